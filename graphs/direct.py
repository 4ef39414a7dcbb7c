"""A run without LangGraph around it, where nothing of what LangGraph gives is wanted.

A graph that is compiled without a checkpointer, and run by `graphs.run` rather than composed into another or streamed
in LangGraph's own modes, records nothing: its steps are then called as they are. A run with one subtask costs 2 ms less
so, of 3.3. Whoever invokes or streams the graph itself gets LangGraph, as does tracing with LangSmith.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from langsmith.utils import tracing_is_enabled

from agora.events import Event
from agora.types import Answer, Attempt, Outcome, RunResult, TaskGraph
from graphs.context import informed
from graphs.execution import Run
from graphs.how import Ask, How, weighed
from graphs.plan import Plan
from graphs.solver import Steps, Weighing

_ATTRIBUTE: Final = "agora_how"


class DirectCalls:
    """Calls every step as it is. See `graphs.execution.Calls`."""

    replay_ticks = 0

    async def plan(self, run: Run) -> Plan:
        """Calls `run.plan`."""
        return await run.plan()

    def solve(self, run: Run, subtask: str, number: int) -> asyncio.Future[Any]:
        """Calls `run.solve`."""
        return asyncio.ensure_future(run.solve(run.by_id[subtask], number))

    def steps(self, run: Run, subtask: str, number: int) -> Steps:
        """Takes every step when its turn has come."""

        async def step(name: str, body: Callable[[], Awaitable[Attempt]]) -> Attempt:
            async with run.turn(subtask):
                return await body()

        return step

    def attempts(self, value: Any, subtask: str, number: int) -> tuple[Attempt, ...]:
        """What the future gave."""
        many: tuple[Attempt, ...] = value
        return many

    async def synthesise(self, run: Run, graph: TaskGraph, outcomes: Mapping[str, Outcome]) -> Answer:
        """Calls `run.synthesise`."""
        return await run.synthesise(graph, outcomes)


def allow(graph: object, how: How) -> None:
    """Lets runs of a graph go without LangGraph around them."""
    setattr(graph, _ATTRIBUTE, how)


def how_of(graph: object) -> How | None:
    """How a graph's runs go, if they may go without LangGraph."""
    how: How | None = getattr(graph, _ATTRIBUTE, None)
    return None if how is None or getattr(graph, "checkpointer", None) or tracing_is_enabled() else how


def weighs(graph: object) -> bool:
    """Whether a run of a graph may say what a right answer is worth."""
    how: How | None = getattr(graph, _ATTRIBUTE, None)
    return how is not None and isinstance(how.crew, Weighing)


async def run_directly(how: How, asked: Ask, run_id: str, emit: Callable[[Event], None]) -> RunResult:
    """Runs to the result.

    Raises:
        AgoraError: If there is none.
    """
    run = Run(informed(weighed(how, asked), asked), asked, calls=DirectCalls(), run_id=run_id, emit=emit)
    return await run.answer()
