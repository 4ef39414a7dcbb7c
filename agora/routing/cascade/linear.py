"""Ridge and logistic regression for many targets over the same features: small, exact, and plain arrays to store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit

Floats = NDArray[np.float64]

STEPS: Final = 60
"""Most steps of logistic regression; on the recorded outcomes 60 gave the weights of 1,000 to 0.0002."""

SETTLED: Final = 1e-3
"""Largest change of a weight (of standardised features) at which a fit is done: far below its standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Brings features to mean 0 and deviation 1; a constant one becomes 0.

    Attributes:
        mean: Shape (d,).
        inverse: One over the deviation, 0 for constant features; shape (d,).
    """

    mean: Floats
    inverse: Floats

    @classmethod
    def of(cls, features: Floats, trust: Floats | float = 1.0) -> Scaling:
        """Learns it; NaN in `features` is left out of the means.

        Args:
            features: Shape (n, d).
            trust: Deviation that each feature gets: with twice as much it is penalised a quarter; shape (d,) or one
                number.
        """
        known = np.isfinite(features)
        count = np.maximum(known.sum(axis=0), 1)
        mean = np.where(known, features, 0.0).sum(axis=0) / count
        deviation = np.sqrt((np.where(known, features - mean, 0.0) ** 2).sum(axis=0) / count)
        return cls(mean=mean, inverse=np.where(deviation > 1e-9, trust / np.maximum(deviation, 1e-9), 0.0))

    def __call__(self, features: Floats) -> Floats:
        """Shape (n, d + 1): scaled, cut off at ±6 so that no odd row rules, and a column of ones."""
        scaled = np.nan_to_num((features - self.mean) * self.inverse, nan=0.0, posinf=6.0, neginf=-6.0)
        return np.column_stack([np.clip(scaled, -6, 6), np.ones(len(features))])

    def arrays(self) -> dict[str, Floats]:
        """What `from_arrays` takes."""
        return {"mean": self.mean, "inverse": self.inverse}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Floats]) -> Scaling:
        """The inverse of `arrays`."""
        return cls(mean=arrays["mean"], inverse=arrays["inverse"])


def ridge(scaled: Floats, targets: Floats, *, penalty: float) -> Floats:
    """Least squares with a penalty on all weights but that of the last feature, the ones.

    Args:
        scaled: Shape (n, d + 1), from `Scaling`.
        targets: Shape (n, k).
        penalty: Weight of the squared weights.

    Returns:
        Weights, shape (d + 1, k).
    """
    gram = scaled.T @ scaled + _penalties(scaled, penalty)
    weights: Floats = cho_solve(cho_factor(gram), scaled.T @ targets)
    return weights


def logistic(scaled: Floats, targets: Floats, *, penalty: float, around: Floats | None = None) -> Floats:
    """Logistic regression, one for each target, by the fixed-Hessian bound of Böhning and Lindsay (1988), accelerated.

    The Hessian of the log-likelihood is nowhere more than XᵀX/4, so one factorisation serves all steps and targets.

    Args:
        scaled: Shape (n, d + 1), from `Scaling`.
        targets: Shape (n, k), in [0, 1].
        penalty: Weight of half the squared weights.
        around: Weights from which the distance is penalised instead, shape (d + 1, 1) or (d + 1, k).

    Returns:
        Weights, shape (d + 1, k).
    """
    penalties = _penalties(scaled, penalty)
    # a product with the inverse is several times as quick as solving anew in each step
    inverse = np.linalg.inv(scaled.T @ scaled / 4 + penalties)
    diagonal = penalties.diagonal()[:, None]
    centre = np.zeros((scaled.shape[1], 1)) if around is None else around
    weights = np.tile(centre, (1, targets.shape[1] // centre.shape[1]))
    ahead, momentum = weights, 1.0
    for _ in range(STEPS):
        gradient = scaled.T @ (targets - expit(scaled @ ahead)) - diagonal * (ahead - centre)
        moved = ahead + inverse @ gradient
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = moved + (momentum - 1) / following * (moved - weights)
        change = float(np.abs(moved - weights).max(initial=0.0))
        weights, momentum = moved, following
        if change < SETTLED:
            break
    return weights


def _penalties(scaled: Floats, penalty: float) -> Floats:
    diagonal = np.full(scaled.shape[1], penalty)
    # the intercept is free, but for what keeps the matrix regular
    diagonal[-1] = 1e-6 * len(scaled)
    return np.diag(diagonal)
