"""A level of a tree of aggregators: how its aggregators go about it, what they see, and their way up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Final

from agora.errors import ConfigError
from fed.aggregate.rule import whole
from fed.aggregate.rules import RULES
from fed.chain import Chain
from fed.hierarchy.sees import EVERYTHING, Sees, View
from fed.pace import PRESETS, Pace

_NEEDS: Final[Mapping[str, tuple[str, ...]]] = {"fedbuff": ("cohort", "buffer")}
"""Settings that a preset has no default for, in the order in which it takes them; `cohort` alone for the others."""


class Orphans(StrEnum):
    """What devices do while their aggregator is gone: go to another one of its level under the same parent, go to the
    parent, or wait. They are back with it as soon as it is. Where there is nobody to go to, they wait.

    What coding dropped of their updates to an aggregator (error feedback) they keep for that aggregator.
    """

    SIBLING = "sibling"
    PARENT = "parent"
    WAIT = "wait"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """An aggregator's link to the one above.

    Attributes:
        up_bytes_per_s: Towards it.
        down_bytes_per_s: From it.
        round_trip_s: Of the link.
        loss: Probability that an update sent up is lost on its way.
    """

    up_bytes_per_s: float = math.inf
    down_bytes_per_s: float = math.inf
    round_trip_s: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        for name in ("up_bytes_per_s", "down_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not (math.isfinite(self.round_trip_s) and self.round_trip_s >= 0):
            raise ConfigError(f"round_trip_s is {self.round_trip_s}; it must be a number from 0")
        if not 0 <= self.loss <= 1:
            raise ConfigError(f"loss is {self.loss}; a probability is from 0 to 1")

    @classmethod
    def from_config(cls, body: Mapping[str, Any]) -> Link:
        """From a table of a configuration file, or what `to_json` made.

        Raises:
            ConfigError: If a key or a value is not allowed.
        """
        known = [f.name for f in fields(cls)]
        if wrong := sorted(set(body) - set(known)):
            raise ConfigError(f"{wrong[0]!r} is no setting of a link; allowed: {', '.join(known)}")
        try:
            return cls(**{name: float(value) for name, value in body.items()})
        except (TypeError, ValueError) as e:
            raise ConfigError(f"a link of {dict(body)!r}: {e}") from e

    def to_json(self) -> dict[str, str]:
        """As JSON; infinite bandwidth, which JSON lacks, as text."""
        return {f.name: str(float(getattr(self, f.name))) for f in fields(self)}


UNLIMITED: Final = Link()
"""A link that takes no time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What the aggregators of a level have in common. Each has its own server, rule and versions.

    Over aggregators, make a version of no more updates (`pace.buffer`) than there are of them: what one of them sends
    is what it has learned since its last update, and several of those in one version are averaged, not added.

    Attributes:
        name: Of the level: `edge`, `cloud`.
        pace: How they go about it. Below the top, an aggregator never ends by itself for want of clients.
        rule: Name of the aggregation rule (`fed.aggregate.rules.RULES`); None for agora's own.
        options: Of the rule.
        sees: What they see of their children.
        chain: What their children's updates go through before they travel; see `fed.simulate.simulate`.
        up: Their link to the level above.
        every: Versions that they make between two updates sent up: κ₂ of hierarchical federated averaging.
        orphans: What devices do whose aggregator of this level is gone.
    """

    name: str
    pace: Pace
    rule: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    sees: Sees = EVERYTHING
    chain: Chain | None = None
    up: Link = UNLIMITED
    every: int = 1
    orphans: Orphans = Orphans.WAIT

    def __post_init__(self) -> None:
        whole(f"every of level {self.name!r}", self.every, least=1)
        if self.orphans not in list(Orphans):
            raise ConfigError(f"orphans of level {self.name!r} is {self.orphans!r}; allowed: {', '.join(Orphans)}")
        # Given as a word, it must be the word's own object, too.
        object.__setattr__(self, "orphans", Orphans(self.orphans))
        if self.rule is not None and self.rule not in RULES:
            raise ConfigError(f"rule of level {self.name!r} is {self.rule!r}; allowed: {', '.join(sorted(RULES))}")
        if self.sees.what is View.SUMS:
            self._check_sums()

    def _check_sums(self) -> None:
        if self.pace.buffer < self.sees.least:
            raise ConfigError(
                f"level {self.name!r} sees only sums of {self.sees.least} updates or more, and makes a version of "
                f"{self.pace.buffer}",
                hint=f"set buffer to {self.sees.least} at least",
            )
        if self.rule not in (None, "mean", "delta", "dense"):
            raise ConfigError(
                f"level {self.name!r} sees only sums, and its rule {self.rule!r} needs single updates",
                hint="take 'mean', 'delta' or 'dense'",
            )
        if self.options.get("remember") or self.options.get("normalise", "weights") != "weights":
            raise ConfigError(
                f"level {self.name!r} sees only sums; its rule can neither remember clients nor count them",
                hint="leave remember and normalise as they are by default",
            )

    @classmethod
    def from_config(cls, name: str, body: Mapping[str, Any]) -> Level:
        """From a table of a configuration file.

        `pace` is a table of `Pace`'s settings, or `preset` with the settings of one (`fed.pace.PRESETS`).

        Raises:
            ConfigError: If a key or a value is not allowed; the text begins with the level.
        """
        known = [f.name for f in fields(cls) if f.name != "name"]
        if wrong := sorted(set(body) - set(known)):
            raise ConfigError(f"level {name!r} has no setting {wrong[0]!r}; allowed: {', '.join(known)}")
        if "pace" not in body:
            raise ConfigError(
                f"level {name!r} has no pace", hint='say for instance pace = {preset = "default", cohort = 4}'
            )
        plain = dict(body)
        try:
            plain["pace"] = _pace(_table(body, "pace"))
            if "sees" in body:
                plain["sees"] = Sees.from_config(_table(body, "sees"))
            if "up" in body:
                plain["up"] = Link.from_config(_table(body, "up"))
            if body.get("chain") is not None:
                plain["chain"] = Chain.from_config(body["chain"])
            plain["options"] = dict(_table(body, "options")) if "options" in body else {}
        except ConfigError as e:
            raise ConfigError(f"level {name!r}: {e.message}", hint=e.hint) from None
        return cls(name=name, **plain)

    def to_json(self) -> dict[str, Any]:
        """As JSON; `from_config` reads it."""
        return {
            "pace": self.pace.to_json(),
            "rule": self.rule,
            "options": dict(self.options),
            "sees": self.sees.to_json(),
            "chain": None if self.chain is None else self.chain.to_json(),
            "up": self.up.to_json(),
            "every": self.every,
            "orphans": str(self.orphans),
        }


def _table(body: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = body[key]
    if not isinstance(found, Mapping):
        raise ConfigError(f"{key} is {found!r}; it must be a table")
    return found


def _pace(body: Mapping[str, Any]) -> Pace:
    if "preset" not in body:
        return Pace.from_json(body)
    plain = dict(body)
    preset = plain.pop("preset")
    if preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}; allowed: {', '.join(PRESETS)}")
    known = {f.name for f in fields(Pace)}
    if wrong := sorted(set(plain) - known):
        raise ConfigError(f"{wrong[0]!r} is no setting of the pace; allowed: {', '.join(sorted(known))}")
    needs = _NEEDS.get(preset, ("cohort",))
    if missing := [name for name in needs if name not in plain]:
        raise ConfigError(f"preset {preset!r} needs {missing[0]!r}")
    first = [plain.pop(name) for name in needs]
    try:
        made = PRESETS[preset](*first, **plain)
    except TypeError as e:
        raise ConfigError(f"preset {preset!r}: {e}", hint="leave out what the preset itself decides") from None
    return Pace.from_json(made.to_json())
