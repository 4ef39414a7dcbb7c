from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import ConfigError
from fed.adapter import Adapter, LayerSize, Method, Spec
from fed.chain import STAGES, Chain, Clip, Context, Int8, Noise, TopK, Weight

SPEC = Spec.lora({"q": LayerSize(30, 20)}, rank=4, alpha=8)
FULL: list[dict[str, Any]] = [
    {"kind": "clip", "norm": 2.0, "per_tensor": True},
    {"kind": "weight", "by": 3.0},
    {"kind": "noise", "multiplier": 0.5},
    {"kind": "top_k", "fraction": 0.25, "error_feedback": False},
    {"kind": "int8", "block": 64, "error_feedback": True},
]


def context(spec: Spec = SPEC, seed: int = 0, job: int = 1) -> Context:
    return Context(start=Adapter.zeros(spec), job=job, seed=seed, examples=5)


def delta(seed: int = 0, spec: Spec = SPEC) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(spec.size, np.float32)


def test_a_configuration_comes_back_as_it_was() -> None:
    chain = Chain.from_config(FULL)
    assert [type(stage) for stage in chain.stages] == [Clip, Weight, Noise, TopK, Int8]
    assert chain.to_json() == FULL
    assert Chain.from_config(chain.to_json()) == chain
    assert {stage["kind"] for stage in FULL} == set(STAGES)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ([{"kind": "zip"}], r"stage 1: kind is 'zip'; it must be one of clip, weight, noise, top_k, int8"),
        ([{"norm": 1.0}], r"stage 1: .* has no kind"),
        (["clip"], r"stage 1: 'clip' has no kind"),
        ([{"kind": "int8"}, {"kind": "clip"}], r"stage 2: clip needs 'norm'"),
        ([{"kind": "clip", "norm": 1, "nrom": 2}], r"clip has no setting 'nrom'; it has norm, per_tensor"),
        ([{"kind": "int8"}, {"kind": "noise", "multiplier": 1.0}], r"noise stands after int8"),
        ([{"kind": "int8"}, {"kind": "top_k", "fraction": 0.1}], r"top_k stands after int8"),
        ([{"kind": "int8"}, {"kind": "int8"}], r"int8 stands after int8"),
        ([{"kind": "noise", "multiplier": 1.0}], r"noise without clip"),
        ([{"kind": "top_k", "fraction": 0.1}, {"kind": "int8", "block": None}], r"after top_k"),
        ([{"kind": "clip", "norm": 0}], r"clip: norm is 0; it must be a number above 0"),
        ([{"kind": "clip", "norm": float("nan")}], r"clip: norm is nan"),
        ([{"kind": "clip", "norm": float("inf")}], r"clip: norm is inf"),
        ([{"kind": "clip", "norm": True}], r"clip: norm is True"),
        ([{"kind": "clip", "norm": 1.0, "per_tensor": 1}], r"clip: per_tensor is 1; it must be true or false"),
        ([{"kind": "weight", "by": "rows"}], r"weight: by is 'rows'"),
        ([{"kind": "weight", "by": -1.0}], r"weight: by is -1.0"),
        ([{"kind": "clip", "norm": 1.0}, {"kind": "noise", "multiplier": -1}], r"noise: multiplier is -1"),
        ([{"kind": "top_k", "fraction": 1.5}], r"top_k: fraction is 1.5; it must be a number above 0, at most 1"),
        ([{"kind": "top_k", "fraction": "1%"}], r"top_k: fraction is '1%'"),
        ([{"kind": "int8", "block": 0}], r"int8: block is 0"),
        ([{"kind": "int8", "block": 2.0}], r"int8: block is 2.0"),
        ([{"kind": "int8", "error_feedback": "no"}], r"int8: error_feedback is 'no'"),
    ],
)
def test_a_wrong_configuration_is_told_what_is_allowed(config: list[Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Chain.from_config(config)


def test_no_stage_changes_nothing() -> None:
    sent, memory = Chain().apply(delta(), context())
    np.testing.assert_array_equal(sent.delta, delta())
    assert sent.weight == 1.0 and memory.job is None and memory.settled is None


@given(st.integers(0, 31), st.integers(0, 2**63), st.integers(1, 80))
def test_the_server_reads_what_the_client_says_it_sent(which: int, seed: int, size: int) -> None:
    """Any part of the chain, any size."""
    spec = Spec(method=Method.DENSE, shapes={"w": (size,), "b": (2,)})
    config = [stage for bit, stage in enumerate(FULL) if which >> bit & 1]
    if which >> 2 & 1 and not which & 1:
        config.insert(0, FULL[0])
    chain = Chain.from_config(config)
    given_delta = delta(seed, spec)
    before = given_delta.copy()
    sent, _ = chain.apply(given_delta, context(spec, seed))
    np.testing.assert_array_equal(given_delta, before)
    np.testing.assert_array_equal(chain.decode(sent.parts, spec), sent.delta)
    assert sent.weight == chain.factor(5)
    assert sum(part.nbytes for part in sent.parts.values()) <= chain.payload_bytes(spec)
    again, _ = chain.apply(given_delta, context(spec, seed))
    assert {name: part.tobytes() for name, part in again.parts.items()} == {
        name: part.tobytes() for name, part in sent.parts.items()
    }


def test_seed_and_job_change_what_is_random() -> None:
    chain = Chain.from_config([{"kind": "clip", "norm": 1.0}, {"kind": "noise", "multiplier": 1.0}])
    one, other, third = (chain.apply(delta(), c)[0].delta for c in (context(), context(seed=1), context(job=2)))
    assert not np.array_equal(one, other) and not np.array_equal(one, third)


def test_negative_and_long_seeds_do() -> None:
    chain = Chain.from_config([{"kind": "int8"}])
    assert np.isfinite(chain.apply(delta(), context(seed=-(2**70) - 3))[0].delta).all()
