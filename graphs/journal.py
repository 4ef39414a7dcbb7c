"""Writing down the events of runs: many at a time, off the runs' own path.

A run tells an event and goes on; one task writes down whatever has come together meanwhile, in one transaction. Under
load a transaction holds more events, so that the disk is never what runs wait for.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from agora.errors import StoreError
from agora.events import Event
from graphs.records import StoredEvent
from graphs.store import RunStore

log = logging.getLogger(__name__)

MAX_BATCH: Final = 512
"""Events of one transaction: all that a plan of the largest size tells twice over. More would keep checkpoints, which
share the connection, waiting for longer than a few milliseconds."""

Told = Callable[[str, Sequence[StoredEvent]], None]
Lost = Callable[[str, StoreError], None]


class Journal:
    """See the module. Open it with `Journal.open`.

    Args:
        store: Where events are kept.
        on_written: Called with a run's id and its events once they are on disk.
        on_lost: Called with a run's id when events of it could not be written.
    """

    def __init__(self, store: RunStore, *, on_written: Told | None = None, on_lost: Lost | None = None) -> None:
        self._store = store
        self._on_written = on_written
        self._on_lost = on_lost
        self._pending: deque[tuple[str, Event]] = deque()
        self._wake = asyncio.Event()
        self._put = 0
        self._settled = 0
        self._flushing: list[tuple[int, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls, store: RunStore, *, on_written: Told | None = None, on_lost: Lost | None = None
    ) -> AsyncIterator[Journal]:
        """A journal whose writer works for as long as the block lasts; what was told by then is written."""
        journal = cls(store, on_written=on_written, on_lost=on_lost)
        writer = journal._writer = asyncio.create_task(journal._write_on())
        try:
            yield journal
        finally:
            try:
                await journal.flush()
            finally:
                writer.cancel()
                await asyncio.wait([writer])

    def put(self, run_id: str, event: Event) -> None:
        """Tells an event of a run that this process is at; returns at once."""
        self._pending.append((run_id, event))
        self._put += 1
        self._wake.set()

    async def flush(self) -> None:
        """Returns when everything that was told until now is on disk, or lost."""
        if self._settled >= self._put or self._writer is None:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._flushing.append((self._put, done))
        # The writer ends before its time only where the whole loop is torn down; nobody must wait for it then.
        either: set[asyncio.Future[None]] = {done, self._writer}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)

    async def _write_on(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                batch = [self._pending.popleft() for _ in range(min(MAX_BATCH, len(self._pending)))]
                await self._write(batch)
                self._settled += len(batch)
                for due, done in self._flushing:
                    if due <= self._settled and not done.done():
                        done.set_result(None)
                self._flushing = [(due, done) for due, done in self._flushing if not done.done()]

    async def _write(self, batch: Sequence[tuple[str, Event]]) -> None:
        runs = list(dict.fromkeys(run_id for run_id, _ in batch))
        try:
            stored = await self._store.append(batch)
        except StoreError as e:
            if len(runs) == 1:
                self._lose(runs[0], e)
                return
            # Which of them it was that could not be written is found by trying each run alone.
            for run_id in runs:
                await self._write([item for item in batch if item[0] == run_id])
            return
        except Exception as e:
            # Whatever it was: the writer goes on, and nobody waits for what will not come.
            log.exception("events could not be written down")
            for run_id in runs:
                self._lose(run_id, StoreError(f"events could not be written down: {type(e).__name__}: {e}"))
            return
        if self._on_written is not None:
            for run_id, events in stored.items():
                self._on_written(run_id, events)

    def _lose(self, run_id: str, error: StoreError) -> None:
        if self._on_lost is not None:
            self._on_lost(run_id, error)
        else:
            log.warning("events of run %s could not be written down: %s", run_id, error.message)
