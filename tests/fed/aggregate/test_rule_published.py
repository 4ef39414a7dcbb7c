"""The published rules, each against what its paper says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agora.errors import AdapterError
from fed.adapter import Adapter
from fed.aggregate.flat import BATCH, BLOCK, RunningSum
from fed.aggregate.rule import Contribution
from fed.aggregate.rules import make

few = settings(max_examples=20, deadline=None)
Seeds = st.integers(0, 500)


@few
@given(seed=Seeds, count=st.integers(1, 3 * BATCH))
def test_the_mean_of_plain_tensors(worlds: Any, seed: int, count: int) -> None:
    rule = make("mean", worlds.plain_start(), step=0.5)
    contributions = worlds.updates(rule, [None] * count, seed)
    weights = np.array([c.weight for c in contributions])
    wanted = rule.current.flat + 0.5 * np.average([c.delta for c in contributions], axis=0, weights=weights)
    np.testing.assert_allclose(worlds.absorb(rule, contributions).flat, wanted, atol=1e-5)


def test_momentum_keeps_the_velocity(worlds: Any) -> None:
    rule = make("mean", worlds.plain_start(), momentum=0.5)
    first = rule.current.flat.copy()
    delta = np.ones(rule.current.spec.size, np.float32)
    for _ in range(3):
        worlds.absorb(rule, [Contribution(client="c", start=rule.current, delta=delta)])
    np.testing.assert_allclose(rule.current.flat - first, 1 + 1.5 + 1.75, atol=1e-5)


def test_a_long_sum_is_right_across_blocks_and_in_few_vectors() -> None:
    size = 2 * BLOCK + 17
    vectors = [np.random.default_rng(n).standard_normal(size).astype(np.float32) for n in range(BATCH + 3)]
    sums = RunningSum(size), RunningSum(size)
    for n, vector in enumerate(vectors):
        for total in sums:
            total.add(n + 0.5, vector)
        sums[1].total()
    np.testing.assert_allclose(sums[0].total(), sum((n + 0.5) * v for n, v in enumerate(vectors)), atol=1e-3)
    assert sums[0].total().tobytes() == sums[1].total().tobytes()
    assert sums[0].take() is not sums[0].take()


@few
@given(seed=Seeds)
def test_fedit_averages_each_factor(worlds: Any, seed: int) -> None:
    rule = make("factor_mean", worlds.initial(4))
    contributions = worlds.updates(rule, [4, 4, 4], seed)
    weights = [c.weight for c in contributions]
    made = worlds.absorb(rule, contributions)
    for name, tensor in made.tensors():
        ends = [c.start.plus(c.delta)[name] for c in contributions]
        np.testing.assert_allclose(tensor, np.average(ends, axis=0, weights=weights), atol=1e-5)


@pytest.mark.parametrize("padding", ["weights", "update"])
def test_hetlora_pads_what_smaller_clients_lack(worlds: Any, padding: str) -> None:
    """In the server's scaling; with padded weights as published, upper ranks shrink by the share that lacks them."""
    rule = make("factor_mean", worlds.initial(4), padding=padding)
    current = rule.current
    [small, full] = worlds.updates(rule, [2, 4], 3)
    ratio = np.sqrt(small.start.spec.scaling / current.spec.scaling)
    np.testing.assert_allclose(small.start["q.lora_B"] * ratio, current["q.lora_B"][:, :2], atol=1e-6)
    weights = [small.weight, full.weight]
    made = worlds.absorb(rule, [small, full])
    for name, rows in (("q.lora_A", True), ("q.lora_B", False)):
        mine = current[name].copy() if padding == "update" else np.zeros_like(current[name])
        part = (slice(None, 2),) if rows else (slice(None), slice(None, 2))
        mine[part] = ratio * small.start.plus(small.delta)[name]
        wanted = np.average([mine, full.start.plus(full.delta)[name]], axis=0, weights=weights)
        np.testing.assert_allclose(made[name], wanted, atol=1e-5)


def test_ranks_that_vanish_from_both_factors_begin_anew(worlds: Any) -> None:
    rule = make("factor_mean", worlds.initial(4))
    [small] = worlds.updates(rule, [2], 3)
    made = worlds.absorb(rule, [small])
    assert not made["q.lora_B"][:, 2:].any() and made["q.lora_A"][2:].any(1).all()


@few
@given(seed=Seeds)
def test_with_a_frozen_the_mean_of_factors_is_exact(worlds: Any, seed: int) -> None:
    rule = make("freeze_a", worlds.initial(4))
    contributions = worlds.updates(rule, [4, 4, 4], seed)
    with pytest.raises(AdapterError, match="changes A of layer 'q', which is frozen"):
        rule.absorb(contributions[0])
    for c in contributions:
        for _, _, a in c.change.factors():
            a[:] = 0
    wanted = worlds.added(rule.current, contributions, 1.0)
    for name, matrix in worlds.whole(worlds.absorb(rule, contributions)).items():
        np.testing.assert_allclose(matrix, wanted[name], atol=1e-5)


@few
@given(seed=Seeds, ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4), limit=st.sampled_from([12, 256]))
def test_stacks_are_exact_and_grow(worlds: Any, seed: int, ranks: list[int], limit: int) -> None:
    """Without a limit in reach by concatenation alone; with one at the layers' own rank just as well."""
    rule = make("stacking", worlds.initial(2), max_rank=limit)
    for version in range(2):
        contributions = worlds.updates(rule, ranks, seed + version)
        wanted = worlds.added(rule.current, contributions, 1.0)
        made = worlds.absorb(rule, contributions)
        for name, matrix in worlds.whole(made).items():
            np.testing.assert_allclose(matrix, wanted[name], atol=1e-4 * max(1.0, np.abs(wanted[name]).max()))
        assert made.spec.rank <= limit
        assert rule.start_for(made, None).spec.rank == 2
    assert rule.notes["rank"] == made.spec.rank


@pytest.mark.parametrize("lora", [False, True])
def test_fedasync_moves_towards_the_client(worlds: Any, lora: bool) -> None:
    rule = make("mix", worlds.initial(12) if lora else worlds.plain_start(), alpha=0.4)
    wanted: Any = worlds.whole(rule.current)["q"] if lora else rule.current.flat.astype(float)
    contributions = worlds.updates(rule, [3, 2] if lora else [None, None], 5, late=[0, 3])
    for c, alpha in zip(contributions, (0.4, 0.2), strict=True):
        client: Adapter = c.start.plus(c.delta)
        wanted = (1 - alpha) * wanted + alpha * (worlds.whole(client)["q"] if lora else client.flat)
    made = worlds.absorb(rule, contributions)
    np.testing.assert_allclose(worlds.whole(made)["q"] if lora else made.flat, wanted, atol=2e-5)


def test_many_mixtures_take_bounded_memory(worlds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fed.aggregate.mix.STACK", 30)
    rule, exact = make("mix", worlds.initial(12)), worlds.whole(worlds.initial(12))["q"]
    sizes = []
    for n in range(8):
        [c] = worlds.updates(rule, [4], n)
        rule.absorb(c)
        exact = 0.4 * exact + 0.6 * worlds.whole(c.start.plus(c.delta))["q"]
        sizes.append(sum(a.size for a in rule.state().arrays.values()))
    assert max(sizes[4:]) <= max(sizes[:4])
    np.testing.assert_allclose(worlds.whole(rule.publish())["q"], exact, atol=1e-4)
