"""Boosted trees for what a sum of estimators gets wrong: quick to learn, and plain arrays to store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEAST_ROWS: Final = 4000
"""Questions below which there are no trees. Fitted to 5,500 to 11,000 of MMLU, routing gained 0.002 by them; fewer
were not tried, and have less to tell."""

TREES: Final = 80
"""Trees. On MMLU, 60 at a rate of 0.12 and 240 at 0.03 differed by 0.0002 in quality under the curve."""

DEPTH: Final = 2
"""Questions that a tree asks; on MMLU 2, 3 and 4 differed by 0.0002."""

RATE: Final = 0.1
"""Share of what a tree finds that counts."""

SHRINKAGE: Final = 60.0
"""Questions' worth of nothing that is mixed into each leaf. On MMLU 20 to 200 differed by 0.0001."""

BINS: Final = 24
"""Values of a feature that are told apart when learning. Not tuned."""

ROWS: Final = 0.6
"""Share of the questions that each tree sees. Not tuned."""

COLUMNS: Final = 0.5
"""Share of the features that each tree may ask of. Not tuned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trees:
    """A sum of T trees of depth D over d features, for m targets at once.

    A tree asks one question at each depth, the same in all its branches, and so is told by D features, D thresholds
    and 2^D leaves.

    Source: Friedman (2002), "Stochastic gradient boosting", with the symmetric trees of Prokhorenkova et al. (2018),
    "CatBoost".

    Attributes:
        features: Shape (T, D).
        thresholds: Shape (T, D).
        leaves: Shape (T, 2^D, m).
    """

    features: NDArray[np.int64]
    thresholds: Floats
    leaves: Floats

    @classmethod
    def none(cls, m: int) -> Trees:
        """No trees: 0 for everything."""
        return cls(
            features=np.zeros((0, DEPTH), dtype=np.int64),
            thresholds=np.zeros((0, DEPTH)),
            leaves=np.zeros((0, 1 << DEPTH, m)),
        )

    @classmethod
    def fit(cls, features: Floats, targets: Floats) -> Trees:
        """Learns them; the same from the same numbers.

        Args:
            features: Shape (n, d).
            targets: Shape (n, m), of mean 0.
        """
        n, d = features.shape
        rng = np.random.default_rng(0)
        edges = np.quantile(features, np.arange(1, BINS) / BINS, axis=0)
        codes = np.stack([np.searchsorted(edges[:, f], features[:, f]) for f in range(d)])
        left = np.array(targets, dtype=np.float64)
        kept = []
        for _ in range(TREES):
            rows = rng.permutation(n)[: max(int(ROWS * n), 1)]
            columns = rng.permutation(d)[: max(int(COLUMNS * d), 1)]
            goals, place = left[rows], np.zeros(len(rows), dtype=np.int64)
            asked: list[tuple[int, float]] = []
            for _ in range(DEPTH):
                found = [(*_split(place, codes[f, rows], goals, 1 << len(asked)), int(f)) for f in columns]
                _, edge, feature = max(found)
                asked.append((feature, float(edges[edge, feature])))
                place = 2 * place + (codes[feature, rows] > edge)
            tree = np.array([f for f, _ in asked]), np.array([t for _, t in asked])
            count = np.bincount(place, minlength=1 << DEPTH)
            sums = np.column_stack([np.bincount(place, weights=g, minlength=1 << DEPTH) for g in goals.T])
            leaves = RATE * sums / (count + SHRINKAGE)[:, None]
            left -= leaves[_leaf(features, *tree)]
            kept.append((*tree, leaves))
        return cls(
            features=np.stack([f for f, _, _ in kept]),
            thresholds=np.stack([t for _, t, _ in kept]),
            leaves=np.stack([v for _, _, v in kept]),
        )

    def __call__(self, features: Floats) -> Floats:
        """Shape (n, m)."""
        result = np.zeros((len(features), self.leaves.shape[2]))
        for tree, thresholds, leaves in zip(self.features, self.thresholds, self.leaves, strict=True):
            result += leaves[_leaf(features, tree, thresholds)]
        return result

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """What `from_arrays` takes."""
        return {"trees.features": self.features, "trees.thresholds": self.thresholds, "trees.leaves": self.leaves}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Trees:
        """The inverse of `arrays`."""
        return cls(
            features=arrays["trees.features"].astype(np.int64),
            thresholds=arrays["trees.thresholds"].astype(np.float64),
            leaves=arrays["trees.leaves"].astype(np.float64),
        )


def _split(place: NDArray[np.int64], codes: NDArray[np.int64], goals: Floats, branches: int) -> tuple[float, int]:
    """Squares explained by the best edge of one feature, asked in every branch, and that edge."""
    at = place * BINS + codes
    cells = branches * BINS
    count = np.bincount(at, minlength=cells).reshape(branches, BINS).cumsum(axis=1)
    explained = np.zeros(BINS - 1)
    for goal in goals.T:
        sums = np.bincount(at, weights=goal, minlength=cells).reshape(branches, BINS).cumsum(axis=1)
        below, above = sums[:, :-1], sums[:, -1:] - sums[:, :-1]
        parts = below**2 / (count[:, :-1] + SHRINKAGE) + above**2 / (count[:, -1:] - count[:, :-1] + SHRINKAGE)
        explained += parts.sum(axis=0)
    best = int(explained.argmax())
    return float(explained[best]), best


def _leaf(features: Floats, tree: NDArray[np.int64], thresholds: Floats) -> NDArray[np.int64]:
    """The leaf that each row comes to, shape (n,)."""
    place = np.zeros(len(features), dtype=np.int64)
    for feature, threshold in zip(tree, thresholds, strict=True):
        place = 2 * place + (features[:, feature] > threshold)
    return place
