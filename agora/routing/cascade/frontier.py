"""Curves of quality over cost: their upper concave hull, and how much quality lies under them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def hull(cost: Floats, quality: Floats) -> list[int]:
    """Points of the upper concave hull, from the cheapest to the best: what mixing at random reaches.

    Args:
        cost: Shape (k,).
        quality: Shape (k,).

    Returns:
        Indices, with rising cost and rising quality.
    """
    order = sorted(range(len(cost)), key=lambda i: (cost[i], -quality[i]))
    kept: list[int] = []
    for i in order:
        if kept and quality[i] <= quality[kept[-1]]:
            continue
        while len(kept) > 1 and _under(cost, quality, kept[-2], kept[-1], i):
            kept.pop()
        kept.append(i)
    return kept


def _under(cost: Floats, quality: Floats, a: int, b: int, c: int) -> bool:
    """Whether b lies on or under the line from a to c."""
    line = (quality[c] - quality[a]) * (cost[b] - cost[a])
    return bool((quality[b] - quality[a]) * (cost[c] - cost[a]) <= line)


def under_curve(cost: Sequence[float] | Floats, quality: Sequence[float] | Floats, low: float, high: float) -> float:
    """Mean quality of a piecewise linear curve between two costs; flat before its first point and after its last.

    Args:
        cost: Rising, shape (k,).
        quality: Shape (k,).
        low: Where to begin.
        high: Where to end, above `low`.
    """
    x, y = np.asarray(cost, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    between = x[(x > low) & (x < high)]
    at = np.concatenate([[low], between, [high]])
    return float(np.trapezoid(np.interp(at, x, y), at) / (high - low))
