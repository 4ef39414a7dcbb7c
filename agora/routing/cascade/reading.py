"""What is read from a question, and from each answer by itself: the first of the two stages of belief."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from agora.routing.cascade.boosting import LEAST_ROWS, Trees
from agora.routing.cascade.evidence import Evidence
from agora.routing.cascade.linear import Scaling, logistic, ridge
from agora.routing.cascade.stacking import Stack

Floats = NDArray[np.float64]

PENALTY: Final = 20.0
"""Of the regressions, on standardised features. Not tuned."""

TEXT_TRUST: Final = 0.3
"""Of a text's own features beside what priors say; see `Scaling.of`. Not tuned."""

LOG_COST: Final = 5.0
"""Largest distance from a model's mean cost that is expected or learned from, as a log: a factor of 150, beyond which
lies an answer that ran into its limit of tokens, or a mistake of the record."""

SURE: Final = 0.01
"""Nothing is believed to be likelier or less likely than this before anybody was asked; a sum may leave [0, 1], and no
question alone tells its answer's rightness as surely. Not tuned."""

MOST: Final = 6.0
"""Largest log odds that are believed of one answer: 400 to 1, beyond what a thousand questions can show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was read of n questions.

    Attributes:
        before: Log odds that each model will be right, from the question alone, shape (n, m).
        alone: Log odds that each answer is right, from the question and that answer alone, shape (n, m).
        cost: Money expected of each model as a share of its mean, from the question, shape (n, m).
        seconds: Seconds expected of each, shape (n, m).
        usual: Log odds that each model is right, whatever the question, shape (m,).
    """

    before: Floats
    alone: Floats
    cost: Floats
    seconds: Floats
    usual: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """What the priors say together of a question, and a logistic regression for each model's answer.

    Attributes:
        before: Of what the priors say.
        trees: Of what that gets wrong, by it and by the text's features; none where there are few questions.
        scaling: Of a question's features.
        cost: Weights for the log of its share of each model's mean, shape (d + 1, m).
        seconds: Weights, shape (d + 1, m).
        own_scaling: Of the features of a question and each model's answer.
        own: Weights for each model, shape (e + 1, 1).
        usual: Log odds that each model is right, whatever the question, shape (m,).
    """

    before: Stack
    trees: Trees
    scaling: Scaling
    cost: Floats
    seconds: Floats
    own_scaling: tuple[Scaling, ...]
    own: tuple[Floats, ...]
    usual: Floats

    @classmethod
    def fit(cls, evidence: Evidence, quality: Floats) -> Reader:
        """Learns from what n models made of m questions; `quality` has shape (n, m)."""
        m = quality.shape[1]
        mean = np.maximum(evidence.cost.mean(axis=0), 1e-12)
        scaling = Scaling.of(evidence.before, _trust(evidence))
        scaled = scaling(evidence.before)
        stack = Stack.fit(evidence.said, quality)
        told = stack(evidence.said)
        trees = Trees.none(m)
        if len(evidence) >= LEAST_ROWS:
            trees = Trees.fit(_with_told(evidence, told), quality - told)
        before = _log_odds(told + trees(_with_told(evidence, told)))
        own_scaling, own = [], []
        for j in range(m):
            features = _with_answer(evidence, before, j)
            own_scaling.append(Scaling.of(features, _own_trust(evidence)))
            own.append(logistic(own_scaling[-1](features), quality[:, [j]], penalty=PENALTY))
        return cls(
            before=stack,
            trees=trees,
            scaling=scaling,
            cost=_log_cost(scaled, evidence.cost / mean),
            seconds=ridge(scaled, evidence.seconds, penalty=PENALTY),
            own_scaling=tuple(own_scaling),
            own=tuple(own),
            usual=np.clip(logit((quality.sum(axis=0) + 1) / (len(quality) + 2)), -MOST, MOST),
        )

    def read(self, evidence: Evidence, asked: Sequence[int]) -> Reading:
        """Reads questions and the answers of those asked; `alone` is 0 for others, whose answers are not looked at."""
        scaled = self.scaling(evidence.before)
        told = self.before(evidence.said)
        before = _log_odds(told + self.trees(_with_told(evidence, told)))
        alone = np.zeros((len(evidence), len(self.own)))
        for j in asked:
            scores = self.own_scaling[j](_with_answer(evidence, before, j)) @ self.own[j]
            alone[:, j] = np.clip(scores[:, 0], -MOST, MOST)
        return Reading(
            before=before,
            alone=alone,
            cost=np.exp(np.clip(scaled @ self.cost, -LOG_COST, LOG_COST)),
            seconds=np.maximum(scaled @ self.seconds, 0.0),
            usual=self.usual,
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What it consists of, by name."""
        arrays: dict[str, NDArray[Any]] = {
            **self.before.arrays(),
            **self.trees.arrays(),
            "cost": self.cost,
            "seconds": self.seconds,
            "usual": self.usual,
            **self.scaling.arrays(),
        }
        for j, (scaling, weights) in enumerate(zip(self.own_scaling, self.own, strict=True)):
            arrays |= {f"own.{j}.{name}": a for name, a in {**scaling.arrays(), "weights": weights}.items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Reader:
        """The inverse of `arrays`."""
        models = range(len(arrays["usual"]))
        return cls(
            before=Stack.from_arrays(arrays),
            trees=Trees.from_arrays(arrays),
            scaling=Scaling.from_arrays(arrays),
            cost=arrays["cost"],
            seconds=arrays["seconds"],
            own_scaling=tuple(
                Scaling(mean=arrays[f"own.{j}.mean"], inverse=arrays[f"own.{j}.inverse"]) for j in models
            ),
            own=tuple(arrays[f"own.{j}.weights"] for j in models),
            usual=arrays["usual"],
        )


def cross_read(evidence: Evidence, quality: Floats, folds: NDArray[np.int_]) -> Reading:
    """Reads each question by regressions that were fitted without it; `folds` has shape (n,)."""
    everybody = range(quality.shape[1])
    parts: list[tuple[NDArray[np.int_], Reading]] = []
    for fold in np.unique(folds):
        held, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        parts.append((held, Reader.fit(evidence.take(rest), quality[rest]).read(evidence.take(held), everybody)))
    order = np.argsort(np.concatenate([held for held, _ in parts]))
    tables = [f.name for f in fields(Reading) if f.name != "usual"]
    return Reading(
        usual=np.mean([part.usual for _, part in parts], axis=0),
        **{name: np.concatenate([getattr(part, name) for _, part in parts])[order] for name in tables},
    )


def probability(log_odds: Floats) -> Floats:
    """From log odds."""
    result: Floats = expit(log_odds)
    return result


def _log_cost(scaled: Floats, share: Floats) -> Floats:
    """Weights for the log of costs, which multiply more than they add; their mean is kept (Duan's smearing, 1983)."""
    weights = ridge(scaled, np.log(np.clip(share, np.exp(-LOG_COST), np.exp(LOG_COST))), penalty=PENALTY)
    # Who costs nothing is taken to cost next to nothing: there is no logarithm of 0.
    weights[-1] += np.log(np.maximum(share.mean(axis=0), 1e-12) / np.exp(scaled @ weights).mean(axis=0))
    return weights


def _log_odds(quality: Floats) -> Floats:
    """Of probabilities that may leave [0, 1]."""
    result: Floats = logit(np.clip(quality, SURE, 1 - SURE))
    return result


def _trust(evidence: Evidence) -> Floats:
    said = evidence.before.shape[1] - evidence.texts
    return np.concatenate([np.ones(said), np.full(evidence.texts, TEXT_TRUST)])


def _own_trust(evidence: Evidence) -> Floats:
    return np.concatenate([np.ones(1), np.full(evidence.texts, TEXT_TRUST), np.ones(evidence.own.shape[2])])


def _with_told(evidence: Evidence, told: Floats) -> Floats:
    """What trees look at: what the priors say together, its mean over the models, and the text's features."""
    texts = evidence.before[:, evidence.before.shape[1] - evidence.texts :]
    mean = told.mean(axis=1, keepdims=True)
    return np.column_stack([mean, told - mean, texts])


def _with_answer(evidence: Evidence, before: Floats, model: int) -> Floats:
    texts = evidence.before[:, evidence.before.shape[1] - evidence.texts :]
    return np.column_stack([before[:, model], texts, evidence.own[:, model]])
