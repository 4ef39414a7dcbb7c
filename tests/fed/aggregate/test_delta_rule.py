"""agora's rule for LoRA, against whole matrices in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agora.errors import AdapterError
from fed.adapter import Adapter
from fed.aggregate.delta import Delta, DeltaOptions
from fed.aggregate.dense import Dense
from fed.aggregate.rule import Contribution

Ranks = st.lists(st.integers(1, 6), min_size=1, max_size=6)
Seeds = st.integers(0, 1_000)
few = settings(max_examples=30, deadline=None)


def products_match(worlds: Any, adapter: Adapter, wanted: dict[str, Any], tolerance: float = 3e-5) -> None:
    for name, matrix in worlds.whole(adapter).items():
        np.testing.assert_allclose(matrix, wanted[name], atol=tolerance * max(1.0, np.abs(wanted[name]).max()))


@few
@given(ranks=Ranks, seed=Seeds, step=st.sampled_from([0.5, 1.0, 2.0]))
def test_the_next_version_is_the_best_of_its_rank(worlds: Any, ranks: list[int], seed: int, step: float) -> None:
    rule = Delta(worlds.initial(4), DeltaOptions(step=step))
    late = [n % 3 for n in range(len(ranks))]
    contributions = worlds.updates(rule, ranks, seed, late=late)
    wanted = worlds.added(rule.current, contributions, step)
    made = worlds.absorb(rule, contributions)
    for name, matrix in worlds.whole(made).items():
        off = np.linalg.norm(matrix - wanted[name])
        least = np.linalg.norm(worlds.best(wanted[name], 4) - wanted[name])
        # Within rounding of the best: singular values near each other leave open which one is kept, not how well.
        assert off <= least + 1e-5 * np.linalg.norm(wanted[name])


@few
@given(ranks=Ranks, seed=Seeds)
def test_head_and_tail_are_the_whole_sum(worlds: Any, ranks: list[int], seed: int) -> None:
    """An error buffer that holds all: after any number of versions W + E is the exact sum."""
    rule = Delta(worlds.initial(3), DeltaOptions(error_rank=20, error_kept=1.0))
    wanted = worlds.whole(rule.current)
    for version in range(3):
        contributions = worlds.updates(rule, ranks, seed + version)
        before = worlds.whole(rule.current)
        for name, after in worlds.added(rule.current, contributions, 1.0).items():
            wanted[name] = wanted[name] + after - before[name]
        worlds.absorb(rule, contributions)
    state = rule.state()
    for n, (name, matrix) in enumerate(worlds.whole(rule.current).items()):
        tail = state.arrays[f"error.p{n}"].astype(float) @ state.arrays[f"error.q{n}"]
        np.testing.assert_allclose(matrix + tail, wanted[name], atol=1e-4)
    assert rule.notes["cut"] < 1e-5


@few
@given(ranks=Ranks, seed=Seeds)
def test_the_order_of_updates_does_not_matter(worlds: Any, ranks: list[int], seed: int) -> None:
    one, other = Delta(worlds.initial(8)), Delta(worlds.initial(8))
    contributions = worlds.updates(one, ranks, seed)
    worlds.close(worlds.absorb(one, contributions), worlds.absorb(other, contributions[::-1]))


@few
@given(seed=Seeds, rank=st.integers(1, 6))
def test_the_same_update_in_other_factors_gives_the_same(worlds: Any, seed: int, rank: int) -> None:
    """(B·G, G⁻¹·A) is the product of (B, A): start and end, each with a gauge of its own."""
    rng = np.random.default_rng(seed)
    results = []
    for gauge in (False, True):
        rule = Delta(worlds.initial(12))
        [c] = worlds.updates(rule, [rank], seed)
        ends = [c.start, c.start.plus(c.delta)]
        if gauge:
            for n, adapter in enumerate(ends):
                tensors: dict[str, Any] = {}
                for name, b, a in adapter.factors():
                    g = np.linalg.qr(rng.standard_normal((rank, rank)))[0] @ np.diag(rng.uniform(0.5, 2.0, rank))
                    tensors |= {f"{name}.lora_B": b @ g, f"{name}.lora_A": np.linalg.inv(g) @ a}
                ends[n] = Adapter.from_tensors(adapter.spec, tensors)
        rule.absorb(Contribution(client="c", start=ends[0], delta=ends[1].flat - ends[0].flat))
        results.append(rule.publish())
    worlds.close(*results)


@few
@given(seed=Seeds, ranks=Ranks)
def test_it_is_the_dense_rule_without_the_matrix(worlds: Any, seed: int, ranks: list[int]) -> None:
    """FlexLoRA's way: numpy's SVD of the whole sum. Where it can tell which singular value is the last one kept."""
    delta, dense = Delta(worlds.initial(4), DeltaOptions(error_rank=0)), Dense(worlds.initial(4))
    for version in range(2):
        contributions = worlds.updates(dense, ranks, seed + version)
        wanted = worlds.added(dense.current, contributions, 1.0)
        one, other = worlds.absorb(delta, contributions), worlds.absorb(dense, contributions)
        for matrix in wanted.values():
            s = np.linalg.svd(matrix, compute_uv=False)
            if s[3] - s[4] < 1e-2 * s[0]:
                return
        worlds.close(one, other, 1e-3)


@few
@given(ranks=st.lists(st.integers(1, 3), min_size=8, max_size=12), seed=Seeds)
def test_a_full_stack_is_exact_while_the_rank_is_low(worlds: Any, ranks: list[int], seed: int) -> None:
    """Layers of at most 12 by 10 have at most rank 10: half of 20 columns holds any sum of them."""
    wide, narrow = Delta(worlds.initial(4)), Delta(worlds.initial(4), DeltaOptions(stack=20))
    contributions = worlds.updates(wide, ranks, seed)
    worlds.close(worlds.absorb(wide, contributions), worlds.absorb(narrow, contributions), 1e-4)


def test_memory_stays_bounded_and_the_loss_is_told(worlds: Any) -> None:
    rule = Delta(worlds.initial(2), DeltaOptions(stack=8, error_rank=0))
    held = []
    for n in range(12):
        for c in worlds.updates(rule, [2, 1], n):
            rule.absorb(c)
        held.append(sum(a.size for name, a in rule.state().arrays.items() if name.startswith("stack")))
    assert max(held[6:]) <= max(held[:6])
    rule.publish()
    assert rule.notes["cut"] > 0


def test_updates_from_one_start_share_its_columns(worlds: Any) -> None:
    rule = Delta(worlds.initial(4))
    for c in worlds.updates(rule, [4, 4, 4], 0):
        rule.absorb(c)
    assert rule.state().facts["stack"]["columns"] == 16
    assert len(rule.state().facts["stack"]["groups"]) == 1


@few
@given(seed=Seeds, beta=st.sampled_from([0.5, 0.9]))
def test_momentum_is_that_of_fedavgm_on_products(worlds: Any, seed: int, beta: float) -> None:
    rule = Delta(worlds.initial(12), DeltaOptions(momentum=beta, step=0.5, error_rank=12, error_kept=1.0))
    wanted = worlds.whole(rule.current)
    velocity = {name: np.zeros_like(m) for name, m in wanted.items()}
    for version in range(3):
        contributions = worlds.updates(rule, [2, 3], seed + version)
        before = worlds.whole(rule.current)
        for name, after in worlds.added(rule.current, contributions, 1.0).items():
            velocity[name] = beta * velocity[name] + after - before[name]
            wanted[name] = wanted[name] + 0.5 * velocity[name]
        products_match(worlds, worlds.absorb(rule, contributions), wanted, 2e-4)


def test_unused_ranks_can_still_learn(worlds: Any) -> None:
    """An update of rank 1 on a zero product: the other ranks have B = 0 and a random A."""
    start = worlds.fresh(worlds.lora(4))
    rule = Delta(start)
    delta = np.zeros(start.spec.size, np.float32)
    b = Adapter(start.spec, delta)["q.lora_B"]
    b[:, 0] = 0.1
    made = worlds.absorb(rule, [Contribution(client="c", start=start, delta=delta)])
    assert np.count_nonzero(made["q.lora_B"].any(0)) == 1
    for _, b, a in made.factors():
        assert np.all(b.any(0) | a.any(1))
        assert np.all(np.linalg.norm(a, axis=1) > 0.2)


def test_nan_is_never_published(worlds: Any) -> None:
    rule = Delta(worlds.initial(4))
    [good, bad] = worlds.updates(rule, [4, 2], 1)
    first = rule.current
    bad.delta[3] = np.nan
    rule.absorb(good)
    rule.absorb(bad)
    with pytest.raises(AdapterError, match="NaN or infinity"):
        rule.publish()
    assert rule.current is first and rule.publish() is first
    assert worlds.absorb(rule, [good]) is not first


def test_the_bytes_are_the_same_whatever_the_number_of_threads(worlds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fed.aggregate.terms.PARALLEL_FROM", 0)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            rule = Delta(worlds.initial(4))
            made.append(worlds.absorb(rule, worlds.updates(rule, [4, 2, 3], 1)).flat.tobytes())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1]
