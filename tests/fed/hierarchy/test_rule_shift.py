"""Moving a version of a rule by other adapters: no update, and nothing of what the rule knows is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agora.errors import AdapterError, InvalidRequest
from fed.adapter import Adapter
from fed.aggregate.rule import Base, Contribution
from fed.aggregate.rules import RULES, make

PRODUCTS = ("delta", "dense", "stacking", "mix")


def rule_of(trees: Any, name: str, **settings: Any) -> Base:
    made = make(name, trees.start(trees.LORA if name != "mean" else trees.DENSE), **settings)
    assert isinstance(made, Base)
    return made


def noise(spec: Any, seed: int, size: float = 0.1) -> Any:
    return (size * np.random.default_rng(seed).normal(size=spec.size)).astype(np.float32)


def absorb(rule: Base, seed: int) -> None:
    spec = rule.start_for(rule.current, None).spec
    delta = Adapter(spec, noise(spec, seed))
    if rule.name == "freeze_a":
        for _, _, a in delta.factors():
            a[:] = 0
    rule.absorb(Contribution(client="a", start=rule.start_for(rule.current, None), delta=delta.flat))


def whole(adapter: Adapter) -> Any:
    return [adapter.spec.scaling * (b.astype(float) @ a.astype(float)) for _, b, a in adapter.factors()]


def test_every_rule_was_looked_at() -> None:
    assert set(RULES) >= {*PRODUCTS, "factor_mean", "freeze_a", "mean"}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_moved_as_products(trees: Any, name: str) -> None:
    rule = rule_of(trees, name)
    absorb(rule, 1)
    was = rule.publish()
    up, down = was.plus(noise(was.spec, 2)), was
    # The sum has a rank that fits.
    moved = rule.shift([(1.0, up), (-1.0, down)])
    assert moved is rule.current
    for found, wanted in zip(whole(moved), whole(up), strict=True):
        np.testing.assert_allclose(found, wanted, atol=3e-5)


@pytest.mark.parametrize("name", ["factor_mean", "freeze_a", "mean"])
def test_others_are_moved_number_by_number(trees: Any, name: str) -> None:
    rule = rule_of(trees, name)
    absorb(rule, 1)
    was = rule.publish()
    part = Adapter(was.spec, noise(was.spec, 3))
    assert rule.shift([(0.5, part)]).flat == pytest.approx(was.flat + 0.5 * part.flat, abs=1e-6)
    with pytest.raises(AdapterError, match="other kinds"):
        rule.shift([(1.0, trees.start(trees.DENSE if name != "mean" else trees.LORA))])
    with pytest.raises(AdapterError, match="at rank"):
        rule.combined([(1.0, part)], rank=99)


@pytest.mark.parametrize("name", ["delta", "mean", "mix"])
def test_a_version_is_not_moved_while_updates_wait(trees: Any, name: str) -> None:
    rule = rule_of(trees, name)
    absorb(rule, 1)
    with pytest.raises(InvalidRequest, match="1 updates were absorbed"):
        rule.shift([(1.0, rule.current)])
    rule.publish()
    rule.shift([(0.0, rule.current)])


def test_what_a_move_cuts_off_the_head_comes_back_with_later_versions(trees: Any) -> None:
    rule = rule_of(trees, "delta", error_kept=1.0)
    other = Adapter(trees.LORA, noise(trees.LORA, 5, 0.3))
    wanted = [a + b for a, b in zip(whole(rule.current), whole(other), strict=True)]
    rule.shift([(1.0, other)])
    error = rule._error  # type: ignore[attr-defined]
    for n, (layer, w) in enumerate(zip(trees.LORA.layers, wanted, strict=True)):
        p, q = error.by_layer[layer]
        np.testing.assert_allclose(whole(rule.current)[n] + p.astype(float) @ q, w, atol=3e-5)
    assert np.linalg.norm(whole(rule.current)[0] - wanted[0]) > 1e-3, "rank 8 does not fit into 4"


@pytest.mark.parametrize("name", ["delta", "mean"])
def test_momentum_goes_on_as_if_nothing_had_moved(trees: Any, name: str) -> None:
    far, near = rule_of(trees, name, momentum=0.9), rule_of(trees, name, momentum=0.9)
    for rule in (far, near):
        for n in range(2):
            absorb(rule, n)
            rule.publish()
    before = [far.current, near.current]
    # Twice the same way, so that the moved one has the rank of the other.
    by = far.current
    far.shift([(0.5, by)])
    moved = far.current
    for rule in (far, near):
        start = Adapter(before[0].spec, before[1].flat)
        rule.absorb(Contribution(client="a", start=start, delta=np.zeros(start.spec.size, np.float32)))
        rule.publish()
    if name == "mean":
        assert far.current.flat - moved.flat == pytest.approx(near.current.flat - before[1].flat, abs=1e-5)
        return
    for n in range(2):
        way = whole(near.current)[n] - whole(before[1])[n]
        found = whole(far.current)[n] - whole(moved)[n]
        # Both are cut to the same rank, at other places.
        assert np.linalg.norm(found - way) < 0.35 * np.linalg.norm(way)


def test_a_moved_rule_is_stored_and_goes_on(trees: Any) -> None:
    one, other = rule_of(trees, "delta", momentum=0.5), rule_of(trees, "delta", momentum=0.5)
    for n in range(2):
        absorb(one, n)
        one.publish()
    one.shift([(0.3, one.current.plus(noise(trees.LORA, 9)))])
    other.load_state(one.state())
    for rule in (one, other):
        absorb(rule, 7)
    assert one.publish().flat.tobytes() == other.publish().flat.tobytes()
