"""Speeds under load, problems, ranks and latest ends, and what is learned of durations."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agora.errors import InvalidPlan, InvalidRequest
from agora.scheduling.expected import Factors, Pace
from agora.scheduling.problem import Flow, Machine, Problem, Task, Wire
from agora.scheduling.ranks import latest_ends, upward_ranks
from agora.scheduling.speed import Speed


def test_a_speed_goes_through_what_was_measured() -> None:
    """vLLM on two CPU cores: 12 tokens a second for one request, 77 for 16 together."""
    speed = Speed.fit([(1, 12.0), (16, 77.0)])
    assert (speed.total(1), speed.total(16)) == pytest.approx((12.0, 77.0))
    assert speed.rate(16) == pytest.approx(77.0 / 16)
    assert 12.0 < speed.total(4) < 77.0
    assert all(speed.rate(n) > speed.rate(n + 1) for n in range(1, 64))
    assert all(speed.total(n) < speed.total(n + 1) for n in range(1, 64))


@settings(max_examples=60, deadline=None)
@given(
    a=st.floats(1e-3, 1.0),
    b=st.floats(0.0, 1.0),
    at=st.lists(st.integers(1, 64), min_size=2, max_size=6, unique=True),
)
def test_a_fit_finds_the_speed_that_points_were_made_of(a: float, b: float, at: list[int]) -> None:
    true = Speed(alone_s=a, each_further_s=b)
    found = Speed.fit([(n, true.total(n)) for n in at])
    assert [found.total(n) for n in at] == pytest.approx([true.total(n) for n in at], rel=1e-6)
    assert found.most(8) >= max(found.total(n) for n in range(1, 9)) * (1 - 1e-12)


def test_points_that_contradict_the_model_give_a_speed_all_the_same() -> None:
    faster_together = Speed.fit([(1, 10.0), (4, 80.0)])
    assert faster_together.each_further_s == 0.0
    assert faster_together.alone_s > 0
    assert Speed.fit([(8, 80.0), (8, 40.0)]).rate(1) == pytest.approx(1 / 0.15)


@pytest.mark.parametrize("points", [[], [(0.5, 1.0)], [(1, 0.0)], [(1, math.nan)], [(math.inf, 1.0)]])
def test_points_that_cannot_be_are_told(points: list[tuple[float, float]]) -> None:
    with pytest.raises(InvalidRequest, match="point"):
        Speed.fit(points)


@pytest.mark.parametrize("wrong", [{"alone_s": 0.0}, {"alone_s": math.nan}, {"alone_s": 1.0, "each_further_s": -1.0}])
def test_speeds_that_cannot_be_are_told(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match="must be a number of seconds"):
        Speed(**wrong)


HERE = Machine(name="here", kind="end", slots=1, speed=Speed(alone_s=1.0))


def tasks(*ids: str) -> tuple[Task, ...]:
    return tuple(Task(id=i, work={"end": 1.0}) for i in ids)


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("needs tasks and machines", {"tasks": ()}),
        ("needs tasks and machines", {"machines": (HERE, HERE)}),
        ("needs tasks and machines", {"tasks": tasks("a", "a")}),
        ("unknown tasks", {"flows": (Flow(source="a", target="z"),)}),
        ("in a circle", {"flows": (Flow(source="a", target="b"), Flow(source="b", target="a"))}),
        ("bytes", {"flows": (Flow(source="a", target="b", size=math.nan),)}),
        ("no machine can do", {"tasks": (*tasks("a"), Task(id="b", work={"cloud": 1.0}))}),
        ("units of work", {"tasks": (*tasks("a"), Task(id="b", work={"end": -1.0}))}),
        ("0 slots", {"machines": (Machine(name="x", kind="end", slots=0, speed=Speed(alone_s=1.0)),)}),
        ("cannot be reached|speed > 0", {"wire": Wire(bytes_per_s=0.0)}),
    ],
)
def test_problems_that_cannot_be_are_told(said: str, wrong: dict[str, object]) -> None:
    right: dict[str, object] = {"tasks": tasks("a", "b"), "machines": (HERE,)}
    with pytest.raises(InvalidPlan, match=said):
        Problem(**{**right, **wrong})  # type: ignore[arg-type]


def test_results_move_only_between_machines() -> None:
    there = Machine(name="there", kind="end", slots=1, speed=Speed(alone_s=1.0))
    problem = Problem(
        tasks=tasks("a"), machines=(HERE, there), wires={("here", "there"): Wire(latency_s=0.5, bytes_per_s=100.0)}
    )
    assert problem.transfer_s("here", "here", 1e9) == 0.0
    assert problem.transfer_s("here", "there", 50.0) == 1.0
    assert problem.transfer_s("there", "here", 50.0) == 0.0


SECONDS = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 5.0}
OUTPUTS = {"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": [], "e": []}


def test_ranks_are_the_longest_ways_to_the_end() -> None:
    ranks = upward_ranks("abcde", OUTPUTS, SECONDS.__getitem__)
    assert ranks == {"d": 4.0, "c": 7.0, "b": 6.0, "a": 8.0, "e": 5.0}
    moved = upward_ranks("abcde", OUTPUTS, SECONDS.__getitem__, lambda i, j: 10.0 if (i, j) == ("b", "d") else 0.0)
    assert moved == {"d": 4.0, "c": 7.0, "b": 16.0, "a": 17.0, "e": 5.0}


def test_latest_ends_share_the_time_out_along_the_paths() -> None:
    ends = latest_ends("abcde", OUTPUTS, SECONDS.__getitem__, deadline_s=16.0)
    assert ends == {"a": 2.0, "b": 8.0, "c": 8.0, "d": 16.0, "e": 16.0}
    assert latest_ends("a", {"a": []}, lambda i: 0.0, deadline_s=3.0) == {"a": 3.0}
    with pytest.raises(InvalidRequest, match="deadline_s is 0"):
        latest_ends("a", {"a": []}, lambda i: 1.0, deadline_s=0.0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), deadline=st.floats(0.1, 1e3))
def test_latest_ends_never_decrease_along_a_path_and_are_met_if_all_goes_as_expected(
    seed: int, deadline: float
) -> None:
    rng = random.Random(seed)
    order = [f"t{n}" for n in range(12)]
    outputs = {i: [j for m, j in enumerate(order) if m > n and rng.random() < 0.25] for n, i in enumerate(order)}
    seconds = {i: rng.uniform(0.0, 3.0) for i in order}
    ends = latest_ends(order, outputs, seconds.__getitem__, deadline_s=deadline)
    longest = max(upward_ranks(order, outputs, seconds.__getitem__).values())
    finish: dict[str, float] = {}
    for i in order:
        started = max((finish[j] for j in order if i in outputs[j] and j in finish), default=0.0)
        finish[i] = started + seconds[i]
        assert 0.0 <= ends[i] <= deadline
        # Stretched or squeezed to the deadline, the schedule in which nobody waits meets every one of them.
        assert finish[i] * deadline / longest <= ends[i] * (1 + 1e-9) + 1e-9
        assert all(ends[i] <= ends[o] for o in outputs[i])


def test_factors_follow_what_is_seen_and_forget_what_was_long_ago() -> None:
    factors: Factors[str] = Factors()
    assert factors.of("m") == 1.0
    factors.saw("m", 10.0, 40.0)
    assert 1.0 < factors.of("m") < 2.0, "one observation is not much"
    for _ in range(30):
        factors.saw("m", 10.0, 40.0)
    assert factors.of("m") == pytest.approx(4.0, rel=0.35)
    for _ in range(30):
        factors.saw("m", 10.0, 10.0)
    assert factors.of("m") < 1.2
    before = factors.of("m")
    for expected, observed in ((0.0, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, -1.0)):
        factors.saw("m", expected, observed)
    assert factors.of("m") == before
    factors.saw("m", 1.0, 1e300)
    assert factors.of("m") < 10.0


def test_paces_are_seconds_per_token() -> None:
    pace: Pace[str] = Pace(0.05)
    assert pace.of("a") == pace.usual() == 0.05
    pace.saw("a", 100, 1.0)
    pace.saw("b", 100, 10.0)
    pace.saw("c", 100, 100.0)
    pace.saw("c", 0, 5.0)
    assert [pace.of(x) for x in "abc"] == pytest.approx([0.01, 0.1, 1.0])
    assert pace.of("unknown") == pytest.approx(0.1)
    assert pace.usual(["a", "new"]) == pytest.approx(0.01)
    assert all(x < y for x, y in pairwise(pace.of(x) for x in "abc"))
