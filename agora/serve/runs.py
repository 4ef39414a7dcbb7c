"""Runs that outlive the connection that asked for them, and the process that began them.

A run is on disk before it is accepted, and so is every event before anybody sees it. A process that starts goes on with
the runs that an earlier one left behind.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from agora.config import Config
from agora.errors import AgoraError, InvalidRequest, RunNotFound, StoreError
from agora.events import Event
from agora.protocols import Load
from agora.serve.errors import ApiError
from agora.serve.live_run import Stop
from agora.serve.weighing import check_weighs
from agora.serve.workshop import PAGE, Workshop
from agora.types import Budget, Tier, checked_question
from graphs.build import Graph
from graphs.records import RunRecord, RunStatus, StoredEvent
from graphs.run import checked_run_id, new_run_id
from graphs.store import RunExists, RunStore

log = logging.getLogger(__name__)

ORIGIN: Final = "gateway"
"""What the store calls runs that were started here, and that are gone on with when the process starts again."""

MAX_RUNS: Final = 16
"""Runs worked on at once, each with up to as many subtasks at once as its graph allows."""

MAX_WAITING: Final = 1_000
"""Runs that may wait for their turn: some megabytes, and at a second each a quarter of an hour on 1 place."""

MAX_CRASHES: Final = 3
"""Processes that may die while at a run before it is no longer gone on with at the start: it may be what kills them."""

RETRY_AFTER_S: Final = 5.0
"""Seconds told to those for whose run there is no place: about what a run of a few subtasks takes."""

NEW_IDS: Final = 8
"""New ids tried for a run that was given none. Two of a thousand runs in one second share one with probability 0.03."""

T = TypeVar("T")


class Runs:
    """See the module. `start` it before use and `aclose` it at the end.

    Args:
        store: Where runs and their events are kept.
        graphs: Graphs by their names, built with the store's checkpointer. One may have several names.
        default_graph: The one used where none is named.
        max_runs: Runs worked on at once; further ones wait, the first to come first.
        max_waiting: Runs that may wait; further ones are refused.
        config: What the graphs were built from: its limits hold for every run, and it is noted where it came from.
        clock: Wall-clock seconds since the epoch.
    """

    def __init__(
        self,
        store: RunStore,
        graphs: Mapping[str, Graph],
        *,
        default_graph: str,
        max_runs: int = MAX_RUNS,
        max_waiting: int = MAX_WAITING,
        config: Config | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if default_graph not in graphs:
            raise InvalidRequest(f"default graph {default_graph!r} is unknown; allowed: {', '.join(graphs)}")
        self._store = store
        self._graphs = graphs
        self._default = default_graph
        self._max_runs = max_runs
        self._max_waiting = max_waiting
        self._config = config
        self._shop = Workshop(store, max_runs=max_runs, clock=clock)
        self._live = self._shop.live
        self._arriving: set[asyncio.Task[Any]] = set()

    @property
    def load(self) -> Load:
        """Runs worked on, and runs waiting for their turn."""
        begun = sum(live.begun for live in self._live.values())
        return Load(running=begun, waiting=len(self._live) - begun)

    def is_waiting(self, run_id: str) -> bool:
        """Whether a run is accepted and waits for its turn."""
        live = self._live.get(run_id)
        return live is not None and not live.begun

    async def start(self, *, resume: bool = True) -> None:
        """Begins to work.

        Args:
            resume: Whether to go on with the gateway's runs that a process left behind, the oldest first.

        Raises:
            StoreError: If the store cannot be read.
        """
        await self._shop.start()
        if not resume:
            return
        left: list[RunRecord] = []
        while page := await self._store.list(
            status=RunStatus.INTERRUPTED,
            origin=ORIGIN,
            before=left[-1].id if left else None,
            limit=PAGE,
            results=False,
        ):
            left += page
        for record in reversed(left):
            if record.graph not in self._graphs:
                log.warning("run %s is left interrupted: there is no graph %r here", record.id, record.graph)
            elif record.crashes >= MAX_CRASHES:
                log.warning("run %s is left interrupted: %d processes died at it", record.id, record.crashes)
            else:
                try:
                    await self._take(record)
                except AgoraError as e:
                    log.warning("run %s is left as it is: %s", record.id, e.message)

    async def create(
        self,
        question: str,
        *,
        graph: str | None = None,
        budget: Budget | None = None,
        reach: Tier = Tier.CLOUD,
        metadata: Mapping[str, str] | None = None,
        run_id: str | None = None,
        asker: str | None = None,
        trade_off: float | None = None,
    ) -> RunRecord:
        """Accepts a run: it is written down when this returns, and goes on whatever becomes of whoever asked.

        Args:
            question: What to answer.
            graph: Name of the graph; the default one if None.
            budget: What it may spend, within what the configuration allows.
            reach: How far up it may go, with every part of it.
            metadata: What is to be kept with it.
            run_id: Its id; the same id again with the same question, graph and reach is the same run.
            asker: Whose question it is; see `graphs.run.run`.
            trade_off: Money that a right answer is worth; see `graphs.run.run`.

        Raises:
            InvalidRequest: If the question cannot be asked, or the id is malformed.
            ApiError: 400 if there is no such graph, 409 if the id is another run's, 429 if too many wait, 503 if it
                cannot be written down or the process is about to end.
        """
        name = self._named(graph)
        if trade_off is not None:
            check_weighs(self._graphs[name], name)
        checked_question(question)
        if run_id is not None:
            checked_run_id(run_id)
            with suppress(RunNotFound):
                return _same(await self._read(run_id), question, name, reach)
        kept = {"metadata": metadata, "asker": asker, "trade_off": trade_off}
        accept = partial(self._accept, question, name, self._within(budget), reach, kept, run_id)
        return await self._admitted(accept, "accepted")

    async def get(self, run_id: str) -> RunRecord:
        """The run of that id.

        Raises:
            RunNotFound: If there is none.
            StoreError: If the store cannot be read.
        """
        return self._as_known(await self._store.get(run_id))

    async def list(
        self, *, limit: int = 20, status: RunStatus | None = None, before: str | None = None
    ) -> Sequence[RunRecord]:
        """The newest runs first, without their results; see `RunStore.list`."""
        records = await self._store.list(limit=limit, status=status, before=before, results=False)
        return [self._as_known(r) for r in records]

    async def cancel(self, run_id: str) -> RunRecord:
        """Ends a run: its work is stopped upstream, and that is written down when this returns.

        A run that came to an end before stays as it is.

        Raises:
            RunNotFound: If there is none.
            ApiError: 409 if another process is at it, 503 if it cannot be written down.
        """
        live = self._live.get(run_id)
        if live is None:
            record = await self._read(run_id)
            if record.status is RunStatus.RUNNING:
                raise ApiError(409, f"run {run_id!r} is being worked on by another process", code="run_elsewhere")
            if record.status is RunStatus.INTERRUPTED:
                await self._arrive(self._cancel_idle(run_id))
            return await self._read(run_id)
        live.stop(Stop.CANCELLED)
        try:
            await live.settled()
        except StoreError as e:
            raise _unwritable("ended", e) from e
        return await self._read(run_id)

    async def resume(self, run_id: str) -> RunRecord:
        """Goes on with a run that was interrupted or failed; one that is in hand already stays so.

        Raises:
            RunNotFound: If there is none.
            ApiError: 409 if it came to its end, another process is at it, or its graph is not here; 429 if too many
                wait; 503 if it cannot be written down or the process is about to end.
        """
        if run_id in self._live:
            return await self._read(run_id)
        record = await self._read(run_id)
        if record.graph not in self._graphs:
            raise ApiError(409, f"run {run_id!r} is of graph {record.graph!r}, which is not here", code="no_graph")
        return await self._admitted(partial(self._take, record), "gone on with")

    async def watch(self, run_id: str, *, after: int = 0) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of a run behind that number, each with its own: those so far, then those to come, until its end.

        Every one is on disk. Any number may watch; one that is slow holds nothing up, and nothing in memory.

        Raises:
            RunNotFound: If there is none.
            StoreError: If the store cannot be read.
        """
        async with aclosing(self.watch_stored(run_id, after=after)) as events:
            async for e in events:
                yield e.seq, e.event

    def watch_stored(self, run_id: str, *, after: int = 0) -> AsyncGenerator[StoredEvent, None]:
        """As `watch`, with the events as they are stored."""
        return self._shop.watch(run_id, after=after)

    async def stored_events(self, run_id: str, *, after: int, limit: int) -> Sequence[StoredEvent]:
        """The events of a run so far; see `RunStore.stored_events`."""
        return await self._store.stored_events(run_id, after=after, limit=limit)

    async def last_seq(self, run_id: str) -> int:
        """The number of a run's last event, 0 if it has none."""
        return await self._store.last_seq(run_id)

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Takes no more runs, gives those worked on some time to end, and leaves the rest to the next process.

        Args:
            drain_s: Seconds for runs to end. Those whose turn had not come are left at once.
        """
        self._shop.close()
        while self._arriving:
            await asyncio.wait(self._arriving)
        await self._shop.aclose(drain_s)

    def _named(self, graph: str | None) -> str:
        if graph is not None and graph not in self._graphs:
            allowed = ", ".join(self._graphs)
            raise ApiError(
                400, f"graph {graph!r} is unknown; allowed: {allowed}", code="graph_not_found", param="graph"
            )
        if graph is None or self._graphs[graph] is self._graphs[self._default]:
            return self._default
        return graph

    def _within(self, budget: Budget | None) -> Budget:
        """What is asked for, within what the configuration allows; what is not asked for is what it allows."""
        asked = budget or Budget()
        if self._config is None:
            return asked
        most = self._config.graph
        return Budget(
            deadline_s=_least(asked.deadline_s, most.deadline_s),
            cost=_least(asked.cost, most.cost),
            tokens=_least(asked.tokens, most.tokens),
        )

    async def _admitted(self, accept: Callable[[], Coroutine[Any, Any, RunRecord]], what: str) -> RunRecord:
        if not self._shop.open:
            raise ApiError(
                503, "no runs are taken: the server is about to end", code="draining", hint="try again later"
            )
        if len(self._live) + len(self._arriving) >= self._max_runs + self._max_waiting:
            raise ApiError(
                429,
                f"{len(self._live)} runs are worked on or wait for their turn, which is the limit",
                code="overloaded",
                retry_after_s=RETRY_AFTER_S,
                hint="try again later",
            )
        try:
            return await self._arrive(accept())
        except RunNotFound:
            raise
        except StoreError as e:
            raise _unwritable(what, e) from e

    async def _arrive(self, work: Coroutine[Any, Any, T]) -> T:
        """Does what must not be left half done when whoever asked goes away."""
        task = asyncio.create_task(work)
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)
        # Whoever went away does not ask what came of it.
        task.add_done_callback(lambda t: t.cancelled() or t.exception())
        return await asyncio.shield(task)

    async def _accept(
        self, question: str, graph: str, budget: Budget, reach: Tier, kept: Mapping[str, Any], run_id: str | None
    ) -> RunRecord:
        config = self._config
        for _ in range(NEW_IDS):
            try:
                record = await self._store.create(
                    run_id or new_run_id(),
                    question,
                    graph=graph,
                    config_path=config.file if config is not None else None,
                    planner=config.graph.planner if config is not None else None,
                    budget=budget,
                    reach=reach,
                    origin=ORIGIN,
                    **kept,
                )
            except RunExists:
                if run_id is None:
                    continue
                # Asked for twice at the same time.
                return _same(await self.get(run_id), question, graph, reach)
            self._shop.enrol(record, self._graphs[graph], last=0, resumed=False)
            return record
        raise StoreError(f"no free run id was found in {NEW_IDS} tries", hint="give one")

    async def _take(self, record: RunRecord) -> RunRecord:
        # First, so that nothing can go wrong once it is this process's.
        last = await self._store.last_seq(record.id)
        try:
            await self._store.take_over(record.id)
        except InvalidRequest as e:
            if record.id in self._live:
                return await self.get(record.id)
            raise ApiError(409, e.message, code="not_resumable", hint=e.hint) from None
        record = replace(record, status=RunStatus.RUNNING, finished_at=None, error=None)
        self._shop.enrol(record, self._graphs[record.graph], last=last, resumed=True)
        return record

    async def _cancel_idle(self, run_id: str) -> None:
        """Ends a run that nobody works on."""
        try:
            await self._store.take_over(run_id)
            end = self._shop.cancelled(run_id)
            await self._store.cancel(run_id, error=end.message, events=[end])
        except InvalidRequest as e:
            raise ApiError(409, e.message, code="run_elsewhere", hint=e.hint) from None
        except StoreError as e:
            raise _unwritable("ended", e) from e

    async def _read(self, run_id: str) -> RunRecord:
        try:
            return await self.get(run_id)
        except RunNotFound:
            raise
        except StoreError as e:
            raise _unwritable("read", e) from e

    def _as_known(self, record: RunRecord) -> RunRecord:
        """The run as the store has it, and as it is known here if its end could not be written down yet."""
        live = self._live.get(record.id)
        if live is None or live.unwritten is None:
            return record
        error = f"it ended, and that could not be written down yet: {live.unwritten}"
        return replace(record, status=RunStatus.FAILED, error=error)


def _least(asked: Any, most: Any) -> Any:
    return min((v for v in (asked, most) if v is not None), default=None)


def _same(record: RunRecord, question: str, graph: str, reach: Tier) -> RunRecord:
    if (record.question, record.graph, record.reach) != (question, graph, reach):
        raise ApiError(
            409,
            f"a run {record.id!r} with another question, graph or reach is already in the store",
            code="id_taken",
            param="id",
            hint="choose another id",
        )
    return record


def _unwritable(what: str, error: StoreError) -> ApiError:
    return ApiError(503, f"the run could not be {what}: {error.message}", code=error.code, hint=error.hint)
