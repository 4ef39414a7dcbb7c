"""What is believed of a question once some models have been asked: who is right, and what asking more would bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from agora.errors import InvalidRequest
from agora.routing.cascade.evidence import Evidence
from agora.routing.cascade.linear import Scaling, logistic, ridge
from agora.routing.cascade.reading import Reading
from agora.routing.cascade.votes import Standing, stand

Floats = NDArray[np.float64]

MAX_MODELS: Final = 8
"""Models that one policy chooses among: beliefs are kept for every subset, 2⁸ = 256 of them, and each further model
doubles both the fit and the file."""

PENALTY: Final = 20.0
"""Of the regressions, on standardised features. Not tuned."""

WORTH_PENALTY: Final = 10.0
"""Of the regressions on `worth_features`. Not tuned."""

LEAST_COST: Final = 0.05
"""Least cost that is expected of a model, as a share of its mean: a linear forecast may fall below 0, and what costs
nothing would always be asked. Not tuned."""

LATE: Final = 0.9
"""Quantile of a forecast's error that is added to the seconds expected, so that a deadline is met that often. Higher
ones are guessed from few answers: of 300 questions 30 lie beyond this one."""


def members(subset: int) -> list[int]:
    """Positions of the models in a subset, which is written as a bit mask."""
    return [i for i in range(subset.bit_length()) if subset >> i & 1]


def subsets(m: int) -> list[int]:
    """All subsets of m models, the smaller first."""
    return sorted(range(1 << m), key=lambda s: (s.bit_count(), s))


def supersets(subset: int, m: int) -> list[int]:
    """All subsets that have more members than this one, and these."""
    return [s for s in range(1 << m) if s != subset and s & subset == subset]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What is believed of n questions, m models, with the same ones asked.

    Attributes:
        quality: Probability that each model's answer is right, asked or not, shape (n, m).
        best: Whose answer to take, shape (n,); −1 if nobody was asked.
        held: Probability that it is right, shape (n,); 0 if nobody was asked.
        cost: Money expected of each model, shape (n, m).
        seconds: Seconds that each model will most likely keep within, shape (n, m).
        reach: Probability that the best answer is right once all of a superset were asked, shape (n, supersets).
        onward: Value of asking each model next under optimal stopping, for every worth of an answer, shape
            (n, m, worths); −∞ for who was asked.
    """

    quality: Floats
    best: NDArray[np.int_]
    held: Floats
    cost: Floats
    seconds: Floats
    reach: Floats
    onward: Floats

    @classmethod
    def stack(cls, parts: Sequence[Forecast]) -> Forecast:
        """What is believed of all the questions of several."""
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Belief:
    """Regressions for one subset of models that have been asked, on the features of `Standing` (d with the ones).

    Attributes:
        subset: Who has been asked, as a bit mask.
        scaling: Of the features.
        quality: Logistic weights, one column for each model and one for the best answer in hand, shape (d, m + 1).
        costing: Scaling of what is known of costs and times.
        cost: Weights, in shares of each model's mean, shape (e, m).
        seconds: Weights, shape (e, m).
        late: Seconds to add, shape (m,).
        worth_scaling: Scaling of the features of `worth_features`.
        reach: Weights, shape (f, supersets).
        onward: Weights, shape (f, m · worths); columns of those asked are 0.
    """

    subset: int
    scaling: Scaling
    quality: Floats
    costing: Scaling
    cost: Floats
    seconds: Floats
    late: Floats
    worth_scaling: Scaling
    reach: Floats
    onward: Floats

    def forecast(self, evidence: Evidence, reading: Reading, mean_cost: Floats, worths: int) -> Forecast:
        """What is believed of each question."""
        m, asked = len(mean_cost), members(self.subset)
        standing = stand(evidence, reading, asked, mean_cost)
        told = expit(self.scaling(standing.features) @ self.quality)
        quality, held = told[:, :m], told[:, m] if asked else np.zeros(len(evidence))
        spending = self.costing(cost_features(evidence, reading, asked, mean_cost))
        worth = self.worth_scaling(worth_features(quality, held, asked))
        onward = np.array(worth @ self.onward).reshape(len(evidence), m, worths)
        onward[:, asked] = -np.inf
        return Forecast(
            quality=quality,
            best=standing.best,
            held=held,
            cost=np.maximum(spending @ self.cost, LEAST_COST) * mean_cost,
            seconds=np.maximum(spending @ self.seconds, 0.0) + self.late,
            reach=np.clip(worth @ self.reach, 0.0, 1.0),
            onward=onward,
        )

    def arrays(self) -> dict[str, Floats]:
        """What it consists of, by name."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        scalings = {name: value for name, value in arrays.items() if isinstance(value, Scaling)}
        plain = {name: value for name, value in arrays.items() if isinstance(value, np.ndarray)}
        return plain | {f"{name}.{key}": a for name, scaling in scalings.items() for key, a in scaling.arrays().items()}

    @classmethod
    def from_arrays(cls, subset: int, arrays: Mapping[str, Floats]) -> Belief:
        """The inverse of `arrays`."""
        names = ("scaling", "costing", "worth_scaling")
        scalings = {n: Scaling(mean=arrays[f"{n}.mean"], inverse=arrays[f"{n}.inverse"]) for n in names}
        plain = {n: arrays[n] for n in ("quality", "cost", "seconds", "late", "reach", "onward")}
        return cls(**{"subset": subset, **scalings, **plain})  # type: ignore[arg-type]


def cost_features(evidence: Evidence, reading: Reading, asked: Sequence[int], mean_cost: Floats) -> Floats:
    """What money and time of the others depend on: the question, and what those asked took."""
    spent = np.log(np.maximum(evidence.cost[:, list(asked)], 1e-12) / mean_cost[list(asked)])
    return np.column_stack([reading.cost, reading.seconds, spent, evidence.seconds[:, list(asked)]])


def worth_features(quality: Floats, held: Floats, asked: Sequence[int]) -> Floats:
    """What the worth of asking on depends on: how likely each is right, and how the best in hand compares."""
    waiting = [j for j in range(quality.shape[1]) if j not in asked]
    other = quality[:, waiting].max(axis=1) if waiting else np.zeros(len(quality))
    doubt = 1 - held
    return np.column_stack([quality, doubt, doubt**2, np.sqrt(doubt), doubt * other, other**2])


def fit_beliefs(
    evidence: Evidence,
    reading: Reading,
    quality: Floats,
    *,
    worths: Floats,
    folds: NDArray[np.int_],
    deadline: float | None,
    timed: bool,
) -> dict[int, Belief]:
    """Fits the beliefs for every subset, the larger first: backward induction.

    The value of having asked S of a question with features x, an answer being worth w, is

        V_S(x) = max( w · E[quality of the best answer of S | x],  max_{j ∉ S} E[V_{S∪j} − cost_j | x] ),

    its expectations being ridge regressions over the questions (Longstaff and Schwartz 2001), on quality forecasts
    that were cross-fitted. What is carried back is what the decisions brought, not what was expected of them. Values
    are held in shares: quality − cost / w.

    Args:
        evidence: Of n questions and m models.
        reading: Of the same, cross-fitted.
        quality: How right each answer was, shape (n, m).
        worths: Money that an answer's being right is worth, shape (L,), one induction for each.
        folds: Shape (n,), for the cross-fitting.
        deadline: Seconds after which nobody new is asked who would likely be late; None for no deadline.
        timed: Whether the seconds were recorded.

    Raises:
        InvalidRequest: If there are more than `MAX_MODELS` models.
    """
    n, m = quality.shape
    if m > MAX_MODELS:
        raise InvalidRequest(
            f"a policy for {m} models; at most {MAX_MODELS} are allowed", hint="leave out those that others dominate"
        )
    mean_cost = np.maximum(evidence.cost.mean(axis=0), 1e-12)
    got = {s: np.zeros(n) for s in subsets(m)}
    value: dict[int, Floats] = {}
    fitted: dict[int, Belief] = {}
    for subset in reversed(subsets(m)):
        asked = members(subset)
        standing = stand(evidence, reading, asked, mean_cost)
        if asked:
            got[subset] = np.take_along_axis(quality, standing.best[:, None], axis=1)[:, 0]
        scaling = Scaling.of(standing.features, standing.trust)
        scaled = scaling(standing.features)
        told = np.column_stack([quality, got[subset]])
        around = _identity(scaling, standing)
        # before anybody was asked, nothing is known that is not in the guess
        out = _held_out(scaled, told, folds, around) if asked else expit(scaled @ around)
        held = out[:, m] if asked else np.zeros(n)
        features = worth_features(out[:, :m], held, asked)
        worth_scaling = Scaling.of(features)
        worth = worth_scaling(features)
        above = supersets(subset, m)
        later = np.column_stack([got[s] for s in above]) if above else np.zeros((n, 0))
        spending = cost_features(evidence, reading, asked, mean_cost)
        costing = Scaling.of(spending)
        spending = costing(spending)
        seconds = ridge(spending, evidence.seconds, penalty=PENALTY)
        expected_seconds = np.maximum(spending @ seconds, 0.0)
        late = np.quantile(evidence.seconds - expected_seconds, LATE, axis=0) if timed else np.zeros(m)
        belief = Belief(
            subset=subset,
            scaling=scaling,
            quality=logistic(scaled, told, penalty=PENALTY, around=around) if asked else around,
            costing=costing,
            cost=ridge(spending, evidence.cost / mean_cost, penalty=PENALTY),
            seconds=seconds,
            late=late,
            worth_scaling=worth_scaling,
            reach=ridge(worth, later, penalty=WORTH_PENALTY),
            onward=np.zeros((worth.shape[1], m * len(worths))),
        )
        in_time = np.ones((n, m), dtype=bool)
        if deadline is not None and timed:
            in_time = evidence.seconds[:, asked].sum(axis=1)[:, None] + expected_seconds + late <= deadline
            if not asked:
                # somebody must be asked
                in_time[~in_time.any(axis=1)] = True
        onward = belief.onward.reshape(worth.shape[1], m, len(worths))
        highest = np.tile(held[:, None], (1, len(worths))) if asked else np.full((n, len(worths)), -np.inf)
        result = np.tile(got[subset][:, None], (1, len(worths)))
        for j in (j for j in range(m) if j not in asked):
            brought = value[subset | 1 << j] - evidence.cost[:, [j]] / worths
            onward[:, j] = ridge(worth, brought, penalty=WORTH_PENALTY)
            expected = np.where(in_time[:, [j]], worth @ onward[:, j], -np.inf)
            better = expected > highest
            highest = np.where(better, expected, highest)
            result = np.where(better, brought, result)
        value[subset] = result
        fitted[subset] = belief
    return {s: fitted[s] for s in subsets(m)}


def _identity(scaling: Scaling, standing: Standing) -> Floats:
    """Weights that say just what the first guesses do: what a regression departs from as far as it has reason to."""
    weights = np.zeros((len(scaling.mean) + 1, len(standing.guess)))
    for column, feature in enumerate(standing.guess):
        if scaling.inverse[feature] > 0:
            weights[feature, column] = 1 / scaling.inverse[feature]
        weights[-1, column] = scaling.mean[feature]
    return weights


def _held_out(scaled: Floats, told: Floats, folds: NDArray[np.int_], around: Floats) -> Floats:
    """Forecasts for each question by a regression that has not seen it."""
    result = np.zeros_like(told)
    for fold in np.unique(folds):
        held = folds == fold
        weights = logistic(scaled[~held], told[~held], penalty=PENALTY, around=around)
        result[held] = expit(scaled[held] @ weights)
    return result
