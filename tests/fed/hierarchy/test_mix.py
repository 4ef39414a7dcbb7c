"""Mixing levels: exact where it is exact, the best that fits where it is cut, and weights that suit a client."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agora.errors import AdapterError, ConfigError, InvalidRequest
from fed.adapter import Adapter, LayerSize, Method, Spec
from fed.hierarchy import fit, mix, personal
from fed.hierarchy.mix import aligned

LAYERS = {"q": LayerSize(12, 10), "v": LayerSize(9, 14)}


def lora(rank: int, seed: int, *, alpha: float = 6.0, rslora: bool = False, **more: Any) -> Adapter:
    spec = Spec.lora(LAYERS, rank=rank, alpha=alpha, rslora=rslora, **more)
    return Adapter(spec, (0.5 * np.random.default_rng(seed).normal(size=spec.size)).astype(np.float32))


def whole(adapter: Adapter) -> dict[str, Any]:
    return {n: adapter.spec.scaling * (b.astype(float) @ a.astype(float)) for n, b, a in adapter.factors()}


weights = st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), weights, st.booleans(), st.sampled_from([2.0, 8.0])), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_lora_is_mixed_exactly_as_products(parts: list[tuple[int, float, bool, float]], seed: int) -> None:
    levels = {f"l{i}": lora(r, seed + i, rslora=rs, alpha=a) for i, (r, _, rs, a) in enumerate(parts)}
    chosen = {f"l{i}": w for i, (_, w, _, _) in enumerate(parts)}
    mixed = mix(levels, chosen)
    if len(parts) > 1:
        assert mixed.spec.rank == sum(r for r, *_ in parts)
    for layer, found in whole(mixed).items():
        wanted = sum(w * whole(levels[name])[layer] for name, w in chosen.items())
        np.testing.assert_allclose(found, wanted, atol=1e-5 * max(1.0, np.abs(wanted).max()))


@pytest.mark.parametrize("rank", [1, 3, 5, 8])
def test_a_mixture_that_is_cut_is_the_best_of_its_rank(rank: int) -> None:
    levels, chosen = {"cloud": lora(4, 1), "edge": lora(4, 2)}, {"cloud": 0.3, "edge": 0.7}
    mixed = mix(levels, chosen, rank=rank)
    assert mixed.spec.rank == rank
    for layer, found in whole(mixed).items():
        wanted = sum(w * whole(levels[n])[layer] for n, w in chosen.items())
        u, s, v = np.linalg.svd(wanted)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        np.testing.assert_allclose(found, best, atol=2e-5)


def test_plain_tensors_are_mixed_number_by_number() -> None:
    spec = Spec(method=Method.PREFIX, shapes={"p": (3, 2)}, rank=3)
    one, other = Adapter(spec, np.arange(6, dtype=np.float32)), Adapter(spec, np.ones(6, np.float32))
    mixed = mix({"cloud": one, "edge": other, "unused": one}, {"cloud": 0.25, "edge": 2.0, "unused": 0.0})
    assert mixed.flat == pytest.approx(0.25 * one.flat + 2.0)


def test_one_level_alone_is_that_adapter() -> None:
    one = lora(4, 1)
    assert mix({"cloud": one, "edge": lora(4, 2)}, {"cloud": 1.0}) is one


@pytest.mark.parametrize(
    ("chosen", "error", "told"),
    [
        ({"fog": 1.0}, InvalidRequest, "a weight is given for 'fog'; there are cloud, edge, other"),
        ({"cloud": math.nan}, InvalidRequest, "the weight of 'cloud' is nan"),
        ({"cloud": 0.0}, InvalidRequest, "every weight is 0"),
        ({"cloud": 1.0, "other": 1.0}, AdapterError, "different base models"),
    ],
)
def test_what_cannot_be_mixed_is_told(chosen: dict[str, float], error: type[Exception], told: str) -> None:
    levels = {"cloud": lora(4, 1), "edge": lora(2, 2), "other": lora(4, 3, base="another")}
    with pytest.raises(error, match=told):
        mix(levels, chosen)
    with pytest.raises(ConfigError, match="rank is 0"):
        mix(levels, {"cloud": 1.0, "edge": 1.0}, rank=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 99))
def test_alignment_keeps_the_product_and_brings_the_factors_near(rank: int, seed: int) -> None:
    one = lora(rank, seed)
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(rank, rank)))
    turned = Adapter.from_tensors(
        one.spec,
        {f"{n}.lora_{f}": x for n, b, a in one.factors() for f, x in (("B", b @ turn), ("A", turn.T @ a))},
    )
    change = 0.01 * np.random.default_rng(seed + 1).normal(size=one.spec.size).astype(np.float32)
    moved = turned.plus(change)
    back = aligned(moved, one)
    for layer, found in whole(back).items():
        np.testing.assert_allclose(found, whole(moved)[layer], atol=2e-5)
    assert np.linalg.norm(back.flat - one.flat) <= 1.01 * np.linalg.norm(change) + 1e-4
    assert aligned(one, one) is one


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=3).filter(lambda w: sum(w) > 0.1), st.integers(0, 9))
def test_fitting_finds_the_weights_that_suit_a_client(true: list[float], seed: int) -> None:
    spec = Spec(method=Method.DENSE, shapes={"w": (30,)})
    rng = np.random.default_rng(seed)
    levels = {f"l{i}": Adapter(spec, rng.normal(size=30).astype(np.float32)) for i in range(len(true))}
    share = [w / sum(true) for w in true]
    target = sum(w * levels[f"l{i}"].flat for i, w in enumerate(share))
    asked = []

    def assess(adapter: Adapter) -> float:
        asked.append(adapter)
        return float(np.mean((adapter.flat - target) ** 2))

    found = fit(levels, assess)
    assert found.asked == len(asked) <= len(true) + 60
    assert found.loss <= min(found.alone.values()) and sum(found.weights.values()) == pytest.approx(1.0)
    assert [found.weights[f"l{i}"] for i in range(len(true))] == pytest.approx(share, abs=0.08)
    assert found == fit(levels, assess)


def test_fitting_takes_no_number_for_the_worst_and_needs_one(trees: Any) -> None:
    levels = {"cloud": lora(2, 1), "edge": lora(2, 2)}
    found = fit(levels, lambda a: math.nan if a is not levels["edge"] else 1.0, most=20)
    assert found.weights == {"cloud": 0.0, "edge": 1.0} and found.alone["cloud"] == math.inf
    with pytest.raises(InvalidRequest, match="infinite"):
        fit(levels, lambda a: math.nan)
    with pytest.raises(InvalidRequest, match="no level"):
        fit({}, lambda a: 0.0)


def test_a_client_is_served_between_general_and_personal(trees: Any) -> None:
    """Trained through a tree, then mixed for one device by its own rows: never worse than any level alone."""
    found = trees.run("dense", changes=())
    own = np.random.default_rng(7).normal(size=20)
    levels = found.seen_by("client-7")
    assert list(levels) == ["cloud", "edge"] and levels["edge"] is found.adapters["edge-2"]
    levels["personal"] = personal(trees.Pull(), levels["edge"], "client-7", seed=1)
    fitted = fit(levels, lambda a: float(np.mean((a.flat - own) ** 2)))
    assert fitted.loss <= min(fitted.alone.values())
    assert fitted.alone["personal"] < fitted.alone["edge"] < fitted.alone["cloud"]
    assert fitted.weights["personal"] > 0.5
