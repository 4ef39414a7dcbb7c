"""Fits on some questions, judges on others: the figures of one split, and of all splits of a set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from agora.routing.cascade.fit import fit_kinds
from agora.routing.cascade.fitted import Fitted
from agora.routing.cascade.outcomes import Outcomes
from agora.routing.cascade.replay import Board, play
from benchmarks.cascade_parts.curves import Curve, oracle, ordered, single_hull

Floats = NDArray[np.float64]

KINDS: Final = ("routing", "cascade", "cascade_routing", "stopping")
"""Kinds of policies that are shown beside the one that validation picks."""

KEPT: Final = 0.95
"""Share of the best single model's quality whose cost is told."""

LATENCY_AT: Final = 0.98
"""Share of the dearest model's quality at which latencies are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What one split came to.

    Attributes:
        curves: By name: the kinds, `agora`, `hull` and `oracle`.
        low: Cost of always asking the cheapest.
        high: Cost of always asking the dearest.
        best_quality: Quality of the best single model.
        best_cost: Its cost.
        picked: Kind that validation picked.
        auroc: How well the probabilities tell right from wrong, by what they look at.
        latency: 95th percentiles at `LATENCY_AT`, where times were recorded.
    """

    curves: Mapping[str, Curve]
    low: float
    high: float
    best_quality: float
    best_cost: float
    picked: str
    auroc: Mapping[str, float]
    latency: Mapping[str, float]


DEADLINE_AT: Final = 0.99
"""Quantile of the dearest model's times that policies are given as the deadline. With 0.95 the dearest itself would be
thought late for the slowest kinds of questions, and never be asked them."""


def deadline_of(train: Outcomes) -> float | None:
    """The time within which the dearest model answers nearly all questions: what a policy should keep within, too."""
    if train.seconds is None:
        return None
    return float(np.quantile(train.seconds[:, int(train.cost.mean(axis=0).argmax())], DEADLINE_AT))


def evaluate(train: Outcomes, judged: Outcomes, *, seed: int) -> Split:
    """Fits on `train` alone and plays on `judged`."""
    kinds = fit_kinds(train, seed=seed, deadline=deadline_of(train))
    board = kinds.picked.mind.board(judged)
    played = {kind: _points(kinds.by_kind[kind], board, judged) for kind in KINDS}
    picked = str(kinds.picked.report["picked"])
    points = played[picked] if picked in played else _points(kinds.picked, board, judged)
    means, right = judged.cost.mean(axis=0), judged.quality.mean(axis=0)
    best = int(right.argmax())
    curves = {name: p.curve() for name, p in played.items()}
    return Split(
        curves=curves
        | {
            "agora": points.curve(),
            "hull": single_hull(judged.cost, judged.quality),
            "oracle": oracle(judged.cost, judged.quality),
        },
        low=float(means.min()),
        high=float(means.max()),
        best_quality=float(right[best]),
        best_cost=float(means[best]),
        picked=picked,
        auroc=_aurocs(board, judged),
        latency=_latency(points, played, judged),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Points:
    """Rows of cost, quality and seconds for each vertex, shape (k, n) each, rising in cost."""

    cost: Floats
    quality: Floats
    seconds: Floats
    timed: bool

    def curve(self) -> Curve:
        p95 = np.quantile(self.seconds, 0.95, axis=1) if self.timed else None
        return ordered(self.cost.mean(axis=1), self.quality.mean(axis=1), p95)


def _points(fitted: Fitted, board: Board, judged: Outcomes) -> _Points:
    played = [play(v.rule, board) for v in fitted.vertices]
    order = np.argsort([p.cost.mean() for p in played], kind="stable")
    return _Points(
        cost=np.stack([played[i].cost for i in order]),
        quality=np.stack([played[i].quality(judged.quality) for i in order]),
        seconds=np.stack([played[i].seconds for i in order]),
        timed=judged.seconds is not None,
    )


def _latency(points: _Points, played: Mapping[str, _Points], judged: Outcomes) -> dict[str, float]:
    """95th percentiles, in seconds, of the cheapest mix that keeps `LATENCY_AT` of the dearest model's quality."""
    if judged.seconds is None:
        return {}
    dearest = int(judged.cost.mean(axis=0).argmax())
    target = LATENCY_AT * float(judged.quality[:, dearest].mean())
    found = {"always_strong": float(np.quantile(judged.seconds[:, dearest], 0.95))}
    for name, p in {"agora": points, **played}.items():
        if (p95 := _p95_at(p, target)) is not None:
            found[name] = p95
    return found


def _p95_at(points: _Points, target: float) -> float | None:
    means = points.quality.mean(axis=1)
    reached = np.flatnonzero(means >= target)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0:
        return float(np.quantile(points.seconds[0], 0.95))
    share = (target - means[i - 1]) / (means[i] - means[i - 1])
    seconds = np.concatenate([points.seconds[i - 1], points.seconds[i]])
    weights = np.repeat([1 - share, share], points.seconds.shape[1])
    order = np.argsort(seconds)
    upto = np.cumsum(weights[order]) / weights.sum()
    return float(seconds[order][min(int(np.searchsorted(upto, 0.95)), len(order) - 1)])


def _aurocs(board: Board, judged: Outcomes) -> dict[str, float]:
    """Mean over the models: by the question, by the answer too, by agreement alone, by all cheaper answers too."""
    m = len(judged.models)
    scores: dict[str, list[float]] = {}

    def add(name: str, score: Floats, j: int) -> None:
        value = auroc(judged.quality[:, j] > 0.5, score)
        if value is not None:
            scores.setdefault(name, []).append(value)

    for j in range(m):
        add("question", board.forecasts[0].quality[:, j], j)
        if judged.answers is None:
            continue
        add("own_answer", board.forecasts[1 << j].quality[:, j], j)
        if j:
            same = board.evidence.same
            agree = ((same[:, :j] == same[:, [j]]) & (same[:, [j]] >= 0)).sum(axis=1)
            add("agreement_with_cheaper", agree.astype(np.float64), j)
            add("own_answer_and_cheaper", board.forecasts[(1 << (j + 1)) - 1].quality[:, j], j)
    return {name: float(np.mean(values)) for name, values in scores.items()}


def auroc(right: NDArray[np.bool_], score: Floats) -> float | None:
    """Probability that a right answer scores higher than a wrong one; None where all are right, or all wrong."""
    positive, negative = int(right.sum()), int((~right).sum())
    if not positive or not negative:
        return None
    ranks = rankdata(score)
    return float((ranks[right].sum() - positive * (positive + 1) / 2) / (positive * negative))


def summary(splits: Sequence[Split]) -> dict[str, Any]:
    """Means over the splits; gains are paired, split by split."""
    names = ("hull", *KINDS, "agora", "oracle")
    auc = {name: np.array([s.curves[name].auc(s.low, s.high) for s in splits]) for name in names}
    log = {name: np.array([s.curves[name].auc_log(s.low, s.high) for s in splits]) for name in names}
    best = np.array([s.best_quality for s in splits])
    gain = auc["agora"] - auc["hull"]
    gap = auc["oracle"] - auc["hull"]
    better = np.maximum(auc["routing"], auc["cascade"])
    costs = [s.curves["agora"].cost_of(KEPT * s.best_quality) for s in splits]
    shares = [None if c is None else c / s.best_cost for c, s in zip(costs, splits, strict=True)]
    reached = [share for share in shares if share is not None]
    hull_costs = [s.curves["hull"].cost_of(KEPT * s.best_quality) for s in splits]
    result: dict[str, Any] = {
        "auc": {"best_single": _mean(best), **{name: _mean(a) for name, a in auc.items()}},
        "auc_log": {"best_single": _mean(best), **{name: _mean(a) for name, a in log.items()}},
        "gain_over_hull": _mean(gain),
        "gain_over_hull_splits": {"lowest": _mean(gain.min()), "highest": _mean(gain.max()), "sd": _mean(gain.std())},
        "gap_closed": _mean(gain.sum() / gap.sum()) if gap.sum() > 0 else None,
        "over_better_of_routing_and_cascade": _mean(
            auc["agora"].mean() - max(auc["routing"].mean(), auc["cascade"].mean())
        ),
        "over_better_in_each_split": _mean(auc["agora"] - better),
        "cost_at_95": _mean(reached) if len(reached) == len(splits) else None,
        "cost_at_95_reached_in": len(reached),
        "hull_cost_at_95": _mean([c / s.best_cost for c, s in zip(hull_costs, splits, strict=True) if c is not None]),
        "picked": dict(Counter(s.picked for s in splits)),
        "auroc": {name: _mean([s.auroc[name] for s in splits]) for name in splits[0].auroc},
    }
    if splits[0].latency:
        told = {name: [s.latency[name] for s in splits if name in s.latency] for name in splits[0].latency}
        result["latency"] = {
            "at_share_of_quality": LATENCY_AT,
            "p95_ms": {name: round(1e3 * float(np.mean(values)), 1) for name, values in told.items()},
            "agora_over_always_strong": _mean(
                [s.latency["agora"] / s.latency["always_strong"] for s in splits if "agora" in s.latency]
            ),
        }
    return result


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 4)
