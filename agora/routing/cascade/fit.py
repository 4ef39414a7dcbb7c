"""Fits every kind of policy to outcomes, and lets validation pick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agora.errors import InvalidRequest
from agora.routing.cascade.beliefs import MAX_MODELS, Belief, Forecast, fit_beliefs
from agora.routing.cascade.evidence import Evidence, evidence_of
from agora.routing.cascade.fitted import Fitted, Mind, Vertex
from agora.routing.cascade.outcomes import Outcomes
from agora.routing.cascade.picking import Tried, judgements, pick, why
from agora.routing.cascade.priors import PRIORS, cross_fitted, fit_priors
from agora.routing.cascade.reading import Reader, cross_read
from agora.routing.cascade.replay import Board, board_from, board_of, play
from agora.routing.cascade.rules import Cascade, CascadeRouting, Routing, Rule, Single, Stopping

Floats = NDArray[np.float64]

LEAST_ROWS: Final = 30
"""Questions below which nothing is fitted: validation on so few would pick at random, being right on a share known to
0.09 at best (the standard error of 30 tosses)."""

FOLDS: Final = 6
"""Folds of the validation. Each is a whole fit; with fewer on some 400 questions, what needs many to be learned looks
worse than it will be with all: with 4, mixing single models was picked on MATH where routing gained 0.02 on others."""

FOLDS_OF_MANY: Final = 3
"""The same from `MANY` questions on, of which two thirds are enough to learn from: half the fits of `FOLDS`, each on
more questions than `FOLDS` leaves of fewer."""

MANY: Final = 3000
"""Questions from which on `FOLDS_OF_MANY` folds do: what is left to learn from are 2,000, several times what `FOLDS`
folds leave of the sets that needed them. It is the time of the fits that is saved; not tuned."""

INNER_FOLDS: Final = 4
"""Folds of the cross-fitting within a fit: three quarters are learned from, and every fold is one more fit of
everything. Not tuned."""

WORTHS: Final = 48
"""What an answer may be worth, on a log scale: neighbours differ by a quarter or less."""

FINER: Final = 2
"""Steps of routing and of cascade routing for each of `WORTHS`: cheap, for nothing is fitted for them. On MMLU a curve
through every threshold had 0.0005 more quality under it than one with neighbours a quarter apart."""

THRESHOLDS: Final = 40
"""Thresholds that are tried for each chain of a cascade: quantiles of what is believed of its answers, 2.5 % of the
answers apart, which is finer than a few hundred questions can tell them apart."""


def fit(
    outcomes: Outcomes,
    *,
    seed: int = 0,
    priors: Sequence[str] = tuple(PRIORS),
    deadline: float | None = None,
    trade_off: float | None = None,
    folds: int | None = None,
) -> Fitted:
    """Fits routing, cascades, cascade routing and optimal stopping, and keeps what validation says is best.

    Every question is judged by beliefs that were fitted without it (`folds`-fold). Each kind gives a curve of quality
    over cost, one point for each worth of an answer. The simplest kind is kept that none beats by more than chance
    (see `pick`), and nothing but single models, mixed, where it loses to them.

    Args:
        outcomes: What the models made of questions, the cheapest model first.
        seed: Of the folds.
        priors: Estimators that look at the question alone, names of `PRIORS`.
        deadline: Seconds within which questions should be answered: whoever would likely be late is not asked after
            others, in fitting as in use. None for no deadline. Needs recorded times.
        trade_off: Money that an answer's being right is worth; None to keep the quality of the best single model for
            the least money.
        folds: Folds of the validation; None for `FOLDS`, fewer where there are many questions.

    Raises:
        InvalidRequest: If there are too few questions or too many models, a prior is unknown, or a number is out of
            range.
    """
    return fit_kinds(outcomes, seed=seed, priors=priors, deadline=deadline, trade_off=trade_off, folds=folds).picked


@dataclass(frozen=True, slots=True, kw_only=True)
class Kinds:
    """Every kind by itself, and the one that was picked.

    Attributes:
        by_kind: Each kind's policies, mixed with single models.
        picked: What `fit` returns.
    """

    by_kind: Mapping[str, Fitted]
    picked: Fitted


def fit_kinds(
    outcomes: Outcomes,
    *,
    seed: int = 0,
    priors: Sequence[str] = tuple(PRIORS),
    deadline: float | None = None,
    trade_off: float | None = None,
    folds: int | None = None,
) -> Kinds:
    """Does what `fit` does, and keeps the other kinds too: to compare them."""
    n, m = outcomes.quality.shape
    folds = folds if folds is not None else FOLDS if n < MANY else FOLDS_OF_MANY
    _check(n, m, priors, deadline, trade_off, folds)
    deadline = deadline if outcomes.seconds is not None else None
    worths = worths_for(outcomes)
    rng = np.random.default_rng(seed)
    outer = _folds(n, folds, rng)
    names = tuple(sorted(outcomes.signals))
    fitting = partial(fit_priors, kinds=priors)
    # One cross-fitting serves all: what a prior says of a question never comes from that question. Those that the
    # held out questions are judged by did see other held out ones, which is what stacking costs everywhere.
    evidence = evidence_of(outcomes, cross_fitted(outcomes, outer, fitting), names)
    mean_cost = np.maximum(outcomes.cost.mean(axis=0), 1e-12)
    learn = partial(_learn, worths=worths, deadline=deadline, timed=outcomes.seconds is not None, rng=rng)
    parts: list[tuple[NDArray[np.int_], Board]] = []
    for fold in range(folds):
        held, rest = np.flatnonzero(outer == fold), np.flatnonzero(outer != fold)
        reader, beliefs = learn(evidence.take(rest), outcomes.quality[rest])
        about = evidence.take(held)
        parts.append(
            (held, board_of(about, reader, beliefs, mean_cost=mean_cost, worths=len(worths), deadline=deadline))
        )
    board = _joined(parts, deadline)
    quality = outcomes.quality[np.concatenate([held for held, _ in parts])]
    tried = {kind: _tried(rules, board, quality) for kind, rules in _rules(m, worths).items()}
    tried["cascade"] = _cascades(board, quality)
    singles = tried["single"]
    judged = judgements(tried, rng)
    gains = {kind: float(values.mean()) for kind, values in judged.items()}
    picked = pick(judged)
    timed = outcomes.seconds is not None
    reader, beliefs = learn(evidence, outcomes.quality)
    mind = Mind(
        models=outcomes.models,
        signals=names,
        priors=fitting(outcomes),
        reader=reader,
        beliefs=beliefs,
        mean_cost=mean_cost,
        worths=worths,
        deadline=deadline,
    )
    top = _judged(singles.rules[int(singles.cost.mean(axis=1).argmax())], board, quality, timed=timed)
    report = {
        "rows": n,
        "models": list(outcomes.models),
        "priors": list(mind.priors),
        "signals": sorted(outcomes.signals),
        "deadline": deadline,
        "gain_over_mixing": {kind: round(gain, 5) for kind, gain in gains.items()},
        "picked": picked,
        "why": why(picked, gains),
        "singles": {
            "cost": [float(c) for c in singles.cost.mean(axis=1)],
            "quality": [float(q) for q in singles.quality.mean(axis=1)],
        },
    }
    fitted = {
        kind: Fitted(
            mind=mind,
            vertices=tuple(_judged(curve.rules[i], board, quality, timed=timed) for i in curve.kept()),
            top=top,
            trade_off=trade_off,
            report=report,
        )
        for kind, curve in tried.items()
    }
    return Kinds(by_kind=fitted, picked=fitted[picked])


def _check(n: int, m: int, priors: Sequence[str], deadline: float | None, trade_off: float | None, folds: int) -> None:
    if n < LEAST_ROWS:
        raise InvalidRequest(f"{n} questions to fit a policy to; at least {LEAST_ROWS} are needed")
    if m > MAX_MODELS:
        raise InvalidRequest(
            f"outcomes of {m} models; a policy chooses among at most {MAX_MODELS}",
            hint="leave out models that a cheaper one beats",
        )
    unknown = [kind for kind in priors if kind not in PRIORS]
    if unknown:
        raise InvalidRequest(f"prior {unknown[0]!r} is unknown; allowed: {', '.join(PRIORS)}")
    for name, value in (("deadline", deadline), ("trade_off", trade_off)):
        if value is not None and not (value > 0 and np.isfinite(value)):
            raise InvalidRequest(f"{name} is {value}; it must be a number above 0")
    if not 2 <= folds <= 20:
        raise InvalidRequest(f"folds is {folds}; allowed: 2 to 20")


def worths_for(outcomes: Outcomes) -> Floats:
    """What an answer may be worth, in money, falling: from where only quality counts to where only cost does.

    At half of what the second cheapest model costs above the cheapest, no quality pays for asking anybody else.
    """
    mean = np.sort(np.maximum(outcomes.cost.mean(axis=0), 1e-12))
    above = mean[1] - mean[0] if len(mean) > 1 else mean[0]
    return np.geomspace(300 * mean[-1], max(0.5 * above, 0.5 * mean[0], 1e-4 * mean[-1]), WORTHS)


def _folds(n: int, folds: int, rng: np.random.Generator) -> NDArray[np.int_]:
    return rng.permutation(np.arange(n) % folds)


def _learn(
    evidence: Evidence,
    quality: Floats,
    *,
    worths: Floats,
    deadline: float | None,
    timed: bool,
    rng: np.random.Generator,
) -> tuple[Reader, dict[int, Belief]]:
    n = len(evidence)
    beliefs = fit_beliefs(
        evidence,
        cross_read(evidence, quality, _folds(n, INNER_FOLDS, rng)),
        quality,
        worths=worths,
        folds=_folds(n, INNER_FOLDS, rng),
        deadline=deadline,
        timed=timed,
    )
    return Reader.fit(evidence, quality), beliefs


def _joined(parts: Sequence[tuple[NDArray[np.int_], Board]], deadline: float | None) -> Board:
    """The folds' boards under one another."""
    boards = [board for _, board in parts]
    evidence = Evidence(
        **{
            name: np.concatenate([getattr(b.evidence, name) for b in boards])
            for name in ("before", "own", "same", "cost", "seconds")
        }
    )
    forecasts: dict[int, Forecast] = {}
    for subset in boards[0].forecasts:
        forecasts[subset] = Forecast.stack([b.forecasts[subset] for b in boards])
    return board_from(evidence, forecasts, deadline)


def _rules(m: int, worths: Floats) -> dict[str, list[Rule]]:
    """The rules of the kinds that have one for each worth."""
    finer = np.geomspace(worths[0], worths[-1], FINER * (len(worths) - 1) + 1)
    return {
        "single": [Single(model=j) for j in range(m)],
        "routing": [Routing(worth=float(w)) for w in finer],
        "cascade_routing": [CascadeRouting(worth=float(w)) for w in finer],
        "stopping": [Stopping(level=level) for level in range(len(worths))],
    }


def _tried(rules: Sequence[Rule], board: Board, quality: Floats) -> Tried:
    played = [play(rule, board) for rule in rules]
    return Tried(
        rules=tuple(rules),
        cost=np.stack([p.cost for p in played]),
        quality=np.stack([p.quality(quality) for p in played]),
    )


def _cascades(board: Board, quality: Floats) -> Tried:
    """Each of the 2^m chains, with every threshold."""
    rules: list[Rule] = []
    costs, rights = [], []
    for length in range(1, quality.shape[1] + 1):
        for chain in combinations(range(quality.shape[1]), length):
            thresholds, cost, right = _along(chain, board, quality)
            rules.extend(Cascade(chain=chain, threshold=float(t)) for t in thresholds)
            costs.append(cost)
            rights.append(right)
    return Tried(rules=tuple(rules), cost=np.concatenate(costs, axis=1).T, quality=np.concatenate(rights, axis=1).T)


def _along(chain: tuple[int, ...], board: Board, quality: Floats) -> tuple[Floats, Floats, Floats]:
    """Thresholds for a chain, and the cost and quality that each comes to: all of them at once, so without `play`.

    Where the next of the chain may not be asked, it ends.

    Returns:
        Thresholds, shape (T,); cost and quality, shape (n, T) each.
    """
    prefixes = np.cumsum([1 << j for j in chain])
    forecasts = [board.forecasts[int(s)] for s in prefixes]
    held = np.column_stack([np.round(f.held, 9) for f in forecasts])
    thresholds = np.unique(np.quantile(held[:, :-1], np.linspace(0, 1, THRESHOLDS))) if len(chain) > 1 else np.zeros(1)
    for k, j in enumerate(chain[1:]):
        held[~board.open[int(prefixes[k])][:, j], k] = np.inf
    held[:, -1] = np.inf
    end = (held[:, :, None] >= thresholds).argmax(axis=1)
    paid = np.cumsum(board.evidence.cost[:, list(chain)], axis=1)
    got = np.column_stack([np.take_along_axis(quality, f.best[:, None], axis=1)[:, 0] for f in forecasts])
    return thresholds, np.take_along_axis(paid, end, axis=1), np.take_along_axis(got, end, axis=1)


def _judged(rule: Rule, board: Board, quality: Floats, *, timed: bool) -> Vertex:
    played = play(rule, board)
    return Vertex(
        rule=rule,
        cost=float(played.cost.mean()),
        quality=float(played.quality(quality).mean()),
        p95_seconds=float(np.quantile(played.seconds, 0.95)) if timed else None,
    )
