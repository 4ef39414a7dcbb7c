from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import InvalidRequest
from fed.adapter import Adapter, LayerSize, Method, Spec, Vector
from fed.chain import Chain, Context, Memory, Residual
from fed.wire import Refused

SPEC = Spec(method=Method.DENSE, shapes={"w": (60,)})
CHAINS: dict[str, list[dict[str, Any]]] = {
    "top_k": [{"kind": "top_k", "fraction": 0.1}],
    "int8": [{"kind": "int8", "block": 16}],
    "both": [{"kind": "top_k", "fraction": 0.1}, {"kind": "int8", "block": 4, "error_feedback": False}],
    "weighted": [{"kind": "weight"}, {"kind": "top_k", "fraction": 0.1}],
}


def context(job: int, start: Adapter | None = None, examples: int = 3) -> Context:
    return Context(start=start or Adapter.zeros(SPEC), job=job, seed=job, examples=examples)


def delta(seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(60, np.float32)


@pytest.mark.parametrize("name", CHAINS)
def test_all_that_was_sent_and_what_is_kept_is_all_there_was(name: str) -> None:
    """The telescoping sum of error feedback, with rows, and so weights, that change from job to job."""
    chain, memory = Chain.from_config(CHAINS[name]), Memory()
    true, sent = np.zeros(60), np.zeros(60)
    for job in range(1, 60):
        update, memory = chain.apply(delta(job), context(job, examples=1 + job % 7), memory)
        memory = memory.settle(job, accepted=True)
        true += delta(job)
        sent += update.unweighted
    assert memory.settled is not None
    np.testing.assert_allclose(sent + memory.settled.values, true, atol=1e-4)
    # It does not grow with the number of jobs: ‖e‖ ≤ 2√(1−δ)/δ·max‖Δ‖, with δ = k/n (Karimireddy et al. 2019, lemma 3).
    longest = max(np.linalg.norm(delta(job)) for job in range(1, 60))
    assert np.linalg.norm(memory.settled.values) < 2 * np.sqrt(0.9) / 0.1 * longest


def test_error_feedback_finds_what_top_k_alone_never_sends() -> None:
    """The same small push in every job beside large noise: without memory it is never among the largest."""
    totals = {}
    for feedback in (True, False):
        chain = Chain.from_config([{"kind": "top_k", "fraction": 0.05, "error_feedback": feedback}])
        memory, total = Memory(), np.zeros(60)
        for job in range(1, 200):
            x = np.zeros(60, np.float32)
            x[:3] = 10.0 * (-1) ** job
            x[30] = 0.5
            update, memory = chain.apply(x, context(job), memory)
            memory = memory.settle(job, accepted=True)
            total += update.delta
        totals[feedback] = total[30]
    assert totals[False] == 0.0
    assert totals[True] == pytest.approx(199 * 0.5, rel=0.3)


@given(
    st.lists(st.sampled_from(["accepted", "lost", "lost twice"]), min_size=1, max_size=25),
    st.sampled_from(sorted(CHAINS)),
)
def test_a_lost_update_costs_its_own_news_and_nothing_else(fates: list[str], name: str) -> None:
    chain, memory = Chain.from_config(CHAINS[name]), Memory()
    counted = np.zeros(60)
    for job, fate in enumerate(fates, 1):
        update, memory = chain.apply(delta(job), context(job), memory)
        memory = memory.settle(job, accepted=fate == "accepted")
        if fate == "lost twice":
            memory = memory.settle(job, accepted=False).settle(job, accepted=True)
        if fate == "accepted":
            counted += delta(job) - update.unweighted
    kept = np.zeros(60) if memory.settled is None else memory.settled.values
    np.testing.assert_allclose(kept, counted, atol=1e-4)


def test_the_fate_of_the_last_update_must_be_known_first() -> None:
    chain = Chain.from_config(CHAINS["top_k"])
    _, memory = chain.apply(delta(1), context(1))
    with pytest.raises(InvalidRequest, match="job 1"):
        chain.apply(delta(2), context(2), memory)
    assert memory.settle(9, accepted=True) is memory


def test_a_refused_call_leaves_the_memory_as_it_was() -> None:
    chain = Chain.from_config(CHAINS["top_k"])
    _, memory = chain.apply(delta(1), context(1))
    memory = memory.settle(1, accepted=True)
    before = memory.pack()
    with pytest.raises(Refused):
        chain.apply(np.full(60, np.nan, np.float32), context(2), memory)
    assert memory.pack() == before


def test_no_feedback_no_memory() -> None:
    for config in ([], [{"kind": "top_k", "fraction": 0.1, "error_feedback": False}], [{"kind": "clip", "norm": 1.0}]):
        _, memory = Chain.from_config(config).apply(delta(1), context(1))
        assert memory.job is None and memory.settled is None


def test_plain_tensors_of_another_version_take_the_residual_as_it_is() -> None:
    chain = Chain.from_config(CHAINS["top_k"])
    _, memory = chain.apply(delta(1), context(1))
    memory = memory.settle(1, accepted=True)
    later = Adapter(SPEC, delta(50))
    assert memory.settled is not None
    owed = memory.owed(later)
    assert owed is not None
    np.testing.assert_array_equal(owed, memory.settled.values)


def test_other_tensors_make_the_residual_void() -> None:
    memory = Memory(settled=Residual(Adapter.zeros(SPEC), delta(1)))
    other = Adapter.zeros(Spec(method=Method.DENSE, shapes={"v": (60,)}))
    assert memory.owed(other) is None


def test_a_checkpoint_brings_it_back() -> None:
    lora = Spec.lora({"q": LayerSize(6, 5)}, rank=2, alpha=4)
    start = Adapter(lora, np.random.default_rng(0).standard_normal(lora.size, np.float32))
    residual = Residual(start, np.ones(lora.size, np.float32))
    for memory in (Memory(), Memory(settled=residual), Memory(settled=residual).opened(7, Residual(start, start.flat))):
        data = memory.pack()
        back = Memory.unpack(data)
        assert back.pack() == data == memory.pack()
        assert back.job == memory.job
        for old, new in ((memory.settled, back.settled), (memory.open, back.open)):
            assert (old is None) == (new is None)
            if old is not None and new is not None:
                assert new.start.spec == lora
                np.testing.assert_array_equal(new.values, old.values)
                np.testing.assert_array_equal(new.start.flat, old.start.flat)


def test_a_run_goes_on_from_its_checkpoint_to_the_same_bytes() -> None:
    chain, memory = Chain.from_config(CHAINS["both"]), Memory()
    for job in (1, 2):
        _, memory = chain.apply(delta(job), context(job), memory)
        memory = memory.settle(job, accepted=True)
    one, _ = chain.apply(delta(3), context(3), memory)
    other, _ = chain.apply(delta(3), context(3), Memory.unpack(memory.pack()))
    assert one.delta.tobytes() == other.delta.tobytes()


def test_a_damaged_checkpoint_is_refused() -> None:
    data = Memory(settled=Residual(Adapter.zeros(SPEC), delta(1))).pack()
    for end in (0, 50, len(data) - 1):
        with pytest.raises(Refused):
            Memory.unpack(data[:end])
    with pytest.raises(Refused):
        Memory.unpack(data[:-1] + bytes([data[-1] ^ 1]))
