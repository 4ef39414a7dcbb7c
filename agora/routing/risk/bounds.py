"""Hoeffding–Bentkus, the p-value of the first papers on risk control: for comparison."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from agora.routing.risk.betting import checked_losses, checked_share


def hoeffding_bentkus_p_values(losses: NDArray[np.float64], max_risk: float) -> NDArray[np.float64]:
    """P-values of the hypotheses that each column's mean loss is above `max_risk`, by their means alone.

    Losses are mapped to [0, 1] by (loss + 1)/2, then p = min(exp(−n·KL(min(r̂, α'), α')), e·P(Bin(n, α') ≤ ⌈n·r̂⌉))
    (Bates et al. 2021, arXiv 2101.02703; used in Angelopoulos et al. 2021, arXiv 2110.01052). They do not see that most
    losses are 0, and on losses around 0 they therefore certify next to nothing.

    Args:
        losses: Shape (n, k), in [−1, 1]; rows independent and from one distribution.
        max_risk: In (0, 1).

    Returns:
        Shape (k,), in [0, 1].

    Raises:
        InvalidRequest: If an argument is out of range.
    """
    table = checked_losses(losses)
    mean = (checked_share("max_risk", max_risk) + 1) / 2
    n = len(table)
    seen = (table.mean(axis=0) + 1) / 2
    below = np.clip(np.minimum(seen, mean), 0.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(below > 0, below * np.log(below / mean), 0.0)
        second = np.where(below < 1, (1 - below) * np.log((1 - below) / (1 - mean)), 0.0)
    hoeffding = np.exp(-n * (first + second))
    bentkus = np.e * binom.cdf(np.ceil(n * seen), n, mean)
    return np.asarray(np.minimum(np.minimum(hoeffding, bentkus), 1.0), dtype=np.float64)
