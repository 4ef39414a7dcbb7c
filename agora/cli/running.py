"""A run from the command line: opened, watched, written down, told. Shared by `ask`, `runs resume` and `demo`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.text import Text

from agora.cli.invocation import ExitCode, Invocation
from agora.cli.progress import pulls
from agora.cli.view import answer_text, lines, render, signs_for, summary
from agora.config import Config
from agora.errors import StoreError
from agora.events import Event, RunFailed, RunFinished, RunState, apply
from agora.types import Budget, RunResult, Tier

if TYPE_CHECKING:
    from agora.square import Square
    from graphs.build import Graph
    from graphs.store import RunStore

DRAWS_PER_S = 8
"""How often the live view is drawn: the eye sees it move, a slow terminal keeps up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to run.

    Attributes:
        config: The configuration.
        question: What to answer.
        run_id: The run's id.
        budget: What it may spend.
        reach: The highest tier whose machines may see any of it.
        pull: Whether missing models may be fetched.
        go_on: Whether it was begun before, and finished subtasks are not to be asked again.
    """

    config: Config
    question: str
    run_id: str
    budget: Budget
    reach: Tier = Tier.CLOUD
    pull: bool = True
    go_on: bool = False


@asynccontextmanager
async def opened(
    invocation: Invocation, config: Config, *, pull: bool, checkpointer: Any = None
) -> AsyncIterator[Graph]:
    """The graph that the configuration describes, with its experts opened; closed again afterwards.

    Raises:
        AgoraError: If something in it cannot be opened.
    """
    from experts.build import open_square
    from graphs.build import build_graph, open_router

    async with AsyncExitStack() as stack:
        with pulls(invocation) as view:
            view.doing("opening the experts")
            square = await open_square(config, pull=pull, progress=view)
            stack.push_async_callback(square.aclose)
            routing = await stack.enter_async_context(open_router(config, pull=pull, progress=view))
            if config.neighbours:
                await stack.enter_async_context(joined_neighbours(config, square))
        yield build_graph(config, square, routing=routing, checkpointer=checkpointer)


@asynccontextmanager
async def joined_neighbours(config: Config, square: Square) -> AsyncIterator[None]:
    """The neighbours' experts, in the square for as long as the block lasts."""
    from agora.serve.neighbours import Neighbours
    from agora.serve.node import node_name
    from experts.build import check_keys, follow_tiers
    from experts.passage import new_node_id

    check_keys(config, neighbours=True)
    neighbours = Neighbours(
        square,
        config.neighbours,
        node_id=new_node_id(),
        node_name=node_name(config),
        max_hops=config.server.max_hops,
        on_tiers=partial(follow_tiers, config, square),
    )
    await neighbours.start()
    try:
        yield
    finally:
        await neighbours.aclose()


async def execute(invocation: Invocation, order: Order, store: RunStore | None) -> RunResult:
    """Runs an order that is already written down in the store, and writes down what happens and how it ended.

    A result that cannot be written down says so in its notes.

    Raises:
        AgoraError: If there is no result.
    """
    if store is None:
        return await _run(invocation, order, None, lambda event: None)
    from graphs.journal import Journal

    invocation.run = order.run_id
    lost: list[StoreError] = []
    async with Journal.open(store, on_lost=lambda run_id, error: lost.append(error)) as journal:
        try:
            result = await _run(invocation, order, store, partial(journal.put, order.run_id))
        except BaseException as e:
            # The events first: they are only this process's to write while the run is.
            await journal.flush()
            await _write_end(invocation, order, store, e)
            raise
        await journal.flush()
    try:
        ended = RunFinished(run=order.run_id, at=time.time(), result=result)
        await store.finish(order.run_id, result=result, events=[ended])
    except StoreError as e:
        # The answer is there: it is shown, whatever becomes of the record.
        return replace(result, notes=(*result.notes, f"the result could not be written down: {e}"))
    invocation.finished = True
    if lost:
        note = f"not everything that happened could be written down: {lost[0]}"
        return replace(result, notes=(*result.notes, note))
    return result


async def _write_end(invocation: Invocation, order: Order, store: RunStore, error: BaseException) -> None:
    """Writes down that there is no result, and why."""
    interrupted = isinstance(error, asyncio.CancelledError)
    message = str(error) or type(error).__name__
    failed = RunFailed(run=order.run_id, at=time.time(), code=getattr(error, "code", "internal"), message=message)
    try:
        if interrupted:
            await store.interrupt(order.run_id)
        else:
            await store.finish(order.run_id, error=message, events=[failed])
    except StoreError as e:
        invocation.note(f"and this could not be written down: {e}", keep=True)
    if interrupted:
        invocation.note(f"interrupted; go on with: agora runs resume {order.run_id}")


async def _run(
    invocation: Invocation, order: Order, store: RunStore | None, keep: Callable[[Event], None]
) -> RunResult:
    from graphs.go_on import go_on
    from graphs.news import News
    from graphs.run import run

    checkpointer = store.checkpointer if store is not None else None
    news = News()
    async with opened(invocation, order.config, pull=order.pull, checkpointer=checkpointer) as graph:
        with watching(invocation) as show:

            def on_event(event: Event) -> None:
                show(event)
                # The last one is written down together with the result.
                if not isinstance(event, RunFinished) and news.is_news(event):
                    keep(event)

            if order.go_on:
                if store is not None:
                    await news.read(store, order.run_id)
                return await go_on(
                    graph, order.run_id, order.question, budget=order.budget, reach=order.reach, on_event=on_event
                )
            return await run(
                graph,
                order.question,
                run_id=order.run_id,
                budget=order.budget,
                reach=order.reach,
                on_event=on_event,
            )


@contextmanager
def watching(invocation: Invocation) -> Iterator[Callable[[Event], None]]:
    """Shows events as they come: a live tree in a terminal, plain lines on stderr elsewhere, nothing under `--json`."""
    if invocation.json:
        yield lambda event: None
        return
    if not invocation.out.is_terminal:

        def tell(event: Event) -> None:
            for line in lines(event):
                invocation.err.print(Text(line), soft_wrap=True)

        yield tell
        return
    state = RunState()
    signs = signs_for(invocation.out.encoding)

    def fold(event: Event) -> None:
        nonlocal state
        state = apply(state, event)

    with Live(
        get_renderable=lambda: render(state, now=time.time(), signs=signs),
        console=invocation.out,
        refresh_per_second=DRAWS_PER_S,
    ):
        yield fold


def tell_result(invocation: Invocation, result: RunResult) -> ExitCode:
    """Prints what a run came to."""
    if invocation.json:
        invocation.print_json(result.to_dict())
    else:
        if invocation.out.is_terminal:
            invocation.say()
        invocation.say(Text(answer_text(result)))
        invocation.say()
        for note in result.notes:
            invocation.say(Text(f"note: {' '.join(note.split())}", style="yellow"))
        signs = signs_for(invocation.out.encoding)
        invocation.say(Text(summary(result, signs=signs), style="dim"))
    return ExitCode.OK if result.complete else ExitCode.PARTIAL


async def run_and_tell(invocation: Invocation, order: Order, *, stored: bool) -> ExitCode:
    """Runs a new order, written down before anything else if `stored`, and prints its result.

    Raises:
        AgoraError: If there is no result.
    """
    from graphs.store import RunStore

    if not stored:
        return tell_result(invocation, await execute(invocation, order, None))
    async with RunStore.open(order.config.store.where) as store:
        config = order.config
        await store.create(
            order.run_id,
            order.question,
            graph=config.graph.name,
            config_path=config.file,
            planner=config.graph.planner,
            budget=order.budget,
            reach=order.reach,
        )
        return tell_result(invocation, await execute(invocation, order, store))
