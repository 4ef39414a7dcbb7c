"""Logistic regression on soft labels."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

RIDGE: Final = 1.0
"""Penalty ½·RIDGE·|w|² against the sum of log losses (scikit-learn's C = 1), on columns of standard deviation 1: a
prior that no signal moves the log-odds by much more than one per standard deviation."""

STEPS: Final = 1_000
"""Steps of the solver at most; a few dozen are usual."""


def fit_logistic(
    table: NDArray[np.float64], target: NDArray[np.float64], *, ridge: float = RIDGE
) -> tuple[NDArray[np.float64], float]:
    """Weights and intercept that minimise Σ log loss + ½·ridge·|w|²; the intercept is not penalised.

    Args:
        table: Shape (n, k); k may be 0.
        target: Shape (n,), in [0, 1]: labels, or smoothed ones; not all 0 and not all 1.
        ridge: Above 0 keeps the weights finite where the classes can be told apart entirely.

    Returns:
        Weights of shape (k,) and the intercept.
    """
    n, k = table.shape
    if not k:
        share = float(target.mean())
        return np.zeros(0), float(np.log(share / (1 - share)))
    # It takes a second to import, and who only reads calibrators never fits one.
    from sklearn.linear_model import LogisticRegression

    # A soft label is a row of each kind with its share of the weight.
    rows = np.vstack([table, table])
    labels = np.concatenate([np.ones(n), np.zeros(n)])
    weights = np.concatenate([target, 1 - target])
    kept = weights > 0
    model = LogisticRegression(C=1 / ridge, max_iter=STEPS, tol=1e-8)
    model.fit(rows[kept], labels[kept], sample_weight=weights[kept])
    return np.asarray(model.coef_[0], dtype=np.float64), float(model.intercept_[0])
