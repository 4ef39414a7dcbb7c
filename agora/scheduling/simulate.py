"""Plays a schedule: events in the order of time, durations that turn out other than expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from agora.errors import AgoraError
from agora.scheduling.problem import Problem
from agora.scheduling.view import Ended, Held, Policy, View

TOLERANCE: Final = 1e-9
"""Share of a task's work that counts as nothing left: rounding of many small steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What durations turn out to be.

    Attributes:
        tasks: Times the expected work that a task is; 1 where nothing is said.
        machines: Times the expected work that everything is on a machine; 1 where nothing is said.
    """

    tasks: Mapping[str, float] = field(default_factory=dict)
    machines: Mapping[str, float] = field(default_factory=dict)

    def work(self, problem: Problem, task: str, machine: str) -> float:
        """Units of work that a task turns out to be on a machine."""
        return problem.work(task, machine) * self.tasks.get(task, 1.0) * self.machines.get(machine, 1.0)


def uncertain(problem: Problem, rng: np.random.Generator, *, tasks: float = 0.5, machines: float = 0.25) -> Truth:
    """Draws what durations turn out to be: lognormal factors with a mean of 1.

    Args:
        problem: What was expected.
        rng: Where randomness comes from.
        tasks: Standard deviation of the logarithm of a task's own factor.
        machines: That of a machine's factor, which all its tasks share.
    """

    def draw(sigma: float) -> float:
        return float(rng.lognormal(-sigma * sigma / 2, sigma))

    return Truth(
        tasks={t.id: draw(tasks) for t in problem.tasks}, machines={m.name: draw(machines) for m in problem.machines}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """One task of a schedule: where, from when, till when."""

    machine: str
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What happened.

    Attributes:
        tasks: By id.
        decisions: How often the policy was asked.
    """

    tasks: Mapping[str, Done]
    decisions: int

    @property
    def makespan(self) -> float:
        """Seconds from the start to the last end."""
        return max(d.end for d in self.tasks.values())


class _Running:
    __slots__ = ("left", "machine", "started", "task", "whole")

    def __init__(self, task: str, machine: str, started: float, work: float) -> None:
        self.task, self.machine, self.started, self.left, self.whole = task, machine, started, work, work


def simulate(problem: Problem, policy: Policy, truth: Truth | None = None) -> Schedule:
    """Plays a problem to its end.

    A task that is given to a machine has its inputs moved there from then on, waits for a slot in the order given, and
    then runs at the speed that the machine has at its load of the moment: all that run slow down when one more starts.

    Args:
        problem: What is to be done.
        policy: Who decides; a fresh one.
        truth: What durations turn out to be; as expected if None.

    Raises:
        AgoraError: If the policy gives a task away twice or before it is ready, or to a machine that cannot do it, or
            gives out nothing while nothing is under way.
    """
    return _Play(problem, policy, truth or Truth()).play()


class _Play:
    def __init__(self, problem: Problem, policy: Policy, truth: Truth) -> None:
        self.problem, self.policy, self.truth = problem, policy, truth
        self.now = 0.0
        self.ready = [t.id for t in problem.tasks if not problem.inputs[t.id]]
        self.missing = {t.id: len(problem.inputs[t.id]) for t in problem.tasks}
        self.waiting: dict[str, tuple[str, float]] = {}
        self.running: dict[str, list[_Running]] = {m.name: [] for m in problem.machines}
        self.ended: dict[str, Ended] = {}
        self.done: dict[str, Done] = {}
        self.look_again: float | None = None
        self.decisions = 0

    def play(self) -> Schedule:
        self._decide()
        while len(self.done) < len(self.problem.tasks):
            at = self._next()
            if math.isinf(at):
                raise AgoraError(f"the policy gave out nothing though {self.ready} wait and nothing is under way")
            self._advance(at)
            ended = self._collect()
            looked_for = self.look_again is not None and self.look_again <= self.now
            if ended or looked_for:
                self._decide()
            self._start()
        return Schedule(tasks=self.done, decisions=self.decisions)

    def _next(self) -> float:
        """When something happens next."""
        times = [math.inf if self.look_again is None else self.look_again]
        for name, running in self.running.items():
            machine = self.problem.by_name[name]
            if running:
                times.append(self.now + min(r.left for r in running) * machine.speed.seconds(len(running)))
        for machine_name, there_at in self.waiting.values():
            if len(self.running[machine_name]) < self.problem.by_name[machine_name].slots:
                times.append(max(there_at, self.now))
        return min(times)

    def _advance(self, at: float) -> None:
        for name, running in self.running.items():
            step = (at - self.now) * self.problem.by_name[name].speed.rate(len(running)) if running else 0.0
            for r in running:
                r.left -= step
        self.now = at

    def _collect(self) -> bool:
        any_ended = False
        for name, running in self.running.items():
            for r in [r for r in running if r.left <= TOLERANCE * r.whole]:
                running.remove(r)
                any_ended = True
                self.ended[r.task] = Ended(machine=name, at=self.now, work=r.whole)
                self.done[r.task] = Done(machine=name, start=r.started, end=self.now)
                for other in self.problem.outputs[r.task]:
                    self.missing[other] -= 1
                    if not self.missing[other]:
                        self.ready.append(other)
        return any_ended

    def _start(self) -> None:
        for task, (name, there_at) in list(self.waiting.items()):
            if there_at <= self.now and len(self.running[name]) < self.problem.by_name[name].slots:
                del self.waiting[task]
                work = self.truth.work(self.problem, task, name)
                self.running[name].append(_Running(task, name, self.now, work))

    def _decide(self) -> None:
        self._start()
        running = {
            r.task: Held(machine=r.machine, there_at=r.started, started=r.started, done=r.whole - r.left)
            for many in self.running.values()
            for r in many
        }
        waiting = {t: Held(machine=m, there_at=at) for t, (m, at) in self.waiting.items()}
        view = View(
            problem=self.problem,
            now=self.now,
            ready=tuple(self.ready),
            held={**running, **waiting},
            ended=self.ended,
        )
        decision = self.policy.decide(view)
        self.decisions += 1
        for task, machine in decision.give:
            if task not in self.ready or machine not in self.problem.able[task]:
                raise AgoraError(f"the policy gave task {task!r} to {machine!r}, which cannot be")
            self.ready.remove(task)
            there = [
                self.problem.transfer_s(self.ended[i].machine, machine, size)
                for i, size in self.problem.inputs[task].items()
            ]
            self.waiting[task] = machine, self.now + max(there, default=0.0)
        later = decision.look_again_at
        # A moment that rounding puts at now would be looked for for ever.
        self.look_again = None if later is None or not self.ready else max(later, math.nextafter(self.now, math.inf))
        self._start()
