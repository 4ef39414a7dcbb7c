"""Running a compiled graph: one call for the result, or the typed events as they happen."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final, cast

from langchain_core.runnables import RunnableConfig
from langgraph.pregel import Pregel

from agora.errors import AgoraError, InvalidRequest, RunNotFound, StoreError
from agora.events import Event, RunFailed, RunFinished
from agora.types import Budget, RunResult, Tier, label_of, reach_of, to_plain
from graphs.direct import how_of, run_directly
from graphs.how import Ask, How

Graph = Pregel[Any, Any, Any, Any]

_DRIVERS: Final = frozenset({"sqlite3", "psycopg"})
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def new_run_id() -> str:
    """An id that sorts by time and is unlikely to have been used before, e.g. `20261122-181502-9f3ac1`."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def checked_run_id(run_id: str) -> str:
    """Returns `run_id` if it may name a run.

    Raises:
        InvalidRequest: If it has other characters than letters, digits and `_ . -`, or too many.
    """
    if _RUN_ID.fullmatch(run_id) is None:
        raise InvalidRequest(f"run id {run_id!r} must match {_RUN_ID.pattern}")
    return run_id


async def run(
    graph: Graph,
    question: str,
    *,
    run_id: str | None = None,
    budget: Budget | None = None,
    said_before: str = "",
    reach: Tier | str = Tier.CLOUD,
    asker: str | None = None,
    trade_off: float | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> RunResult:
    """Runs a graph to its result.

    Args:
        graph: What `horizontal` and its like return.
        question: What to answer.
        run_id: The run's id, which names it in the checkpoints; a new one if None.
        budget: What this run may spend; the graph's own budget if None.
        said_before: What the question may refer to: told to whoever is asked for a part of it, but not planned over.
        reach: How far up the question, what was said before and every part of it may go: `local`, `edge` or `cloud`.
        asker: Whose question it is: answers in flight or in a cache are shared among the questions of one asker only,
            and among all that name none.
        trade_off: Money that a right answer is worth this time, for a graph that weighs the one against the other; as
            the graph has it if None.
        on_event: Called with every event as it happens.

    Raises:
        AgoraError: If there is no result. A result with missing parts is a result, and says so.
    """
    asked, run_id = _ask(question, budget, said_before, reach, asker, trade_off), run_id or new_run_id()
    if (how := how_of(graph)) is not None:
        return await run_directly(how, asked, checked_run_id(run_id), on_event or _nobody)
    return await _last(_events(graph, asked, run_id), on_event)


async def resume(graph: Graph, run_id: str, *, on_event: Callable[[Event], None] | None = None) -> RunResult:
    """Goes on with a run that was interrupted: what was finished is taken from the checkpoint, not asked again.

    The deadline starts anew; what was spent before still counts.

    Args:
        graph: The graph that the run was started on, with its checkpointer.
        run_id: The run's id.
        on_event: Called with every event, those of the finished subtasks first.

    Raises:
        RunNotFound: If the checkpoints know no such run.
        InvalidRequest: If it already came to its end.
        AgoraError: If there is no result.
    """
    config = _config(run_id)
    try:
        state = await graph.aget_state(config) if graph.checkpointer else None
    except Exception as e:
        if isinstance(e, AgoraError) or not _is_of_a_database(e):
            raise
        raise _store_error(e) from e
    if state is None or state.created_at is None:
        raise RunNotFound(f"no run {run_id!r} is in the checkpoints", hint="list them with: agora runs list")
    if not state.next:
        raise InvalidRequest(f"run {run_id!r} already came to its end", hint=f"see: agora runs show {run_id}")
    return await _last(_events(graph, None, run_id), on_event)


async def stream(
    graph: Graph,
    question: str,
    *,
    run_id: str | None = None,
    budget: Budget | None = None,
    said_before: str = "",
    reach: Tier | str = Tier.CLOUD,
    asker: str | None = None,
    trade_off: float | None = None,
) -> AsyncGenerator[Event, None]:
    """Runs a graph and yields its events as they happen; closing the iterator cancels the run.

    Args:
        graph: What `horizontal` and its like return.
        question: What to answer.
        run_id: The run's id; a new one if None.
        budget: What this run may spend; the graph's own budget if None.
        said_before: As for `run`.
        reach: As for `run`.
        asker: As for `run`.
        trade_off: As for `run`.

    Yields:
        Events; the last one is `RunFinished`, or `RunFailed` if there is no result.
    """
    run_id = run_id or new_run_id()
    try:
        asked = _ask(question, budget, said_before, reach, asker, trade_off)
        async with aclosing(_events(graph, asked, run_id)) as events:
            async for event in events:
                yield event
    except AgoraError as e:
        yield RunFailed(run=run_id, at=time.time(), code=e.code, message=str(e))


def _nobody(event: Event) -> None:
    """Listens to no event."""


async def _last(events: AsyncGenerator[Event, None], on_event: Callable[[Event], None] | None) -> RunResult:
    result: RunResult | None = None
    async with aclosing(events):
        async for event in events:
            if on_event is not None:
                on_event(event)
            if isinstance(event, RunFinished):
                result = event.result
    if result is None:
        raise AgoraError("the graph ended without a result", hint="is it one of agora's graphs?")
    return result


async def _events(graph: Graph, given: Ask | None, run_id: str) -> AsyncGenerator[Event, None]:
    if given is not None and (how := how_of(graph)) is not None:
        async with aclosing(_direct(how, given, checked_run_id(run_id))) as events:
            async for event in events:
                yield event
        return
    try:
        stream = graph.astream(
            given,
            _config(run_id),
            stream_mode="custom",
            # A subtask's result is on disk before the run goes on to its end.
            durability="sync" if graph.checkpointer else None,
        )
        # Closed on the way out: a cancelled or abandoned run ends its in-flight work.
        async with aclosing(cast(AsyncGenerator[Event, None], stream)) as items:
            async for item in items:
                yield item
    except Exception as e:
        if isinstance(e, AgoraError) or not _is_of_a_database(e):
            raise
        raise _store_error(e) from e


async def _direct(how: How, given: Ask, run_id: str) -> AsyncGenerator[Event, None]:
    happened: asyncio.Queue[Event | None] = asyncio.Queue()
    run = asyncio.ensure_future(run_directly(how, given, run_id, happened.put_nowait))
    run.add_done_callback(lambda _: happened.put_nowait(None))
    try:
        while (event := await happened.get()) is not None:
            yield event
        await run
    finally:
        run.cancel()
        await asyncio.wait({run})


def _is_of_a_database(error: Exception) -> bool:
    # By its family, so that no database driver has to be imported to ask.
    return any(c.__module__.partition(".")[0] in _DRIVERS for c in type(error).__mro__)


def _store_error(error: Exception) -> StoreError:
    return StoreError(f"the run store failed: {error}", hint="is the disk full, or the file damaged or locked?")


def _ask(
    question: str,
    budget: Budget | None,
    said_before: str,
    reach: Tier | str,
    asker: str | None,
    trade_off: float | None,
) -> Ask:
    asked: Ask = {"question": question}
    if budget is not None:
        asked["budget"] = to_plain(budget)
    if said_before:
        asked["said_before"] = said_before
    if (bound := reach_of(reach)) is not Tier.CLOUD:
        asked["reach"] = label_of(bound)
    if asker is not None:
        asked["asker"] = asker
    if trade_off is not None:
        asked["trade_off"] = trade_off
    return asked


def _config(run_id: str) -> RunnableConfig:
    return {"configurable": {"thread_id": checked_run_id(run_id)}}
