"""Figures of a curve of quality over cost, as the set's description defines them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agora.routing.cascade.frontier import hull, under_curve

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Mean quality over mean cost; between neighbouring points one mixes at random.

    Attributes:
        cost: Rising, shape (k,).
        quality: Shape (k,).
        p95_s: 95th percentile of the time at each point, shape (k,); None where no time was recorded.
    """

    cost: Floats
    quality: Floats
    p95_s: Floats | None = None

    def auc(self, low: float, high: float) -> float:
        """Mean quality between two costs."""
        return under_curve(self.cost, self.quality, low, high) if high > low else float(self.at(high))

    def auc_log(self, low: float, high: float) -> float:
        """Mean quality between two costs on a log axis, where the curve is read at 512 places."""
        costs = np.geomspace(low, high, 512)
        return float(np.interp(costs, self.cost, self.quality).mean())

    def at(self, cost: float) -> float:
        """Quality at a cost."""
        return float(np.interp(cost, self.cost, self.quality))

    def cost_of(self, quality: float) -> float | None:
        """The least cost at which a quality is reached; None where it is not."""
        reached = np.flatnonzero(self.quality >= quality)
        if not len(reached):
            return None
        i = int(reached[0])
        if i == 0:
            return float(self.cost[0])
        share = (quality - self.quality[i - 1]) / (self.quality[i] - self.quality[i - 1])
        return float(self.cost[i - 1] + share * (self.cost[i] - self.cost[i - 1]))


def ordered(cost: Floats, quality: Floats, p95_s: Floats | None = None) -> Curve:
    """A curve through points that were chosen elsewhere, in the order of their cost."""
    order = np.argsort(cost, kind="stable")
    return Curve(cost=cost[order], quality=quality[order], p95_s=None if p95_s is None else p95_s[order])


def single_hull(cost: Floats, quality: Floats) -> Curve:
    """What random mixing of single models reaches: their concave hull on these questions; tables of shape (n, m)."""
    means, right = cost.mean(axis=0), quality.mean(axis=0)
    kept = hull(means, right)
    return Curve(cost=means[kept], quality=right[kept])


def oracle(cost: Floats, quality: Floats) -> Curve:
    """What who knew every outcome would reach by asking one model of each question; tables of shape (n, m).

    For each price of an answer, it asks the model with the most quality − price · cost.
    """
    prices = np.concatenate([[0.0], np.geomspace(1e-4, 1e4, 400) / cost.mean()])
    rows = np.arange(len(cost))
    costs, rights = [], []
    for price in prices:
        # where prices do not decide, the cheapest of the best
        chosen = (quality - max(price, 1e-9 / cost.max()) * cost).argmax(axis=1)
        costs.append(cost[rows, chosen].mean())
        rights.append(quality[rows, chosen].mean())
    x, y = np.array(costs), np.array(rights)
    kept = hull(x, y)
    return Curve(cost=x[kept], quality=y[kept])
