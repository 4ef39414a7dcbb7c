"""Whatever happens to a server, and in whatever order: nonsense, duplicates and clocks that stand still included."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from fed.pace import Pace, Weighting
from fed.server import begin, step
from fed.state import State, timers
from fed.words import (
    Absorb,
    Action,
    Arrived,
    Assign,
    Cancel,
    ClientInfo,
    DropTimer,
    Event,
    Finish,
    Job,
    Joined,
    Left,
    Lost,
    Profile,
    Publish,
    Rang,
    Refuse,
    Regrouped,
    Release,
    SetTimer,
)

NAMES = [f"c{i}" for i in range(6)]
MODELS = ["x", "y", "z"]


@st.composite
def paces(draw: st.DrawFn) -> Pace:
    cohort = draw(st.integers(1, 5))
    lockstep = draw(st.booleans())
    over = draw(st.sampled_from([1.0, 1.5])) if lockstep else 1.0
    wanted = math.ceil(round(cohort * over, 6))
    buffer = draw(st.integers(1, wanted if lockstep else 7))
    none_or = lambda s: st.none() | s  # noqa: E731
    return Pace(
        cohort=cohort,
        lockstep=lockstep,
        over_select=over,
        buffer=buffer,
        least=draw(st.integers(1, buffer)),
        deadline_s=draw(none_or(st.sampled_from([0.5, 3.0, 20.0]))),
        max_staleness=draw(none_or(st.integers(0, 3))),
        job_timeout_s=draw(st.sampled_from([2.0, 10.0])),
        share_cap=draw(st.sampled_from([0.1, 0.4, 1.0])) if buffer > 1 else 1.0,
        share_window=draw(st.sampled_from([1, 3, 8])),
        weighting=draw(st.sampled_from(Weighting)),
        discount=draw(st.sampled_from(["constant", "polynomial", "hinge"])),
        steps=4,
        balanced=draw(st.booleans()),
        give_up=draw(st.integers(1, 4)),
        linger_s=draw(st.sampled_from([0.0, 30.0])),
        gather_s=draw(st.sampled_from([0.0, 1.0])),
        rest_s=0.5,
        rest_max_s=8.0,
        publications=draw(none_or(st.integers(1, 30))),
        jobs=draw(none_or(st.integers(1, 60))),
        seconds=draw(none_or(st.sampled_from([5.0, 100.0]))),
    )


class Ledger:
    """What a driver sees, and checks of every single action against it."""

    def __init__(self, pace: Pace, seed: int) -> None:
        self.pace = pace
        self.present: set[str] = set()
        self.busy: dict[str, int] = {}
        self.jobs: dict[int, Job] = {}
        self.ended: set[int] = set()
        self.absorbed: dict[str, list[int]] = {}
        self.published: Counter[int] = Counter()
        self.version: Counter[str] = Counter()
        self.released: set[tuple[str, int]] = set()
        self.timers: dict[str, float] = {}
        self.over: str | None = None
        self.now = 0.0
        self.state, actions = begin(pace, seed=seed, models=("x", "y"))
        self.see(actions)

    def tell(self, event: Event) -> tuple[Action, ...]:
        if math.isfinite(event.at):
            self.now = max(self.now, event.at)
        if isinstance(event, Joined) and self.over is None:
            self.present.add(event.client.name)
            self.free(event.client.name)
        elif isinstance(event, Left):
            self.present.discard(event.client)
            self.free(event.client)
        elif isinstance(event, Rang) and self.timers.get(event.timer, math.inf) <= self.now:
            del self.timers[event.timer]
        elif isinstance(event, Lost) and self.busy.get(event.client) == event.job:
            self.free(event.client)
        self.state, actions = step(self.state, event)
        self.see(actions)
        return actions

    def free(self, client: str) -> None:
        job = self.busy.pop(client, None)
        if job is not None:
            self.ended.add(job)

    def see(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            assert self.over is None or isinstance(action, Refuse), "nothing happens after the end"
            getattr(self, type(action).__name__.lower())(action)

    def assign(self, action: Assign) -> None:
        job = action.job
        assert job.client in self.present and job.client not in self.busy
        assert job.version == self.version[job.model] and (job.model, job.version) not in self.released
        assert job.id == len(self.jobs)
        self.jobs[job.id], self.busy[job.client] = job, job.id
        assert sum(1 for j in self.busy.values() if self.jobs[j].model == job.model) <= self.pace.wanted

    def absorb(self, action: Absorb) -> None:
        job = self.jobs[action.job]
        assert self.busy.get(job.client) == job.id and (action.client, action.model) == (job.client, job.model)
        assert action.staleness == self.version[job.model] - job.version
        assert self.pace.max_staleness is None or action.staleness <= self.pace.max_staleness
        assert 0 < action.weight < math.inf
        self.absorbed.setdefault(job.model, []).append(job.id)
        self.free(job.client)

    def refuse(self, action: Refuse) -> None:
        if self.busy.get(action.client) == action.job:
            self.free(action.client)

    def cancel(self, action: Cancel) -> None:
        assert self.jobs[action.job].client == action.client
        self.free(action.client)
        assert action.job in self.ended

    def publish(self, action: Publish) -> None:
        assert list(action.jobs) == self.absorbed.pop(action.model), "in the order absorbed, each once"
        assert len(action.jobs) >= self.pace.least
        self.published.update(action.jobs)
        self.version[action.model] += 1
        assert action.version == self.version[action.model]

    def release(self, action: Release) -> None:
        key = (action.model, action.version)
        assert key not in self.released and action.version < self.version[action.model]
        assert all((self.jobs[j].model, self.jobs[j].version) != key for j in self.busy.values())
        self.released.add(key)

    def settimer(self, action: SetTimer) -> None:
        self.timers[action.timer] = action.at

    def droptimer(self, action: DropTimer) -> None:
        self.timers.pop(action.timer, None)

    def finish(self, action: Finish) -> None:
        assert action.why
        self.over = action.why
        assert not self.busy and not self.timers
        assert all(len(left) < self.pace.least for left in self.absorbed.values())

    def check(self) -> None:
        state = self.state
        assert state.finished == self.over
        assert {j.job.id for j in state.jobs.values()} == set(self.busy.values())
        assert {s.timer: s.at for s in timers(state)} == self.timers
        assert all(n == 1 for n in self.published.values())
        kept = {(self.jobs[j].model, self.jobs[j].version) for j in self.busy.values()}
        for model, newest in self.version.items():
            held = {v for v in range(newest) if (model, v) not in self.released}
            assert held == {v for m, v in kept if m == model and v < newest}, "what nobody starts from is released"
        if self.over is None:
            counted = {n for n, c in state.clients.items() if c.present}
            assert counted == self.present and state.present == len(self.present)
            pooled = [n for m in state.models.values() for pool in m.pools for n in pool.values()]
            assert sorted(pooled) == sorted(n for n in self.present if state.clients[n].place >= 0)
            for name in self.present:
                c = state.clients[name]
                assert [c.job is not None, c.rest_until is not None, c.place >= 0].count(True) == 1
                if c.place >= 0:
                    assert state.models[c.model].pools[c.pool][c.place] == name
            dead = [n for n in self.present if state.clients[n].losses >= self.pace.give_up]
            assert state.failing == len(dead)


class Anything(RuleBasedStateMachine):
    @initialize(pace=paces(), seed=st.integers(0, 2**63), joined=st.integers(0, 5))
    def begins(self, pace: Pace, seed: int, joined: int) -> None:
        self.ledger = Ledger(pace, seed)
        self.events: list[Event] = []
        self.start = (pace, seed)
        for name in NAMES[:joined]:
            self.tell(Joined(at=0.0, client=ClientInfo(name=name)))
        self.tell(Rang(at=1.0, timer="gather:x"))

    def tell(self, event: Event) -> tuple[Action, ...]:
        self.events.append(event)
        return self.ledger.tell(event)

    def later(self, more: float) -> float:
        return self.ledger.now + more

    passed = st.sampled_from([0.0, 0.0, 0.1, 1.0, 5.0, -3.0, math.nan, math.inf])

    @rule(more=passed, name=st.sampled_from(NAMES), examples=st.integers(1, 99), speed=st.floats(0, 10))
    def joins(self, more: float, name: str, examples: int, speed: float) -> None:
        info = ClientInfo(name=name, examples=examples, profile=Profile(seconds_per_step=speed))
        self.tell(Joined(at=self.later(more), client=info))

    @rule(more=passed, name=st.sampled_from(NAMES))
    def leaves(self, more: float, name: str) -> None:
        self.tell(Left(at=self.later(more), client=name))

    @rule(more=passed, which=st.integers(0, 5), examples=st.sampled_from([1, 7, 7, 1000, 0, -2]), norm=st.floats())
    def answers(self, more: float, which: int, examples: int, norm: float) -> None:
        busy = sorted(self.ledger.busy.items())
        if busy:
            name, job = busy[which % len(busy)]
            arrived = Arrived(at=self.later(more), job=job, client=name, examples=examples, steps=1, norm=norm)
            self.tell(arrived)
            before = self.ledger.state
            again = self.tell(arrived)
            if self.ledger.over is None:
                # A duplicate only ever wakes its client up.
                assert any(isinstance(a, Refuse) and a.job == job for a in again)
                assert not any(isinstance(a, Absorb | Publish) for a in again)
                assert before.models["x"].version == self.ledger.state.models["x"].version

    @rule(steps=st.lists(st.integers(0, 5), min_size=1, max_size=6))
    def some_answer(self, steps: list[int]) -> None:
        for which in steps:
            busy = sorted(self.ledger.busy.items())
            if busy:
                name, job = busy[which % len(busy)]
                at = self.later(0.25)
                self.tell(Arrived(at=at, job=job, client=name, examples=1 + which, steps=1, norm=1.0))
                self.ledger.check()

    @rule(more=passed, job=st.integers(-2, 70), name=st.sampled_from([*NAMES, "nobody"]), lost=st.booleans())
    def nonsense(self, more: float, job: int, name: str, lost: bool) -> None:
        at = self.later(more)
        if lost:
            self.tell(Lost(at=at, job=job, client=name, why="guess"))
        elif self.ledger.busy.get(name) != job:
            actions = self.tell(Arrived(at=at, job=job, client=name, examples=1, steps=1, norm=1.0))
            assert [type(a) for a in actions].count(Refuse) == 1
            assert not any(isinstance(a, Absorb) for a in actions)

    @rule(more=passed, which=st.integers(0, 5))
    def loses(self, more: float, which: int) -> None:
        busy = sorted(self.ledger.busy.items())
        if busy:
            name, job = busy[which % len(busy)]
            self.tell(Lost(at=self.later(more), job=job, client=name, why="link"))

    @rule(which=st.integers(0, 9))
    def rings(self, which: int) -> None:
        waiting = sorted(self.ledger.timers.items(), key=lambda t: (t[1], t[0]))
        if waiting:
            name, at = waiting[which % len(waiting)]
            self.tell(Rang(at=max(at, self.ledger.now), timer=name))

    @rule(
        more=passed,
        timer=st.sampled_from(["job:0", "job:x", "job:²", "rest:c1", "round:x", "gather:y", "alone", "", "limit:"]),
    )
    def rings_at_any_time(self, more: float, timer: str) -> None:
        self.tell(Rang(at=self.later(more), timer=timer))

    @rule(more=passed, models=st.dictionaries(st.sampled_from([*NAMES, "new"]), st.sampled_from(MODELS), max_size=4))
    def regroups(self, more: float, models: dict[str, str]) -> None:
        self.tell(Regrouped(at=self.later(more), models=models))

    @rule()
    def is_saved_and_taken_up(self) -> None:
        body = json.loads(json.dumps(self.ledger.state.to_json(), allow_nan=False))
        again = State.from_json(body)
        assert again == self.ledger.state
        # From here on the run goes on from what was read: all that follows must hold for it, too.
        self.ledger.state = again

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.check()

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        pace, seed = self.start
        state, _ = begin(pace, seed=seed, models=("x", "y"))
        for event in self.events:
            before, was = state, state.to_json()
            state, _ = step(before, event)
            assert before.to_json() == was, "a step changes no state that somebody has"
        assert state == self.ledger.state, "the same events make the same state, saved in between or not"


def test_whatever_happens() -> None:
    run_state_machine_as_test(Anything, settings=settings(max_examples=100, stateful_step_count=30, deadline=None))


@settings(max_examples=60, deadline=None)
@given(pace=paces(), data=st.data())
def test_one_working_client_is_enough_for_progress(pace: Pace, data: st.DataObject) -> None:
    """All others take jobs and never say a word: versions are made all the same."""
    pace = pace.but(publications=5, jobs=None, seconds=None, give_up=3)
    dead = data.draw(st.integers(0, 5))
    takes = data.draw(st.floats(0.1, pace.job_timeout_s * 0.9))
    ledger = Ledger(pace, data.draw(st.integers(0, 99)))
    for i in range(dead):
        ledger.tell(Joined(at=0.0, client=ClientInfo(name=f"dead{i}")))
    ledger.tell(Joined(at=0.0, client=ClientInfo(name="alive")))
    play(ledger, {"alive": takes})
    assert ledger.over is not None and ledger.over.startswith("5 versions")


@settings(max_examples=40, deadline=None)
@given(pace=paces(), dead=st.integers(0, 6))
def test_when_all_are_dead_the_run_ends_and_says_why(pace: Pace, dead: int) -> None:
    pace = pace.but(publications=None, jobs=None, seconds=None)
    ledger = Ledger(pace, 1)
    for i in range(dead):
        ledger.tell(Joined(at=0.0, client=ClientInfo(name=f"dead{i}")))
    play(ledger, {})
    assert ledger.over is not None
    assert ("no client works" if dead else "no client joined") in ledger.over


def play(ledger: Ledger, takes: dict[str, float], most: int = 5000) -> None:
    """Lets every client that works answer in time, and timers ring."""
    started: dict[int, float] = {}
    for _ in range(most):
        if ledger.over is not None:
            return
        for job in ledger.busy.values():
            started.setdefault(job, ledger.now)
        due: list[tuple[float, int, Any]] = [(at, 1, timer) for timer, at in ledger.timers.items()]
        due += [(started[j] + takes[n], 0, (n, j)) for n, j in ledger.busy.items() if n in takes]
        at, kind, what = min(due)
        if kind:
            ledger.tell(Rang(at=at, timer=what))
        else:
            name, job = what
            ledger.tell(Arrived(at=at, job=job, client=name, examples=3, steps=1, norm=1.0))
        ledger.check()
    pytest.fail(f"no end after {most} events: {ledger.version}")
