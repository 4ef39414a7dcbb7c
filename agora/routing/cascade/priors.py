"""Quality estimators before anybody is asked: from the question alone. A registry, so that others can be added."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from agora.routing.cascade.linear import Scaling, logistic
from agora.routing.cascade.outcomes import Outcomes
from agora.routing.cascade.text_features import TEXT_FEATURES, text_features, weighed, word_counts

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32] | None

NEIGHBOURS: Final = 150
"""Neighbours that say how well a model does near a question: a share of right answers known to 0.04. On MMLU, 50 and
400 gained 0.0017 less by routing."""

SHRINKAGE: Final = 8.0
"""Neighbours' worth of the model's mean that is mixed in, so that few or far neighbours say little. Not tuned."""

PENALTY: Final = 30.0
"""Of the logistic regression on an embedding's 384 numbers, standardised. Not tuned."""

WORD_PENALTY: Final = 12.0
"""Of the regression on hashed words, whose rows have length 1. On 20 random splits of MATH, routing by it gained 0.007
to 0.010 with 5 to 25."""

GLANCE: Final = 0.4
"""Squared length of a question's text features beside its words: they are few, and would else rule. On MATH (same
splits) routing gained 0.010, with 0.1 0.007, with 0.02 0.004."""

OPENING_SHRINKAGE: Final = 20.0
"""Questions' worth of the model's mean that is mixed into the mean of those that open alike. Not tuned."""

OPENING_CHARS: Final = 200
"""Characters of a first line that count: more than a template's line has."""

_DIGITS: Final = re.compile(r"\d+")


class Prior(Protocol):
    """A fitted estimator: how likely each model is right, from the question alone."""

    def predict(self, texts: Sequence[str], embeddings: Vectors) -> Floats:
        """Quality of each model, shape (n, m)."""

    def arrays(self) -> Mapping[str, NDArray[np.generic]]:
        """What it consists of, by name."""

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """The inverse of `arrays`."""

    @classmethod
    def fit(cls, outcomes: Outcomes) -> Self | None:
        """Learns from outcomes; None where they lack what it needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NearestNeighbours:
    """Mean quality among the nearest questions by embedding, weighted by their similarity."""

    embeddings: NDArray[np.float32]
    quality: Floats

    @classmethod
    def fit(cls, outcomes: Outcomes) -> Self | None:
        """Keeps the questions' embeddings; None if there are none."""
        if outcomes.embeddings is None:
            return None
        return cls(embeddings=outcomes.embeddings, quality=outcomes.quality)

    def predict(self, texts: Sequence[str], embeddings: Vectors) -> Floats:
        """Shape (n, m); the mean of each model where there is no embedding."""
        mean = self.quality.mean(axis=0)
        if embeddings is None:
            return np.tile(mean, (len(texts), 1))
        k = min(NEIGHBOURS, len(self.quality))
        rows = []
        for start in range(0, len(embeddings), 512):
            like = embeddings[start : start + 512] @ self.embeddings.T
            nearest = np.argpartition(-like, k - 1, axis=1)[:, :k]
            weights = np.maximum(np.take_along_axis(like, nearest, axis=1), 0.0).astype(np.float64)
            weighed = np.einsum("nk,nkm->nm", weights, self.quality[nearest])
            rows.append((weighed + SHRINKAGE * mean) / (weights.sum(axis=1, keepdims=True) + SHRINKAGE))
        return np.concatenate(rows)

    def arrays(self) -> Mapping[str, NDArray[np.generic]]:
        """Embeddings and quality."""
        return {"embeddings": self.embeddings, "quality": self.quality}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """The inverse of `arrays`."""
        return cls(embeddings=arrays["embeddings"].astype(np.float32), quality=arrays["quality"].astype(np.float64))


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingLogistic:
    """Logistic regression on the embedding."""

    scaling: Scaling
    weights: Floats

    @classmethod
    def fit(cls, outcomes: Outcomes) -> Self | None:
        """Learns it; None if there are no embeddings."""
        if outcomes.embeddings is None:
            return None
        features = outcomes.embeddings.astype(np.float64)
        scaling = Scaling.of(features)
        return cls(scaling=scaling, weights=logistic(scaling(features), outcomes.quality, penalty=PENALTY))

    def predict(self, texts: Sequence[str], embeddings: Vectors) -> Floats:
        """Shape (n, m); without an embedding, what an average one gives."""
        if embeddings is None:
            embeddings = np.full((len(texts), len(self.scaling.mean)), np.nan, dtype=np.float32)
        result: Floats = expit(self.scaling(embeddings.astype(np.float64)) @ self.weights)
        return result

    def arrays(self) -> Mapping[str, NDArray[np.generic]]:
        """Scaling and weights."""
        return {**self.scaling.arrays(), "weights": self.weights}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """The inverse of `arrays`."""
        floats = {name: array.astype(np.float64) for name, array in arrays.items()}
        return cls(scaling=Scaling.from_arrays(floats), weights=floats["weights"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """Ridge regression on hashed words and pairs of words, the rare ones counting more, and on the text's features.

    It needs no embedding.

    Attributes:
        rarity: Log of one over the share of questions that have each hashed word, shape (`WORDS`,).
        scaling: Of the text's features.
        weights: Shape (`WORDS` + text features, m).
        bias: Shape (m,).
    """

    rarity: Floats
    scaling: Scaling
    weights: Floats
    bias: Floats

    @classmethod
    def fit(cls, outcomes: Outcomes) -> Self | None:
        """Learns it."""
        from scipy.sparse import hstack
        from sklearn.linear_model import Ridge

        counts = word_counts(outcomes.questions)
        rarity = np.log((1 + len(outcomes)) / (1 + np.asarray((counts > 0).sum(axis=0)).ravel())) + 1
        features = text_features(outcomes.questions)
        scaling = Scaling.of(features, np.sqrt(GLANCE / TEXT_FEATURES))
        model = Ridge(alpha=WORD_PENALTY, solver="sparse_cg", tol=1e-3)
        model.fit(hstack([weighed(counts, rarity), scaling(features)[:, :-1]]).tocsr(), outcomes.quality)
        weights = np.atleast_2d(np.asarray(model.coef_, dtype=np.float64)).T
        bias = np.atleast_1d(np.asarray(model.intercept_, dtype=np.float64))
        return cls(rarity=rarity, scaling=scaling, weights=np.ascontiguousarray(weights), bias=bias)

    def predict(self, texts: Sequence[str], embeddings: Vectors) -> Floats:
        """Shape (n, m), in [0, 1]."""
        words, glance = self.weights[: len(self.rarity)], self.weights[len(self.rarity) :]
        told = weighed(word_counts(texts), self.rarity) @ words + self.scaling(text_features(texts))[:, :-1] @ glance
        result: Floats = np.clip(told + self.bias, 0.0, 1.0)
        return result

    def arrays(self) -> Mapping[str, NDArray[np.generic]]:
        """Rarity, scaling, weights and bias."""
        return {"rarity": self.rarity, **self.scaling.arrays(), "weights": self.weights, "bias": self.bias}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """The inverse of `arrays`."""
        floats = {name: array.astype(np.float64) for name, array in arrays.items()}
        return cls(
            rarity=floats["rarity"],
            scaling=Scaling.from_arrays(floats),
            weights=floats["weights"],
            bias=floats["bias"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Openings:
    """Mean quality over questions that open alike: those of one task or subject, where a template says which.

    Questions that open like no other get each model's mean.

    Attributes:
        keys: Hashes of openings, rising, shape (g,).
        values: Mean quality under each, drawn towards the whole's by `OPENING_SHRINKAGE`, shape (g, m).
        mean: Mean quality of each model, shape (m,).
    """

    keys: NDArray[np.int64]
    values: Floats
    mean: Floats

    @classmethod
    def fit(cls, outcomes: Outcomes) -> Self | None:
        """Counts."""
        keys, group, count = np.unique(_openings(outcomes.questions), return_inverse=True, return_counts=True)
        mean = outcomes.quality.mean(axis=0)
        sums = np.zeros((len(keys), len(mean)))
        np.add.at(sums, group, outcomes.quality)
        values = (sums + OPENING_SHRINKAGE * mean) / (count[:, None] + OPENING_SHRINKAGE)
        several = count > 1
        return cls(keys=keys[several], values=values[several], mean=mean)

    def predict(self, texts: Sequence[str], embeddings: Vectors) -> Floats:
        """Shape (n, m)."""
        keys = _openings(texts)
        if not len(self.keys):
            return np.tile(self.mean, (len(texts), 1))
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where((self.keys[place] == keys)[:, None], self.values[place], self.mean)

    def arrays(self) -> Mapping[str, NDArray[np.generic]]:
        """Keys, values and mean."""
        return {"keys": self.keys, "values": self.values, "mean": self.mean}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """The inverse of `arrays`."""
        return cls(
            keys=arrays["keys"].astype(np.int64),
            values=arrays["values"].astype(np.float64),
            mean=arrays["mean"].astype(np.float64),
        )


def _openings(texts: Sequence[str]) -> NDArray[np.int64]:
    """A hash of each text's first line, its digits left out."""
    lines = (_DIGITS.sub("", text[:OPENING_CHARS].partition("\n")[0]).strip().casefold() for text in texts)
    digests = (hashlib.sha256(line.encode("utf-8", "surrogatepass")).digest() for line in lines)
    return np.array([int.from_bytes(d[:8], "big", signed=True) for d in digests], dtype=np.int64)


PRIORS: Final[Mapping[str, type[Prior]]] = {
    "knn": NearestNeighbours,
    "logistic": EmbeddingLogistic,
    "words": Words,
    "openings": Openings,
}
"""Estimators by name. What they say is put together in `agora.routing.cascade.stacking`."""


def fit_priors(outcomes: Outcomes, kinds: Sequence[str]) -> dict[str, Prior]:
    """Fits those that can be fitted to these outcomes."""
    fitted = {kind: PRIORS[kind].fit(outcomes) for kind in kinds}
    return {kind: prior for kind, prior in fitted.items() if prior is not None}


def said_by(priors: Mapping[str, Prior], texts: Sequence[str], embeddings: Vectors) -> Floats:
    """What all say, side by side: of each the mean over the models and the models' distances from it.

    Apart, because the distances are small and a choice among models hangs on them.

    Returns:
        Shape (n, number of priors · (m + 1)).
    """
    if not priors:
        return np.zeros((len(texts), 0))
    columns = []
    for prior in priors.values():
        quality = prior.predict(texts, embeddings)
        mean = quality.mean(axis=1, keepdims=True)
        columns += [mean, quality - mean]
    return np.column_stack(columns)


def cross_fitted(outcomes: Outcomes, folds: NDArray[np.int_], fit: Callable[[Outcomes], Mapping[str, Prior]]) -> Floats:
    """What priors say of each question that were fitted without it.

    Args:
        outcomes: n questions.
        folds: Shape (n,): the fold each belongs to.
        fit: Fits them.

    Returns:
        Shape (n, number of priors · (m + 1)).
    """
    parts: list[tuple[NDArray[np.int_], Floats]] = []
    for fold in np.unique(folds):
        held = np.flatnonzero(folds == fold)
        priors = fit(outcomes.take(np.flatnonzero(folds != fold)))
        part = outcomes.take(held)
        parts.append((held, said_by(priors, part.questions, part.embeddings)))
    result = np.zeros((len(outcomes), parts[0][1].shape[1]))
    for held, said in parts:
        result[held] = said
    return result
