"""How many replicas of a server there should be, by its queue and by the time to the first token.

A pure state machine: `decide` is told what is observed, some times a minute, and says how many replicas it wants. It
starts and stops nothing; see `experts.replicas` for that, or hand the number to an autoscaler.

What is asked for follows the rule of Kubernetes' HorizontalPodAutoscaler: as many replicas as bring what is observed
per replica to its target. That alone flaps, so there are three brakes. A *dead band* around the targets: more are
wanted only above (1 + band)·target, fewer only if what is left would stay below (1 - band)·target. *Patience*: fewer
(more) are wanted only if fewer (more) would have been right all the while for some time. And a *cool-down* after every
change, in which what was changed shows its effect.

A load that stays within ±band of some level never makes it change its mind twice: to go up, the load per replica must
have been above (1 + band) times the target; to come back, below (1 - band) times it with one replica fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from agora.errors import InvalidRequest

MAX_SAMPLES: Final = 512
"""Looks that are remembered: at one every two seconds more than a quarter of an hour, three times the default patience.
Of more than that, every second one is forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What is aimed at, and how patiently.

    Attributes:
        least: Least replicas.
        most: Most replicas.
        queue: Requests per replica, running and waiting together, that are aimed at. 16 were seen to get 6 times the
            throughput of one from a small model on 2 CPU cores (77 tokens a second against 12).
        ttft_s: Seconds to the first token that are aimed at; None for any.
        band: Half-width of the dead band, as a share of the targets. The HorizontalPodAutoscaler's tolerance is 0.1;
            queues are noisier than processor loads.
        up_after_s: Seconds for which more must have been right.
        down_after_s: Seconds for which fewer must have been right: five minutes, as in the HorizontalPodAutoscaler.
        cooldown_s: Seconds after a change without another. To be no shorter than a replica takes to start: until then
            the queue tells nothing of what was changed.
        step_up: Most replicas more at once.
        step_down: Most replicas fewer at once.

    Raises:
        InvalidRequest: If a number is out of range.
    """

    least: int = 1
    most: int = 4
    queue: float = 16.0
    ttft_s: float | None = None
    band: float = 0.2
    up_after_s: float = 10.0
    down_after_s: float = 300.0
    cooldown_s: float = 60.0
    step_up: int = 2
    step_down: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise InvalidRequest(f"least is {self.least} and most is {self.most} replicas; allowed: 1 ≤ least ≤ most")
        if not (self.queue > 0 and math.isfinite(self.queue)):
            raise InvalidRequest(f"queue is {self.queue}; it must be a number of requests > 0")
        if self.ttft_s is not None and not (self.ttft_s > 0 and math.isfinite(self.ttft_s)):
            raise InvalidRequest(f"ttft_s is {self.ttft_s}; it must be a number of seconds > 0, or absent")
        if not 0 <= self.band < 1:
            raise InvalidRequest(f"band is {self.band}; allowed: 0 to below 1")
        for name in ("up_after_s", "down_after_s", "cooldown_s"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise InvalidRequest(f"{name} is {value}; it must be a number of seconds ≥ 0")
        if self.step_up < 1 or self.step_down < 1:
            raise InvalidRequest(f"step_up is {self.step_up}, step_down {self.step_down}; both must be ≥ 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What is seen at a moment.

    Attributes:
        at: Seconds on a clock that does not go back.
        requests: Requests running and waiting, on all replicas together.
        ttft_s: Recent time to the first token in seconds; None if there was none of late.

    Raises:
        InvalidRequest: If a number is negative, NaN or infinite.
    """

    at: float
    requests: float
    ttft_s: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.at):
            raise InvalidRequest(f"at is {self.at}; it must be a number of seconds")
        for name in ("requests", "ttft_s"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise InvalidRequest(f"{name} is {value}; it must be a number ≥ 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What was right at a moment: at least `low` replicas, and no more than `high`."""

    at: float
    low: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingState:
    """What is remembered between two looks.

    Attributes:
        wanted: Replicas wanted.
        changed_at: When that changed last; None for never.
        samples: What was right of late, oldest first.
    """

    wanted: int
    changed_at: float | None = None
    samples: tuple[Sample, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the samples."""
        return {"wanted": self.wanted, "changed_at": self.changed_at}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ScalingState:
        """Reads what `to_dict` wrote."""
        return cls(wanted=plain["wanted"], changed_at=plain["changed_at"])


def decide(state: ScalingState, seen: Observation, targets: Targets) -> tuple[ScalingState, int, str]:
    """One look: what is remembered now, how many replicas are wanted, and why.

    A clock that went back is taken to stand still, and what was remembered of the time that then has not been yet is
    forgotten.
    """
    now = seen.at
    wanted = min(max(state.wanted, targets.least), targets.most)
    if wanted != state.wanted:
        why = f"{targets.least} to {targets.most} are allowed"
        return ScalingState(wanted=wanted, changed_at=now), wanted, why
    low, high = _right(wanted, seen, targets)
    past = [s for s in state.samples if s.at <= now]
    changed_at = None if state.changed_at is None else min(state.changed_at, now)
    samples = _kept((*past, Sample(at=now, low=low, high=high)), now, targets)
    still = replace(state, changed_at=changed_at, samples=samples)
    up = _throughout(samples, now, targets.up_after_s, lambda window: min(s.low for s in window))
    down = _throughout(samples, now, targets.down_after_s, lambda window: max(s.high for s in window))
    if up is not None and up > wanted:
        new = min(up, wanted + targets.step_up)
    elif down is not None and down < wanted:
        new = max(down, wanted - targets.step_down)
    else:
        return still, wanted, _steady(wanted, low, high, targets)
    if changed_at is not None and now - changed_at < targets.cooldown_s:
        left = targets.cooldown_s - (now - changed_at)
        return still, wanted, f"{new} would be right, but the last change is too recent: {left:.0f} s left"
    # The samples are kept: they say how many replicas were right, whatever there were. But what was said with regard to
    # the time to the first token was said for another number of them.
    kept = samples if targets.ttft_s is None else ()
    return ScalingState(wanted=new, changed_at=now, samples=kept), new, _why(seen, wanted, new, targets)


def _right(replicas: int, seen: Observation, targets: Targets) -> tuple[int, int]:
    """The fewest replicas that are enough at the upper edge of the dead band, and at the lower one."""
    # Rounding must not make a replica more of 32.000000000000004/16.
    low = math.ceil(seen.requests / (targets.queue * (1 + targets.band)) - 1e-9)
    high = math.ceil(seen.requests / (targets.queue * (1 - targets.band)) - 1e-9)
    # A replica that answers one request at a time is as quick as it gets: another one would not help.
    if targets.ttft_s is not None and seen.ttft_s is not None and seen.requests > replicas:
        share = seen.ttft_s / targets.ttft_s
        if share > 1 + targets.band:
            low = max(low, math.ceil(replicas * min(share, float(targets.most)) / (1 + targets.band) - 1e-9))
        # With one fewer each gets so much more to do.
        if replicas > 1 and share * replicas / (replicas - 1) > 1 - targets.band:
            high = max(high, replicas)
    low = min(max(low, targets.least), targets.most)
    return low, min(max(high, low), targets.most)


def _kept(samples: tuple[Sample, ...], now: float, targets: Targets) -> tuple[Sample, ...]:
    """Those that still count: within the longer patience, and the last one before it."""
    begins = now - max(targets.up_after_s, targets.down_after_s)
    before = [n for n, s in enumerate(samples) if s.at <= begins]
    samples = samples[before[-1] if before else 0 :]
    # Every second one, but neither the first nor the last: they say how far back it is known.
    return samples if len(samples) <= MAX_SAMPLES else (*samples[:-1:2], samples[-1])


def _throughout(
    samples: tuple[Sample, ...], now: float, seconds: float, of: Callable[[tuple[Sample, ...]], int]
) -> int | None:
    """What was right all the while; None if that is not known for so long."""
    begins = now - seconds
    if samples[0].at > begins:
        return None
    # The last one before it counts too: it was what was known when it began.
    first = max(n for n, s in enumerate(samples) if s.at <= begins)
    return of(samples[first:])


def _steady(wanted: int, low: int, high: int, targets: Targets) -> str:
    if low > wanted:
        return f"{low} would be right, but not yet for {targets.up_after_s:g} s"
    if high < wanted:
        return f"{high} would be enough, but not yet for {targets.down_after_s:g} s"
    return "as many as are right"


def _why(seen: Observation, old: int, new: int, targets: Targets) -> str:
    told = f"{seen.requests / old:.3g} requests per replica, {targets.queue:g} are aimed at"
    if targets.ttft_s is not None and seen.ttft_s is not None:
        told += f"; {seen.ttft_s:.3g} s to the first token, {targets.ttft_s:g} are aimed at"
    return f"{old} → {new}: {told}"
