"""Schedules as they are played: valid whatever the policy, never under the bounds, and dynamic HEFT's are short."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agora.errors import AgoraError
from agora.scheduling.bounds import critical_path, lower_bound, total_work
from agora.scheduling.policies import POLICIES, DynamicHeft
from agora.scheduling.problem import Flow, Machine, Problem, Task, Wire
from agora.scheduling.simulate import Schedule, Truth, simulate, uncertain
from agora.scheduling.speed import Speed
from agora.scheduling.view import Decision, View


def small(seed: int, count: int = 5, many: int = 2) -> Problem:
    rng = np.random.default_rng(seed)
    machines = tuple(
        Machine(
            name=f"m{n}",
            kind=("end", "cloud")[n % 2],
            slots=int(rng.integers(1, 4)),
            speed=Speed(alone_s=rng.uniform(0.2, 2.0), each_further_s=float(rng.choice([0.0, 0.1, 0.5, 3.0]))),
        )
        for n in range(many)
    )
    tasks = []
    for n in range(count):
        both = {"end": rng.uniform(0.5, 5.0), "cloud": rng.uniform(0.5, 5.0)}
        tasks.append(Task(id=f"t{n}", work=both if many > 1 and rng.random() < 0.8 else {"end": both["end"]}))
    flows = tuple(
        Flow(source=f"t{a}", target=f"t{b}", size=rng.uniform(0.0, 3.0))
        for a, b in itertools.combinations(range(count), 2)
        if rng.random() < 0.35
    )
    wire = Wire(latency_s=rng.uniform(0.0, 0.5), bytes_per_s=rng.uniform(0.5, 10.0))
    return Problem(tasks=tuple(tasks), flows=flows, machines=machines, wire=wire)


class Fixed:
    """Gives every task to a machine that was chosen beforehand, in an order that was; may hold back on purpose."""

    def __init__(self, where: dict[str, str], order: list[str], *, one_by_one: bool = False) -> None:
        self.where, self.order, self.one_by_one = where, order, one_by_one

    def decide(self, view: View) -> Decision:
        ready = sorted(view.ready, key=self.order.index)
        if self.one_by_one:
            ready = ready[: 1 if not view.held else 0]
        return Decision(give=tuple((t, self.where[t]) for t in ready))


def check(problem: Problem, schedule: Schedule, truth: Truth) -> None:
    """Everything is done once, after its inputs have been moved, in a slot, no faster than it can be."""
    assert set(schedule.tasks) == set(problem.by_id)
    for task, done in schedule.tasks.items():
        assert done.machine in problem.able[task]
        machine = problem.by_name[done.machine]
        least = truth.work(problem, task, done.machine) * machine.speed.seconds(1)
        assert done.end - done.start >= least * (1 - 1e-6)
        for source, size in problem.inputs[task].items():
            before = schedule.tasks[source]
            assert done.start >= before.end + problem.transfer_s(before.machine, done.machine, size) - 1e-6
    for machine in problem.machines:
        here = [d for d in schedule.tasks.values() if d.machine == machine.name]
        for d in here:
            assert sum(1 for o in here if o.start <= d.start < o.end - 1e-9) <= machine.slots


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 100_000), name=st.sampled_from(sorted(POLICIES)))
def test_every_policy_makes_a_valid_schedule_that_no_bound_forbids(seed: int, name: str) -> None:
    problem = small(seed, count=12, many=4)
    truth = uncertain(problem, np.random.default_rng(seed))
    schedule = simulate(problem, POLICIES[name](), truth)
    check(problem, schedule, truth)
    bound = lower_bound(problem, lambda t, m: truth.work(problem, t, m))
    assert schedule.makespan >= bound * (1 - 1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_no_schedule_at_all_beats_the_bounds(seed: int) -> None:
    """Every place of every task, and many orders, with and without holding back."""
    problem = small(seed, count=4, many=2)
    bound = lower_bound(problem)
    ids = [t.id for t in problem.tasks]
    best = math.inf
    for places in itertools.product(*(problem.able[i] for i in ids)):
        for order in itertools.permutations(ids):
            for one_by_one in (False, True):
                policy = Fixed(dict(zip(ids, places, strict=True)), list(order), one_by_one=one_by_one)
                best = min(best, simulate(problem, policy).makespan)
    assert best >= bound * (1 - 1e-6)
    assert critical_path(problem) <= bound and total_work(problem) <= bound
    # Online and without knowing the optimum, but not far from it where everything goes as expected.
    assert simulate(problem, DynamicHeft()).makespan <= 3.0 * best


def test_the_bounds_are_reached_where_they_can_be() -> None:
    speed = Speed.fit([(1, 12.0), (16, 77.0)])
    one = (Machine(name="gpu", kind="edge", slots=16, speed=speed),)
    alike = tuple(Task(id=f"t{n}", work={"edge": 77.0}) for n in range(32))
    together = Problem(tasks=alike, machines=one)
    assert total_work(together) == pytest.approx(32.0)
    assert simulate(together, DynamicHeft()).makespan == pytest.approx(32.0)
    chain = Problem(
        tasks=alike[:3], machines=one, flows=(Flow(source="t0", target="t1"), Flow(source="t1", target="t2"))
    )
    assert critical_path(chain) == pytest.approx(3 * 77 / 12)
    assert simulate(chain, DynamicHeft()).makespan == pytest.approx(3 * 77 / 12)


def test_the_bound_by_work_knows_that_a_machine_may_be_faster_with_less_to_do() -> None:
    """Each further request costs more than one alone: together they get less than one by itself."""
    slow = Machine(name="m", kind="end", slots=4, speed=Speed(alone_s=1.0, each_further_s=3.0))
    problem = Problem(tasks=tuple(Task(id=f"t{n}", work={"end": 1.0}) for n in range(4)), machines=(slow,))
    assert total_work(problem) == pytest.approx(4.0)
    one_by_one = simulate(problem, Fixed(dict.fromkeys(problem.by_id, "m"), list(problem.by_id), one_by_one=True))
    assert one_by_one.makespan == pytest.approx(4.0)


def test_requests_slow_each_other_as_they_come_and_go() -> None:
    """Two tasks of 1 and 2 units at 1 s a unit, 1.5 s when both run: 1.5 s together, then 1 s alone."""
    machine = Machine(name="m", kind="end", slots=2, speed=Speed(alone_s=1.0, each_further_s=0.5))
    problem = Problem(tasks=(Task(id="a", work={"end": 1.0}), Task(id="b", work={"end": 2.0})), machines=(machine,))
    schedule = simulate(problem, POLICIES["round_robin"]())
    assert schedule.tasks["a"].end == pytest.approx(1.5)
    assert schedule.tasks["b"].end == pytest.approx(2.5)


def test_the_longest_way_goes_first() -> None:
    """One slot; a chain of three beside four single ones, which round robin takes as they stand."""
    machines = tuple(Machine(name=f"m{n}", kind="end", slots=1, speed=Speed(alone_s=1.0)) for n in range(2))
    ids = ["s0", "s1", "s2", "c0", "c1", "c2"]
    problem = Problem(
        tasks=tuple(Task(id=i, work={"end": 1.0}) for i in ids),
        flows=(Flow(source="c0", target="c1"), Flow(source="c1", target="c2")),
        machines=machines,
    )
    assert simulate(problem, POLICIES["heft"]()).makespan == pytest.approx(3.0)
    assert simulate(problem, POLICIES["round_robin"]()).makespan > 3.5


def test_a_machine_that_is_slower_than_thought_gets_less() -> None:
    machines = tuple(Machine(name=n, kind="end", slots=1, speed=Speed(alone_s=1.0)) for n in ("good", "bad"))
    problem = Problem(tasks=tuple(Task(id=f"t{n}", work={"end": 1.0}) for n in range(60)), machines=machines)
    truth = Truth(machines={"bad": 8.0})
    learned = simulate(problem, DynamicHeft(), truth)
    share = sum(d.machine == "bad" for d in learned.tasks.values()) / 60
    assert share < 0.2
    assert learned.makespan <= lower_bound(problem, lambda t, m: truth.work(problem, t, m)) * 1.2


def test_a_moment_too_late_is_looked_for_again() -> None:
    """What is planned for a slot that comes free later is not given away before: the data leaves just in time."""
    quick = Machine(name="quick", kind="cloud", slots=1, speed=Speed(alone_s=0.1))
    slow = Machine(name="slow", kind="cloud", slots=1, speed=Speed(alone_s=10.0))
    problem = Problem(tasks=tuple(Task(id=f"t{n}", work={"cloud": 10.0}) for n in range(5)), machines=(quick, slow))
    schedule = simulate(problem, DynamicHeft())
    assert {d.machine for d in schedule.tasks.values()} == {"quick"}
    assert schedule.makespan == pytest.approx(5.0)


def test_the_same_seed_gives_the_same_schedule() -> None:
    problem = small(7, count=12, many=4)
    played = [simulate(problem, DynamicHeft(), uncertain(problem, np.random.default_rng(3))) for _ in range(2)]
    assert played[0].tasks == played[1].tasks


def test_uncertain_durations_are_as_long_as_expected_on_average() -> None:
    problem = small(1, count=300)
    factors = list(uncertain(problem, np.random.default_rng(0), tasks=0.5).tasks.values())
    assert np.mean(factors) == pytest.approx(1.0, abs=0.1)
    assert np.std(np.log(factors)) == pytest.approx(0.5, abs=0.08)


class Idle:
    def decide(self, view: View) -> Decision:
        return Decision()


def test_policies_that_do_what_cannot_be_are_told() -> None:
    problem = small(0)
    with pytest.raises(AgoraError, match="gave out nothing"):
        simulate(problem, Idle())
    with pytest.raises(AgoraError, match="which cannot be"):
        simulate(problem, Fixed(dict.fromkeys(problem.by_id, "nowhere"), list(problem.by_id)))
