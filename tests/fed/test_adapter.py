"""Adapters as vectors: layout, specs, and what does not fit."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import AdapterError
from fed.adapter import Adapter, LayerSize, Method, Spec

LAYERS = {"a.q_proj": LayerSize(6, 4), "a.v_proj": LayerSize(6, 3)}


def lora(rank: int = 2, *, rslora: bool = False) -> Spec:
    return Spec.lora(LAYERS, rank=rank, alpha=8, rslora=rslora, base="b" * 64)


def test_tensors_are_views_of_the_vector_in_the_order_of_the_layers() -> None:
    spec = lora()
    flat = np.arange(spec.size, dtype=np.float32)
    adapter = Adapter(spec, flat)
    names = [name for name, _ in adapter.tensors()]
    assert names == ["a.q_proj.lora_A", "a.q_proj.lora_B", "a.v_proj.lora_A", "a.v_proj.lora_B"]
    assert adapter["a.q_proj.lora_A"].shape == (2, 6)
    assert adapter["a.v_proj.lora_B"].shape == (3, 2)
    assert np.concatenate([t.ravel() for _, t in adapter.tensors()]).tolist() == flat.tolist()
    assert all(np.shares_memory(tensor, flat) for _, tensor in adapter.tensors())


def test_factors_come_as_b_and_a() -> None:
    adapter = Adapter.zeros(lora(3))
    assert [(name, b.shape, a.shape) for name, b, a in adapter.factors()] == [
        ("a.q_proj", (4, 3), (3, 6)),
        ("a.v_proj", (3, 3), (3, 6)),
    ]


def test_scaling_is_alpha_over_r_or_its_root() -> None:
    assert lora(4).scaling == 2.0
    assert lora(4, rslora=True).scaling == 8 / math.sqrt(4)
    assert Spec(method=Method.PROMPT, shapes={"p": (2, 3)}, rank=2).scaling == 1.0


@given(rank=st.integers(1, 9), rslora=st.booleans())
def test_a_spec_survives_json(rank: int, rslora: bool) -> None:
    spec = lora(rank, rslora=rslora)
    again = Spec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.size == sum(rank * (s.inputs + s.outputs) for s in LAYERS.values())


def test_specs_whose_tensors_lie_otherwise_are_not_equal() -> None:
    one = Spec(method=Method.DENSE, shapes={"a": (2,), "b": (3,)})
    other = Spec(method=Method.DENSE, shapes={"b": (3,), "a": (2,)})
    assert one != other
    assert one != "a spec"


def test_tensors_are_put_together_and_taken_apart() -> None:
    spec = lora()
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in spec.shapes.items()}
    adapter = Adapter.from_tensors(spec, tensors)
    for name, tensor in adapter.tensors():
        assert tensor.tolist() == tensors[name].tolist()
    moved = adapter.plus(np.ones(spec.size, np.float32))
    assert np.allclose(moved.flat - adapter.flat, 1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda t: {**t, "more": np.zeros(2, np.float32)}, "'more' is not expected"),
        (lambda t: {k: v for k, v in t.items() if not k.endswith("q_proj.lora_B")}, "'a.q_proj.lora_B' is missing"),
        (lambda t: {**t, "a.q_proj.lora_A": np.zeros((6, 2), np.float32)}, "has shape (6, 2); expected (2, 6)"),
    ],
)
def test_tensors_that_are_not_those_of_the_spec_are_refused(wrong, said) -> None:  # type: ignore[no-untyped-def]
    spec = lora()
    tensors = {name: np.zeros(shape, np.float32) for name, shape in spec.shapes.items()}
    with pytest.raises(AdapterError, match=said.replace("(", r"\(").replace(")", r"\)")):
        Adapter.from_tensors(spec, wrong(tensors))


@pytest.mark.parametrize("flat", [np.zeros(3, np.float32), np.zeros(lora().size, np.float64)])
def test_a_vector_of_another_size_or_type_is_refused(flat: np.ndarray) -> None:
    with pytest.raises(AdapterError, match="an adapter of 38 numbers was given"):
        Adapter(lora(), flat)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {**lora().to_json(), "method": "magic"},
        {**lora().to_json(), "shapes": [["a", [0, 2]]]},
        {**lora().to_json(), "shapes": []},
        {**lora().to_json(), "rank": "many"},
        {**lora().to_json(), "alpha": math.nan},
        {**lora().to_json(), "rank": 0},
    ],
)
def test_what_tells_no_shape_is_refused(body: dict[str, object]) -> None:
    with pytest.raises(AdapterError):
        Spec.from_json(body)


def test_rank_zero_and_ranks_of_prompts_are_refused() -> None:
    with pytest.raises(AdapterError, match="rank 0"):
        lora(0)
    with pytest.raises(AdapterError, match="prompt has no rank"):
        Spec(method=Method.PROMPT, shapes={"p": (2, 3)}).at_rank(2)
