"""Updates are compared by what they change: checked against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agora.errors import AdapterError
from fed.adapter import Adapter, LayerSize, Method, Spec
from fed.aggregate.lowrank import product
from fed.clusters import similarity
from fed.clusters.similarity import Change, centred, cosine, distances, gram, inner, norm

LAYERS = {"q": LayerSize(11, 7), "v": LayerSize(5, 9)}


def drawn(rank: int, seed: int, *, rslora: bool = False) -> tuple[Adapter, Adapter]:
    """An adapter, and one a small step away."""
    spec = Spec.lora(LAYERS, rank=rank, alpha=6.0, rslora=rslora, base="x")
    rng = np.random.default_rng(seed)
    old = Adapter(spec, rng.normal(size=spec.size).astype(np.float32))
    return old, old.plus((0.1 * rng.normal(size=spec.size)).astype(np.float32))


def dense(old: Adapter, new: Adapter) -> np.ndarray:
    parts = [product(new, n).astype(np.float64) - product(old, n).astype(np.float64) for n in LAYERS]
    return np.concatenate([p.ravel() for p in parts])


@settings(max_examples=40, deadline=None)
@given(ranks=st.lists(st.integers(1, 6), min_size=2, max_size=5), seed=st.integers(0, 1000), rslora=st.booleans())
def test_products_are_those_of_dense_matrices_at_any_mix_of_ranks(ranks: list[int], seed: int, rslora: bool) -> None:
    pairs = [drawn(r, seed + n, rslora=rslora) for n, r in enumerate(ranks)]
    whole = np.stack([dense(old, new) for old, new in pairs])
    expected = whole @ whole.T
    found = gram([Change.of(old, new.flat - old.flat) for old, new in pairs])
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=2e-4 * scale)
    np.testing.assert_allclose(found, gram([Change.between(old, new) for old, new in pairs]), atol=1e-3 * scale)


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 5), seed=st.integers(0, 1000))
def test_other_factors_of_the_same_products_are_the_same_update(rank: int, seed: int) -> None:
    old, new = drawn(rank, seed)
    other_old, other_new = drawn(3, seed + 1)
    rng = np.random.default_rng(seed)
    turned = []
    for adapter in (old, new):
        # (BG, G⁻¹A), another G for each: the raw difference of factors is then quite another one.
        g = np.linalg.qr(rng.normal(size=(rank, rank)))[0] * rng.uniform(0.5, 2.0)
        tensors = {}
        for layer, b, a in adapter.factors():
            tensors[f"{layer}.lora_B"], tensors[f"{layer}.lora_A"] = b @ g, np.linalg.inv(g) @ a
        turned.append(Adapter.from_tensors(adapter.spec, tensors))
    other = Change.of(other_old, other_new.flat - other_old.flat)
    one = Change.of(old, new.flat - old.flat)
    same = Change.of(turned[0], turned[1].flat - turned[0].flat)
    assert norm(same) == pytest.approx(norm(one), rel=1e-3)
    assert cosine(one, same) == pytest.approx(1.0, abs=1e-4)
    assert cosine(same, other) == pytest.approx(cosine(one, other), abs=1e-3)


def test_vectors_are_compared_by_their_dot_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "NUMBERS", 3)
    spec = Spec(method=Method.PROMPT, shapes={"p": (4, 2)})
    rng = np.random.default_rng(0)
    deltas = rng.normal(size=(3, 8)).astype(np.float32)
    found = gram([Change.of(Adapter.zeros(spec), d) for d in deltas])
    np.testing.assert_allclose(found, deltas.astype(np.float64) @ deltas.T.astype(np.float64), rtol=1e-12)


def test_many_clients_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = [Change.of(old, new.flat - old.flat) for old, new in (drawn(r, r) for r in (1, 2, 3, 4, 5))]
    whole = gram(changes)
    monkeypatch.setattr(similarity, "COLUMNS", 5)
    np.testing.assert_allclose(gram(changes), whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())


@settings(max_examples=20, deadline=None)
@given(ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)), share=st.floats(0, 1), seed=st.integers(0, 100))
def test_a_mean_within_the_cap_is_exact_and_never_larger_than_it(
    ranks: tuple[int, int], share: float, seed: int
) -> None:
    (a_old, a_new), (b_old, b_new) = drawn(ranks[0], seed), drawn(ranks[1], seed + 1)
    one, other = Change.of(a_old, a_new.flat - a_old.flat), Change.of(b_old, b_new.flat - b_old.flat)
    expected = (1 - share) * dense(a_old, a_new) + share * dense(b_old, b_new)
    exact = one.mixed(other, share, rank=16)
    probe = [Change.of(o, n.flat - o.flat) for o, n in (drawn(2, 777), drawn(3, 778))]
    for p, (o, n) in zip(probe, (drawn(2, 777), drawn(3, 778)), strict=True):
        assert inner(exact, p) == pytest.approx(float(expected @ dense(o, n)), abs=1e-3 * norm(exact) * norm(p) + 1e-6)
    cut = one.mixed(other, share, rank=2)
    assert all(len(q) <= 2 for _, q in cut.factors.values())
    assert norm(cut) <= norm(exact) * (1 + 1e-4)


def test_what_all_have_in_common_does_not_count_and_nothing_is_far_from_everything() -> None:
    rng = np.random.default_rng(1)
    points = rng.normal(size=(6, 20))
    moved = points + 100 * rng.normal(size=20)
    np.testing.assert_allclose(centred(moved @ moved.T), centred(points @ points.T), atol=1e-6)
    points[2] = 0
    found = distances(points @ points.T)
    assert np.all(found[2, [0, 1, 3, 4, 5]] == 1.0) and np.all(np.diag(found) == 0)


def test_updates_of_different_adapters_are_refused() -> None:
    old, new = drawn(2, 0)
    spec = Spec(method=Method.DENSE, shapes={"w": (3,)})
    with pytest.raises(AdapterError, match="cannot be compared"):
        gram([Change.of(old, new.flat - old.flat), Change.of(Adapter.zeros(spec), np.ones(3, np.float32))])


def test_saved_and_read_it_is_the_same_to_the_bit() -> None:
    old, new = drawn(3, 5)
    change = Change.of(old, new.flat - old.flat)
    again = Change.load(change.spec, change.save().arrays)
    for layer, (p, q) in change.factors.items():
        assert again.factors[layer][0].tobytes() == p.tobytes() and again.factors[layer][1].tobytes() == q.tobytes()
