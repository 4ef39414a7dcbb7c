"""What holds for every rule: weights, staleness, checkpoints, starts of other ranks, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from agora.errors import AdapterError, ConfigError, InvalidRequest, StoreError
from fed.adapter import Adapter, Method
from fed.aggregate.rule import Contribution, Rule, State
from fed.aggregate.rules import RULES, default, make

few = settings(max_examples=8, deadline=None)
Seeds = st.integers(0, 1_000)

PRODUCTS = ("delta", "stacking", "dense")
VARIANTS: dict[str, dict[str, Any]] = {
    "delta": {"momentum": 0.5, "remember": 8},
    "stacking": {"max_rank": 20},
    "factor_mean": {"momentum": 0.5},
    "freeze_a": {"momentum": 0.5},
    "dense": {},
    "mean": {"momentum": 0.5, "remember": 8},
    "mix": {},
}


def first(worlds: Any, name: str) -> Adapter:
    found: Adapter = worlds.plain_start() if name == "mean" else worlds.initial(4)
    return found


def updates(worlds: Any, name: str, rule: Rule, seed: int, **more: Any) -> list[Contribution]:
    mixed = name in (*PRODUCTS, "factor_mean", "mix")
    ranks = [None, 2, 3, None] if mixed else [None] * 4
    found: list[Contribution] = worlds.updates(rule, ranks, seed, **more)
    if name == "freeze_a":
        for c in found:
            for _, _, a in c.change.factors():
                a[:] = 0
    return found


def test_every_rule_is_tested() -> None:
    assert set(VARIANTS) == set(RULES)


@pytest.mark.parametrize("name", sorted(RULES))
def test_nothing_absorbed_publishes_nothing(worlds: Any, name: str) -> None:
    rule = make(name, first(worlds, name), **VARIANTS[name])
    assert rule.publish() is rule.current
    made = worlds.absorb(rule, updates(worlds, name, rule, 1))
    assert made is rule.current and rule.publish() is made


@pytest.mark.parametrize("name", sorted(RULES))
@few
@given(seed=Seeds, cut=st.integers(0, 3))
def test_a_restored_rule_goes_on_bit_for_bit(worlds: Any, name: str, seed: int, cut: int) -> None:
    """Saved between any two updates, through safetensors and JSON, after versions that filled its buffers."""
    rule = make(name, first(worlds, name), **VARIANTS[name])
    for version in range(2):
        worlds.absorb(rule, updates(worlds, name, rule, seed + version))
    waiting = updates(worlds, name, rule, seed + 7)
    for c in waiting[:cut]:
        rule.absorb(c)
    state = rule.state()
    again = make(name, first(worlds, name), **VARIANTS[name])
    again.load_state(State(load(save(state.arrays)), json.loads(json.dumps(state.facts))))
    for c in waiting[cut:]:
        rule.absorb(c)
        again.absorb(c)
    one, other = rule.publish(), again.publish()
    assert one.flat.tobytes() == other.flat.tobytes()
    assert rule.notes == again.notes
    more = updates(worlds, name, rule, seed + 9)
    assert worlds.absorb(rule, more).flat.tobytes() == worlds.absorb(again, more).flat.tobytes()
    assert rule.start_for(one, None).flat.tobytes() == again.start_for(other, None).flat.tobytes()


@pytest.mark.parametrize("name", sorted(set(RULES) - {"mix"}))
def test_a_late_update_really_makes_a_smaller_step(worlds: Any, name: str) -> None:
    """Even alone: an update of three versions ago moves half as far as the same one fresh."""
    moves = []
    for tau in (0, 3):
        # Of rank 12 all is kept that these layers can hold, so that steps are not cut.
        rule = make(name, worlds.plain_start() if name == "mean" else worlds.initial(12))
        start = rule.start_for(rule.current, None)
        delta = worlds.noise(start.spec, 3)
        if name == "freeze_a":
            for _, _, a in Adapter(start.spec, delta).factors():
                a[:] = 0
        discount = (1 + tau) ** -0.5
        rule.absorb(
            Contribution(client="c", start=start, delta=delta, weight=7 * discount, staleness=tau, discount=discount)
        )
        before, after = rule.current, rule.publish()
        if name in PRODUCTS:
            old, new = worlds.whole(before), worlds.whole(after)
            moves.append(np.concatenate([(new[n] - old[n]).ravel() for n in old]))
        else:
            moves.append(after.flat - before.flat)
    assert np.abs(moves[0]).max() > 0.1
    np.testing.assert_allclose(moves[1], 0.5 * moves[0], atol=2e-5)


@pytest.mark.parametrize("name", sorted(set(RULES) - {"mix"}))
def test_only_relative_weights_matter(worlds: Any, name: str) -> None:
    made = []
    for factor in (1.0, 1000.0):
        rule = make(name, first(worlds, name), normalise="weights")
        contributions = [
            Contribution(client=c.client, start=c.start, delta=c.delta, weight=factor)
            for c in updates(worlds, name, rule, 5)
        ]
        made.append(worlds.absorb(rule, contributions))
    np.testing.assert_allclose(made[0].flat, made[1].flat, atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(RULES) - {"mix"}))
def test_divided_by_their_number_weights_count_alone(worlds: Any, name: str) -> None:
    rule = make(name, first(worlds, name), normalise="count")
    c = updates(worlds, name, rule, 6)[0]
    twice = make(name, first(worlds, name), step=2.0)
    one = worlds.absorb(rule, [Contribution(client="c", start=c.start, delta=c.delta, weight=2.0)])
    other = worlds.absorb(twice, [Contribution(client="c", start=c.start, delta=c.delta, weight=1.0)])
    np.testing.assert_allclose(one.flat, other.flat, atol=1e-5)


@pytest.mark.parametrize("name", [*PRODUCTS, "mix"])
@few
@given(seed=Seeds, rank=st.integers(1, 12))
def test_starts_are_the_head_of_the_product(worlds: Any, name: str, seed: int, rank: int) -> None:
    adapter = worlds.initial(4, seed)
    start = make(name, adapter).start_for(adapter, rank)
    assert start.spec == adapter.spec.at_rank(rank)
    wanted = worlds.whole(adapter)
    for layer, matrix in worlds.whole(start).items():
        np.testing.assert_allclose(matrix, worlds.best(wanted[layer], rank), atol=2e-5)
    for _, b, a in start.factors():
        assert np.all(np.linalg.norm(a, axis=1) > 0.1)
        assert not b[:, 4:].any()


@pytest.mark.parametrize("name", [*PRODUCTS, "mix", "factor_mean"])
def test_a_start_is_made_once_and_the_own_rank_is_the_version_itself(worlds: Any, name: str) -> None:
    rule = make(name, worlds.initial(4))
    assert rule.start_for(rule.current, None) is rule.current
    assert rule.start_for(rule.current, 4) is rule.current
    assert rule.start_for(rule.current, 2) is rule.start_for(rule.current, 2)


@pytest.mark.parametrize(("name", "why"), [("freeze_a", "rank 4 for all"), ("mean", "cannot be trained at another")])
def test_ranks_that_a_method_has_no_place_for_are_refused(worlds: Any, name: str, why: str) -> None:
    rule = make(name, first(worlds, name))
    with pytest.raises(AdapterError, match=why):
        rule.start_for(rule.current, 2)


def test_updates_that_do_not_fit_are_refused_and_change_nothing(worlds: Any) -> None:
    rule = make("delta", worlds.initial(4))
    other = worlds.fresh(worlds.lora(4, alpha=8.0))
    with pytest.raises(AdapterError, match=r"alpha is '8\.0', not '6\.0'"):
        rule.absorb(Contribution(client="c", start=other, delta=np.zeros(other.spec.size, np.float32)))
    plain = worlds.plain_start()
    with pytest.raises(AdapterError, match="method is 'prefix'"):
        rule.absorb(Contribution(client="c", start=plain, delta=np.zeros(plain.spec.size, np.float32)))
    assert rule.publish() is rule.current
    [c] = worlds.updates(rule, [2], 0)
    for name, why in (("freeze_a", "has rank 2"), ("factor_mean", "above the server's 1")):
        refusing = make(name, worlds.initial(1 if name == "factor_mean" else 4))
        with pytest.raises(AdapterError, match=why):
            refusing.absorb(c)


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"weight": -1.0}, InvalidRequest, "weight -1.0"),
        ({"weight": float("nan")}, InvalidRequest, "weight nan"),
        ({"discount": 0.5}, InvalidRequest, "a fresh update"),
        ({"staleness": -1}, InvalidRequest, "staleness -1"),
        ({"staleness": 1, "discount": 1.5}, InvalidRequest, "discount 1.5"),
        ({"delta": np.zeros(3, np.float32)}, AdapterError, r"shape \(3,\)"),
    ],
)
def test_impossible_updates_are_refused(worlds: Any, change: dict[str, Any], error: type[Exception], why: str) -> None:
    start = worlds.plain_start()
    whole = {"client": "c", "start": start, "delta": np.zeros(start.spec.size, np.float32)} | change
    with pytest.raises(error, match=why):
        Contribution(**whole)


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("median", {}, "allowed: delta, dense"),
        ("mean", {"error_rank": 3}, "no setting 'error_rank'; it has step"),
        ("delta", {"step": 0}, "step is 0; it must be a number above 0"),
        ("delta", {"momentum": 1.0}, "momentum is 1.0; it must be from 0 to below 1"),
        ("delta", {"error_rank": -1}, "error_rank is -1"),
        ("delta", {"error_kept": 1.5}, "error_kept is 1.5; it must be from 0 to 1"),
        ("delta", {"stack": 1}, "stack is 1"),
        ("delta", {"normalise": "sum"}, "allowed: weights, count"),
        ("factor_mean", {"padding": "ones"}, "allowed: weights, update"),
        ("stacking", {"max_rank": 3}, "below the server's rank of 4"),
        ("mix", {"alpha": 0.0}, "alpha is 0"),
    ],
)
def test_impossible_settings_are_refused(worlds: Any, name: str, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        make(name, first(worlds, name), **settings)


def test_rules_are_for_what_they_are_for(worlds: Any) -> None:
    with pytest.raises(AdapterError, match="take 'delta'"):
        make("mean", worlds.initial(4))
    with pytest.raises(AdapterError, match="take 'mean'"):
        make("delta", worlds.plain_start())
    with pytest.raises(AdapterError, match="both factors of layer 'q' are zero"):
        make("delta", Adapter.zeros(worlds.lora(4)))
    assert [default(m) for m in (Method.LORA, Method.PREFIX)] == ["delta", "mean"]


def test_a_state_of_something_else_is_refused(worlds: Any) -> None:
    state = make("delta", worlds.initial(4)).state()
    with pytest.raises(StoreError, match="another adapter or rule"):
        make("dense", worlds.initial(4)).load_state(state)
    with pytest.raises(StoreError, match="another adapter or rule"):
        make("delta", worlds.initial(5)).load_state(state)
    del state.arrays["current"]
    with pytest.raises(StoreError, match="damaged"):
        make("delta", worlds.initial(4)).load_state(state)
