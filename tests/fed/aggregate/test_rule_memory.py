"""Rules that remember clients: against the same sums of whole matrices, or vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed.aggregate.rule import Contribution
from fed.aggregate.rules import make

few = settings(max_examples=20, deadline=None)


class Reference:
    """h̄ + Σ c_i(Δ_i − h_i)/Σw_i on plain arrays; clients not heard of before count as h̄."""

    def __init__(self) -> None:
        self.last: dict[str, tuple[float, Any]] = {}

    def step(self, buffer: list[tuple[str, float, float, Any]]) -> Any:
        """From client, c, w and Δ."""
        weights = sum(w for w, _ in self.last.values())
        mean = sum(w * h for w, h in self.last.values()) / weights if self.last else 0.0
        total = sum(w for _, _, w, _ in buffer)
        moved = mean
        for client, c, _, delta in buffer:
            moved = moved + c * (delta - (self.last[client][1] if client in self.last else mean)) / total
        for client, _, w, delta in buffer:
            self.last[client] = (w, delta)
        return moved


Buffers = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=2, max_size=4)


@few
@given(buffers=Buffers, seed=st.integers(0, 500))
def test_the_mean_is_corrected_by_what_is_remembered(worlds: Any, buffers: list[list[int]], seed: int) -> None:
    rule, reference = make("mean", worlds.plain_start(), remember=10), Reference()
    rng = np.random.default_rng(seed)
    for buffer in buffers:
        seen, before = [], rule.current
        for client in buffer:
            tau = int(rng.integers(0, 3))
            d, w = (1 + tau) ** -0.5, float(rng.uniform(0.5, 2))
            delta = worlds.noise(before.spec, int(rng.integers(1 << 30)))
            rule.absorb(
                Contribution(client=str(client), start=before, delta=delta, weight=w * d, staleness=tau, discount=d)
            )
            seen.append((str(client), w * d, w, delta.astype(float)))
        np.testing.assert_allclose(rule.publish().flat - before.flat, reference.step(seen), atol=2e-5)


@few
@given(buffers=Buffers, seed=st.integers(0, 500))
def test_products_are_corrected_alike(worlds: Any, buffers: list[list[int]], seed: int) -> None:
    """Clients of several ranks; a server rank that holds all that these layers can."""
    rule, reference = make("delta", worlds.initial(12), remember=10), Reference()
    rng = np.random.default_rng(seed)
    for buffer in buffers:
        seen, before = [], rule.current
        for client in buffer:
            start = rule.start_for(before, 1 + client % 3)
            c = Contribution(
                client=str(client), start=start, delta=worlds.noise(start.spec, int(rng.integers(1 << 30)))
            )
            rule.absorb(c)
            seen.append((str(client), 1.0, 1.0, worlds.change(c)["q"]))
        moved = worlds.whole(rule.publish())["q"] - worlds.whole(before)["q"]
        wanted = reference.step(seen)
        np.testing.assert_allclose(moved, wanted, atol=1e-4 * max(1.0, float(np.abs(wanted).max())))


@pytest.mark.parametrize("name", ["mean", "delta"])
def test_when_everybody_answers_every_time_nothing_is_corrected(worlds: Any, name: str) -> None:
    results = []
    for remember in (0, 4):
        rule = make(name, worlds.plain_start() if name == "mean" else worlds.initial(12), remember=remember)
        for version in range(3):
            for n, c in enumerate(worlds.updates(rule, [None] * 4, version)):
                rule.absorb(Contribution(client=c.client, start=c.start, delta=c.delta, weight=n + 1.0))
            rule.publish()
        results.append(rule.current)
    one, other = (worlds.whole(r)["q"] if name == "delta" else r.flat for r in results)
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_fast_client_does_not_drag_the_server_to_its_own_optimum(worlds: Any) -> None:
    """Two clients pull to 0 and to 1; one sends nine updates of ten. The balance is at a half, not at a tenth."""
    start = worlds.plain_start()
    ends = []
    for remember in (0, 2):
        rule = make("mean", start, remember=remember, step=0.2)
        for n in range(200):
            goal = 1.0 if n % 10 == 0 else 0.0
            delta = (goal - rule.current.flat).astype(np.float32)
            rule.absorb(Contribution(client=str(goal), start=rule.current, delta=delta))
            rule.publish()
        ends.append(float(rule.current.flat.mean()))
    assert ends[0] < 0.25
    assert abs(ends[1] - 0.5) < 0.25


def test_the_longest_silent_are_forgotten_first(worlds: Any) -> None:
    rule = make("mean", worlds.plain_start(), remember=2)
    for client in ("a", "b", "a", "c"):
        rule.absorb(Contribution(client=client, start=rule.current, delta=worlds.noise(rule.current.spec, 1)))
        rule.publish()
    assert [known[0] for known in rule.state().facts["memory"]["known"]] == ["a", "c"]
