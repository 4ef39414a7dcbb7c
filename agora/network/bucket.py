"""A token bucket that requests fill: extra work as a share of all work, never more."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import Final

from agora.errors import InvalidRequest

CAPACITY: Final = 20.0
"""Most extra requests saved up. At a share of 5 % those of the last 400 requests: a burst of late answers of one path
is met, and after a long quiet time a slow-down of everything doubles no more than that many requests."""


class ShareBucket:
    """Lets at most a share of all requests be extra ones. It starts empty, so that holds at every moment.

    Args:
        share: Extra requests for each request.
        capacity: Most extra requests saved up.

    Attributes:
        asked: Requests counted.
        taken: Extra requests that were let through.

    Raises:
        InvalidRequest: If a number is out of range.
    """

    def __init__(self, share: float, *, capacity: float = CAPACITY) -> None:
        if not 0 <= share <= 1:
            raise InvalidRequest(f"the share of extra requests is {share}; allowed: 0 to 1")
        if not (capacity >= 1 and math.isfinite(capacity)):
            raise InvalidRequest(f"the capacity of the bucket is {capacity}; it must be a number ≥ 1")
        self._share = share
        self._capacity = capacity
        self._level = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.asked = 0
        self.taken = 0

    @property
    def level(self) -> float:
        """Extra requests that may be sent now."""
        return self._level

    def fill(self) -> None:
        """Counts one request; whoever has waited longest may get what it brings."""
        self.asked += 1
        self._level = min(self._capacity, self._level + self._share)
        self._hand_out()

    def give_back(self) -> None:
        """Takes back what was taken for a request that was not sent after all."""
        self.taken -= 1
        self._level = min(self._capacity, self._level + 1)
        self._hand_out()

    async def take(self) -> None:
        """Waits until an extra request may be sent; cancelling gives up the place in the queue."""
        if not self._waiting and self._enough():
            self._spend()
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.give_back()  # It was handed over in the same turn of the loop that cancelled the wait.
            elif place in self._waiting:
                self._waiting.remove(place)
            raise

    def take_now(self) -> bool:
        """Takes what there is for an extra request, if there is; never ahead of those that wait."""
        if self._waiting or not self._enough():
            return False
        self._spend()
        return True

    def _hand_out(self) -> None:
        while self._waiting and self._enough():
            place = self._waiting.popleft()
            if not place.done():
                self._spend()
                place.set_result(None)

    def _enough(self) -> bool:
        # Twenty times 0.05 is a little less than 1; the count, in whole numbers, keeps it from ever being too much.
        return self._level > 1 - 1e-9 and self.taken + 1 <= self._share * self.asked + 1e-9

    def _spend(self) -> None:
        self._level = max(0.0, self._level - 1)
        self.taken += 1
