"""A first-come, first-served limit on how many requests run at once, with a bounded queue in front of it."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agora.errors import BackendTimeout, InvalidRequest, Overloaded
from agora.protocols import Load


class Slots:
    """Counts running and waiting requests, and holds back those above a limit.

    Args:
        limit: Requests that may run at once; None for no limit.
        max_waiting: Requests that may wait for a slot; None for any number, 0 for none.
        owner: The backend's name, for errors.

    Raises:
        InvalidRequest: If a limit is out of range.
    """

    def __init__(self, limit: int | None = None, max_waiting: int | None = None, *, owner: str = "") -> None:
        if limit is not None and limit < 1:
            raise InvalidRequest(f"the limit of requests at once is {limit}; it must be ≥ 1, or absent for no limit")
        if max_waiting is not None and max_waiting < 0:
            raise InvalidRequest(f"the limit of waiting requests is {max_waiting}; it must be ≥ 0, or absent")
        self._limit = limit
        self._max_waiting = max_waiting
        self._owner = owner
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def load(self) -> Load:
        """Requests running and waiting now."""
        return Load(running=self._running, waiting=len(self._waiting))

    async def acquire(self) -> None:
        """Takes a slot, waiting for one if need be; cancelling the wait gives up the place in the queue.

        Raises:
            Overloaded: If the queue is full.
        """
        if self._limit is None or self._running < self._limit:
            self._running += 1
            return
        if self._max_waiting is not None and len(self._waiting) >= self._max_waiting:
            raise Overloaded(
                f"{self._running} requests are running and {len(self._waiting)} waiting, which is the limit",
                backend=self._owner,
                hint="try again later, or raise the limit",
            )
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.release()  # The slot was handed over in the same turn of the loop that cancelled the wait.
            elif place in self._waiting:
                self._waiting.remove(place)
            raise

    def release(self) -> None:
        """Gives a slot back: to whoever has waited longest, if anyone has."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._running -= 1

    @asynccontextmanager
    async def hold(self, until: float = math.inf) -> AsyncIterator[None]:
        """Holds a slot for the length of a block.

        Args:
            until: When to stop waiting for it, on the event loop's clock.

        Raises:
            BackendTimeout: If no slot came free by then.
            Overloaded: If the queue is full.
        """
        await self.take(until)
        try:
            yield
        finally:
            self.release()

    async def take(self, until: float = math.inf) -> None:
        """Like `acquire`, but waits no longer than `until`.

        Raises:
            BackendTimeout: If no slot came free by then.
            Overloaded: If the queue is full.
        """
        if self._limit is None or self._running < self._limit:
            # The usual case, without a timer that would never ring.
            self._running += 1
            return
        try:
            async with asyncio.timeout_at(None if until == math.inf else until):
                await self.acquire()
        except TimeoutError:
            raise BackendTimeout(
                f"timeout_s passed while {len(self._waiting) + 1} requests waited for one of {self._limit} places",
                backend=self._owner,
            ) from None

    def abort(self, error: Exception) -> None:
        """Fails every waiting request with `error`."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_exception(error)
