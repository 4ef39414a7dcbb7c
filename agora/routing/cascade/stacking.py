"""What several estimators say before anybody is asked, put together with as few weights as will do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A sum of what P estimators say, whose weights are not negative and the same for every model.

    How hard a question is for all, and for whom it is harder than for others, are weighed apart: the first is far
    easier to tell, and the choice among models hangs on the second. All models share the weights, so that they are
    learned from n · m outcomes: on 430 questions, weights of its own for each model cost more than they brought.

    Source: Breiman (1996), "Stacked regressions": weights ≥ 0, fitted to what each estimator says of questions that
    were held out from it.

    Attributes:
        mean: Weights of what is said of all models' mean, shape (P,).
        apart: Weights of what is said of the models' distances from it, shape (P,).
        bias: Shape (m,).
    """

    mean: Floats
    apart: Floats
    bias: Floats

    @classmethod
    def fit(cls, said: Floats, quality: Floats) -> Stack:
        """Learns it.

        Args:
            said: Cross-fitted, as from `agora.routing.cascade.priors.said_by`, shape (n, P · (m + 1)).
            quality: Shape (n, m).
        """
        from scipy.optimize import nnls

        means, distances = _parts(said, quality.shape[1])
        count = means.shape[1]
        level = quality.mean(axis=1)
        apart = quality - level[:, None]
        mean_weights, apart_weights = np.zeros(count), np.zeros(count)
        if count:
            mean_weights = nnls(means - means.mean(axis=0), level - level.mean())[0]
            centred = distances - distances.mean(axis=0)
            goal = apart - apart.mean(axis=0)
            apart_weights = nnls(centred.reshape(-1, count), goal.reshape(-1))[0]
        bias = quality.mean(axis=0) - (means @ mean_weights).mean() - (distances @ apart_weights).mean(axis=0)
        return cls(mean=mean_weights, apart=apart_weights, bias=bias)

    def __call__(self, said: Floats) -> Floats:
        """Quality of each model, shape (n, m); may leave [0, 1]."""
        means, distances = _parts(said, len(self.bias))
        result: Floats = (means @ self.mean)[:, None] + distances @ self.apart + self.bias
        return result

    def arrays(self) -> dict[str, Floats]:
        """What `from_arrays` takes."""
        return {"stack.mean": self.mean, "stack.apart": self.apart, "stack.bias": self.bias}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Floats]) -> Stack:
        """The inverse of `arrays`."""
        return cls(mean=arrays["stack.mean"], apart=arrays["stack.apart"], bias=arrays["stack.bias"])


def _parts(said: Floats, m: int) -> tuple[Floats, Floats]:
    """Means, shape (n, P), and distances, shape (n, m, P)."""
    told = said.reshape(len(said), said.shape[1] // (m + 1), m + 1)
    return told[:, :, 0], told[:, :, 1:].transpose(0, 2, 1)
