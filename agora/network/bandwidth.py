"""Bandwidth of a way, from the transfers that were made on it."""

from __future__ import annotations

import math
from typing import Final

from agora.network.ewma import Age, fading

MIN_WEIGHT_S: Final = 0.25
"""Least seconds that a transfer counts for: else a quick one would say next to nothing against a slow one before it. As
long as a short job's transfer over 4G takes, a megabyte at 32 Mbit/s; it was tried with `MAX_WEIGHT_S`."""

MAX_WEIGHT_S: Final = 0.5
"""Most seconds that a transfer counts for: else one long stall would outweigh all that comes after it. On recorded 4G
and 5G a bound of twice the least one had the fewest late jobs."""

STALLED_MBPS: Final = 0.1
"""What a way counts as on which a transfer moved nothing: too slow for anything but text. Of logs a mean is taken,
which a zero would hold down for ever; one so low is outweighed by a few good transfers."""

FASTEST_MBPS: Final = 1e9
"""What a transfer counts as that took no time: a petabit per second, beyond any link, and far from where logs end."""


class Bandwidth:
    """Megabits per second: the geometric mean of recent transfers, each weighed by the seconds it took (within bounds).

    On a scale of factors one bad transfer after good ones is believed at once, and so is a good one after bad ones. A
    transfer broken off counts for what it moved, even if that is nothing.

    Args:
        tau_s: Seconds in which a transfer's weight falls to 1/e.
        prior_s: How many seconds of transfer the configured bandwidth stands for.
    """

    __slots__ = ("_age", "_logs", "_prior_s", "_seconds", "_tau")

    def __init__(self, tau_s: float, prior_s: float) -> None:
        self._tau = tau_s
        self._prior_s = prior_s
        self._logs = 0.0
        self._seconds = 0.0
        self._age = Age()

    def mbps(self, at: float, prior: float | None) -> float | None:
        """The bandwidth now.

        Args:
            at: The time.
            prior: What is configured; None for nothing.

        Returns:
            Megabits per second ≥ 0; None if neither configured nor observed.
        """
        kept = fading(self._age.of(at), self._tau)
        if self._seconds * kept <= 0 or prior == 0:
            return prior
        if prior is None:
            return math.exp(self._logs / self._seconds)
        logs = math.log(prior) * self._prior_s + self._logs * kept
        return math.exp(logs / (self._prior_s + self._seconds * kept))

    def seconds(self, at: float) -> float:
        """How many seconds of transfer it stands on now."""
        return self._seconds * fading(self._age.of(at), self._tau)

    def observe(self, transferred: int, seconds: float, at: float, *, rtt_s: float, prior: float | None) -> bool:
        """Takes in a transfer.

        One that took less than a round trip tells the round trip, not the bandwidth: while TCP opens its window (RFC
        6928: 10 segments, then doubled each round trip) a fast link and a slow one look alike. It is a lower bound, so
        it counts only where it is above what was thought.

        Args:
            transferred: Bytes that arrived.
            seconds: How long that took, without the round trip.
            at: When it ended.
            rtt_s: The round-trip time.
            prior: The configured bandwidth, as for `mbps`.

        Returns:
            Whether it told anything.
        """
        if seconds <= 0:
            return False
        seen = transferred * 8 / 1e6 / seconds
        if seconds < rtt_s and seen <= (self.mbps(at, prior) or 0.0):
            return False
        kept = fading(self._age.touch(at), self._tau)
        weight = min(max(seconds, MIN_WEIGHT_S), MAX_WEIGHT_S)
        self._logs = self._logs * kept + math.log(min(max(seen, STALLED_MBPS), FASTEST_MBPS)) * weight
        self._seconds = self._seconds * kept + weight
        return True

    def fade(self, factor: float) -> None:
        """Trusts what was observed so far only this much (0 to 1)."""
        self._logs *= factor
        self._seconds *= factor
