"""Modelled clients: how fast they compute, how long transfers take, which jobs they lose, when they come and go."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from agora.errors import ConfigError
from fed.draws import bits, normal, of_text, uniform
from fed.state import info_from_json, info_to_json
from fed.words import ClientInfo, Job, Profile

_SPEED, _JITTER, _LOSS, _WHEN, _SILENT, _ORDER = range(1, 7)
"""What is drawn, so that draws differ."""


def constant(n: int, seed: int) -> list[float]:
    """All are equally fast."""
    return [1.0] * n


def lognormal(n: int, seed: int, *, sigma: float = 1.0) -> list[float]:
    """Factor exp(σ·z), z standard normal: the median client takes 1.

    Raises:
        ConfigError: If sigma is no number from 0.
    """
    _from_0("sigma", sigma)
    return [math.exp(sigma * normal(seed, i, _SPEED)) for i in range(n)]


def tiers(n: int, seed: int, *, factors: Sequence[float] = (1.0, 2.0, 4.0)) -> list[float]:
    """As many clients of each factor, to within one; which client gets which is random.

    Raises:
        ConfigError: If there is no factor, or one is no number above 0.
    """
    if not factors or not all(math.isfinite(f) and f > 0 for f in factors):
        raise ConfigError(f"factors are {list(factors)}; at least one is needed, all above 0")
    order = sorted(range(n), key=lambda i: bits(seed, i, _ORDER))
    found = [0.0] * n
    for place, i in enumerate(order):
        found[i] = float(factors[place % len(factors)])
    return found


SPEEDS: Final[Mapping[str, Callable[..., list[float]]]] = MappingProxyType(
    {"constant": constant, "lognormal": lognormal, "tiers": tiers}
)
"""How many times the usual seconds per step each client takes, by the name of the distribution."""


class Move(StrEnum):
    """What may happen to a client: it joins, leaves and says so, or dies and does not."""

    JOINS = "joins"
    LEAVES = "leaves"
    DIES = "dies"


@dataclass(frozen=True, slots=True)
class Change:
    """When something happens to a client, in seconds."""

    at: float
    client: str
    what: Move


@dataclass(frozen=True, slots=True, kw_only=True)
class Journey:
    """What becomes of a job, without its way back.

    Attributes:
        computed_s: Seconds from its assignment until its steps are done.
        lost_s: Seconds until it comes to nothing; None if it does not.
        silent: Whether nobody is told of that.
    """

    computed_s: float
    lost_s: float | None
    silent: bool


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Clients and links, as the simulator models them.

    A transfer of n bytes takes half a round trip and n over the bandwidth; links are not shared. A job that is lost is
    so at a random moment before its steps are done, so a lost job never costs real training.

    Attributes:
        clients: Who there is, their speed and links in their profiles.
        jitter: σ of a lognormal factor (median 1) on the compute time of each single job.
        loss: Probability that a job comes to nothing.
        loss_of: The same by client, where it is another.
        silent: Share of lost jobs that nobody tells the server of.
        changes: Who comes and goes. A client that first joins is absent until then, all others are there from the
            beginning. One that has died loses its job silently, and all that it is given, until it joins again.
        seed: Of all that is drawn.
    """

    clients: tuple[ClientInfo, ...]
    jitter: float = 0.0
    loss: float = 0.0
    loss_of: Mapping[str, float] = field(default_factory=dict)
    silent: float = 0.0
    changes: tuple[Change, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        names = [c.name for c in self.clients]
        if len(set(names)) != len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise ConfigError(f"client {twice[0]!r} is there twice; names must be unique")
        _from_0("jitter", self.jitter)
        for name, value in (("loss", self.loss), ("silent", self.silent), *self.loss_of.items()):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}; a probability is from 0 to 1")
        known = set(names)
        if wrong := sorted({*self.loss_of, *(c.client for c in self.changes)} - known):
            raise ConfigError(f"client {wrong[0]!r} is not in the fleet")
        for change in self.changes:
            _from_0(f"the time when {change.client!r} {change.what}", change.at)
        for client in self.clients:
            _check_profile(client)

    def late(self) -> frozenset[str]:
        """Clients that are not there at the beginning."""
        first: dict[str, Change] = {}
        for change in sorted(self.changes, key=lambda c: c.at):
            first.setdefault(change.client, change)
        return frozenset(name for name, change in first.items() if change.what is Move.JOINS)

    def journey(self, info: ClientInfo, job: Job, *, steps: int, down_bytes: int) -> Journey:
        """What becomes of a job; the same whenever it is asked."""
        key = of_text(info.name)
        seconds = steps * info.profile.seconds_per_step
        if self.jitter:
            seconds *= math.exp(self.jitter * normal(self.seed, job.id, key, _JITTER))
        seconds += _transfer(down_bytes, info.profile.down_bytes_per_s, info.profile.round_trip_s)
        loss = self.loss_of.get(info.name, self.loss)
        if not loss or uniform(self.seed, job.id, key, _LOSS) >= loss:
            return Journey(computed_s=seconds, lost_s=None, silent=False)
        silent = bool(self.silent) and uniform(self.seed, job.id, key, _SILENT) < self.silent
        lost = seconds * uniform(self.seed, job.id, key, _WHEN)
        return Journey(computed_s=seconds, lost_s=lost, silent=silent)

    def way_back(self, info: ClientInfo, up_bytes: int) -> float:
        """Seconds until an update of so many bytes is at the server."""
        return _transfer(up_bytes, info.profile.up_bytes_per_s, info.profile.round_trip_s)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "clients": [info_to_json(c) for c in self.clients],
            "jitter": self.jitter,
            "loss": self.loss,
            "loss_of": dict(sorted(self.loss_of.items())),
            "silent": self.silent,
            "changes": [[c.at, c.client, str(c.what)] for c in self.changes],
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Fleet:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: If it is something else.
        """
        try:
            return cls(
                **{
                    **body,
                    "clients": tuple(info_from_json(c) for c in body["clients"]),
                    "changes": tuple(Change(at, client, Move(what)) for at, client, what in body["changes"]),
                }
            )
        except (KeyError, TypeError, ValueError) as e:
            raise ConfigError(f"this is no fleet: {type(e).__name__}: {e}") from e


def fleet(
    clients: int | Sequence[ClientInfo],
    *,
    speeds: str = "constant",
    parameters: Mapping[str, Any] | None = None,
    seconds_per_step: float = 1.0,
    up_bytes_per_s: float = math.inf,
    down_bytes_per_s: float = math.inf,
    round_trip_s: float = 0.0,
    seed: int = 0,
    **others: Any,
) -> Fleet:
    """A fleet whose speeds come from a distribution.

    Args:
        clients: Who there is, or how many: then they are named `client-0` and so on. Profiles they have are replaced.
        speeds: Name of the distribution (`SPEEDS`).
        parameters: Its own: `sigma` of the lognormal, `factors` of the tiers.
        seconds_per_step: What its factors are multiplied by.
        up_bytes_per_s: Of every link.
        down_bytes_per_s: Of every link.
        round_trip_s: Of every link.
        seed: Of the speeds, and of what is drawn later.
        others: The other attributes of `Fleet`.

    Raises:
        ConfigError: If there is no distribution of that name, or something is out of range.
    """
    if speeds not in SPEEDS:
        raise ConfigError(f"speeds is {speeds!r}; allowed: {', '.join(sorted(SPEEDS))}")
    given = dict(parameters or {})
    allowed = [p for p in inspect.signature(SPEEDS[speeds]).parameters if p not in ("n", "seed")]
    if wrong := sorted(set(given) - set(allowed)):
        raise ConfigError(f"speeds {speeds!r} has no parameter {wrong[0]!r}; it has {', '.join(allowed) or 'none'}")
    infos = [ClientInfo(name=f"client-{i}") for i in range(clients)] if isinstance(clients, int) else list(clients)
    factors = SPEEDS[speeds](len(infos), seed, **given)
    profiles = (
        Profile(
            seconds_per_step=seconds_per_step * factor,
            up_bytes_per_s=up_bytes_per_s,
            down_bytes_per_s=down_bytes_per_s,
            round_trip_s=round_trip_s,
        )
        for factor in factors
    )
    described = tuple(replace(info, profile=profile) for info, profile in zip(infos, profiles, strict=True))
    return Fleet(clients=described, seed=seed, **others)


def _transfer(size: int, bytes_per_s: float, round_trip_s: float) -> float:
    return round_trip_s / 2 + size / bytes_per_s


def _check_profile(client: ClientInfo) -> None:
    p = client.profile
    for name, value in (("seconds_per_step", p.seconds_per_step), ("round_trip_s", p.round_trip_s)):
        _from_0(f"{name} of {client.name!r}", value)
    for name, value in (("up_bytes_per_s", p.up_bytes_per_s), ("down_bytes_per_s", p.down_bytes_per_s)):
        if not value > 0:
            raise ConfigError(f"{name} of {client.name!r} is {value}; it must be above 0")


def _from_0(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{name} is {value}; it must be a number from 0")
