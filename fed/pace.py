"""How fast a federation goes: how many jobs run at once, when a version is made, and how long is waited for whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, Self

from agora.errors import ConfigError
from fed.staleness import Discount, discount

TIMEOUT_S: Final = 600.0
"""Seconds after which a job is written off: 10 minutes, several times what the jobs of a phone or a small server take
with adapters of a few MB; those who know their clients say less."""

GIVE_UP: Final = 8
"""Lost jobs in a row after which a client counts as dead. One that loses every tenth by chance has that once in 10⁸."""

REST_MAX_S: Final = 3600.0
"""Longest rest of a client that lost its last jobs: one that works again is found within the hour."""

SHARE_WINDOW: Final = 64
"""Updates looked back at for the share of one client: several times the buffers that are usual (4 to 16)."""

DEFAULT_SHARE: Final = 8
"""Jobs under way for every update of a buffer, by default: 2 updates of 16 jobs were faster than 4 in
`benchmarks.fed_speed`, since less of what is sent out is stale. Two updates at least, however few jobs there are: one
alone has all the weight of its version, whatever number of examples stands behind it."""

DEFAULT_DISCOUNT_A: Final = 0.25
"""Exponent of the staleness discount, by default: half that of FedAsync and FedBuff, since the same delay counts as
more versions where buffers are small. Chosen on the tuning seeds of `benchmarks.fed_speed`; on the reported ones 0.5
was from equally fast to a quarter slower."""

BALANCE_MOST: Final = 8.0
"""Most that balancing multiplies or divides a client's steps by: a client of a step or two learns nothing, and one
with far more steps than the others drifts away from them."""


class Weighting(StrEnum):
    """What an update weighs before staleness."""

    EXAMPLES = "examples"
    EQUAL = "equal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a server goes about it. With several models, each has its own cohort, buffer and deadline.

    Attributes:
        cohort: Jobs running at once, per model.
        over_select: In lockstep, so many times as many clients are asked as updates are waited for; the late ones are
            told to stop (Bonawitz et al. 2019, arXiv 1902.01046).
        buffer: K, updates that make a version (FedBuff, Nguyen et al. 2022, arXiv 2106.06639); 1 is fully asynchronous.
        deadline_s: Seconds after the last version, or the start of a round, when one is made of what is there; None
            waits for the whole buffer.
        least: Fewest updates that make a version then.
        lockstep: Jobs are given out only when a version was made, and none outlives its round: federated averaging.
        max_staleness: Updates that more versions have overtaken are refused, and their jobs stopped; None takes all.
        job_timeout_s: Seconds after which a job is written off and its place given to another client.
        share_cap: Most share of the weight that one client may have among the last `share_window` updates of a model.
            Weights above are scaled down to it, exactly over that window; nobody is left out, so with n clients in the
            window the cap is never under 1/n.
        share_window: Updates looked back at for that.
        weighting: What an update weighs: the examples its client trains on, or the same for all.
        discount: Name of what staleness does to the weight (`fed.staleness.DISCOUNTS`).
        discount_a: Its parameter a; None for that of the paper.
        discount_b: Its parameter b, of the hinge.
        steps: Local steps of a job; None for the client's own setting.
        balanced: Steps by profile, so that all jobs take equally long: `steps` for a client of (geometric) mean speed.
        publications: Versions after which the run ends, of all models together.
        jobs: Jobs after which none is given out.
        seconds: When the run ends, on the driver's clock, from its beginning.
        rest_s: Shortest rest of a client that lost two jobs in a row. It rests as long as the lost job took, and twice
            as long with every further loss.
        rest_max_s: Longest rest.
        give_up: Lost jobs in a row after which a client counts as dead. If all do, the run ends.
        linger_s: Seconds to wait for clients where none is there.
        gather_s: Seconds to wait for more clients before the first jobs of a model are given out to fewer than wanted.
    """

    cohort: int = 16
    over_select: float = 1.0
    buffer: int = 4
    deadline_s: float | None = None
    least: int = 1
    lockstep: bool = False
    max_staleness: int | None = None
    job_timeout_s: float = TIMEOUT_S
    share_cap: float = 1.0
    share_window: int = SHARE_WINDOW
    weighting: Weighting = Weighting.EXAMPLES
    discount: str = "polynomial"
    discount_a: float | None = None
    discount_b: float | None = None
    steps: int | None = None
    balanced: bool = False
    publications: int | None = None
    jobs: int | None = None
    seconds: float | None = None
    rest_s: float = 1.0
    rest_max_s: float = REST_MAX_S
    give_up: int = GIVE_UP
    linger_s: float = 600.0
    gather_s: float = 0.0

    def __post_init__(self) -> None:
        for name, (allowed, holds) in _RULES.items():
            value = getattr(self, name)
            if not (value is None and name in _OPTIONAL) and not holds(value):
                raise ConfigError(f"{name} is {value!r}; it must be {allowed}")
        if self.weighting not in list(Weighting):
            raise ConfigError(f"weighting is {self.weighting!r}; allowed: {', '.join(Weighting)}")
        _discount(self.discount, self.discount_a, self.discount_b)
        if self.over_select > 1 and not self.lockstep:
            raise ConfigError(
                f"over_select is {self.over_select} without lockstep", hint="ask for a larger cohort instead"
            )
        if self.lockstep and self.buffer > self.wanted:
            raise ConfigError(
                f"buffer is {self.buffer}; in lockstep at most {self.wanted} updates can come in a round",
                hint="take a larger cohort, or a smaller buffer",
            )
        if self.share_cap < 1 and self.buffer == 1:
            raise ConfigError(
                f"share_cap is {self.share_cap} with a buffer of 1: an update alone has all the weight of its version",
                hint="take a buffer of 2 or more",
            )
        if self.least > self.buffer:
            raise ConfigError(f"least is {self.least}, more than the buffer of {self.buffer}")
        if self.balanced and self.steps is None:
            raise ConfigError("balanced needs steps: those of a client of mean speed", hint="set steps")
        if self.rest_max_s < self.rest_s:
            raise ConfigError(f"rest_max_s is {self.rest_max_s}, less than rest_s, {self.rest_s}")

    @property
    def wanted(self) -> int:
        """Jobs to have running, per model."""
        return math.ceil(round(self.cohort * self.over_select, 6))

    @property
    def discounts(self) -> Discount:
        """What staleness does to the weight."""
        return _discount(self.discount, self.discount_a, self.discount_b)

    @classmethod
    def synchronous(
        cls, cohort: int, *, over_select: float = 1.0, deadline_s: float | None = None, **others: Any
    ) -> Self:
        """Federated averaging (McMahan et al. 2017, arXiv 1602.05629), with over-selection or a deadline."""
        return cls(
            cohort=cohort, buffer=cohort, over_select=over_select, deadline_s=deadline_s, lockstep=True, **others
        )

    @classmethod
    def fedbuff(cls, concurrency: int, k: int, **others: Any) -> Self:
        """FedBuff (Nguyen et al. 2022, arXiv 2106.06639): weights by 1/√(1+τ), a version of every K updates."""
        return cls(cohort=concurrency, buffer=k, **others)

    @classmethod
    def fedasync(cls, concurrency: int, **others: Any) -> Self:
        """FedAsync (Xie, Koyejo and Gupta 2019, arXiv 1903.03934): every update makes a version."""
        return cls(cohort=concurrency, buffer=1, **others)

    @classmethod
    def default(cls, concurrency: int, **others: Any) -> Self:
        """agora's own: buffered, an eighth of the jobs under way making a version (`DEFAULT_SHARE`), or two updates."""
        settings: dict[str, Any] = {
            "cohort": concurrency,
            "buffer": min(concurrency, max(2, concurrency // DEFAULT_SHARE)),
        }
        if "discount" not in others:
            settings["discount_a"] = DEFAULT_DISCOUNT_A
        return cls(**{**settings, **others})

    def but(self, **changes: Any) -> Self:
        """The same with something changed."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"weighting": str(self.weighting)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Reads what `to_json` wrote, or a table of a configuration file.

        Raises:
            ConfigError: If a key or a value is not allowed.
        """
        known = {f.name for f in fields(cls)}
        if wrong := sorted(set(body) - known):
            raise ConfigError(f"{wrong[0]!r} is no setting of the pace; allowed: {', '.join(sorted(known))}")
        weighting = body.get("weighting", Weighting.EXAMPLES)
        if weighting not in list(Weighting):
            raise ConfigError(f"weighting is {weighting!r}; allowed: {', '.join(Weighting)}")
        return cls(**{**body, "weighting": Weighting(weighting)})


PRESETS: Final[Mapping[str, Callable[..., Pace]]] = MappingProxyType(
    {
        "default": Pace.default,
        "synchronous": Pace.synchronous,
        "fedbuff": Pace.fedbuff,
        "fedasync": Pace.fedasync,
    }
)
"""By name, for configuration files: each takes the number of jobs at once first."""


@lru_cache(maxsize=32)
def _discount(name: str, a: float | None, b: float | None) -> Discount:
    given = {"a": a, "b": b}
    return discount(name, **{key: value for key, value in given.items() if value is not None})


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _real(value: Any, least: float, *, above: bool = False) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return False
    return value > least if above else value >= least


_COUNT: Final = ("a whole number from 1", lambda v: _whole(v, 1))
_SECONDS: Final = ("a number above 0", lambda v: _real(v, 0, above=True))
_WAIT: Final = ("a number from 0", lambda v: _real(v, 0))
_YES_NO: Final = ("true or false", lambda v: isinstance(v, bool))

_RULES: Final[Mapping[str, tuple[str, Callable[[Any], bool]]]] = MappingProxyType(
    {
        "cohort": _COUNT,
        "over_select": ("a number from 1", lambda v: _real(v, 1)),
        "buffer": _COUNT,
        "deadline_s": _SECONDS,
        "least": _COUNT,
        "lockstep": _YES_NO,
        "max_staleness": ("a whole number from 0", lambda v: _whole(v, 0)),
        "job_timeout_s": _SECONDS,
        "share_cap": ("above 0 and at most 1", lambda v: _real(v, 0, above=True) and v <= 1),
        "share_window": _COUNT,
        "steps": _COUNT,
        "balanced": _YES_NO,
        "publications": _COUNT,
        "jobs": _COUNT,
        "seconds": _SECONDS,
        "rest_s": _WAIT,
        "rest_max_s": _WAIT,
        "give_up": _COUNT,
        "linger_s": _WAIT,
        "gather_s": _WAIT,
    }
)
"""What each setting may be."""

_OPTIONAL: Final = frozenset({"deadline_s", "max_staleness", "steps", "publications", "jobs", "seconds"})
"""Settings that may be None."""
