"""How fast a machine answers one request, by how many it answers at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.optimize import nnls

from agora.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Seconds for one unit of work (a token, say) of each of n requests that are answered together: a + b·(n − 1).

    A decoding step reads all weights once, which takes the same time for any number of requests, and does some work for
    each of them. So the time of a step is linear in n, what one request gets falls with n, and what all get together
    rises towards 1/b.

    Attributes:
        alone_s: a, seconds for a unit of a request that is alone.
        each_further_s: b, seconds that each further request adds to it; 0 for slots that do not slow each other.

    Raises:
        InvalidRequest: If a is not a positive number, or b a negative one.
    """

    alone_s: float
    each_further_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.alone_s > 0 and math.isfinite(self.alone_s)):
            raise InvalidRequest(f"alone_s is {self.alone_s}; it must be a number of seconds > 0")
        if not (self.each_further_s >= 0 and math.isfinite(self.each_further_s)):
            raise InvalidRequest(f"each_further_s is {self.each_further_s}; it must be a number of seconds ≥ 0")

    @classmethod
    def fit(cls, points: Iterable[tuple[float, float]]) -> Self:
        """Fits a and b to measured throughputs, by least squares of the relative error with a, b ≥ 0.

        Args:
            points: Pairs of requests at once, and units per second of all of them together; from one such pair on.
                A single one tells nothing of what load costs, and gives b = 0.

        Raises:
            InvalidRequest: If there is no point, or one is not positive.
        """
        pairs = [(float(n), float(total)) for n, total in points]
        if not pairs:
            raise InvalidRequest("a speed needs at least one measured point", hint="give (requests at once, units/s)")
        for n, total in pairs:
            if not (n >= 1 and total > 0 and math.isfinite(n) and math.isfinite(total)):
                raise InvalidRequest(
                    f"({n:g}, {total:g}) is no measured point: at least 1 request, more than 0 units/s"
                )
        if len({n for n, _ in pairs}) == 1:
            # One load alone: all that can be said is how fast each was under it.
            seconds = float(np.mean([n / total for n, total in pairs]))
            return cls(alone_s=seconds)
        step = np.array([n / total for n, total in pairs])
        rows = np.array([[1.0, n - 1.0] for n, _ in pairs]) / step[:, None]
        (a, b), _ = nnls(rows, np.ones(len(pairs)))
        # Points that say a lone request takes no time at all (a = 0) contradict themselves; the fastest one holds.
        return cls(alone_s=float(a) or float(step.min()), each_further_s=float(b))

    def seconds(self, at_once: int) -> float:
        """Seconds for a unit of one of so many requests."""
        return self.alone_s + self.each_further_s * (at_once - 1)

    def rate(self, at_once: int) -> float:
        """Units per second of one of so many requests."""
        return 1.0 / self.seconds(at_once)

    def total(self, at_once: int) -> float:
        """Units per second of all of them together."""
        return at_once / self.seconds(at_once)

    def most(self, slots: int) -> float:
        """Most units per second that up to so many requests get together.

        n/(a + b(n−1)) is monotone in n, so the most is at either end.
        """
        return max(self.total(1), self.total(slots))
