from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fed.adapter import Adapter, LayerSize, Spec, Vector
from fed.chain.carry import carry

LAYERS = {"q": LayerSize(14, 11), "v": LayerSize(9, 12)}


def adapter(rank: int, seed: int, alpha: float = 8.0, scale: float = 1.0) -> Adapter:
    spec = Spec.lora(LAYERS, rank=rank, alpha=alpha)
    return Adapter(spec, np.random.default_rng(seed).standard_normal(spec.size, np.float32) * np.float32(scale))


def products(x: Adapter) -> dict[str, NDArray[np.float64]]:
    """s·B·A in full."""
    return {n: x.spec.scaling * b.astype(np.float64) @ a.astype(np.float64) for n, b, a in x.factors()}


def change(start: Adapter, delta: Vector) -> dict[str, NDArray[np.float64]]:
    return {n: p - products(start)[n] for n, p in products(start.plus(delta)).items()}


def small(spec: Spec, seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(spec.size, np.float32) * np.float32(1e-4)


def turned(start: Adapter, seed: int) -> Adapter:
    """(B·G, G⁻¹·A): the same adapter in other numbers."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, NDArray[np.floating]] = {}
    for name, b, a in start.factors():
        g = np.linalg.qr(rng.standard_normal((start.spec.rank, start.spec.rank)))[0] * rng.uniform(0.5, 2)
        tensors |= {f"{name}.lora_B": b @ g, f"{name}.lora_A": np.linalg.inv(g) @ a}
    return Adapter.from_tensors(start.spec, tensors)


@given(st.integers(1, 6), st.integers(0, 1000))
def test_the_same_adapter_in_other_numbers_gets_the_same_change_of_its_product(rank: int, seed: int) -> None:
    start = adapter(rank, seed)
    onto = turned(start, seed + 1)
    delta = small(start.spec, seed + 2)
    moved = carry(delta, start, onto)
    assert moved is not None
    for name, wanted in change(start, delta).items():
        error = np.linalg.norm(change(onto, moved)[name] - wanted)
        assert error < 2e-3 * np.linalg.norm(wanted)


def test_as_it_stands_it_would_mean_something_else() -> None:
    start = adapter(3, 0)
    onto = turned(start, 1)
    delta = small(start.spec, 2)
    for name, wanted in change(start, delta).items():
        assert np.linalg.norm(change(onto, delta)[name] - wanted) > 0.5 * np.linalg.norm(wanted)


def test_same_start_same_numbers() -> None:
    start = adapter(3, 0)
    delta = small(start.spec, 1)
    assert carry(delta, start, start) is delta
    assert carry(delta, start, Adapter(start.spec, start.flat.copy())) is delta


@pytest.mark.parametrize("alpha", [8.0, 2.0])
def test_a_higher_rank_takes_all_of_it(alpha: float) -> None:
    """Padded as a server pads: B = 0 with A random; and another scaling."""
    start = adapter(2, 0)
    spec = Spec.lora(LAYERS, rank=4, alpha=alpha)
    rng = np.random.default_rng(5)
    tensors = {}
    for name, b, a in start.factors():
        tensors[f"{name}.lora_B"] = np.concatenate([b, np.zeros_like(b)], axis=1)
        tensors[f"{name}.lora_A"] = np.concatenate([a, rng.standard_normal(a.shape).astype(np.float32)])
    onto = Adapter.from_tensors(spec, tensors)
    delta = small(start.spec, 1)
    moved = carry(delta, start, onto)
    assert moved is not None and moved.shape == (spec.size,)
    for name, wanted in change(start, delta).items():
        assert np.linalg.norm(change(onto, moved)[name] - wanted) < 2e-3 * np.linalg.norm(wanted)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
def test_any_other_version_takes_the_nearest_change_there_is(rank: int, other: int, seed: int) -> None:
    """Against least squares over the whole product, formed in full; of another rank, the smallest solution of it."""
    start, onto = adapter(rank, seed), adapter(other, seed + 1)
    delta = small(start.spec, seed + 2)
    moved = carry(delta, start, onto)
    assert moved is not None
    for full, best, got in solved(start, delta, onto, moved):
        np.testing.assert_allclose(full @ got, full @ best, atol=2e-3 * np.abs(full @ best).max())
        if rank != other:
            np.testing.assert_allclose(got, best, atol=2e-3 * np.abs(best).max())


def solved(start: Adapter, delta: Vector, onto: Adapter, moved: Vector) -> list[tuple[NDArray[np.floating], ...]]:
    """For every layer: the first-order map from numbers to products, its smallest solution, and what was found."""
    found: list[tuple[NDArray[np.floating], ...]] = []
    for (name, b, a), (_, db, da) in zip(onto.factors(), Adapter(onto.spec, moved).factors(), strict=True):
        full = onto.spec.scaling * np.concatenate(
            [np.kron(np.eye(b.shape[0]), a.T.astype(np.float64)), np.kron(b.astype(np.float64), np.eye(a.shape[1]))],
            axis=1,
        )
        best = np.linalg.lstsq(full, change(start, delta)[name].ravel(), rcond=1e-6)[0]
        found.append((full, best, np.concatenate([db.ravel(), da.ravel()]).astype(np.float64)))
    return found


def test_directions_that_an_adapter_hardly_has_take_no_part() -> None:
    """B near zero, as at the start of training: expressed through it a change would need huge numbers in A."""
    start = adapter(2, 0)
    onto = adapter(2, 1)
    flat = onto.flat.copy()
    for name in LAYERS:
        slot = onto.spec.slots[f"{name}.lora_B"]
        flat[slot.start : slot.start + slot.size] *= np.float32(1e-6)
    delta = small(start.spec, 2)
    moved = carry(delta, start, Adapter(onto.spec, flat))
    assert moved is not None
    assert np.linalg.norm(moved) < 20 * np.linalg.norm(delta)


@given(st.integers(0, 1000))
def test_a_rule_that_keeps_a_gets_nothing_in_a(seed: int) -> None:
    start = adapter(3, seed)
    onto = start.plus(only(start.spec, "lora_B", seed + 1) * np.float32(0.3))
    delta = only(start.spec, "lora_B", seed + 2)
    moved = carry(delta, start, onto)
    assert moved is not None
    np.testing.assert_allclose(moved, delta, atol=1e-5)


def only(spec: Spec, factor: str, seed: int) -> Vector:
    """Numbers in one of the factors of every layer."""
    values = small(spec, seed) * np.float32(1e4)
    for name, slot in spec.slots.items():
        if not name.endswith(factor):
            values[slot.start : slot.start + slot.size] = 0
    return values


@pytest.mark.parametrize("step", [1e-3, 0.03, 0.1])
def test_a_version_a_little_further_on_keeps_the_numbers_nearly_as_they_are(step: float) -> None:
    """As averaged factors do; and it still means the same, as far as can be."""
    start = adapter(3, 0)
    onto = start.plus(adapter(3, 1).flat * np.float32(step))
    delta = small(start.spec, 2)
    moved = carry(delta, start, onto)
    assert moved is not None
    assert np.linalg.norm(moved - delta) < 3 * step * np.linalg.norm(delta)
    for full, best, got in solved(start, delta, onto, moved):
        np.testing.assert_allclose(full @ got, full @ best, atol=1e-3 * np.abs(full @ best).max())
        assert np.linalg.norm(got - best) > 0.1 * np.linalg.norm(got)


def test_tensors_in_another_order() -> None:
    start = adapter(2, 0)
    turned_round = Spec.lora(dict(reversed(list(LAYERS.items()))), rank=2, alpha=8)
    onto = Adapter.from_tensors(turned_round, dict(start.tensors()))
    delta = small(start.spec, 1)
    moved = carry(delta, start, onto)
    assert moved is not None
    for name, values in Adapter(start.spec, delta).tensors():
        np.testing.assert_allclose(Adapter(turned_round, moved)[name], values, atol=1e-7)


def test_zeros_everywhere_do_no_harm() -> None:
    start, onto = adapter(2, 0), Adapter.zeros(Spec.lora(LAYERS, rank=2, alpha=8))
    moved = carry(small(start.spec, 1), start, onto)
    assert moved is not None and not moved.any()


def test_nothing_in_common() -> None:
    start = adapter(2, 0)
    delta = small(start.spec, 1)
    fewer = Adapter.zeros(Spec.lora({"q": LAYERS["q"]}, rank=2, alpha=8))
    other_base = Adapter.zeros(Spec.lora(LAYERS, rank=2, alpha=8, base="other"))
    assert carry(delta, start, fewer) is None
    assert carry(delta, start, other_base) is None
