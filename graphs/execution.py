"""One run over a task graph: plan, two rounds of subtasks, one answer, in a form that can be resumed.

LangGraph matches recorded results to calls by the order of the calls. So all subtasks are called at once, in
topological order, and each awaits its inputs inside its body: the position in that order is its identity, whatever
the timing. Failures that may pass are asked again in a second round, in which again all subtasks are called and those
that need nothing return at once. Every record carries its subtask's id, which is checked when it is read.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Final, NoReturn, Protocol

from agora.errors import AgoraError, DeadlineExceeded, InvalidRequest, StoreError
from agora.events import AttemptEnded, AttemptStarted, Event, Planned, RunFinished, RunStarted, Synthesising
from agora.types import (
    Answer,
    Attempt,
    Failure,
    Outcome,
    RunResult,
    Subtask,
    TaskGraph,
    Tier,
    checked_question,
    reach_of,
)
from graphs.crew import missing_input
from graphs.how import Ask, How, asker_of, budget_of
from graphs.missing import with_what_is_missing
from graphs.outside import plan_outside
from graphs.places import Places
from graphs.plan import Plan
from graphs.put_together import put_together
from graphs.render import render
from graphs.solver import Job, Steps
from graphs.spend import Spend
from graphs.synthesise import SectionsSynthesiser, answered

log = logging.getLogger(__name__)

PLANNING_SHARE: Final = 0.5
"""Share of the time to the deadline that a planner is told it has. A planning model that hangs is then replaced by the
rules while there is as much time left to answer."""


class Calls(Protocol):
    """How the steps of a run are called: as tasks that are recorded and resumed, or directly.

    Attributes:
        replay_ticks: Turns of the event loop in which results of an earlier leg reach the run, before anybody is asked.
    """

    @property
    def replay_ticks(self) -> int:
        """See the class."""

    async def plan(self, run: Run) -> Plan:
        """Calls `run.plan`."""

    def solve(self, run: Run, subtask: str, number: int) -> asyncio.Future[Any]:
        """Calls `run.solve`; all subtasks of a round are called at once, in topological order."""

    def steps(self, run: Run, subtask: str, number: int) -> Steps:
        """Keeps the steps of one call of `run.solve`, in the order in which they are taken."""

    def attempts(self, value: Any, subtask: str, number: int) -> tuple[Attempt, ...]:
        """What the future of `solve` gave, read. Raises whatever shows that it is something else."""

    async def synthesise(self, run: Run, graph: TaskGraph, outcomes: Mapping[str, Outcome]) -> Answer:
        """Calls `run.synthesise`."""


class Run:
    """One run, or one leg of it if it was resumed. Lives in memory only: what must survive is what the tasks return.

    Args:
        how: What all runs of its graph share.
        state: What was asked.
        calls: How its steps are called.
        run_id: Its id; a new one if None.
        emit: Told every event as it happens.

    Raises:
        InvalidRequest: If the question, the budget or the label cannot be.
    """

    def __init__(
        self, how: How, state: Ask, *, calls: Calls, run_id: str | None, emit: Callable[[Event], None]
    ) -> None:
        if not isinstance(state, Mapping) or "question" not in state:
            raise InvalidRequest("the input needs the key 'question'", hint="invoke with {'question': '…'}")
        self.how = how
        self.question = checked_question(state["question"])
        self.said_before = state.get("said_before") or ""
        self.id = run_id or uuid.uuid4().hex
        self.budget = budget_of(state) or how.budget
        self.asker = asker_of(state)
        self.reach = Tier.CLOUD if state.get("reach") is None else reach_of(state["reach"])
        self.spend = Spend(self.budget)
        self.started = asyncio.get_running_loop().time()
        self.deadline = None if self.budget.deadline_s is None else self.started + self.budget.deadline_s
        self.places = Places(how.max_parallel)
        self.urgency: Mapping[str, float] = {}
        self.emit = emit
        self.calls = calls
        self.settled: dict[str, asyncio.Future[Outcome]] = {}
        self.attempts: dict[str, tuple[Attempt, ...]] = {}
        self.told: set[tuple[str, int]] = set()
        self.lost: asyncio.Future[NoReturn] = asyncio.get_running_loop().create_future()
        self.open = asyncio.Event()
        self.first: dict[str, Outcome] = {}
        self.order: tuple[Subtask, ...] = ()
        self.by_id: dict[str, Subtask] = {}

    @property
    def left(self) -> float | None:
        """Seconds to the deadline, or None."""
        return None if self.deadline is None else self.deadline - asyncio.get_running_loop().time()

    async def answer(self) -> RunResult:
        """Runs to the result.

        Raises:
            AgoraError: If planning fails, or a result cannot be kept or read back.
        """
        self.emit(RunStarted(run=self.id, at=time.time(), question=self.question))
        if self.how.departure is not None:
            # As a whole, before its parts leave, each without what the others tell.
            await self.how.departure.learn(f"{self.said_before}\n\n{self.question}", spend=self.spend)
        plan = await self.calls.plan(self)
        # Once more for a plan that was recorded: the label of the run holds whatever the record says.
        plan = replace(plan, graph=plan.graph.bounded(self.reach))
        self.spend.add(plan.usage)
        self.order = plan.graph.order
        self.by_id = {s.id: s for s in self.order}
        self.urgency = self.how.scheduler.urgencies(plan.graph)
        self.emit(Planned(run=self.id, at=time.time(), graph=plan.graph, planner=plan.planner, notes=plan.notes))
        await self._round(1)
        self.first = {i: many[-1].outcome for i, many in self.attempts.items()}
        if self._worth_asking_again():
            await self._round(2)
        outcomes = {i: many[-1].outcome for i, many in self.attempts.items()}
        final = await self._one_answer(plan.graph, outcomes)
        if self.lost.done():
            await self.lost
        result = self._result(plan, outcomes, final)
        self.emit(RunFinished(run=self.id, at=time.time(), result=result))
        return result

    def lose(self, error: Exception) -> None:
        """A result could not be written down: the run ends now, before anybody else is asked and paid."""
        if not self.lost.done():
            self.lost.set_exception(StoreError(f"a result could not be kept: {error}", hint="is the disk full?"))

    async def plan(self) -> Plan:
        """The first step: makes the task graph, within the run's time, and labels it.

        Raises:
            DeadlineExceeded: If that is up.
            AgoraError: If the planner fails.
        """
        try:
            async with asyncio.timeout(self.left):
                share = None if self.left is None else self.left * PLANNING_SHARE
                return await plan_outside(
                    self.how.planner,
                    self.question,
                    reach=self.reach,
                    departure=self.how.departure,
                    spend=self.spend,
                    timeout_s=share,
                    budget=self.budget,
                )
        except TimeoutError:
            raise DeadlineExceeded(
                f"the deadline of {self.budget.deadline_s:g} s passed while planning", hint="give it more time"
            ) from None
        except AgoraError:
            raise
        except Exception as e:
            raise AgoraError(
                f"planner {self.how.planner.name!r} failed: {type(e).__name__}: {e}",
                hint="a planner raises AgoraError only",
            ) from e

    async def _round(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        self.settled = {s.id: loop.create_future() for s in self.order}
        self.open.clear()
        calls = []
        for s in self.order:
            done = self.calls.solve(self, s.id, number)
            # By callback, not one after the other: on resume a recorded result must reach those that wait for it while
            # an unrelated subtask before it is still running.
            done.add_done_callback(partial(self._record, s.id, number, len(self.attempts.get(s.id, ()))))
            calls.append(done)
        everything = asyncio.gather(*calls, *self.settled.values())
        # What else went wrong in it is no news once the run has ended otherwise.
        everything.add_done_callback(lambda f: f.cancelled() or f.exception())
        try:
            # A subtask that was interrupted in the middle hands over its steps one after the other.
            for _ in range(self.calls.replay_ticks * (1 + self.how.crew.most_steps)):
                await asyncio.sleep(0)
            self.open.set()
            either: set[asyncio.Future[Any]] = {everything, self.lost}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self.lost.done():
                await self.lost
            await everything
        finally:
            everything.cancel()

    def _record(self, subtask: str, number: int, earlier: int, done: asyncio.Future[Any]) -> None:
        if done.cancelled() or done.exception() is not None:
            return
        settled = self.settled[subtask]
        try:
            many = self.calls.attempts(done.result(), subtask, number)
            outcome = many[-1].outcome if many else self.attempts[subtask][-1].outcome
        except Exception as e:
            # Whoever waits for it must not wait for ever.
            if not settled.done():
                settled.set_exception(
                    StoreError(
                        f"the recorded result of subtask {subtask!r} cannot be read: {e}",
                        hint="was the run started by another version? Ask the question again",
                    )
                )
            return
        self.attempts[subtask] = self.attempts.get(subtask, ()) + many
        if not settled.done():
            settled.set_result(outcome)
        for n, attempt in enumerate(many, earlier + 1):
            if (subtask, n) not in self.told:
                # This came from the checkpoint: nobody was asked now, but it was spent, and it is told.
                self.spend.add(attempt.outcome.usage)
                self._tell_end(subtask, n, attempt, n == earlier + len(many), at=attempt.started_at + attempt.seconds)

    def _worth_asking_again(self) -> frozenset[str]:
        """Subtasks whose failure may pass, and those that failed for want of them.

        From what the first round recorded alone, never from the time, so that a resumed run comes to the same.
        """
        again: set[str] = set()
        for s in self.order:
            outcome = self.first[s.id]
            if isinstance(outcome, Failure) and (outcome.transient or any(i in again for i in s.inputs)):
                again.add(s.id)
        return frozenset(again)

    async def solve(self, subtask: Subtask, number: int) -> tuple[Attempt, ...]:
        """The body of a subtask: wait for the inputs, take a slot, ask. Settles the subtask for those that need it."""
        stepwise = self.how.crew.most_steps > 0
        if not stepwise:
            await self.open.wait()
        before = self.attempts.get(subtask.id, ())
        if number > 1 and subtask.id not in self._worth_asking_again():
            if not self.settled[subtask.id].done():
                self.settled[subtask.id].set_result(before[-1].outcome)
            return ()
        inputs = {i: await asyncio.shield(self.settled[i]) for i in subtask.inputs}
        missing = [i for i, o in inputs.items() if isinstance(o, Failure)]
        if missing:
            many: tuple[Attempt, ...] = (missing_input(subtask, missing),)
            self._tell_end(subtask.id, len(before) + 1, many[0], True)
        else:
            answers = {i: (self.by_id[i], o) for i, o in inputs.items() if isinstance(o, Answer)}
            async with nullcontext() if stepwise else self.turn(subtask.id):
                job = Job(
                    subtask=subtask,
                    question=render(subtask, answers),
                    spend=self.spend,
                    deadline=self.deadline,
                    on_start=lambda n, expert, why: self._tell_start(subtask.id, len(before) + n, expert, why),
                    on_end=lambda n, attempt, last: self._tell_end(subtask.id, len(before) + n, attempt, last),
                    steps=self.calls.steps(self, subtask.id, number),
                    asker=self.asker,
                )
                many = await self.how.crew.solve(job)
        # Before the checkpoint is written: those that wait for this one start a write earlier.
        self.settled[subtask.id].set_result(many[-1].outcome)
        return many

    @asynccontextmanager
    async def turn(self, subtask: str) -> AsyncIterator[None]:
        """A place among those who may be asked at the same time, once what is on record has been counted."""
        await self.open.wait()
        async with self.places.at(self.urgency.get(subtask, 0.0)):
            yield

    def _tell_start(self, subtask: str, attempt: int, expert: str, why: str) -> None:
        self.emit(
            AttemptStarted(
                run=self.id,
                at=time.time(),
                subtask=subtask,
                position=self._position(subtask),
                attempt=attempt,
                expert=expert,
                why=why,
            )
        )

    def _tell_end(self, subtask: str, attempt: int, result: Attempt, final: bool, *, at: float | None = None) -> None:
        self.told.add((subtask, attempt))
        if at is None:  # It was asked now, and is not from the record.
            self.how.scheduler.saw(result)
        self.emit(
            AttemptEnded(
                run=self.id,
                at=time.time() if at is None else at,
                subtask=subtask,
                position=self._position(subtask),
                attempt=attempt,
                result=result,
                final=final,
            )
        )

    def _position(self, subtask: str) -> int:
        return self.order.index(self.by_id[subtask])

    async def _one_answer(self, graph: TaskGraph, outcomes: Mapping[str, Outcome]) -> Answer:
        if not any(isinstance(o, Answer) for o in outcomes.values()):
            return Answer(text="", expert="nobody")
        synthesiser = self.how.synthesiser
        if synthesiser.asks is None:
            # It asks nobody: nothing that costs or differs on a second try, so nothing to record.
            return await self.synthesise(graph, outcomes)
        if len(answered(graph, outcomes)) == 1:
            return await SectionsSynthesiser().synthesise(self.question, graph, outcomes)
        self.emit(Synthesising(run=self.id, at=time.time()))
        answer = await self.calls.synthesise(self, graph, outcomes)
        self.spend.add(answer.usage)
        return answer

    async def synthesise(self, graph: TaskGraph, outcomes: Mapping[str, Outcome]) -> Answer:
        """The synthesis, within budget and deadline; whatever goes wrong with it, the parts are given as they are."""
        return await put_together(
            self.how.synthesiser,
            self.question,
            graph,
            outcomes,
            departure=self.how.departure,
            spend=self.spend,
            deadline=self.deadline,
        )

    def _result(self, plan: Plan, outcomes: Mapping[str, Outcome], final: Answer) -> RunResult:
        missing = tuple(s.id for s in self.order if isinstance(outcomes[s.id], Failure))
        return RunResult(
            run=self.id,
            question=self.question,
            text=with_what_is_missing(final.text, self.by_id, outcomes, missing),
            graph=plan.graph,
            planner=plan.planner,
            attempts={s.id: self.attempts[s.id] for s in self.order},
            missing=missing,
            notes=(*plan.notes, *self.how.crew.notes, *self._cut_short(outcomes), *final.notes),
            usage=self.spend.spent,
            seconds=asyncio.get_running_loop().time() - self.started,
        )

    def _cut_short(self, outcomes: Mapping[str, Outcome]) -> list[str]:
        return [f"{s.id}: {n}" for s in self.order if isinstance(o := outcomes[s.id], Answer) for n in o.notes]
