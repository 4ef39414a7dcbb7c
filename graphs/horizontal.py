"""Horizontal collaboration: a question becomes a task graph, and its subtasks are solved side by side by experts.

The result is a compiled LangGraph graph (an `@entrypoint`), to be invoked, streamed, checkpointed and composed like any
other. Inside, every subtask is a `@task` and starts the moment its own inputs are there: a LangGraph superstep would
hold it back until every subtask of the level above had ended.
"""

from __future__ import annotations

from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.pregel import Pregel

from agora.routing.keywords import KeywordRouter
from agora.routing.router import Router
from agora.square import Square
from agora.types import Budget
from graphs.crew import MAX_ATTEMPTS, Crew
from graphs.departure import Departure
from graphs.entry import MAX_PARALLEL, checked_limits, compiled
from graphs.how import How
from graphs.once import Once
from graphs.plan import Planner
from graphs.rules import RulePlanner
from graphs.synthesise import SectionsSynthesiser, Synthesiser


def horizontal(
    square: Square,
    *,
    planner: Planner | None = None,
    router: Router | None = None,
    synthesiser: Synthesiser | None = None,
    budget: Budget | None = None,
    max_parallel: int = MAX_PARALLEL,
    max_attempts: int = MAX_ATTEMPTS,
    departure: Departure | None = None,
    once: Once | None = None,
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
        departure: What is done to a text before it leaves this machine's tier; nothing if None.
        once: Makes identical calls once; every call is made if None.
        checkpointer: Where finished subtasks are kept, so that a killed run can be resumed.

    Returns:
        A compiled LangGraph graph. Input `Ask`, output `Answered`; `stream_mode="custom"` yields the typed events of
        `agora.events`.

    Raises:
        InvalidRequest: If a limit is not a positive number. When run: if the question cannot be asked.
        AgoraError: When run: if planning fails. Failing subtasks do not raise; the result says what is missing.
    """
    checked_limits(max_parallel=max_parallel, max_attempts=max_attempts)
    crew = Crew(
        square=square,
        router=router or KeywordRouter(),
        max_attempts=max_attempts,
        departure=departure,
        once=once,
    )
    how = How(
        crew=crew,
        planner=planner or RulePlanner(),
        synthesiser=synthesiser or SectionsSynthesiser(),
        budget=budget or Budget(),
        max_parallel=max_parallel,
        departure=departure,
    )
    return compiled(how, name="horizontal", checkpointer=checkpointer)
