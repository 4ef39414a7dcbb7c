"""How good confidences are: do they order answers (AUROC, AURC), and do they say what comes true (ECE)?"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from agora.errors import InvalidRequest

ECE_BINS: Final = 15
"""Bins of equal width, as in Guo et al. 2017 (arXiv 1706.04599)."""


def auroc(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> float | None:
    """Probability that a right answer has more confidence than a wrong one; equal confidences count half.

    Returns:
        In [0, 1]; None if all answers are right or all wrong, where it is not defined.

    Raises:
        InvalidRequest: If the arrays do not fit.
    """
    told, truth = _checked(confidence, right)
    positive = int(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        return None
    ranks = rankdata(told)
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def ece(confidence: NDArray[np.float64], right: NDArray[np.bool_], *, bins: int = ECE_BINS) -> float:
    """Expected calibration error: mean |accuracy − confidence| over bins of equal width, weighted by their answers.

    A confidence on the border of two bins counts to the lower one; 0 to the first (Guo et al. 2017, arXiv 1706.04599).

    Raises:
        InvalidRequest: If the arrays do not fit, or a confidence is not in [0, 1].
    """
    told, truth = _checked(confidence, right)
    if not ((told >= 0) & (told <= 1)).all():
        raise InvalidRequest("a confidence is not in [0, 1]: calibration error compares it with a share")
    at = np.clip(np.ceil(told * bins).astype(np.int64) - 1, 0, bins - 1)
    off = np.bincount(at, weights=truth - told, minlength=bins)
    return float(np.abs(off).sum() / len(truth))


def aurc(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Area under the risk–coverage curve: the share of wrong answers among the k most trusted, averaged over k = 1…n.

    Geifman et al. 2018 (arXiv 1805.08206). Answers of equal confidence are in random order, and this is the exact
    expectation over that order: within a group of equals, the errors expected grow linearly.

    Returns:
        In [0, 1]; 0 if all answers are right. Lower is better; without any order it is the share of wrong answers.

    Raises:
        InvalidRequest: If the arrays do not fit.
    """
    told, truth = _checked(confidence, right)
    order = np.argsort(-told, kind="stable")
    wrong = (~truth[order]).astype(np.float64)
    _, group, sizes = np.unique(-told[order], return_inverse=True, return_counts=True)
    shared = (np.bincount(group, weights=wrong) / sizes)[group]
    return float((np.cumsum(shared) / np.arange(1, len(wrong) + 1)).mean())


def _checked(
    confidence: NDArray[np.float64], right: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    told, truth = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.bool_)
    if told.ndim != 1 or told.shape != truth.shape or not len(told):
        raise InvalidRequest(f"confidences {told.shape} and labels {truth.shape} must be as many, and at least one")
    if np.isnan(told).any():
        raise InvalidRequest("a confidence is NaN; leave the answer out, or give it a number")
    return told, truth
