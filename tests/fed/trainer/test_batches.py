"""Rows are drawn pass by pass, of alike lengths, and become tensors whose places are the right ones."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed.trainer.batches import collate, judge, plan, steps_of
from fed.trainer.encode import Row


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 20), st.integers(1, 30), st.integers(0, 9))
def test_all_rows_are_seen_as_often_as_each_other(lengths: list[int], batch: int, steps: int, seed: int) -> None:
    size = min(batch, len(lengths))
    planned = list(plan(lengths, batch=batch, steps=steps, rng=np.random.default_rng(seed)))
    assert [len(p) for p in planned] == [size] * steps
    assert all(len(set(p)) == size for p in planned)
    seen = Counter(i for p in planned for i in p)
    counts = [seen[i] for i in range(len(lengths))]
    assert max(counts) - min(counts) <= 1
    assert planned == list(plan(lengths, batch=batch, steps=steps, rng=np.random.default_rng(seed)))


def test_alike_lengths_share_a_step() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, 640).tolist()
    planned = list(plan(lengths, batch=16, steps=40, rng=rng))
    padded = sum(max(lengths[i] for i in p) * len(p) for p in planned)
    assert padded < 1.12 * sum(lengths)  # drawn without order it is 1.8 times as much
    orders = [[lengths[i] for i in p] for p in planned]
    assert np.argsort([max(o) for o in orders[:8]]).tolist() != list(range(8))  # and steps do not grow longer


@pytest.mark.parametrize(
    ("rows", "batch", "steps", "epochs", "expected"),
    [
        (100, 16, None, 1.0, 7),
        (100, 16, 3, 9.0, 3),
        (5, 16, None, 1.0, 1),
        (100, 10, None, 2.5, 25),
        (9, 4, None, 0.1, 1),
    ],
)
def test_steps_of_a_job(rows: int, batch: int, steps: int | None, epochs: float, expected: int) -> None:
    assert steps_of(rows, batch=batch, steps=steps, epochs=epochs) == expected


def test_places_and_targets_are_those_of_the_responses() -> None:
    batch = collate([Row((5, 6, 7, 8), 2), Row((9, 10), 2, (20, 21, 22), 1), Row((11, 12, 13), 2)])
    assert batch.ids.tolist() == [[5, 6, 7, 8], [9, 10, 0, 0], [11, 12, 13, 0]]
    assert batch.rows.tolist() == [0, 0, 1, 2]
    assert batch.places.tolist() == [1, 2, 1, 1]
    assert batch.targets.tolist() == [7, 8, 1, 13]
    assert batch.choices.tolist() == [[-1] * 3, [-1] * 3, [20, 21, 22], [-1] * 3]
    assert batch.tokens == 9


def test_words_are_judged_among_themselves_and_tokens_among_all() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 30, generator=generator).requires_grad_()
    batch = collate([Row((1, 2), 1), Row((3,), 1, (20, 21), 1), Row((4,), 1, (5, 6, 7), 0)])
    judged = judge(logits, batch)
    every = logits.detach().double().numpy()
    expected = [
        np.log(np.exp(every[0]).sum()) - every[0, 2],
        np.log(np.exp(every[1, [20, 21]]).sum()) - every[1, 21],
        np.log(np.exp(every[2, [5, 6, 7]]).sum()) - every[2, 5],
    ]
    np.testing.assert_allclose(judged.losses.detach().numpy(), expected, rtol=1e-5)
    assert judged.correct.tolist() == [
        every[0].argmax() == 2,
        every[1, 21] > every[1, 20],
        every[2, [5, 6, 7]].argmax() == 0,
    ]
    judged.losses.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert logits.grad[1, [0, 5, 29]].tolist() == [0, 0, 0]  # other words of the vocabulary do not matter there
