"""What clients' updates of the one model, which all have in common, were like: the frame in which they are compared.

Updates that clients made of different models cannot be compared with each other: near its optimum a cluster's updates
cancel out, and what is left says how its members differ, not what they share. So clients introduce themselves by
updates of the one model that all begin with. At its optimum the updates of all sum to zero, and those of clients who
need different models point away from each other (Sattler, Müller and Samek 2019, arXiv 1910.01991).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fed.adapter import Spec
from fed.aggregate.rule import State
from fed.clusters.similarity import Change, Matrix, gram


@dataclass(slots=True, eq=False)
class Introduction:
    """The running mean of a client's updates of the one model.

    Attributes:
        mean: The mean; None before the first one.
        updates: So many of them, since it began to introduce itself.
    """

    mean: Change | None = None
    updates: int = 0


class Introductions:
    """Of up to `most` clients, each in factors of at most `rank` columns; those longest silent are forgotten first.

    Args:
        memory: Share that is kept of the mean when an update comes. The first updates are averaged alike, so that the
            very first has no more weight than others.
        rank: Columns of the factors of a client.
        most: Clients.
    """

    def __init__(self, *, memory: float, rank: int, most: int) -> None:
        self._memory, self._rank, self._most = memory, rank, most
        self._of: dict[str, Introduction] = {}

    def updates(self, client: str) -> int:
        """Updates since the client began to introduce itself."""
        found = self._of.get(client)
        return found.updates if found is not None else 0

    def known(self) -> list[str]:
        """Clients that there is a mean of, by name."""
        return sorted(name for name, one in self._of.items() if one.mean is not None)

    def add(self, client: str, change: Change) -> None:
        """Takes an update of the one model."""
        one = self._of.pop(client, None) or Introduction()
        self._of[client] = one
        one.updates += 1
        share = max(1.0 / one.updates, 1.0 - self._memory)
        if one.mean is None or one.updates == 1:
            one.mean = change.capped(self._rank)
        else:
            one.mean = one.mean.mixed(change, share, rank=self._rank)
        while len(self._of) > self._most:
            del self._of[next(iter(self._of))]

    def again(self, client: str) -> None:
        """A client begins to introduce itself anew; what it was like counts until its first update comes."""
        if client in self._of:
            self._of[client].updates = 0

    def products(self, clients: Sequence[str]) -> Matrix:
        """Inner products of clients' means, shape (n, n)."""
        return gram([mean for c in clients if (mean := self._of[c].mean) is not None])

    def save(self) -> State:
        """All of it."""
        state = State({}, {"clients": [], "specs": {}})
        for n, (client, one) in enumerate(self._of.items()):
            assert one.mean is not None
            digest = one.mean.spec.digest
            state.facts["specs"].setdefault(digest, one.mean.spec.to_json())
            state.facts["clients"].append([client, one.updates, digest])
            state.arrays.update({f"{n}.{name}": a for name, a in one.mean.save().arrays.items()})
        return state

    def load(self, state: State) -> None:
        """Goes on from what `save` told."""
        specs = {digest: Spec.from_json(body) for digest, body in state.facts["specs"].items()}
        self._of = {}
        for n, (client, updates, digest) in enumerate(state.facts["clients"]):
            part = {k.partition(".")[2]: a for k, a in state.arrays.items() if k.startswith(f"{n}.")}
            self._of[client] = Introduction(Change.load(specs[digest], part), int(updates))
