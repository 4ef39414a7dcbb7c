from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from agora.errors import ConfigError
from fed.adapter import Adapter, Method, Spec, Vector
from fed.chain import Clip, Context, Int8, Noise, TopK, Weight, norm_of

FLOATS = st.floats(-(2.0**50), 2.0**50, width=32)
VECTORS = arrays(np.float32, st.integers(1, 200), elements=FLOATS)


def context(size: int, seed: int = 0, **more: Any) -> Context:
    spec = Spec(method=Method.DENSE, shapes={"w": (size,)})
    return Context(start=Adapter.zeros(spec), job=1, seed=seed, examples=5, **more)


# Clip


@given(VECTORS, st.floats(1e-3, 1e6))
def test_clipped_norm_never_exceeds_the_bound_and_the_direction_stays(x: Vector, norm: float) -> None:
    y, after = Clip(norm=norm).apply(x, context(x.size))
    assert math.sqrt(sum(float(v) ** 2 for v in y)) <= norm * (1 + 1e-12)
    assert after.bound == norm
    if norm_of(x) <= norm:
        np.testing.assert_array_equal(y, x)
    else:
        assert norm_of(y) >= norm * (1 - 1e-5)
        np.testing.assert_allclose(y / norm, x / norm_of(x), atol=1e-6)


@given(arrays(np.float32, 12, elements=FLOATS), st.floats(1e-3, 1e3))
def test_clipping_each_tensor_bounds_the_whole_and_spares_the_small(x: Vector, norm: float) -> None:
    spec = Spec(method=Method.DENSE, shapes={"a": (2, 3), "b": (4,), "c": (2,)})
    y, _ = Clip(norm=norm, per_tensor=True).apply(x, replace(context(12), start=Adapter.zeros(spec)))
    assert norm_of(y) <= norm * (1 + 1e-12)
    for part in (slice(0, 6), slice(6, 10), slice(10, 12)):
        assert norm_of(y[part]) <= norm / math.sqrt(3) * (1 + 1e-12)
        if norm_of(x[part]) <= norm / math.sqrt(3):
            np.testing.assert_array_equal(y[part], x[part])


def test_norm_of_numbers_whose_squares_do_not_fit_float32() -> None:
    assert norm_of(np.array([3e30, 4e30], np.float32)) == pytest.approx(5e30, rel=1e-6)


# Weight


def test_weight_multiplies_and_says_so() -> None:
    x = np.array([1.0, -2.0], np.float32)
    y, after = Weight().apply(x, context(2, bound=3.0))
    assert y.tolist() == [5.0, -10.0] and after.weight == 5.0 and after.bound == 15.0
    y, after = Weight(by=0.5).apply(x, context(2))
    assert y.tolist() == [0.5, -1.0] and after.weight == 0.5 and after.bound is None


# Noise


def test_noise_has_the_spread_that_the_bound_asks_for() -> None:
    """Standard error of a standard deviation over n draws: σ/√(2n)."""
    n = 200_000
    x = np.linspace(-1, 1, n, dtype=np.float32)
    y, _ = Noise(multiplier=0.5).apply(x, context(n, bound=4.0))
    noise = (y - x).astype(np.float64)
    assert abs(noise.std() - 2.0) < 5 * 2.0 / math.sqrt(2 * n)
    assert abs(noise.mean()) < 5 * 2.0 / math.sqrt(n)
    assert abs(np.mean(noise**4) / 2.0**4 - 3.0) < 0.1


def test_noise_grows_with_the_clients_weight() -> None:
    bounded = Clip(norm=1.0).apply(np.zeros(50_000, np.float32), context(50_000))
    y, _ = Noise(multiplier=1.0).apply(*Weight(by=10.0).apply(*bounded))
    assert y.std() == pytest.approx(10.0, rel=0.02)


def test_noise_without_a_bound_is_refused() -> None:
    with pytest.raises(ConfigError, match="bounds"):
        Noise(multiplier=1.0).apply(np.zeros(3, np.float32), context(3))


# Top-k


@given(arrays(np.float32, st.integers(1, 120), elements=st.integers(-4, 4).map(float)), st.floats(0.001, 1.0))
def test_top_k_sends_the_largest_and_the_first_of_equals(x: Vector, fraction: float) -> None:
    """With ties all over; the reference sorts."""
    stage = TopK(fraction=fraction)
    count = stage.count(x.size)
    assert count == max(1, math.ceil(round(fraction * x.size, 6)))
    chosen = sorted(sorted(range(x.size), key=lambda i: (-abs(x[i]), i))[:count])
    parts = stage.encode({"values": x}, context(x.size))
    np.testing.assert_array_equal(parts["values"], x[chosen])
    wanted = np.zeros_like(x)
    wanted[chosen] = x[chosen]
    decoded = stage.decode(parts, x.size, context(x.size).spec)
    np.testing.assert_array_equal(decoded["values"], wanted)
    assert set(decoded) == {"values"}


@pytest.mark.parametrize(
    ("fraction", "how", "bytes_each"),
    [(0.01, "gaps", 2.0), (0.05, "gaps", 1.0), (0.3, "bitmap", 1 / 0.3 / 8), (1.0, "bitmap", 1 / 8)],
)
def test_places_are_told_in_the_shorter_way(fraction: float, how: str, bytes_each: float) -> None:
    n = 100_000
    x = np.random.default_rng(0).standard_normal(n, np.float32)
    stage = TopK(fraction=fraction)
    parts = stage.encode({"values": x}, context(n))
    assert set(parts) == {"values", how}
    assert parts[how].nbytes == pytest.approx(bytes_each * fraction * n, rel=0.01)
    sent = sum(part.nbytes for part in parts.values())
    assert sent <= sum(stage.payload(n, {"values": 4 * n}, context(n).spec).values())


def test_places_far_apart() -> None:
    """A gap beyond 16 bits."""
    x = np.zeros(200_000, np.float32)
    x[[0, 150_000]] = 1.0, -2.0
    stage = TopK(fraction=2 / 200_000)
    parts = stage.encode({"values": x}, context(x.size))
    assert parts["gaps"].dtype == np.uint32
    np.testing.assert_array_equal(stage.decode(parts, x.size, context(x.size).spec)["values"], x)


def test_seven_percent_of_a_hundred_is_seven() -> None:
    assert [TopK(fraction=f).count(100) for f in (0.07, 0.29, 0.071, 1e-9, 1.0)] == [7, 29, 8, 1, 100]


# Int8


def int8(x: Vector, seed: int = 0, stage: Int8 | None = None) -> Vector:
    stage = stage or Int8(block=16)
    at = context(x.size, seed)
    decoded: Vector = stage.decode(stage.encode({"values": x}, at), x.size, at.spec)["values"]
    return decoded


@given(VECTORS, st.integers(0, 2**32))
def test_int8_errs_by_less_than_a_level_of_its_block(x: Vector, seed: int) -> None:
    y = int8(x, seed)
    for start in range(0, x.size, 16):
        block = slice(start, start + 16)
        level = float(np.abs(x[block]).max()) / 127
        assert np.abs(y[block].astype(np.float64) - x[block]).max() <= level * (1 + 1e-4) + 1e-36


@given(arrays(np.float32, 24, elements=st.floats(-10, 10, width=32)))
def test_int8_is_right_on_average(x: Vector) -> None:
    """A level's error is below 1, so its mean over n draws stays within 6/(2√n) but once in 10⁸."""
    n = 3000
    stage = Int8(block=24)
    levels = np.abs(x).max() / 127
    copies = np.tile(x, n)
    mean = int8(copies, 1, stage).reshape(n, -1).astype(np.float64).mean(0)
    assert np.abs(mean - x).max() <= levels * 3 / math.sqrt(n) + 1e-5 * np.abs(x).max() + 1e-36


def test_int8_keeps_zeros_extremes_and_the_tiniest_numbers_sane() -> None:
    assert not int8(np.zeros(40, np.float32)).any()
    x = np.array([1.0, -1.0, 0.0, 0.5], np.float32)
    assert int8(x)[:3].tolist() == [1.0, -1.0, 0.0]
    tiny = np.full(5, 1e-44, np.float32)
    assert not int8(tiny).any()
    huge = np.array([3e38, -3e38], np.float32)
    np.testing.assert_allclose(int8(huge), huge, rtol=1e-6)


def test_int8_scales_by_tensor_or_by_block() -> None:
    spec = Spec(method=Method.DENSE, shapes={"small": (3,), "large": (5,)})
    at = Context(start=Adapter.zeros(spec), job=1, seed=0, examples=1)
    x = np.array([0.01, -0.02, 0.03, 100, 50, 25, -100, 1], np.float32)
    by_tensor = Int8(block=None)
    parts = by_tensor.encode({"values": x}, at)
    np.testing.assert_allclose(parts["scales"], np.array([0.03, 100]) / 127, rtol=1e-6)
    assert np.abs(by_tensor.decode(parts, 8, spec)["values"][:3] - x[:3]).max() < 0.03 / 127 * 1.001
    blocks = Int8(block=3).encode({"values": x}, at)
    np.testing.assert_allclose(blocks["scales"], np.array([0.03, 100, 100]) / 127, rtol=1e-6)
    assert by_tensor.payload(8, {"values": 32}, spec) == {"values": 8, "scales": 8}
