"""Outcomes made by a known law: three models, the dearer the better, whose wrong answers differ."""

from __future__ import annotations

import numpy as np
import pytest

from agora.routing.cascade.fit import Kinds, fit_kinds
from agora.routing.cascade.outcomes import Outcomes


def made(n: int, seed: int) -> Outcomes:
    """Questions of two kinds, the hard ones hard for the cheap model; a signal tells somewhat who is right."""
    rng = np.random.default_rng(seed)
    hard = rng.random(n) < 0.5
    chance = np.where(hard[:, None], [0.25, 0.7, 0.9], [0.9, 0.93, 0.95])
    right = rng.random((n, 3)) < chance
    wrong = rng.integers(100, 110, size=(n, 3))
    return Outcomes(
        models=("small", "middle", "large"),
        questions=tuple(f"{'Prove by cases' if h else 'Add'} that {i} and {i + 3} fit?" for i, h in enumerate(hard)),
        quality=right.astype(float),
        cost=rng.uniform(0.8, 1.2, size=(n, 3)) * [1.0, 4.0, 20.0],
        seconds=rng.uniform(0.8, 1.2, size=(n, 3)) * [0.2, 0.5, 1.0],
        answers=tuple(
            tuple("7" if r else str(w) for r, w in zip(rs, ws, strict=True))
            for rs, ws in zip(right, wrong, strict=True)
        ),
        signals={"logprob": np.where(rng.random((n, 3)) < 0.1, np.nan, right + rng.normal(0, 0.7, size=(n, 3)))},
    )


@pytest.fixture(scope="session")
def train() -> Outcomes:
    return made(240, seed=1)


@pytest.fixture(scope="session")
def unseen() -> Outcomes:
    return made(300, seed=2)


@pytest.fixture(scope="session")
def kinds(train: Outcomes) -> Kinds:
    return fit_kinds(train, seed=3, folds=3)
