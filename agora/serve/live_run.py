"""A run that this process is at: what is on disk of it, and who waits for more."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from enum import Enum
from itertools import islice
from typing import Final

from agora.errors import StoreError
from agora.events import RunFinished
from agora.types import RunResult
from graphs.build import Graph
from graphs.news import News
from graphs.records import RunRecord, StoredEvent

TAIL: Final = 256
"""Events kept in memory for those who watch: a whole run of a usual plan. Who is further behind reads the store."""


class Stop(Enum):
    """Why a run is stopped from outside: its asker ended it, or the process ends and another one goes on with it."""

    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"


class LiveRun:
    """See the module. Lives on one event loop.

    Args:
        record: The run as it is in the store.
        graph: The graph it runs on.
        last: Number of its last event on disk.
        resumed: Whether it was begun before.

    Attributes:
        begun: Whether its turn has come.
        why: Why it was stopped, if it was.
        unwritten: Why its end could not be written down yet, if it could not.
        over: Whether nothing more will come of it here.
        finished: The event that tells its result, which is written down together with the result.
        work: What works on the graph.
        care: What waits for that and writes down how it ended.
        news: What its earlier legs have told.
    """

    def __init__(self, record: RunRecord, graph: Graph, *, last: int, resumed: bool) -> None:
        self.record = record
        self.graph = graph
        self.resumed = resumed
        self.begun = False
        self.why: Stop | StoreError | None = None
        self.unwritten: StoreError | None = None
        self.over = False
        self.finished: RunFinished | None = None
        self.work: asyncio.Task[RunResult] | None = None
        self.care: asyncio.Task[None] | None = None
        self.news = News()
        self._last = last
        self._tail: deque[StoredEvent] = deque(maxlen=TAIL)
        self._moved = asyncio.Event()

    @property
    def id(self) -> str:
        """The run's id."""
        return self.record.id

    @property
    def moved(self) -> asyncio.Event:
        """Set at the next change; taken before looking, so that no change falls between the look and the wait."""
        return self._moved

    def stop(self, why: Stop | StoreError) -> None:
        """Ends the work on it; what becomes of it depends on why. The first reason counts."""
        if self.work is not None and not self.work.done():
            self.why = self.why or why
            self.work.cancel()

    def wrote(self, events: Sequence[StoredEvent]) -> None:
        """Its next events are on disk: whoever watches may see them."""
        self._tail.extend(events)
        self._last = events[-1].seq
        self._move()

    def end(self) -> None:
        """Nothing more will come of it here."""
        self.over = True
        self._move()

    def cannot_write(self, error: StoreError) -> None:
        """Its end could not be written down; whoever waits for it is not kept any longer."""
        self.unwritten = error
        self._move()

    def after(self, seq: int) -> Sequence[StoredEvent] | None:
        """Its events behind that number, as far as they are on disk; None if they have to be read from there."""
        if seq >= self._last:
            return ()
        if not self._tail or self._tail[0].seq > seq + 1:
            return None
        return tuple(islice(self._tail, seq + 1 - self._tail[0].seq, None))

    async def settled(self) -> None:
        """Returns when its end is written down.

        Raises:
            StoreError: If that cannot be done for now.
        """
        while not self.over:
            if self.unwritten is not None:
                raise self.unwritten
            await self._moved.wait()

    def _move(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
