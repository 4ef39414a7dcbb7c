"""Going on with a run that was begun before, wherever it was stopped."""

from __future__ import annotations

from collections.abc import Callable

from agora.errors import InvalidRequest, RunNotFound
from agora.events import Event
from agora.types import Budget, RunResult, Tier
from graphs.run import Graph, resume, run


async def go_on(
    graph: Graph,
    run_id: str,
    question: str,
    *,
    budget: Budget | None = None,
    reach: Tier = Tier.CLOUD,
    asker: str | None = None,
    trade_off: float | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> RunResult:
    """Brings a run to its result: from its checkpoint, or from its question if it was stopped before the first one.

    Args:
        graph: The graph that it was started on, with its checkpointer.
        run_id: The run's id.
        question: What was asked.
        budget: What it may spend if it has to start from its question; a checkpoint brings its own.
        reach: How far up it may go, likewise.
        asker: Whose question it is, likewise.
        trade_off: Money that a right answer is worth, likewise.
        on_event: Called with every event, those of finished subtasks first; with none if all was done but the telling.

    Raises:
        AgoraError: If there is no result.
    """
    try:
        return await resume(graph, run_id, on_event=on_event)
    except RunNotFound:
        return await run(
            graph,
            question,
            run_id=run_id,
            budget=budget,
            reach=reach,
            asker=asker,
            trade_off=trade_off,
            on_event=on_event,
        )
    except InvalidRequest:
        # Stopped after its last checkpoint and before its result was written down: the checkpoint has the result.
        state = await graph.aget_state({"configurable": {"thread_id": run_id}})
        if state.next or "result" not in state.values:
            raise
        return RunResult.from_dict(state.values["result"])
