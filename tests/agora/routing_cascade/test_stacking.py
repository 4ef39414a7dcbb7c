"""Estimators are weighed by what they bring, and by nothing where they bring nothing."""

from __future__ import annotations

import numpy as np
import pytest

from agora.routing.cascade.stacking import Stack


def said_of(*estimates: np.ndarray) -> np.ndarray:
    """As `said_by` puts it: the mean over the models, then each model's distance from it."""
    columns = []
    for estimate in estimates:
        mean = estimate.mean(axis=1, keepdims=True)
        columns += [mean, estimate - mean]
    return np.column_stack(columns)


def test_a_guess_at_random_gets_no_weight_beside_a_good_one() -> None:
    rng = np.random.default_rng(0)
    true = rng.uniform(0.1, 0.9, (4000, 3))
    quality = (rng.random(true.shape) < true).astype(float)
    said = said_of(true, rng.uniform(0, 1, true.shape))
    stack = Stack.fit(said, quality)
    assert stack.mean[0] == pytest.approx(1, abs=0.1) and stack.apart[0] == pytest.approx(1, abs=0.1)
    assert abs(stack.mean[1]) < 0.06 and abs(stack.apart[1]) < 0.06
    assert np.abs(stack(said) - true).mean() < 0.03


def test_too_bold_an_estimate_is_tamed() -> None:
    rng = np.random.default_rng(1)
    true = rng.uniform(0.4, 0.6, (4000, 2))
    bold = 0.5 + 4 * (true - 0.5)
    stack = Stack.fit(said_of(bold), (rng.random(true.shape) < true).astype(float))
    assert stack.apart[0] == pytest.approx(0.25, abs=0.1)


def test_how_hard_and_for_whom_are_weighed_apart() -> None:
    """An estimator may know how hard a question is, and nothing of for whom."""
    rng = np.random.default_rng(2)
    level = rng.uniform(0.2, 0.8, (4000, 1))
    noise = rng.normal(0, 0.2, (4000, 2))
    estimate = level + noise - noise.mean(axis=1, keepdims=True)
    stack = Stack.fit(said_of(estimate), (rng.random((4000, 2)) < level).astype(float))
    assert stack.mean[0] == pytest.approx(1, abs=0.1) and stack.apart[0] < 0.1


def test_without_estimates_the_usual_is_said() -> None:
    quality = np.array([[1.0, 0.0], [1.0, 1.0]])
    stack = Stack.fit(np.zeros((2, 0)), quality)
    assert stack(np.zeros((3, 0))) == pytest.approx(np.tile([1.0, 0.5], (3, 1)))


def test_it_comes_back_as_it_was_stored() -> None:
    rng = np.random.default_rng(3)
    said, quality = rng.random((50, 6)), rng.random((50, 2))
    stack = Stack.fit(said, quality)
    assert np.array_equal(Stack.from_arrays(stack.arrays())(said), stack(said))
