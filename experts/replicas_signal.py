"""How many replicas of a server are wanted: told as it is, whoever then starts and stops them."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from agora.scheduling.scaling import Observation, ScalingState, Targets, decide
from experts.vllm_metrics import Seconds

WINDOW_S: Final = 60.0
"""Seconds for which a time to the first token counts as recent: shorter than a scale-down's patience, and long enough
that a server with one request a second is judged by more than a handful."""

MAX_TIMES: Final = 2_048
"""Times kept at most: 34 requests a second over the whole window; of more the latest count."""

QUANTILE: Final = 0.9
"""Nine of ten first tokens are to come within the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What an autoscaler needs to know of a server.

    Attributes:
        wanted: Replicas wanted.
        up: Replicas that take requests; None where others start and stop them.
        starting: Replicas on their way; None likewise.
        draining: Replicas that end their last requests; None likewise.
        requests: Requests running and waiting, on all together.
        ttft_s: Recent time to the first token, in seconds; None if there was none of late.
        why: Why so many are wanted.
    """

    wanted: int
    up: int | None = None
    starting: int | None = None
    draining: int | None = None
    requests: int = 0
    ttft_s: float | None = None
    why: str = ""


class FirstTokens:
    """Times to the first token of the last minute."""

    def __init__(self) -> None:
        self._times: deque[tuple[float, float]] = deque(maxlen=MAX_TIMES)

    def saw(self, at: float, seconds: float) -> None:
        """Takes note of one."""
        if seconds >= 0 and math.isfinite(seconds):
            self._times.append((at, seconds))

    def recent(self, now: float) -> float | None:
        """The 90th percentile; None if there was none of late."""
        while self._times and self._times[0][0] <= now - WINDOW_S:
            self._times.popleft()
        if not self._times:
            return None
        ordered = sorted(seconds for _, seconds in self._times)
        return ordered[min(math.ceil(QUANTILE * len(ordered)), len(ordered)) - 1]


class Watch:
    """Looks at a server that others start and stop, and tells how many replicas of it are wanted.

    How many there are is not known: it is taken to be as many as were wanted last.

    Args:
        targets: What is aimed at.
    """

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._state = ScalingState(wanted=targets.least)
        self._before: Seconds | None = None
        self._ttft: tuple[float, float] | None = None

    def look(self, at: float, requests: int, first_token: Seconds | None) -> Signal:
        """Takes note of what is seen now.

        Args:
            at: Seconds on a clock that does not go back.
            requests: Requests running and waiting there.
            first_token: The server's histogram of times to the first token since it started, if it tells one.
        """
        if first_token is not None:
            recent = _since(self._before, first_token)
            self._before = first_token
            if recent is not None:
                self._ttft = at, recent
        ttft = None if self._ttft is None or at - self._ttft[0] > WINDOW_S else self._ttft[1]
        seen = Observation(at=at, requests=float(requests), ttft_s=ttft)
        self._state, wanted, why = decide(self._state, seen, self._targets)
        return Signal(wanted=wanted, requests=requests, ttft_s=ttft, why=why)


def _since(before: Seconds | None, now: Seconds) -> float | None:
    """The 90th percentile of what came since an earlier look; None if nothing did."""
    if before is None or now.count < before.count or len(before.bounds) != len(now.bounds):
        # The first look, or the server was started again: all it tells of is new.
        before = Seconds(count=0.0, total=0.0, bounds=tuple((bound, 0.0) for bound, _ in now.bounds))
    bounds = tuple((b, max(n - o, 0.0)) for (b, n), (_, o) in zip(now.bounds, before.bounds, strict=True))
    new = Seconds(count=now.count - before.count, total=now.total - before.total, bounds=bounds)
    return new.quantile(QUANTILE) if new.bounds else new.mean
