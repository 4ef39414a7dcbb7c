"""Breakers: when they open, for how long, and that one probe decides."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import InvalidRequest
from agora.network.breaker import STEADY, Breaker, BreakerRules, BreakerState


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


EXACT = BreakerRules(jitter=0.0)


def broken(clock: Clock, rules: BreakerRules = EXACT) -> Breaker:
    breaker = Breaker(clock=clock, rules=rules)
    for _ in range(rules.consecutive):
        breaker.failed("no carrier")
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_does_not_count_as_one() -> None:
    breaker = Breaker(clock=Clock(), rules=EXACT)
    for _ in range(3):
        breaker.failed("no carrier")
        breaker.failed("no carrier")
        breaker.succeeded()
    assert breaker.closed
    for _ in range(3):
        breaker.failed("no carrier")
    assert breaker.state is BreakerState.OPEN
    assert (breaker.why, breaker.opened) == ("no carrier", 1)


def test_a_failure_rate_opens_it_though_never_three_fail_in_a_row() -> None:
    breaker = Breaker(clock=Clock(), rules=BreakerRules(window=20, rate=0.5, least=10))
    for n in range(9):
        breaker.failed("x") if n % 2 else breaker.succeeded()
    assert breaker.closed, "too few to tell a rate"
    breaker.failed("x")
    assert not breaker.closed


def test_one_probe_decides_and_the_time_doubles_each_time_it_fails() -> None:
    clock = Clock()
    breaker = broken(clock)
    waits = []
    for _ in range(8):
        assert not breaker.due
        waits.append(breaker.due_in_s)
        clock.now += breaker.due_in_s
        assert breaker.due
        breaker.begin_probe()
        assert breaker.state is BreakerState.HALF_OPEN
        assert not breaker.due, "one probe, not two"
        with pytest.raises(InvalidRequest, match="no probe is due"):
            breaker.begin_probe()
        breaker.end_probe(False, "still no carrier")
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    clock.now += 30
    breaker.begin_probe()
    breaker.end_probe(True)
    assert breaker.closed
    assert breaker.open_s == pytest.approx(sum(waits) + 30)


def test_the_time_varies_by_the_jitter_and_by_the_seed_alone() -> None:
    def waits(seed: int) -> list[float]:
        rng = random.Random(seed)
        return [self_.due_in_s for self_ in (_opened(rng) for _ in range(50))]

    def _opened(rng: random.Random) -> Breaker:
        breaker = Breaker(clock=Clock(), rules=BreakerRules(jitter=0.2), rng=rng)
        for _ in range(3):
            breaker.failed("x")
        return breaker

    assert waits(1) == waits(1)
    assert all(0.4 <= w <= 0.6 for w in waits(2))
    assert max(waits(2)) - min(waits(2)) > 0.1


def test_one_that_flaps_is_left_alone_for_longer_each_time() -> None:
    clock = Clock()
    breaker = broken(clock)
    waits = []
    for _ in range(6):
        waits.append(breaker.due_in_s)
        clock.now += breaker.due_in_s
        breaker.begin_probe()
        breaker.end_probe(True)
        clock.now += 1.0  # it works for a second
        for _ in range(3):
            breaker.failed("gone again")
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    clock.now += breaker.due_in_s
    breaker.begin_probe()
    breaker.end_probe(True)
    clock.now += STEADY * 30 + 1  # and now it is back for good
    for _ in range(3):
        breaker.failed("gone after long")
    assert breaker.due_in_s == 0.5


def test_a_request_that_was_under_way_closes_it_and_a_late_probe_changes_nothing() -> None:
    clock = Clock()
    breaker = broken(clock)
    clock.now += 1
    breaker.begin_probe()
    breaker.succeeded()
    assert breaker.closed
    breaker.end_probe(False, "too late")
    assert breaker.closed


def test_a_probe_that_was_broken_off_may_be_sent_again_at_once() -> None:
    clock = Clock()
    breaker = broken(clock)
    clock.now += 1
    breaker.begin_probe()
    breaker.give_up_probe()
    assert breaker.due
    assert breaker.opened == 1


def test_failures_of_requests_sent_before_it_opened_do_not_lengthen_the_wait() -> None:
    clock = Clock()
    breaker = broken(clock)
    for _ in range(50):
        breaker.failed("one of those under way")
    assert breaker.due_in_s == 0.5
    assert breaker.opened == 1


@given(st.lists(st.tuples(st.sampled_from("sfpogc"), st.floats(-1e6, 1e6)), max_size=60))
def test_whatever_the_clock_does_it_comes_to_a_probe_in_bounded_time(story: list[tuple[str, float]]) -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    for what, leap in story:
        clock.now += leap
        if what == "s":
            breaker.succeeded()
        elif what == "f":
            breaker.failed("x" * 1000)
        elif what == "p" and breaker.due:
            breaker.begin_probe()
        elif what in "og":
            breaker.end_probe(what == "o")
        elif what == "c":
            breaker.give_up_probe()
        assert len(breaker.why) <= 300
        assert breaker.open_s >= 0
        assert breaker.due_in_s <= 36, "longest_open_s and its jitter, however far the clock went back"
    if breaker.state is BreakerState.HALF_OPEN:
        breaker.end_probe(False)
    if not breaker.closed:
        breaker.begin_probe() if breaker.due else None
        clock.now += breaker.due_in_s + 1e-3  # the sum of two floats may fall short
        assert breaker.due or breaker.state is BreakerState.HALF_OPEN


@pytest.mark.parametrize(
    "wrong",
    [{"consecutive": 0}, {"rate": 0.0}, {"rate": 1.5}, {"jitter": 1.0}, {"first_open_s": 0.0}, {"longest_open_s": 0.1}],
)
def test_rules_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        BreakerRules(**wrong)  # type: ignore[arg-type]
