"""Virtual time: what happens next, and when."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

COMPACT_AT: Final = 1024
"""Forgotten entries, beyond as many as are awaited, after which the heap is built anew: rare enough to cost nothing."""


class Kind(StrEnum):
    """What there is to wait for: a job's steps are done, its update is there or lost, a timer, a client's change."""

    COMPUTED = "computed"
    ARRIVED = "arrived"
    LOST = "lost"
    TIMER = "timer"
    CHANGE = "change"


Entry = tuple[float, int, str, str]
"""Seconds, sequence, kind, and of what."""


class Clock:
    """Entries in the order of their time; those of the same time in the order they were set.

    There is at most one entry of each kind and key: setting another replaces it.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[Entry] = []
        self._awaited: dict[tuple[str, str], int] = {}
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._awaited)

    def set(self, kind: Kind, key: str, at: float) -> None:
        """Waits for something. What should have been already is next; what is never is not waited for."""
        if math.isinf(at):
            self.drop(kind, key)
            return
        self._sequence += 1
        heapq.heappush(self._heap, (max(at, self.now), self._sequence, kind, key))
        self._awaited[kind, key] = self._sequence

    def drop(self, kind: Kind, key: str) -> None:
        """Waits for it no longer."""
        self._awaited.pop((kind, key), None)
        if len(self._heap) > 2 * len(self._awaited) + COMPACT_AT:
            self._heap = self._live()
            heapq.heapify(self._heap)

    def next(self) -> tuple[Kind, str] | None:
        """Goes to the next entry and takes it out; None if there is none."""
        while self._heap:
            at, sequence, kind, key = heapq.heappop(self._heap)
            if self._awaited.get((kind, key)) == sequence:
                del self._awaited[kind, key]
                self.now = at
                return Kind(kind), key
        return None

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        entries = [[at, sequence, str(kind), key] for at, sequence, kind, key in sorted(self._live())]
        return {"now": self.now, "sequence": self._sequence, "entries": entries}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Clock:
        """Reads what `to_json` wrote."""
        clock = cls()
        clock.now, clock._sequence = body["now"], body["sequence"]
        for at, sequence, kind, key in body["entries"]:
            clock._heap.append((at, sequence, Kind(kind), key))
            clock._awaited[Kind(kind), key] = sequence
        return clock

    def _live(self) -> list[Entry]:
        return [e for e in self._heap if self._awaited.get((e[2], e[3])) == e[1]]
