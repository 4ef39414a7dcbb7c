"""What a level may see of what is below it, said in one place; `fed.hierarchy.gate` keeps to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Final

from agora.errors import ConfigError
from fed.aggregate.rule import whole


class View(StrEnum):
    """What an aggregator sees of its children's updates.

    `updates` is each of them, with its norm, its examples and, unless forbidden, its loss. `sums` is the weighted sum
    of several children's updates and the sum of their weights, nothing of any one but that it came. `counts` is how
    many came and of how many examples: no numbers of a model go up, and none come down.
    """

    UPDATES = "updates"
    SUMS = "sums"
    COUNTS = "counts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sees:
    """What an aggregator may see. Whatever this says, it knows its own children, to whom it gives jobs, by name, and
    nobody below them.

    Attributes:
        what: See `View`.
        least: Children in every sum, with `sums`.
        behind: Devices behind every update of an aggregator below: it sends none before so many devices had part in it.
        metrics: Whether training losses are told: a device's own with `updates`, means of a child aggregator's devices.
    """

    what: View = View.UPDATES
    least: int = 1
    behind: int = 1
    metrics: bool = True

    def __post_init__(self) -> None:
        if self.what not in list(View):
            raise ConfigError(f"what is {self.what!r}; allowed: {', '.join(View)}")
        object.__setattr__(self, "what", View(self.what))
        whole("least", self.least, least=1)
        whole("behind", self.behind, least=1)
        if not isinstance(self.metrics, bool):
            raise ConfigError(f"metrics is {self.metrics!r}; it must be true or false")
        if self.what is View.SUMS and self.least < 2:
            raise ConfigError(f"least is {self.least}; a sum that hides what is in it has 2 updates at least")
        if self.what is not View.SUMS and self.least != 1:
            raise ConfigError(f"least is {self.least} without sums", hint="set what to 'sums', or leave least out")

    @classmethod
    def from_config(cls, body: Mapping[str, Any]) -> Sees:
        """From a table of a configuration file.

        Raises:
            ConfigError: If a key or a value is not allowed.
        """
        known = [f.name for f in fields(cls)]
        if wrong := sorted(set(body) - set(known)):
            raise ConfigError(f"{wrong[0]!r} is no setting of what a level sees; allowed: {', '.join(known)}")
        return cls(**body)

    def to_json(self) -> dict[str, Any]:
        """As `from_config` reads it."""
        return {"what": str(self.what), "least": self.least, "behind": self.behind, "metrics": self.metrics}


EVERYTHING: Final = Sees()
"""What a flat server sees."""
