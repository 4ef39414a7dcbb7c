"""Recorded bandwidth over time, and exactly how long a transfer takes under it."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

from agora.errors import InvalidRequest

MEGABIT_BYTES: Final = 125_000
"""Bytes in a megabit."""


class Trace:
    """Bandwidth as a step function of time: each value holds until the next one.

    After its end a trace begins again, as mahimahi's link shells do (Netravali et al., ATC 2015), so a long run may
    play a short one; its first time need not be 0.

    Args:
        times_s: When each value begins, rising; seconds.
        mbps: The values, megabits per second ≥ 0.
        end_s: When the last value ends; absent for as long after its begin as the one before it.
        name: What to call it in errors.

    Raises:
        InvalidRequest: If there are no values, they do not rise in time, or one is negative, NaN or infinite.
    """

    def __init__(
        self, times_s: Sequence[float], mbps: Sequence[float], *, end_s: float | None = None, name: str = "trace"
    ) -> None:
        if len(times_s) != len(mbps) or not times_s:
            raise InvalidRequest(
                f"{name}: {len(times_s)} times and {len(mbps)} values; there must be as many, and some"
            )
        if end_s is None:
            end_s = times_s[-1] + (times_s[-1] - times_s[-2] if len(times_s) > 1 else 1.0)
        edges = [*times_s, end_s]
        for before, after in itertools.pairwise(edges):
            if not (math.isfinite(before) and math.isfinite(after) and before < after):
                raise InvalidRequest(f"{name}: {after} s follows {before} s; times must rise")
        for value in mbps:
            if not (value >= 0 and math.isfinite(value)):
                raise InvalidRequest(f"{name}: {value} Mbit/s; it must be a number ≥ 0")
        self.name = name
        self._start = float(times_s[0])
        self._edges = [t - self._start for t in edges]
        self._mbps = [float(m) for m in mbps]
        self._moved = [0.0]  # Bytes from the start to each edge.
        for i, rate in enumerate(self._mbps):
            self._moved.append(self._moved[-1] + rate * MEGABIT_BYTES * (self._edges[i + 1] - self._edges[i]))

    @property
    def start_s(self) -> float:
        """When it begins."""
        return self._start

    @property
    def end_s(self) -> float:
        """When it ends, and begins again."""
        return self._start + self._edges[-1]

    @property
    def mbps(self) -> tuple[float, ...]:
        """Its values."""
        return tuple(self._mbps)

    @property
    def times_s(self) -> tuple[float, ...]:
        """When each of them begins."""
        return tuple(self._start + t for t in self._edges[:-1])

    def at(self, t: float) -> float:
        """The bandwidth at a time, megabits per second."""
        return self._mbps[self._step(self._within(t)[1])]

    def next_change(self, t: float) -> float:
        """The first time after `t` at which a value begins (be it the same again)."""
        rounds, within = self._within(t)
        following = self._start + rounds * self._edges[-1] + self._edges[self._step(within) + 1]
        return following if following > t else math.nextafter(t, math.inf)

    def moved(self, start: float, end: float) -> float:
        """Bytes that can be moved between two times; 0 if `end` is not after `start`."""
        return max(self._upto(end) - self._upto(start), 0.0) if end > start else 0.0

    def transfer_s(self, start: float, size: float) -> float:
        """How long moving so many bytes takes from `start` on, across changes and gaps.

        Args:
            start: When it begins.
            size: Bytes.

        Returns:
            Seconds; 0 for nothing to move, infinite if the trace is zero throughout.
        """
        if size <= 0:
            return 0.0
        whole = self._moved[-1]
        if whole <= 0:
            return math.inf
        within = self._within(start)[1]
        i = self._step(within)
        goal = self._moved[i] + self._mbps[i] * MEGABIT_BYTES * (within - self._edges[i]) + size
        # Never a boundary with nothing left to move after it: of the last byte, the step in which it moves is meant.
        more = max(math.ceil(goal / whole) - 1, 0)
        rest = goal - more * whole
        if rest <= 0 and more:  # Rounding: it is the last byte of the round before.
            more, rest = more - 1, whole
        j = self._last_before(rest)
        end = self._edges[j] + (rest - self._moved[j]) / (self._mbps[j] * MEGABIT_BYTES)
        return max(more * self._edges[-1] + end - within, 0.0)

    def _last_before(self, goal: float) -> int:
        """The step in which so many bytes from the start are reached."""
        low, high = 0, len(self._mbps)
        while low < high:
            middle = (low + high) // 2
            if self._moved[middle + 1] < goal:
                low = middle + 1
            else:
                high = middle
        j = min(low, len(self._mbps) - 1)
        while self._mbps[j] == 0 and j > 0:  # Rounding may put the goal a hair above the last byte there is.
            j -= 1
        return j

    def _upto(self, t: float) -> float:
        rounds, within = self._within(t)
        i = self._step(within)
        return rounds * self._moved[-1] + self._moved[i] + self._mbps[i] * MEGABIT_BYTES * (within - self._edges[i])

    def _within(self, t: float) -> tuple[int, float]:
        """How often it has begun again by a time, and the time since then."""
        rounds = math.floor((t - self._start) / self._edges[-1])
        return rounds, min(max(t - self._start - rounds * self._edges[-1], 0.0), self._edges[-1])

    def _step(self, within: float) -> int:
        return min(bisect_right(self._edges, within) - 1, len(self._mbps) - 1)
