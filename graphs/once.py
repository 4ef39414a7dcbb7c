"""Redundancy: identical calls in flight are made once, and answers may be kept for the next who asks the same."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from agora.errors import InvalidRequest
from agora.types import Answer, Outcome, Usage
from graphs.call import Call, Called, shared

TOGETHER: Final = "answered once, together with an identical question"
"""The note of an answer that somebody else's call brought."""

KEPT: Final = "from the cache: the same was asked of {expert} before"
"""The note of an answer that was kept."""

MAX_BYTES: Final = 16 * 2**20
"""Bytes of questions and answers kept, at most: those of 1,024 entries of 16 kB, a page of text each."""

ENTRY_BYTES: Final = 1_000
"""Bytes of an entry besides its texts: the answer's fields, key and links of one on CPython 3.11 are some 900."""


class Once:
    """Makes identical calls once.

    Calls are identical if the same asker has the same backend sent the same: expert, node, adapter version, system
    prompt, text, token limit, label, and what is asked of the answer afterwards; see `Call.key`. Nothing is shared
    between two askers (`graphs.run`; the gateway's are its API keys), in flight or kept: how soon an answer comes would
    tell one of them what the other asks. Where no asker is named, all are one. Sampled calls (temperature above 0) are
    never identical: who samples wants another answer.

    *In flight.* The first to ask leads: its run's budget pays. Whoever asks the same meanwhile waits for the same
    answer, reserves nothing and pays nothing. The work goes on for as long as anybody waits, whoever leaves; when the
    last one does, it is cancelled. A failure reaches those who waited, and nobody after them; one that is due to the
    leader's own limits (its time, its budget, its way through the square) reaches the leader alone, as does an answer
    that fell short for that, and the others ask anew.

    *Kept*, if wanted: answers that would come again (`Call.lasting`), the least recently used ones given up first. A
    call whose question is private is shared in flight by equal text alone, and never kept.

    Lives on one event loop at a time; the kept answers outlive it.

    Args:
        cache_entries: Most answers kept; 0 to keep none.
        cache_bytes: Most bytes of them.

    Attributes:
        made: Calls made.
        joined: Calls that were answered by another one in flight.
        found: Calls that were answered from what was kept.

    Raises:
        InvalidRequest: If a limit is out of range.
    """

    def __init__(self, *, cache_entries: int = 0, cache_bytes: int = MAX_BYTES) -> None:
        if cache_entries < 0 or cache_bytes < 0:
            raise InvalidRequest(f"cache limits are {cache_entries} and {cache_bytes} bytes; they must be ≥ 0")
        self._flights: dict[Hashable, _Flight] = {}
        self._cache = _Cache(cache_entries, cache_bytes)
        self.made = 0
        self.joined = 0
        self.found = 0

    @property
    def in_flight(self) -> int:
        """Calls being made."""
        return len(self._flights)

    @property
    def keeps(self) -> bool:
        """Whether any answer may be kept."""
        return self._cache.most > 0

    @property
    def kept(self) -> int:
        """Answers kept."""
        return len(self._cache)

    def forget(self) -> None:
        """Gives up every answer kept."""
        self._cache.clear()

    async def ask(self, call: Call, *, private: bool = False) -> Outcome:
        """Makes the call, or takes the outcome of an identical one.

        Args:
            call: What is asked.
            private: Whether its text holds what may not be kept.

        Returns:
            What came of it. Usage is zero where another call brought it.
        """
        if call.expert.temperature > 0:
            self.made += 1
            return (await call.make()).outcome
        key = call.key
        lasting = not private and self.keeps and call.lasting
        if lasting and (answer := self._cache.get(key, call.expert.backend)) is not None:
            self.found += 1
            return shared(answer, KEPT.format(expert=call.expert.name), 0.0)
        started = time.monotonic()
        while True:
            flight = self._flights.get(key)
            leads = flight is None or flight.loop is not asyncio.get_running_loop()
            if flight is None or leads:
                flight = self._take_off(key, call.make)
            called = await self._landing(key, flight)
            if leads:
                if lasting and called.common and isinstance(called.outcome, Answer):
                    self._cache.put(key, call.expert.backend, call.text, called.outcome)
                return called.outcome
            if called.common:
                self.joined += 1
                if isinstance(called.outcome, Answer):
                    return shared(called.outcome, TOGETHER, time.monotonic() - started)
                return replace(called.outcome, usage=Usage())

    def _take_off(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, Called]]) -> _Flight:
        self.made += 1
        loop = asyncio.get_running_loop()
        flight = _Flight(loop.create_task(work()), loop)
        self._flights[key] = flight
        flight.task.add_done_callback(partial(self._end, key, flight))
        return flight

    async def _landing(self, key: Hashable, flight: _Flight) -> Called:
        flight.waiting += 1
        try:
            await asyncio.wait((flight.task,))
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                # Whoever asks the same from now on must not wait for what is being given up.
                self._end(key, flight, flight.task)
                flight.task.cancel()
                await asyncio.wait((flight.task,))
        return flight.task.result()

    def _end(self, key: Hashable, flight: _Flight, task: asyncio.Task[Called]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


@dataclass(slots=True, eq=False)
class _Flight:
    """A call being made, and how many wait for it."""

    task: asyncio.Task[Called]
    loop: asyncio.AbstractEventLoop
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    backend: weakref.ref[Any]
    answer: Answer
    bytes: int


class _Cache:
    """Answers by call, the least recently used ones given up first.

    A key names a backend by its identity, which another one may have once it is gone: so an entry knows its backend,
    weakly, in order not to hold a model's weights.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most = most
        self._most_bytes = most_bytes
        self._bytes = 0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        self._entries.clear()
        self._bytes = 0

    def get(self, key: Hashable, backend: object) -> Answer | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.backend() is not backend:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry.answer

    def put(self, key: Hashable, backend: object, text: str, answer: Answer) -> None:
        size = ENTRY_BYTES + len(text.encode()) + len(answer.text.encode())
        if size > self._most_bytes:
            return
        try:
            known = weakref.ref(backend)
        except TypeError:
            # It cannot be told whether it is still the same one.
            return
        if key in self._entries:
            self._drop(key)
        self._entries[key] = _Entry(known, answer, size)
        self._bytes += size
        while len(self._entries) > self.most or self._bytes > self._most_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: Hashable) -> None:
        self._bytes -= self._entries.pop(key).bytes
