"""Who has come to disagree with its cluster: told by the size and the direction of its updates.

Neither proves that a client belongs elsewhere, so a client that disagrees is only asked to introduce itself again. One
that comes back to the same cluster has raised a false alarm, and is left alone for twice as long each time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

JUMP: Final = 1.6
"""An update so many times as long as the client's usual ones disagrees. Chosen, not tuned: a false alarm costs a
client a few updates of the one model, and a change of labels makes updates several times as long."""

TOWARDS: Final = 0.3
"""An update whose cosine with the way to another cluster's model is above this disagrees. Chosen, not tuned."""

PATIENCE: Final = 2
"""Updates in a row that must disagree: one may be chance."""

SETTLE: Final = 3
"""Updates of a cluster's model by which a client's usual length is learned, before it is judged."""

SLOW: Final = 0.2
"""What an update adds to the usual length: about the last 5 count."""


@dataclass(slots=True)
class Watched:
    """A client among its cluster.

    Attributes:
        usual: log of the usual length of its updates.
        updates: So many since it came to this cluster.
        disagree: The last so many in a row disagreed.
        calm: Updates that must come before it is judged.
    """

    usual: float = 0.0
    updates: int = 0
    disagree: int = 0
    calm: int = SETTLE


@dataclass(slots=True)
class Watch:
    """Over all clients that are in clusters.

    Attributes:
        jump: See `JUMP`.
        towards: See `TOWARDS`.
        patience: See `PATIENCE`.
    """

    jump: float = JUMP
    towards: float = TOWARDS
    patience: int = PATIENCE
    _of: dict[str, Watched] = field(default_factory=dict)

    def enters(self, client: str, *, back: bool = False) -> None:
        """A client comes to a cluster; `back` if that is where it was before it was asked to introduce itself."""
        old = self._of.get(client)
        calm = 2 * max(old.calm, SETTLE) if back and old is not None else SETTLE
        self._of[client] = Watched(calm=calm)

    def see(self, client: str, length: float, pull: float) -> bool:
        """Looks at an update of the client's own cluster.

        Args:
            client: Whose.
            length: Its norm.
            pull: The largest cosine between it and the way to another cluster's model.

        Returns:
            Whether the client has come to disagree.
        """
        one = self._of.setdefault(client, Watched())
        one.updates += 1
        told = math.log(max(length, 1e-30))
        if one.updates == 1:
            one.usual = told
        wrong = told - one.usual > math.log(self.jump) or pull > self.towards
        judged = one.updates > one.calm
        one.disagree = one.disagree + 1 if wrong and judged else 0
        if not (wrong and judged):
            one.usual += SLOW * (told - one.usual)
        return one.disagree >= self.patience

    def leaves(self, client: str) -> None:
        """A client is no longer in its cluster; how calm it was is remembered."""
        if client in self._of:
            self._of[client].disagree = 0

    def save(self) -> dict[str, list[Any]]:
        """All of it, fit for JSON."""
        return {name: [w.usual, w.updates, w.disagree, w.calm] for name, w in self._of.items()}

    def load(self, saved: dict[str, list[Any]]) -> None:
        """Goes on from what `save` told."""
        self._of = {name: Watched(*values) for name, values in saved.items()}
