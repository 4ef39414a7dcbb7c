"""A run's steps as LangGraph tasks, whose results are recorded and taken from the record when the run is resumed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, cast

from langgraph.func import task

from agora.errors import StoreError
from agora.types import (
    Answer,
    Attempt,
    Outcome,
    TaskGraph,
    Usage,
    attempt_from_dict,
    attempt_to_dict,
    outcome_from_dict,
    outcome_to_dict,
    to_plain,
)
from graphs.execution import Run
from graphs.plan import Plan
from graphs.solver import Steps

REPLAY_TICKS: Final = 8
"""Turns of the event loop in which recorded results reach the run, before anybody is asked: LangGraph hands them over
in 4. What was spent before an interruption is thus counted before more is granted."""


class RecordedCalls:
    """Calls every step as a task of its own. See `graphs.execution.Calls`."""

    replay_ticks = REPLAY_TICKS

    async def plan(self, run: Run) -> Plan:
        """Calls `run.plan`."""
        plain = await _plan(run)
        return Plan(
            graph=TaskGraph.from_dict(plain["graph"]),
            planner=plain["planner"],
            notes=tuple(plain["notes"]),
            usage=Usage(**plain["usage"]),
        )

    def solve(self, run: Run, subtask: str, number: int) -> asyncio.Future[Any]:
        """Calls `run.solve`."""
        return cast("asyncio.Future[Any]", (_solve if number == 1 else _solve_again)(run, subtask))

    def steps(self, run: Run, subtask: str, number: int) -> Steps:
        """Keeps every step as a task within the subtask's own."""
        return _RecordedSteps(run, subtask, number)

    def attempts(self, value: Any, subtask: str, number: int) -> tuple[Attempt, ...]:
        """What was recorded; raises `ValueError` if it is another subtask's."""
        if (value["subtask"], value["round"]) != (subtask, number):
            raise ValueError(f"it is of subtask {value['subtask']!r}, round {value['round']}")
        return tuple(attempt_from_dict(a) for a in value["attempts"])

    async def synthesise(self, run: Run, graph: TaskGraph, outcomes: Mapping[str, Outcome]) -> Answer:
        """Calls `run.synthesise`."""
        answer = outcome_from_dict(await _synthesise(run, graph, outcomes))
        assert isinstance(answer, Answer)
        return answer


class _RecordedSteps:
    """See `graphs.solver.Steps`. A step is known by its place, which is checked with what is written in its record."""

    def __init__(self, run: Run, subtask: str, number: int) -> None:
        self._run = run
        self._key = {"subtask": subtask, "round": number}
        self._taken = 0

    async def __call__(self, name: str, body: Callable[[], Awaitable[Attempt]]) -> Attempt:
        self._taken += 1
        key = {**self._key, "step": self._taken, "name": name}
        record = await _step(self._run, key, body)
        if any(record.get(k) != v for k, v in key.items()):
            raise StoreError(
                f"step {self._taken} of subtask {self._key['subtask']!r} is recorded as {record.get('name')!r}, "
                f"not {name!r}",
                hint="was the run started with another configuration? Ask the question again",
            )
        return attempt_from_dict(record["attempt"])


@task
async def _step(run: Run, key: Mapping[str, Any], body: Callable[[], Awaitable[Attempt]]) -> dict[str, Any]:
    async with run.turn(key["subtask"]):
        return {**key, "attempt": attempt_to_dict(await body())}


@task
async def _plan(run: Run) -> dict[str, Any]:
    plan = await run.plan()
    return {
        "graph": plan.graph.to_dict(),
        "planner": plan.planner,
        "notes": list(plan.notes),
        "usage": to_plain(plan.usage),
    }


@task
async def _solve(run: Run, subtask: str) -> dict[str, Any]:
    return _recorded(subtask, 1, await run.solve(run.by_id[subtask], 1))


@task
async def _solve_again(run: Run, subtask: str) -> dict[str, Any]:
    return _recorded(subtask, 2, await run.solve(run.by_id[subtask], 2))


def _recorded(subtask: str, number: int, many: tuple[Attempt, ...]) -> dict[str, Any]:
    return {"subtask": subtask, "round": number, "attempts": [attempt_to_dict(a) for a in many]}


@task
async def _synthesise(run: Run, graph: TaskGraph, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return outcome_to_dict(await run.synthesise(graph, outcomes))
