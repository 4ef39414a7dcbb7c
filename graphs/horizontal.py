"""Horizontal collaboration: a question becomes a task graph, and its subtasks are solved side by side by experts.

The result is a compiled LangGraph graph (an `@entrypoint`), to be invoked, streamed, checkpointed and composed like any
other. Inside, every subtask is a `@task` and starts the moment its own inputs are there: a LangGraph superstep would
hold it back until every subtask of the level above had ended.
"""

from __future__ import annotations

from typing import Any, Final, TypedDict

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.func import entrypoint
from langgraph.pregel import Pregel
from langgraph.types import StreamWriter

from agora.errors import InvalidRequest
from agora.routing.keywords import KeywordRouter
from agora.routing.router import Router
from agora.square import Square
from agora.types import Budget
from graphs import direct
from graphs.context import informed
from graphs.crew import MAX_ATTEMPTS, Crew
from graphs.databases import watching
from graphs.execution import Ask, How, Run
from graphs.plan import Planner
from graphs.recorded import RecordedCalls
from graphs.rules import RulePlanner
from graphs.synthesise import SectionsSynthesiser, Synthesiser

MAX_PARALLEL: Final = 16
"""Subtasks of one run asked at the same time: the batch size at which `local` reaches its full speed on a CPU."""

LEAST_CONCURRENCY: Final = 2
"""LangGraph's `max_concurrency` below which a run cannot move: one place is its own, one is for a subtask."""


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
    how = How(
        crew=crew,
        planner=planner or RulePlanner(),
        synthesiser=synthesiser or SectionsSynthesiser(),
        budget=budget or Budget(),
        max_parallel=max_parallel,
    )

    async def horizontal(state: Ask, *, config: RunnableConfig, writer: StreamWriter) -> Answered:
        if (most := config.get("max_concurrency")) is not None and most < LEAST_CONCURRENCY:
            raise InvalidRequest(
                f"max_concurrency is {most}: the run itself takes a place, and none would be left for its subtasks",
                hint="leave it out, and limit subtasks with horizontal(max_parallel=...)",
            )
        thread = (config.get("configurable") or {}).get("thread_id")
        run = Run(
            informed(how, state),
            state,
            calls=RecordedCalls(),
            run_id=None if thread is None else str(thread),
            emit=writer,
        )
        with watching(checkpointer, run.id, run.lose):
            result = await run.answer()
        return Answered(answer=result.text, result=result.to_dict())

    graph: Pregel[Any, Any, Any, Any] = entrypoint(checkpointer=checkpointer)(horizontal)
    direct.allow(graph, how)
    return graph
