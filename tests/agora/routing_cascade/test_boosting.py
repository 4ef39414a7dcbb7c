"""Trees find what a straight line does not, and say little where there is nothing to find."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from agora.routing.cascade.boosting import BINS, SHRINKAGE, Trees, _split


def centred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(values - values.mean(axis=0), dtype=np.float64)


def test_steps_and_corners_are_found() -> None:
    rng = np.random.default_rng(0)
    x, unseen = rng.normal(size=(4000, 5)), rng.normal(size=(2000, 5))

    def law(f: NDArray[np.float64]) -> NDArray[np.float64]:
        corner = (f[:, 0] > 0.3) & (f[:, 1] < 0)
        return np.column_stack([np.where(corner, 0.5, 0.0), np.abs(f[:, 2]) * 0.4])

    trees = Trees.fit(x, centred(law(x)) + rng.normal(0, 0.4, (4000, 2)))
    true = centred(law(unseen))
    left = ((trees(unseen) - true) ** 2).mean(axis=0) / (true**2).mean(axis=0)
    assert (left < 0.3).all(), "most of what can be told is told"


def test_noise_is_hardly_learned() -> None:
    rng = np.random.default_rng(1)
    x, noise = rng.normal(size=(4000, 8)), rng.choice([-0.5, 0.5], (4000, 2))
    said = Trees.fit(x, centred(noise))(rng.normal(size=(2000, 8)))
    assert said.std() < 0.12 * noise.std()


def test_a_split_explains_what_it_does_by_hand() -> None:
    codes = np.array([0, 0, 1, 1, 2])
    goals = np.array([[1.0], [1.0], [-1.0], [-1.0], [-1.0]])
    explained, edge = _split(np.zeros(5, dtype=np.int64), codes, goals, 1)
    assert edge == 0, "between the first value and the others"
    assert explained == pytest.approx(4 / (2 + SHRINKAGE) + 9 / (3 + SHRINKAGE))


def test_constant_features_and_equal_ones_do_no_harm() -> None:
    rng = np.random.default_rng(2)
    told = rng.integers(0, 3, 3000).astype(float)
    x = np.column_stack([np.ones(3000), told, told])
    said = Trees.fit(x, centred(told[:, None]))(x)
    assert np.isfinite(said).all()
    assert [said[told == t].std() for t in range(3)] == pytest.approx([0, 0, 0], abs=1e-12)
    assert said[told == 2].mean() - said[told == 0].mean() == pytest.approx(2, abs=0.3)


def test_the_same_numbers_give_the_same_trees_which_come_back_as_stored() -> None:
    rng = np.random.default_rng(3)
    x, goals = rng.normal(size=(500, BINS // 4)), rng.normal(size=(500, 3))
    trees = Trees.fit(x, goals)
    assert np.array_equal(trees(x), Trees.fit(x, goals)(x))
    assert np.array_equal(Trees.from_arrays(trees.arrays())(x), trees(x))
    assert (Trees.from_arrays(Trees.none(3).arrays())(x) == 0).all()
