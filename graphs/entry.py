"""The LangGraph graph around a run: its input, its output, and how it is compiled. All graphs of agora share it."""

from __future__ import annotations

from typing import Any, Final, TypedDict

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.func import entrypoint
from langgraph.pregel import Pregel
from langgraph.types import StreamWriter

from agora.errors import InvalidRequest
from agora.types import MAX_SUBTASKS
from graphs import direct
from graphs.context import informed
from graphs.databases import watching
from graphs.execution import Run
from graphs.how import Ask, How, weighed
from graphs.recorded import RecordedCalls

MAX_PARALLEL: Final = 16
"""Subtasks of one run asked at the same time: the batch size at which `local` reaches its full speed on a CPU."""

LEAST_CONCURRENCY: Final = 2
"""LangGraph's `max_concurrency` below which a run cannot move: one place is its own, one is for a subtask."""


class Answered(TypedDict):
    """What comes out of the graph: the answer's text, and everything else as `RunResult.to_dict` writes it."""

    answer: str
    result: dict[str, Any]


def checked_limits(**limits: float) -> None:
    """Checks that every limit is at least 1.

    Raises:
        InvalidRequest: If one is not.
    """
    for name, value in limits.items():
        if value < 1:
            raise InvalidRequest(f"{name} is {value}; it must be ≥ 1")


def compiled(
    how: How, *, name: str, checkpointer: BaseCheckpointSaver[Any] | None = None
) -> Pregel[Any, Any, Any, Any]:
    """Compiles a graph.

    Args:
        how: What all its runs share.
        name: What LangGraph calls it.
        checkpointer: Where finished subtasks are kept, so that a killed run can be resumed.

    Returns:
        A compiled LangGraph graph. Input `Ask`, output `Answered`; `stream_mode="custom"` yields the typed events of
        `agora.events`.
    """

    async def answer(state: Ask, *, config: RunnableConfig, writer: StreamWriter) -> Answered:
        # LangGraph counts a subtask and the step that it waits for as two that run at the same time: were all places
        # taken by subtasks, none could take its step.
        least = LEAST_CONCURRENCY + (MAX_SUBTASKS if how.crew.most_steps else 0)
        if (most := config.get("max_concurrency")) is not None and most < least:
            raise InvalidRequest(
                f"max_concurrency is {most}: the run itself takes a place, and none would be left for its subtasks",
                hint=f"leave it out, and limit subtasks with {name}(max_parallel=...)",
            )
        thread = (config.get("configurable") or {}).get("thread_id")
        run = Run(
            informed(weighed(how, state), state),
            state,
            calls=RecordedCalls(),
            run_id=None if thread is None else str(thread),
            emit=writer,
        )
        with watching(checkpointer, run.id, run.lose):
            result = await run.answer()
        return Answered(answer=result.text, result=result.to_dict())

    answer.__name__ = answer.__qualname__ = name
    graph: Pregel[Any, Any, Any, Any] = entrypoint(checkpointer=checkpointer)(answer)
    direct.allow(graph, how)
    return graph
