"""Horizontal collaboration: a question becomes a task graph, and its subtasks are solved side by side by experts.

The result is a compiled LangGraph graph (an `@entrypoint`), to be invoked, streamed, checkpointed and composed like any
other. Inside, every subtask is a `@task` and starts the moment its own inputs are there: a LangGraph superstep would
hold it back until every subtask of the level above had ended.

Resuming. LangGraph matches recorded results to calls by the order of the calls. So all subtasks are called at once, in
topological order, and each awaits its inputs inside its body: the position in that order is its identity, whatever
the timing. Failures that may pass are asked again in a second round of calls, placed after all of the first; a
recorded failure of the first round is thus never the last word.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypedDict

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.func import entrypoint, task
from langgraph.pregel import Pregel
from langgraph.types import StreamWriter

from agora.errors import BudgetExceeded, DeadlineExceeded, InvalidRequest
from agora.events import AttemptEnded, AttemptStarted, Planned, RunFinished, RunStarted, Synthesising
from agora.routing.keywords import KeywordRouter
from agora.routing.router import Router
from agora.square import Square
from agora.types import (
    Answer,
    Attempt,
    Budget,
    Failure,
    Outcome,
    RunResult,
    Subtask,
    TaskGraph,
    Usage,
    attempt_from_dict,
    attempt_to_dict,
    checked_question,
    outcome_from_dict,
    outcome_to_dict,
    to_plain,
)
from graphs.crew import MAX_ATTEMPTS, Crew, missing_input
from graphs.plan import Plan, Planner
from graphs.render import plain_question, render
from graphs.rules import RulePlanner
from graphs.spend import Spend
from graphs.synthesise import SectionsSynthesiser, Synthesiser, combine, synthesis_prompt

MAX_PARALLEL: Final = 16
"""Subtasks of one run asked at the same time: the batch size at which `local` reaches its full speed on a CPU."""


class Ask(TypedDict, total=False):
    """What goes into the graph. `budget` and `run` may be left out; keys of a larger state are ignored."""

    question: str
    budget: dict[str, Any]
    run: str


class Answered(TypedDict):
    """What comes out of the graph: the answer's text, and everything else as `RunResult.to_dict` writes it."""

    answer: str
    result: dict[str, Any]


def horizontal(
    square: Square,
    *,
    planner: Planner | None = None,
    router: Router | None = None,
    synthesiser: Synthesiser | None = None,
    budget: Budget | None = None,
    max_parallel: int = MAX_PARALLEL,
    max_attempts: int = MAX_ATTEMPTS,
    checkpointer: BaseCheckpointSaver[Any] | None = None,
) -> Pregel[Any, Any, Any, Any]:
    """Builds the graph: plan, solve every subtask as soon as its inputs are there, make one answer.

    Args:
        square: Who can be asked.
        planner: Makes the task graph; by rules if None.
        router: Ranks experts for a subtask; by keywords if None.
        synthesiser: Makes one answer of the parts; puts them one under the other if None.
        budget: What a run may spend, unless its input says otherwise.
        max_parallel: Subtasks of one run asked at the same time.
        max_attempts: Experts asked for one subtask before it is given up.
        checkpointer: Where finished subtasks are kept, so that a killed run can be resumed.

    Returns:
        A compiled LangGraph graph. Input `Ask`, output `Answered`; `stream_mode="custom"` yields the typed events of
        `agora.events`.

    Raises:
        InvalidRequest: If a limit is not a positive number. When run: if the question cannot be asked.
        AgoraError: When run: if planning fails. Failing subtasks do not raise; the result says what is missing.
    """
    for name, value in (("max_parallel", max_parallel), ("max_attempts", max_attempts)):
        if value < 1:
            raise InvalidRequest(f"{name} is {value}; it must be ≥ 1")
    crew = Crew(square=square, router=router or KeywordRouter(), max_attempts=max_attempts)
    how = _How(
        crew=crew,
        planner=planner or RulePlanner(),
        synthesiser=synthesiser or SectionsSynthesiser(),
        budget=budget or Budget(),
        max_parallel=max_parallel,
    )

    async def horizontal(state: Ask, *, config: RunnableConfig, writer: StreamWriter) -> Answered:
        return await _Run(how, state, config, writer).answer()

    graph: Pregel[Any, Any, Any, Any] = entrypoint(checkpointer=checkpointer)(horizontal)
    return graph


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """What all runs of one graph share."""

    crew: Crew
    planner: Planner
    synthesiser: Synthesiser
    budget: Budget
    max_parallel: int


class _Run:
    """One run, or one leg of it if it was resumed. Lives in memory only: what must survive is what the tasks return."""

    def __init__(self, how: _How, state: Ask, config: RunnableConfig, writer: StreamWriter) -> None:
        if not isinstance(state, Mapping) or "question" not in state:
            raise InvalidRequest("the input needs the key 'question'", hint="invoke with {'question': '…'}")
        self.how = how
        self.question = checked_question(state["question"])
        self.id = state.get("run") or (config.get("configurable") or {}).get("thread_id") or uuid.uuid4().hex
        self.budget = _budget(state.get("budget")) or how.budget
        self.spend = Spend(self.budget)
        self.started = asyncio.get_running_loop().time()
        self.deadline = None if self.budget.deadline_s is None else self.started + self.budget.deadline_s
        self.slots = asyncio.Semaphore(how.max_parallel)
        self.emit: StreamWriter = writer
        self.settled: dict[str, asyncio.Future[Outcome]] = {}
        self.attempts: dict[str, tuple[Attempt, ...]] = {}
        self.told: set[tuple[str, int]] = set()
        self.order: tuple[Subtask, ...] = ()
        self.by_id: dict[str, Subtask] = {}

    @property
    def left(self) -> float | None:
        """Seconds to the deadline, or None."""
        return None if self.deadline is None else self.deadline - asyncio.get_running_loop().time()

    async def answer(self) -> Answered:
        self.emit(RunStarted(run=self.id, at=time.time(), question=self.question))
        plan = _plan_from_dict(await _plan(self))
        self.spend.add(plan.usage)
        self.order = plan.graph.order
        self.by_id = {s.id: s for s in self.order}
        self.emit(Planned(run=self.id, at=time.time(), graph=plan.graph, planner=plan.planner, notes=plan.notes))
        await self._round(_solve, self.order)
        # Failures that may pass: once more, after everything else has been tried. Which subtasks these are follows
        # from recorded outcomes alone, never from the time, so that a resumed run makes the same calls.
        if again := self._worth_asking_again():
            await self._round(_solve_again, again)
        outcomes = {i: many[-1].outcome for i, many in self.attempts.items()}
        final = await self._one_answer(plan.graph, outcomes)
        result = self._result(plan, outcomes, final)
        self.emit(RunFinished(run=self.id, at=time.time(), result=result))
        return Answered(answer=result.text, result=result.to_dict())

    async def _round(self, call: Any, subtasks: Sequence[Subtask]) -> None:
        loop = asyncio.get_running_loop()
        for s in subtasks:
            self.settled[s.id] = loop.create_future()
        calls = []
        for s in subtasks:
            done: asyncio.Future[list[dict[str, Any]]] = call(self, s.id)
            # By callback, not one after the other: on resume a recorded result must reach those that wait for it while
            # an unrelated subtask before it is still running.
            done.add_done_callback(partial(self._record, s.id, len(self.attempts.get(s.id, ()))))
            calls.append(done)
        await asyncio.gather(*calls)

    def _record(self, subtask: str, earlier: int, done: asyncio.Future[list[dict[str, Any]]]) -> None:
        if done.cancelled() or done.exception() is not None:
            return
        many = tuple(attempt_from_dict(a) for a in done.result())
        replayed = (subtask, earlier + 1) not in self.told
        self.attempts[subtask] = self.attempts.get(subtask, ()) + many
        if not self.settled[subtask].done():
            self.settled[subtask].set_result(many[-1].outcome)
        if replayed:
            # This came from the checkpoint: nobody was asked now, but it was spent, and it is told.
            for n, attempt in enumerate(many, 1):
                self.spend.add(attempt.outcome.usage)
                self._tell_end(subtask, earlier + n, attempt, n == len(many))

    def _worth_asking_again(self) -> tuple[Subtask, ...]:
        again: dict[str, Subtask] = {}
        for s in self.order:
            outcome = self.attempts[s.id][-1].outcome
            if isinstance(outcome, Failure) and (outcome.transient or any(i in again for i in s.inputs)):
                again[s.id] = s
        return tuple(again.values())

    async def solve(self, subtask: Subtask) -> tuple[Attempt, ...]:
        """The body of a subtask: wait for the inputs, take a slot, ask. Settles the subtask for those that need it."""
        earlier = len(self.attempts.get(subtask.id, ()))
        inputs = {i: await asyncio.shield(self.settled[i]) for i in subtask.inputs}
        missing = [i for i, o in inputs.items() if isinstance(o, Failure)]
        if missing:
            many: tuple[Attempt, ...] = (missing_input(subtask, missing),)
            self._tell_end(subtask.id, earlier + 1, many[0], True)
        else:
            answers = {i: (self.by_id[i], o) for i, o in inputs.items() if isinstance(o, Answer)}
            async with self.slots:
                many = await self.how.crew.solve(
                    subtask,
                    render(subtask, answers),
                    spend=self.spend,
                    deadline=self.deadline,
                    on_start=lambda n, expert, why: self._tell_start(subtask.id, earlier + n, expert, why),
                    on_end=lambda n, attempt, last: self._tell_end(subtask.id, earlier + n, attempt, last),
                )
        # Before the checkpoint is written: those that wait for this one start a write earlier. The writes are made in
        # this order, so a dependant is never recorded without its input.
        self.settled[subtask.id].set_result(many[-1].outcome)
        return many

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

    def _tell_end(self, subtask: str, attempt: int, result: Attempt, final: bool) -> None:
        self.told.add((subtask, attempt))
        self.emit(
            AttemptEnded(
                run=self.id,
                at=time.time(),
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
        if synthesiser.asks is None or len(graph) == 1:
            # Nothing that could fail or differ on a second try: nothing to record.
            return await SectionsSynthesiser().synthesise(self.question, graph, outcomes)
        self.emit(Synthesising(run=self.id, at=time.time()))
        answer = outcome_from_dict(await _synthesise(self, graph, outcomes))
        assert isinstance(answer, Answer)
        self.spend.add(answer.usage)
        return answer

    async def synthesise(self, graph: TaskGraph, outcomes: Mapping[str, Outcome]) -> Answer:
        """The body of the synthesis: within the budget, or else the parts as they are."""
        synthesiser = self.how.synthesiser
        assert synthesiser.asks is not None
        try:
            if self.left is not None and self.left <= 0:
                raise DeadlineExceeded("the run's deadline passed before the parts could be put together")
            prompt = synthesis_prompt(self.question, graph, outcomes)
            with self.spend.grant(synthesiser.asks.card, len(prompt), None) as most:
                return await synthesiser.synthesise(
                    self.question, graph, outcomes, max_tokens=most, timeout_s=self.left
                )
        except (BudgetExceeded, DeadlineExceeded) as e:
            note = f"the parts are given as they are: {e.message}"
            return Answer(text=combine(self.question, graph, outcomes), expert="sections", notes=(note,))

    def _result(self, plan: Plan, outcomes: Mapping[str, Outcome], final: Answer) -> RunResult:
        missing = tuple(s.id for s in self.order if isinstance(outcomes[s.id], Failure))
        return RunResult(
            run=self.id,
            question=self.question,
            text=_with_what_is_missing(final.text, self.by_id, outcomes, missing),
            graph=plan.graph,
            planner=plan.planner,
            attempts={s.id: self.attempts[s.id] for s in self.order},
            missing=missing,
            notes=(*plan.notes, *final.notes),
            usage=self.spend.spent,
            seconds=asyncio.get_running_loop().time() - self.started,
        )


@task
async def _plan(run: _Run) -> dict[str, Any]:
    try:
        async with asyncio.timeout(run.left):
            plan = await run.how.planner.plan(run.question, timeout_s=run.left, budget=run.budget)
    except TimeoutError:
        raise DeadlineExceeded(
            f"the deadline of {run.budget.deadline_s:g} s passed while planning", hint="give it more time"
        ) from None
    return {
        "graph": plan.graph.to_dict(),
        "planner": plan.planner,
        "notes": list(plan.notes),
        "usage": to_plain(plan.usage),
    }


def _plan_from_dict(plain: Mapping[str, Any]) -> Plan:
    return Plan(
        graph=TaskGraph.from_dict(plain["graph"]),
        planner=plain["planner"],
        notes=tuple(plain["notes"]),
        usage=Usage(**plain["usage"]),
    )


@task
async def _solve(run: _Run, subtask: str) -> list[dict[str, Any]]:
    return [attempt_to_dict(a) for a in await run.solve(run.by_id[subtask])]


@task
async def _solve_again(run: _Run, subtask: str) -> list[dict[str, Any]]:
    return [attempt_to_dict(a) for a in await run.solve(run.by_id[subtask])]


@task
async def _synthesise(run: _Run, graph: TaskGraph, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return outcome_to_dict(await run.synthesise(graph, outcomes))


def _budget(plain: Any) -> Budget | None:
    if plain is None or isinstance(plain, Budget):
        return plain
    try:
        return Budget(**plain)
    except TypeError:
        raise InvalidRequest(f"budget {plain!r} must be an object with any of deadline_s, cost, tokens") from None


def _with_what_is_missing(
    text: str, by_id: Mapping[str, Subtask], outcomes: Mapping[str, Outcome], missing: Sequence[str]
) -> str:
    if not missing:
        return text
    lines = [f"- {plain_question(by_id[i], by_id)} ({_reason(outcomes[i])})" for i in missing]
    if not text:
        return "No part of this could be answered:\n" + "\n".join(lines)
    return f"{text}\n\nMissing from this answer:\n" + "\n".join(lines)


def _reason(outcome: Outcome) -> str:
    return outcome.message if isinstance(outcome, Failure) else ""
