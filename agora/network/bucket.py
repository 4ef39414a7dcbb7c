"""A limit that requests fill: extra work as a share of all work, of any stretch of it that is long enough to tell.

A token bucket lets what it saved up come on top of its rate: with twenty saved at a rate of 5 %, thirty of two hundred
requests in a row may be asked twice, which is 15 %, and just where everything slows down they are. So what is kept here
are the places of the last extra requests among all requests, and each further one must leave every stretch within the
share.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import Final

from agora.errors import InvalidRequest

CAPACITY: Final = 10
"""Most extra requests at once. At a share of 5 % they are those of 200 requests, the shortest stretch for which the
share then holds: the late answers of one path that hangs for a fifth of a second at fifty requests a second are met,
and when everything slows down no more than ten requests are doubled before it is seen."""


class ShareBucket:
    """Lets at most a share of all requests be extra ones.

    That holds from the first request on to any later moment, and for every stretch of `capacity / share` requests or
    more in a row, wherever it begins; in a shorter one there are at most `capacity`. An extra request counts where it
    is let through: after the last request that was counted by then.

    Args:
        share: Extra requests for each request.
        capacity: Most extra requests at once.

    Attributes:
        asked: Requests counted.
        taken: Extra requests that were let through.

    Raises:
        InvalidRequest: If a number is out of range.
    """

    def __init__(self, share: float, *, capacity: int = CAPACITY) -> None:
        if not 0 <= share <= 1:
            raise InvalidRequest(f"the share of extra requests is {share}; allowed: 0 to 1")
        if not 1 <= capacity < math.inf:
            raise InvalidRequest(f"the capacity of the bucket is {capacity}; it must be a whole number ≥ 1")
        self._share = share
        self._capacity = int(capacity)
        self._places: deque[int] = deque()
        self._waiting: deque[asyncio.Future[int]] = deque()
        self.asked = 0
        self.taken = 0

    def fill(self) -> None:
        """Counts one request; whoever has waited longest may get what it brings."""
        self.asked += 1
        while self._places and (self.asked - self._places[0]) * self._share > 2 * self._capacity:
            self._places.popleft()  # Too long ago to matter, see `_enough`.
        self._hand_out()

    def give_back(self, place: int) -> None:
        """Takes back what was taken for a request that was not sent after all.

        Args:
            place: What `take` gave.
        """
        self.taken -= 1
        if place in self._places:
            self._places.remove(place)
        self._hand_out()

    async def take(self) -> int:
        """Waits until an extra request may be sent; cancelling gives up the place in the queue.

        Returns:
            After how many requests it was let through; for `give_back`.
        """
        if not self._waiting and self._enough():
            return self._spend()
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(turn.result())  # It was handed over in the same turn of the loop that cancelled it.
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def take_now(self) -> bool:
        """Takes what there is for an extra request, if there is; never ahead of those that wait."""
        if self._waiting or not self._enough():
            return False
        self._spend()
        return True

    def _hand_out(self) -> None:
        while self._waiting and self._enough():
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(self._spend())

    def _enough(self) -> bool:
        """Whether one more leaves every stretch within the share.

        Together with the last few it makes `count` extra requests, which must lie in a stretch of `count / share`
        requests or more; up to `capacity` they may lie anywhere. More than twice the capacity need no look: those
        stretches are put together from shorter ones that were looked at, which overlap in one extra request.
        """
        if self.taken + 1 > self._share * self.asked + _HAIR:
            return False
        for count in range(self._capacity + 1, min(2 * self._capacity, len(self._places) + 1) + 1):
            stretch = self.asked - self._places[1 - count] + 1
            if count > self._share * stretch + _HAIR:
                return False
        return True

    def _spend(self) -> int:
        self._places.append(self.asked)
        self.taken += 1
        return self.asked


_HAIR: Final = 1e-9
"""Twenty times 0.05 is a little less than 1: rounding must not cost a request."""
