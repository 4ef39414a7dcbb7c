"""Working on accepted runs: so many at a time, their events and their ends written down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from agora.errors import AgoraError, RunNotFound, StoreError
from agora.events import Event, RunFailed, RunFinished
from agora.serve.live_run import LiveRun, Stop
from agora.types import RunResult
from graphs.build import Graph
from graphs.go_on import go_on
from graphs.journal import Journal
from graphs.records import RunRecord, RunStatus, StoredEvent
from graphs.run import run
from graphs.store import NotOurs, RunStore

log = logging.getLogger(__name__)

PAGE: Final = 128
"""Events read from the store at once: a hundred answers, some hundred kilobytes."""

LOOK_S: Final = 1.0
"""Seconds between two looks at a run that another process works on; of what it writes nobody here is told."""

FIRST_RETRY_S: Final = 0.5
"""Seconds until a run's end that could not be written down is tried again; doubled every time."""

LAST_RETRY_S: Final = 30.0
"""Most seconds between two such tries: soon enough after somebody has made room on the disk."""


class Workshop:
    """See the module. Every run in it is this process's in the store, and leaves it when its end is written down.

    Args:
        store: Where runs and their events are kept.
        max_runs: Runs worked on at once; further ones wait, the first to come first.
        clock: Wall-clock seconds since the epoch.
    """

    def __init__(self, store: RunStore, *, max_runs: int, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._places = asyncio.Semaphore(max_runs)
        self._live: dict[str, LiveRun] = {}
        self._stack = AsyncExitStack()
        self._journal: Journal | None = None
        self._closing = asyncio.Event()

    @property
    def live(self) -> Mapping[str, LiveRun]:
        """The runs in it, by their ids."""
        return MappingProxyType(self._live)

    @property
    def open(self) -> bool:
        """Whether it takes runs."""
        return self._journal is not None and not self._closing.is_set()

    async def start(self) -> None:
        """Opens it."""
        journal = Journal.open(self._store, on_written=self._wrote, on_lost=self._lost)
        self._journal = await self._stack.enter_async_context(journal)

    def close(self) -> None:
        """Takes no more runs."""
        self._closing.set()

    async def aclose(self, drain_s: float) -> None:
        """Gives the runs worked on some time to end, and leaves the rest to the next process.

        Args:
            drain_s: Seconds for runs to end. Those whose turn had not come are left at once.
        """
        self.close()
        for live in tuple(self._live.values()):
            if not live.begun:
                live.stop(Stop.INTERRUPTED)
        if cares := [live.care for live in self._live.values() if live.care is not None]:
            await asyncio.wait(cares, timeout=drain_s)
            for live in tuple(self._live.values()):
                live.stop(Stop.INTERRUPTED)
            await asyncio.wait(cares)
        await self._stack.aclose()

    def enrol(self, record: RunRecord, graph: Graph, *, last: int, resumed: bool) -> None:
        """Takes a run that is this process's in the store.

        Args:
            record: The run.
            graph: The graph it runs on.
            last: Number of its last event.
            resumed: Whether it was begun before.
        """
        live = LiveRun(record, graph, last=last, resumed=resumed)
        self._live[record.id] = live
        live.work = asyncio.create_task(self._work(live))
        live.care = asyncio.create_task(self._care(live, live.work))

    async def _work(self, live: LiveRun) -> RunResult:
        async with self._places:
            live.begun = True
            tell = partial(self._tell, live)
            record = live.record
            if not live.resumed:
                return await run(
                    live.graph,
                    record.question,
                    run_id=live.id,
                    budget=record.budget,
                    reach=record.reach,
                    asker=record.asker,
                    trade_off=record.trade_off,
                    on_event=tell,
                )
            await live.news.read(self._store, live.id)
            return await go_on(
                live.graph,
                live.id,
                record.question,
                budget=record.budget,
                reach=record.reach,
                asker=record.asker,
                trade_off=record.trade_off,
                on_event=tell,
            )

    def _tell(self, live: LiveRun, event: Event) -> None:
        assert self._journal is not None
        if isinstance(event, RunFinished):
            live.finished = event
        elif live.news.is_news(event):
            self._journal.put(live.id, event)

    def _wrote(self, run_id: str, events: Sequence[StoredEvent]) -> None:
        if live := self._live.get(run_id):
            live.wrote(events)

    def _lost(self, run_id: str, error: StoreError) -> None:
        log.warning("events of run %s could not be written down: %s", run_id, error.message)
        if live := self._live.get(run_id):
            live.stop(error)

    async def _care(self, live: LiveRun, work: asyncio.Task[RunResult]) -> None:
        """Waits for a run's end and writes it down, for as long as that takes."""
        assert self._journal is not None
        try:
            await asyncio.wait([work])
            await self._journal.flush()
            write = self._end(live, work)
            delay = FIRST_RETRY_S
            while not await self._written(live, write):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), delay)
                    # The next process finds the run in the hands of a dead one, and goes on with it.
                    return
                delay = min(2 * delay, LAST_RETRY_S)
        finally:
            work.cancel()
            del self._live[live.id]
            live.end()

    async def _written(self, live: LiveRun, write: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        try:
            await write()
        except StoreError as e:
            log.warning("the end of run %s could not be written down: %s", live.id, e.message)
            if isinstance(e, (RunNotFound, NotOurs)):
                return True
            live.cannot_write(e)
            return False
        return True

    def _end(self, live: LiveRun, work: asyncio.Task[RunResult]) -> Callable[[], Coroutine[Any, Any, None]]:
        """How to write down what a run came to."""
        if not work.cancelled() and work.exception() is None:
            result = work.result()
            told = live.finished or RunFinished(run=live.id, at=self._clock(), result=result)
            return partial(self._store.finish, live.id, result=result, events=[told])
        error = live.why or (None if work.cancelled() else work.exception())
        if error is Stop.CANCELLED:
            end = self.cancelled(live.id)
            return partial(self._store.cancel, live.id, error=end.message, events=[end])
        if error is None or isinstance(error, Stop):
            return partial(self._store.interrupt, live.id)
        if not isinstance(error, AgoraError):
            log.error("run %s failed", live.id, exc_info=error)
            error = AgoraError(f"an error inside agora: {type(error).__name__}: {error}")
        # It may quote what came from outside; what cannot be written down would be tried for ever.
        message = str(error).encode("utf-8", "replace").decode()
        failed = RunFailed(run=live.id, at=self._clock(), code=error.code, message=message)
        return partial(self._store.finish, live.id, error=message, events=[failed])

    async def watch(self, run_id: str, *, after: int = 0) -> AsyncGenerator[StoredEvent, None]:
        """The events of a run, those so far and those to come, until its end; see `Runs.watch`."""
        if run_id not in self._live:
            await self._store.get(run_id)
        while True:
            live = self._live.get(run_id)
            moved = live.moved if live is not None else None
            ended = live is None or live.over or live.unwritten is not None
            events = live.after(after) if live is not None else None
            if events is None:
                events = await self._store.stored_events(run_id, after=after, limit=PAGE)
            for e in events:
                yield e
                after = e.seq
            if events:
                continue
            if moved is not None and not ended:
                await moved.wait()
            elif live is None and self.open and (await self._store.get(run_id)).status is RunStatus.RUNNING:
                await asyncio.sleep(LOOK_S)
            else:
                return

    def cancelled(self, run_id: str) -> RunFailed:
        """The last event of a run that its asker ended."""
        return RunFailed(run=run_id, at=self._clock(), code="cancelled", message="cancelled by whoever asked for it")
