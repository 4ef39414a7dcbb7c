"""How much is let in: requests at once and in a minute, bytes of bodies; the node's own work apart from others'.

Work that neighbours send has places of its own, a share of the node's, and gets one only while the expert it asks for
has no queue. So it fills what is free, and never stands before a request of the node itself for longer than one answer
takes. The places are counted apart, since a graph holds one of the node's own while its subtasks wait for places on
other nodes: were they the same, nodes full of graphs would wait for each other for ever.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from agora.protocols import Backend, Load
from agora.serve.errors import ApiError

LOOK_AGAIN_S: Final = 0.05
"""Seconds after which waiting neighbours' work looks again whether its expert is free. Places that come free here are
told at once; this is for what the expert works off by itself, and small beside any answer."""

MAX_BODIES_BYTES: Final = 256 * 2**20
"""Bytes of bodies at the same time: 64 of the largest that are allowed by default."""


@dataclass(slots=True)
class _Waiter:
    place: asyncio.Future[None]
    backend: Backend | None


class Admission:
    """Lets requests in, first come, first served within each class.

    Args:
        running: Most requests of the node's own at once.
        waiting: Most requests waiting, of the node's own and of neighbours each.
        neighbours: Most requests of neighbours at once, besides.
    """

    def __init__(self, *, running: int, waiting: int, neighbours: int) -> None:
        self._most, self._most_waiting, self._most_neighbours = running, waiting, max(1, neighbours)
        self._running = 0  # of the node's own
        self._neighbours = 0
        self._own: deque[_Waiter] = deque()
        self._others: deque[_Waiter] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._idle: asyncio.Event | None = None

    @property
    def load(self) -> Load:
        """Requests let in and waiting, all together."""
        running = self._running + self._neighbours
        return Load(running=running, waiting=len(self._own) + len(self._others))

    @property
    def neighbours(self) -> Load:
        """The same, of neighbours only."""
        return Load(running=self._neighbours, waiting=len(self._others))

    def enter_now(self, backend: Backend | None, *, neighbour: bool) -> bool:
        """Takes a place if there is one for it at once; `leave` gives it back."""
        if neighbour:
            if self._neighbours >= self._most_neighbours or self._others or not _is_free(backend):
                return False
            self._neighbours += 1
            return True
        if self._running >= self._most or self._own:
            return False
        self._running += 1
        return True

    async def enter(self, backend: Backend | None, *, neighbour: bool) -> None:
        """Waits for a place; `leave` gives it back.

        Raises:
            ApiError: 429, if too many wait already.
        """
        await self._wait(self._others if neighbour else self._own, backend, neighbour=neighbour)

    def leave(self, *, neighbour: bool) -> None:
        """Gives a place back."""
        self._count(-1, neighbour=neighbour)
        if self._own or self._others:
            self._let_in()
        self._tell_idle()

    async def idle(self) -> None:
        """Waits until nothing is left that was let in or waits for it."""
        while self.load.total:
            self._idle = asyncio.Event()
            await self._idle.wait()

    def _tell_idle(self) -> None:
        if self._idle is not None and not self.load.total:
            self._idle.set()

    def _count(self, change: int, *, neighbour: bool) -> None:
        if neighbour:
            self._neighbours += change
        else:
            self._running += change

    async def _wait(self, queue: deque[_Waiter], backend: Backend | None, *, neighbour: bool) -> None:
        if len(queue) >= self._most_waiting:
            raise ApiError(
                429,
                f"{self.load.running} requests are being answered and {len(queue)} wait, which is the limit",
                code="overloaded",
                hint="try again later, or ask another node",
            )
        waiter = _Waiter(asyncio.get_running_loop().create_future(), backend)
        queue.append(waiter)
        self._look_again_soon()
        try:
            await waiter.place
        except asyncio.CancelledError:
            if waiter.place.done() and not waiter.place.cancelled():
                # It was let in within the same turn of the loop that cancelled it.
                self.leave(neighbour=neighbour)
            elif waiter in queue:
                queue.remove(waiter)
                self._tell_idle()
            raise

    def _let_in(self) -> None:
        """Gives free places to those who wait, in their order; neighbours only if their expert is free."""
        while self._own and self._running < self._most:
            self._give(self._own.popleft(), neighbour=False)
        kept: list[_Waiter] = []
        given: set[int] = set()
        while self._others and self._neighbours < self._most_neighbours:
            waiter = self._others.popleft()
            backend = waiter.backend
            if id(backend) not in given and _is_free(backend):
                self._give(waiter, neighbour=True)
                if backend is not None:
                    given.add(id(backend))
            else:
                # It keeps its turn; those behind it may ask for another expert.
                kept.append(waiter)
        self._others.extendleft(reversed(kept))
        if given and self._others:
            # One for each expert: whether it is still free shows when this one has been taken on, a turn later.
            asyncio.get_running_loop().call_soon(self._let_in)
        else:
            self._look_again_soon()

    def _give(self, waiter: _Waiter, *, neighbour: bool) -> None:
        """Gives a place to whoever still wants it: a wait may have been cancelled a moment ago."""
        if not waiter.place.done():
            self._count(1, neighbour=neighbour)
            waiter.place.set_result(None)

    def _look_again_soon(self) -> None:
        if self._others and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._let_in()


def _is_free(backend: Backend | None) -> bool:
    return backend is None or backend.load.waiting == 0


class Rate:
    """Requests per minute of each caller: a bucket that holds a minute's worth and fills steadily.

    Args:
        per_minute: Requests per minute; None for any number.
        clock: Seconds on a clock that never goes back.
    """

    def __init__(self, per_minute: int | None, *, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, caller: str) -> None:
        """Counts a request.

        Raises:
            ApiError: 429, if the caller has used up its minute.
        """
        if self._per_minute is None:
            return
        now = self._clock()
        left, at = self._buckets.get(caller, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - at) * self._per_minute / 60)
        if left < 1:
            self._buckets[caller] = (left, now)
            after = math.ceil((1 - left) * 60 / self._per_minute)
            raise ApiError(
                429,
                f"more than {self._per_minute} requests in a minute",
                code="rate_limited",
                retry_after_s=after,
                hint=f"try again in {after} s",
            )
        self._buckets[caller] = (left - 1, now)


class Bodies:
    """Bytes of bodies that did not come with their head, from their first byte until they are answered.

    Args:
        most: Most bytes at once.
    """

    def __init__(self, most: int = MAX_BODIES_BYTES) -> None:
        self._most = most
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes that are set aside now."""
        return self._held

    def take(self, size: int, *, instead_of: int = 0) -> int:
        """Sets bytes aside; `give` gives them back.

        Args:
            size: How many.
            instead_of: Bytes that were set aside before for the same body, when its size was not known.

        Returns:
            `size`.

        Raises:
            ApiError: 429, if too many are set aside already.
        """
        self._held -= instead_of
        if self._held + size > self._most and self._held and size > instead_of:
            self._held += instead_of
            raise ApiError(429, "too many large requests are being answered", code="overloaded", hint="try again later")
        self._held += size
        return size

    def give(self, size: int) -> None:
        """Gives bytes back."""
        self._held -= size
