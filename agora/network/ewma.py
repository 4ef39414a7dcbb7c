"""Numbers that forget: a peak-sensitive average, a plain one, and a histogram, all fading with time.

Time is handed in with every call. A clock that stands still or goes back makes nothing older; one that leaps forward
makes everything old, and each of these then tells what it was given as a prior.
"""

from __future__ import annotations

import math
from typing import Final

BINS_PER_E: Final = 12
"""Bins of a histogram per factor e: 8 % wide each, finer than a latency can be predicted."""

LOWEST: Final = -7.0
"""ln of the histogram's lower end: below e⁻⁷ ≈ 0.001 everything is one bin. What is kept are times over those expected,
and one a thousand times quicker than expected says that the expectation is wrong, whatever it is."""

HIGHEST: Final = 9.0
"""ln of its upper end: above e⁹ ≈ 8100 everything is one bin: a millisecond expected and eight seconds taken. Which
of them it was matters to nobody any more."""

KEEP: Final = 0.995
"""Weight that each new entry leaves to the older ones of a histogram: it holds some 200 entries, ten of them above its
95th percentile."""

SMALLEST_UNIT: Final = 1e-100
"""Unit of a histogram's bins below which they are scaled anew, far from where numbers end."""


class Age:
    """How long ago something was last touched; never negative, whatever the clock does."""

    __slots__ = ("_at",)

    def __init__(self) -> None:
        self._at: float | None = None

    def of(self, at: float) -> float:
        """Seconds from the last touch to `at`; 0 before the first, and if the clock went back."""
        if self._at is None or math.isnan(at):
            return 0.0
        return max(at - self._at, 0.0)

    def touch(self, at: float) -> float:
        """The same, and `at` is now the last touch, even after a clock that went back: else nothing would ever age
        until it has caught up."""
        age = self.of(at)
        if math.isfinite(at):
            self._at = at
        return age


def fading(age: float, tau_s: float) -> float:
    """exp(−age/τ): what is left of a weight."""
    return math.exp(-age / tau_s)


class PeakEwma:
    """Jumps up to a peak at once and comes down with time: Finagle's peak EWMA (`PeakEwma.scala`, Twitter 2016).

    What is above the average is taken at once; what is below only by the weight 1 − exp(−Δt/τ). Without news it sinks
    to `floor` (Finagle's: to 0), so that a path that was slow once is tried again.

    Args:
        tau_s: Seconds in which a peak falls to 1/e.
        floor: Where it starts, and sinks to.
    """

    __slots__ = ("_age", "_floor", "_tau", "_value")

    def __init__(self, tau_s: float, floor: float = 0.0) -> None:
        self._tau = tau_s
        self._floor = floor
        self._value = floor
        self._age = Age()

    def read(self, at: float) -> float:
        """The average now."""
        return self._floor + (self._value - self._floor) * fading(self._age.of(at), self._tau)

    def observe(self, value: float, at: float) -> None:
        """Takes in a value."""
        kept = fading(self._age.of(at), self._tau)
        sunk = self.read(at)
        self._value = value if value > sunk else self._value * kept + value * (1 - kept)
        self._age.touch(at)


class Mean:
    """A weighted mean whose old values fade, beside a prior that does not.

    Args:
        tau_s: Seconds in which a value's weight falls to 1/e.
        prior_weight: What the prior weighs, in the same unit as the values' weights.
    """

    __slots__ = ("_age", "_prior_weight", "_tau", "_total", "_weight")

    def __init__(self, tau_s: float, prior_weight: float) -> None:
        self._tau = tau_s
        self._prior_weight = prior_weight
        self._total = 0.0
        self._weight = 0.0
        self._age = Age()

    def read(self, at: float, prior: float | None) -> float | None:
        """The mean now; without a prior only what was observed, None before anything was (or if all has faded)."""
        kept = fading(self._age.of(at), self._tau)
        if prior is None:
            return self._total / self._weight if self._weight * kept > 0 else None
        return (prior * self._prior_weight + self._total * kept) / (self._prior_weight + self._weight * kept)

    def weight(self, at: float) -> float:
        """What the observed values weigh now, all together."""
        return self._weight * fading(self._age.of(at), self._tau)

    def observe(self, value: float, at: float, weight: float = 1.0) -> None:
        """Takes in a value."""
        kept = fading(self._age.touch(at), self._tau)
        self._total = self._total * kept + value * weight
        self._weight = self._weight * kept + weight

    def fade(self, factor: float) -> None:
        """Trusts what was observed so far only this much (0 to 1)."""
        self._total *= factor
        self._weight *= factor


class Slope:
    """Least squares y ≈ a + b·x whose points fade with time, with a ridge that holds b at a prior.

    Args:
        tau_s: Seconds in which a point's weight falls to 1/e.
        ridge: What the prior weighs: a sum of squared deviations of x, in its unit.
    """

    __slots__ = ("_age", "_n", "_ridge", "_tau", "_x", "_xx", "_xy", "_y")

    def __init__(self, tau_s: float, ridge: float) -> None:
        self._tau = tau_s
        self._ridge = ridge
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._age = Age()

    def read(self, at: float, prior: float) -> float:
        """b now, never below 0."""
        kept = fading(self._age.of(at), self._tau)
        if self._n * kept <= 0:
            return prior
        squares = max(self._xx - self._x * self._x / self._n, 0.0) * kept
        products = (self._xy - self._x * self._y / self._n) * kept
        return max((products + prior * self._ridge) / (squares + self._ridge), 0.0)

    def observe(self, x: float, y: float, at: float) -> None:
        """Takes in a point."""
        kept = fading(self._age.touch(at), self._tau)
        new = (1.0, x, y, x * x, x * y)
        old = (self._n, self._x, self._y, self._xx, self._xy)
        self._n, self._x, self._y, self._xx, self._xy = (o * kept + n for o, n in zip(old, new, strict=True))


class Histogram:
    """A distribution of positive numbers on a log scale that forgets by count (`KEEP`) and by time.

    Args:
        tau_s: Seconds in which an entry's weight falls to 1/e.
        sigma: The prior: log-normal around 1 with this standard deviation of the logarithm.
        prior_weight: How many entries the prior stands for.
    """

    __slots__ = ("_age", "_bins", "_prior_weight", "_sigma", "_squares", "_tau", "_unit", "_weight")

    def __init__(self, tau_s: float, *, sigma: float, prior_weight: float) -> None:
        self._tau = tau_s
        self._sigma = sigma
        self._prior_weight = prior_weight
        self._bins = [0.0] * (int((HIGHEST - LOWEST) * BINS_PER_E) + 2)
        self._weight = 0.0
        self._squares = 0.0
        self._unit = 1.0
        self._age = Age()

    def observe(self, value: float, at: float) -> None:
        """Takes in a number ≥ 0."""
        kept = fading(self._age.touch(at), self._tau) * KEEP
        if self._unit * kept < SMALLEST_UNIT:
            self._bins = [b * self._unit * kept for b in self._bins]
            self._unit = 1.0
        else:
            # Instead of every older entry growing lighter, the new one weighs more: the bins are in units of it.
            self._unit *= kept
        place = _bin(value)
        self._bins[place] += 1 / self._unit
        self._weight = self._weight * kept + 1
        self._squares = self._squares * kept + (LOWEST + (place - 0.5) / BINS_PER_E) ** 2

    def weight(self, at: float) -> float:
        """How many entries' worth it holds now, the prior not counted."""
        return self._weight * fading(self._age.of(at), self._tau)

    def below(self, value: float, at: float) -> float:
        """Probability of a number ≤ `value`, linear within the bin that holds it."""
        if value <= 0:
            return 0.0
        kept, place = fading(self._age.of(at), self._tau), _place(value)
        whole = min(int(place), len(self._bins) - 1)
        seen = (sum(self._bins[:whole]) + self._bins[whole] * min(place - whole, 1.0)) * self._unit
        prior = _normal(math.log(value) / self._sigma) if math.isfinite(value) else 1.0
        return (prior * self._prior_weight + seen * kept) / (self._prior_weight + self._weight * kept)

    def quantile(self, q: float, at: float) -> float:
        """The number below which a share `q` in (0, 1) lies, prior and entries together; exact to a hundredth."""
        low, high = LOWEST, HIGHEST
        while high - low > 0.005:
            middle = (low + high) / 2
            low, high = (middle, high) if self.below(math.exp(middle), at) < q else (low, middle)
        return math.exp((low + high) / 2)

    def spread(self, at: float) -> float:
        """Standard deviation of the logarithm around 0, prior and entries together."""
        kept = fading(self._age.of(at), self._tau)
        total = self._sigma**2 * self._prior_weight + self._squares * kept
        return math.sqrt(total / (self._prior_weight + self._weight * kept))


def _place(value: float) -> float:
    """Where a number lies, in bins: bin 0 is all below `LOWEST`, the last all above `HIGHEST`."""
    if not math.isfinite(value):
        return (HIGHEST - LOWEST) * BINS_PER_E + 2
    return min(max((math.log(value) - LOWEST) * BINS_PER_E + 1, 0.0), (HIGHEST - LOWEST) * BINS_PER_E + 2)


def _bin(value: float) -> int:
    return 0 if value <= 0 else min(int(_place(value)), int((HIGHEST - LOWEST) * BINS_PER_E) + 1)


def _normal(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))
