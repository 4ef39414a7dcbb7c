"""Where there are many questions, trees add to what the priors say; stored, they say the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agora.routing.cascade import reading
from agora.routing.cascade.evidence import Evidence, evidence_of
from agora.routing.cascade.fit import fit
from agora.routing.cascade.outcomes import Outcomes
from agora.routing.cascade.reading import Reader
from agora.routing.cascade.saved import load, save


def bent(n: int, seed: int) -> Outcomes:
    """The dear model is better at questions of middling length alone: no straight line in the length tells that."""
    rng = np.random.default_rng(seed)
    length = rng.integers(5, 60, n)
    middling = (length > 18) & (length < 40)
    chance = np.column_stack([np.full(n, 0.5), np.where(middling, 0.9, 0.5)])
    return Outcomes(
        models=("cheap", "dear"),
        questions=tuple(" ".join("abcdefgh"[i] * 4 for i in rng.integers(0, 8, k)) + "?" for k in length),
        quality=(rng.random((n, 2)) < chance).astype(float),
        cost=np.tile([1.0, 10.0], (n, 1)),
    )


def evidence(outcomes: Outcomes) -> Evidence:
    return evidence_of(outcomes, np.zeros((len(outcomes), 0)), ())


def test_trees_find_what_lines_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    train, judged = bent(2000, 0), bent(2000, 1)
    monkeypatch.setattr(reading, "LEAST_ROWS", 2000)
    told = [
        Reader.fit(evidence(part), part.quality).read(evidence(judged), ()) for part in (train, train.take(range(1999)))
    ]
    gains = [reading.probability(t.before) @ [-1.0, 1.0] for t in told]
    assert np.ptp(gains[1]) < 1e-9, "without an estimator or trees all questions are alike"
    # whom to ask the dear model, when it may be asked half of the questions: by chance 0.2 of them bring something
    brought = [(judged.quality @ [-1.0, 1.0])[g >= np.median(g)].mean() for g in gains]
    assert brought[0] > brought[1] + 0.08


def test_a_policy_with_trees_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LEAST_ROWS", 80)
    fitted, judged = fit(bent(160, 2), folds=2), bent(200, 3)
    assert len(fitted.mind.reader.trees.leaves)
    save(fitted, tmp_path)
    before, after = (f.mind.board(judged).forecasts[0].quality for f in (fitted, load(tmp_path)))
    assert np.array_equal(before, after) and np.ptp(before) > 0.01
