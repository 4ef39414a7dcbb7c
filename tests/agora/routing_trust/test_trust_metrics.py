"""Metrics against values computed another way."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from agora.errors import InvalidRequest
from agora.routing.trust import aurc, auroc, ece

answers = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), st.booleans()), min_size=1, max_size=30)


def arrays(pairs: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([c for c, _ in pairs]), np.array([r for _, r in pairs])


@given(answers)
def test_auroc_is_that_of_scikit_learn(pairs: list[tuple[float, bool]]) -> None:
    confidence, right = arrays(pairs)
    if right.all() or not right.any():
        assert auroc(confidence, right) is None
    else:
        assert auroc(confidence, right) == pytest.approx(roc_auc_score(right, confidence))


@given(answers)
def test_ece_is_the_weighted_gap_of_the_bins(pairs: list[tuple[float, bool]]) -> None:
    confidence, right = arrays(pairs)
    total = 0.0
    for b in range(10):
        low, high = b / 10, (b + 1) / 10
        inside = [(c, r) for c, r in pairs if (low < c <= high) or (b == 0 and c == 0)]
        if inside:
            total += abs(sum(r for _, r in inside) - sum(c for c, _ in inside))
    assert ece(confidence, right, bins=10) == pytest.approx(total / len(pairs))


def curve(right: list[bool]) -> float:
    """The area for answers that are in order already."""
    risks = [sum(not r for r in right[:k]) / k for k in range(1, len(right) + 1)]
    return sum(risks) / len(risks)


@given(st.lists(st.tuples(st.sampled_from([0.2, 0.5, 0.8]), st.booleans()), min_size=1, max_size=6))
def test_aurc_is_the_mean_over_all_orders_that_the_confidences_allow(pairs: list[tuple[float, bool]]) -> None:
    allowed = [p for p in permutations(pairs) if all(a[0] >= b[0] for a, b in pairwise(p))]
    expected = sum(curve([r for _, r in p]) for p in allowed) / len(allowed)
    assert aurc(*arrays(pairs)) == pytest.approx(expected)


def test_aurc_of_a_perfect_and_of_a_reversed_order() -> None:
    right = np.array([True] * 6 + [False] * 4)
    good, bad = np.linspace(1, 0.1, 10), np.linspace(0.1, 1, 10)
    assert aurc(good, right) == pytest.approx(curve([True] * 6 + [False] * 4))
    assert aurc(bad, right) == pytest.approx(curve([False] * 4 + [True] * 6))
    assert aurc(np.full(10, 0.6), right) == pytest.approx(0.4)
    assert aurc(good, np.ones(10, dtype=bool)) == 0


@pytest.mark.parametrize("metric", [auroc, ece, aurc])
def test_what_is_no_number_or_does_not_fit_is_refused(metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidRequest, match="NaN"):
        metric(np.array([0.5, np.nan]), np.array([True, False]))
    with pytest.raises(InvalidRequest, match="as many"):
        metric(np.array([0.5]), np.array([True, False]))
    with pytest.raises(InvalidRequest, match="at least one"):
        metric(np.array([]), np.array([], dtype=bool))


def test_ece_compares_only_probabilities() -> None:
    with pytest.raises(InvalidRequest, match=r"\[0, 1\]"):
        ece(np.array([1.5]), np.array([True]))
