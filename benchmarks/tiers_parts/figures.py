"""Figures of the three tiers and of agora over the same questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.tiers_parts.alone import Judged
from benchmarks.tiers_parts.experts import TIERS
from benchmarks.tiers_parts.questions import SETS

KEPT: Final = 0.01
"""Quality that may be lost and still counts as kept: one question in a hundred, as in the goals for recorded sets."""

RESAMPLES: Final = 2_000
"""Bootstrap resamples: the ends of a 95 % interval then stand on 50 of them each."""


def figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Quality (share of right answers), and cost and time per question."""
    return {
        "quality": _mean([j.right for j in judged]),
        **{f"quality_{s}": _mean([j.right for j in judged if j.question.set == s]) for s in SETS},
        "cost": _money([j.cost for j in judged]),
        "seconds": _mean([j.seconds for j in judged]),
        "cpu_seconds": _mean([j.cpu_seconds for j in judged]),
    }


def asked(judged: Sequence[Judged]) -> dict[str, Any]:
    """Who was asked how often, and whose answers were taken; by set of questions too."""
    return {
        "asked": _counts([t for j in judged for t in j.asked]),
        "taken": _counts([j.taken for j in judged]),
        **{f"taken_{s}": _counts([j.taken for j in judged if j.question.set == s]) for s in SETS},
    }


def _counts(names: Sequence[str]) -> dict[str, int]:
    counted = Counter(names)
    return {t: counted[t] for t in TIERS}


def oracle(alone: Mapping[str, Sequence[Judged]]) -> list[Judged]:
    """The cheapest right answer to every question; the cheapest wrong one where all are wrong."""
    rows = zip(*alone.values(), strict=True)
    return [min(row, key=lambda j: (not j.right, j.cost)) for row in rows]


def best_single(alone: Mapping[str, Sequence[Judged]]) -> str:
    """The tier with the best quality, the cheaper one of equals."""
    return max(alone, key=lambda t: (fmean(j.right for j in alone[t]), -fmean(j.cost for j in alone[t])))


def mixed_quality(alone: Mapping[str, Sequence[Judged]], cost: float) -> float:
    """Quality of the best random mix of single tiers at that cost per question: their upper hull; the cheapest tier's
    below it, the best tier's above it."""
    points = sorted((fmean(j.cost for j in many), fmean(float(j.right) for j in many)) for many in alone.values())
    best = points[0][1] if cost >= points[0][0] else min(q for _, q in points)
    for i, (low, below) in enumerate(points):
        if low <= cost:
            best = max(best, below)
        for high, above in points[i + 1 :]:
            if low <= cost < high:
                best = max(best, below + (above - below) * (cost - low) / (high - low))
    return best


def compared(alone: Mapping[str, Sequence[Judged]], agora: Sequence[Judged], *, seed: int) -> dict[str, Any]:
    """Agora beside the best tier alone: what was saved, what was kept, and whether that is more than mixing brings."""
    best = best_single(alone)
    single = alone[best]
    saved = 1 - _ratio(agora, single, "cost")
    difference = np.array([float(a.right) - float(s.right) for a, s in zip(agora, single, strict=True)])
    cost = fmean(j.cost for j in agora)
    kept = float(difference.mean()) >= -KEPT
    interval = _interval(_draws(difference, seed))
    over = fmean(float(j.right) for j in agora) - mixed_quality(alone, cost)
    return {
        "best_single": best,
        "cost_saved": round(saved, 4),
        "cost_saved_ci95": _interval(_saved_draws(agora, single, seed)),
        "cpu_seconds_saved": round(1 - _ratio(agora, single, "cpu_seconds"), 4),
        "quality_over_best_single": round(float(difference.mean()), 4),
        "quality_over_best_single_ci95": interval,
        "quality_kept": kept,
        "quality_over_mixing": round(over, 4),
        "verdict": _verdict(best, saved, float(difference.mean()), interval, kept=kept, over=over),
    }


def _verdict(best: str, saved: float, difference: float, interval: Sequence[float], *, kept: bool, over: float) -> str:
    beside = f"against always asking the {best} tier"
    quality = f"{difference:+.3f} (95 %: {interval[0]:+.3f} to {interval[1]:+.3f})"
    if saved <= 0:
        return f"nothing was saved: {-saved:.0%} more cost {beside}, quality {quality}"
    if not kept:
        more = "more" if over > 0 else "no more"
        return (
            f"quality was not kept: {quality} {beside}, for {saved:.0%} less cost; {more} quality than a "
            f"random mix of tiers at that cost ({over:+.3f})"
        )
    return f"{saved:.0%} of the cost was saved {beside}, quality {quality}"


def _ratio(a: Sequence[Judged], b: Sequence[Judged], what: str) -> float:
    whole = sum(getattr(j, what) for j in b)
    return sum(getattr(j, what) for j in a) / whole if whole > 0 else 1.0


def _picks(n: int, seed: int) -> NDArray[np.int_]:
    return np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))


def _draws(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    means: NDArray[np.float64] = values[_picks(len(values), seed)].mean(axis=1)
    return means


def _saved_draws(a: Sequence[Judged], b: Sequence[Judged], seed: int) -> NDArray[np.float64]:
    picks = _picks(len(a), seed)
    of_a, of_b = np.array([j.cost for j in a])[picks].sum(axis=1), np.array([j.cost for j in b])[picks].sum(axis=1)
    saved: NDArray[np.float64] = 1 - of_a / of_b
    return saved


def _interval(draws: NDArray[np.float64]) -> list[float]:
    return [round(float(x), 4) for x in np.quantile(draws, [0.025, 0.975])]


def _mean(values: Sequence[float]) -> float | None:
    return round(fmean(values), 4) if values else None


def _money(values: Sequence[float]) -> float | None:
    """Ten digits: an answer costs some hundred millionths."""
    return round(fmean(values), 10) if values else None
