"""Places for subtasks that are asked at the same time, and who gets the next one that comes free.

`How.scheduler` says who: `Fifo`, whoever has waited longest; `Heft`, whoever has the longest way to the end behind it;
or one of one's own. `SCHEDULERS` makes them by name.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from heapq import heappop, heappush
from statistics import median
from types import MappingProxyType, TracebackType
from typing import Final, Protocol

from agora.errors import InvalidRequest
from agora.scheduling.expected import Pace
from agora.scheduling.ranks import latest_ends, upward_ranks
from agora.square import Square
from agora.types import Answer, Attempt, Subtask, TaskGraph

USUAL_S: Final = 0.05
"""Seconds per token of experts of whom none has answered yet: a 135M model on two CPU cores makes 12 to 22 tokens a
second. As long as it is the same for all, only the ratio to other waits counts, and there are none."""

TURNS: Final = 4
"""Turns of the event loop for which a free place is kept while urgencies differ. When a subtask has ended, those that
wait for it ask for a place 3 turns later: its result reaches them through a shield."""


class Scheduler(Protocol):
    """Says which of the subtasks that wait for a place gets the next one. One for all runs of a graph."""

    def urgencies(self, graph: TaskGraph) -> Mapping[str, float]:
        """How urgent each subtask is, by its id: the largest first, 0 where nothing is said.

        Asked once for each run, when it has been planned. Must not block.
        """

    def saw(self, attempt: Attempt) -> None:
        """Told of everyone who was asked, and how long it took."""


class Places:
    """Holds back those above a limit, like a semaphore, and lets the most urgent of them in first.

    Among the equally urgent whoever has waited longest is first. Someone less urgent may wait for as long as more
    urgent ones come; those are the subtasks of one run, of which there is an end. Cancelling a wait gives it up, and a
    place that was just handed over to it goes on to the next.

    Where urgencies differ a free place is given away a few turns of the event loop later, so that those who become
    ready at the same moment are compared, and not served as they happen to be called.

    Args:
        most: Places.

    Raises:
        InvalidRequest: If there is none.
    """

    __slots__ = ("_free", "_others", "_soon", "_turn", "_urgent")

    def __init__(self, most: int) -> None:
        if most < 1:
            raise InvalidRequest(f"there are {most} places; there must be at least 1")
        self._free = most
        self._turn = 0
        self._soon = False
        self._urgent: list[tuple[float, int, asyncio.Future[None]]] = []
        self._others: deque[asyncio.Future[None]] = deque()

    @property
    def free(self) -> int:
        """Places that nobody has."""
        return self._free

    @property
    def waiting(self) -> int:
        """How many wait for one."""
        urgent = sum(not place.done() for _, _, place in self._urgent)
        return urgent + sum(not place.done() for place in self._others)

    def at(self, urgency: float = 0.0) -> Place:
        """A place for the length of an `async with` block.

        Args:
            urgency: The largest is let in first; 0 or less is not urgent at all.
        """
        return Place(self, urgency)

    async def acquire(self, urgency: float = 0.0) -> None:
        """Takes a place; waits for one if need be."""
        if self._free and not (urgency > 0 or self._urgent):
            # Nobody else waits where a place is free: it is handed over in the moment in which it is given back.
            self._free -= 1
            return
        loop = asyncio.get_running_loop()
        place = loop.create_future()
        if urgency > 0:
            self._turn += 1
            heappush(self._urgent, (-urgency, self._turn, place))
            if self._free:
                self._give_soon(loop)
        else:
            self._others.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.release()  # It was handed over in the same turn of the loop that cancelled the wait.
            else:
                place.cancel()  # Whoever looks for the next one passes it over.
            raise

    def release(self) -> None:
        """Gives a place back: to the most urgent of those who wait, if anyone does."""
        self._free += 1
        if self._urgent:
            self._give_soon(asyncio.get_running_loop())
        elif self._others:
            self._give()

    def _give_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._soon:
            self._soon = True
            loop.call_soon(self._turn_of_loop, loop, TURNS)

    def _turn_of_loop(self, loop: asyncio.AbstractEventLoop, left: int) -> None:
        if left:
            loop.call_soon(self._turn_of_loop, loop, left - 1)
        else:
            self._soon = False
            self._give()

    def _give(self) -> None:
        while self._free and (self._urgent or self._others):
            place = heappop(self._urgent)[2] if self._urgent else self._others.popleft()
            if not place.done():
                self._free -= 1
                place.set_result(None)


class Place:
    """One place of `Places`, held for the length of a block."""

    __slots__ = ("_places", "_urgency")

    def __init__(self, places: Places, urgency: float) -> None:
        self._places = places
        self._urgency = urgency

    async def __aenter__(self) -> None:
        places = self._places
        if places._free and not (self._urgency > 0 or places._urgent):
            # The usual case, without another coroutine.
            places._free -= 1
            return
        await places.acquire(self._urgency)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._places.release()


class Fifo:
    """As they came: all are equally urgent."""

    def urgencies(self, graph: TaskGraph) -> Mapping[str, float]:
        """None is more urgent than another."""
        return {}

    def saw(self, attempt: Attempt) -> None:
        """Nothing is learned."""


class Heft:
    """The longest way to the end first (`agora.scheduling.ranks`), by what is known of how long the experts take.

    A subtask is expected to take the tokens that it may generate, at the pace of its expert; one that names no expert,
    as if the usual one of them were asked. Paces are learned from what is answered.

    Args:
        square: Who can be asked.
    """

    def __init__(self, square: Square) -> None:
        self._square = square
        self._pace: Pace[str] = Pace(USUAL_S)

    def urgencies(self, graph: TaskGraph) -> Mapping[str, float]:
        """Upward ranks, in seconds."""
        if len(graph) == 1:
            return {}
        expected = self.expected_seconds(graph)
        return upward_ranks([s.id for s in graph], _outputs(graph), expected.__getitem__)

    def saw(self, attempt: Attempt) -> None:
        """Learns from an answer how fast its expert is; a failure tells nothing of that."""
        outcome = attempt.outcome
        if attempt.expert is not None and isinstance(outcome, Answer):
            self._pace.saw(attempt.expert, outcome.usage.completion_tokens, attempt.seconds)

    def expected_seconds(self, graph: TaskGraph) -> dict[str, float]:
        """How long each subtask is expected to take, in seconds."""
        cards = {e.name: e.card for e in self._square}
        usual_limit = median(c.max_tokens for c in cards.values()) if cards else 1.0
        usual_pace = self._pace.usual(cards)

        def seconds(subtask: Subtask) -> float:
            card = None if subtask.expert is None else cards.get(subtask.expert)
            limit = usual_limit if card is None else card.max_tokens
            tokens = limit if subtask.max_tokens is None else min(limit, subtask.max_tokens)
            return tokens * (usual_pace if card is None else self._pace.of(card.name))

        return {s.id: seconds(s) for s in graph}

    def sub_deadlines(self, graph: TaskGraph, deadline_s: float) -> dict[str, float]:
        """The latest end of each subtask for the run to end in time: see `agora.scheduling.ranks.latest_ends`.

        For whoever chooses an expert or a path by the probability of being in time: a subtask with much behind it must
        choose a fast one where one that nobody waits for may take the cheap one.

        Args:
            graph: The subtasks.
            deadline_s: Seconds that there are for all of it, from now or any other moment.

        Returns:
            Seconds from that moment, by subtask; never more than `deadline_s`, and never earlier for a subtask than for
            one that it needs.

        Raises:
            InvalidRequest: If the deadline is not positive.
        """
        expected = self.expected_seconds(graph)
        order = [s.id for s in graph]
        return latest_ends(order, _outputs(graph), expected.__getitem__, deadline_s=deadline_s)


def _outputs(graph: TaskGraph) -> dict[str, list[str]]:
    outputs: dict[str, list[str]] = {s.id: [] for s in graph}
    for s in graph:
        for i in s.inputs:
            outputs[i].append(s.id)
    return outputs


SCHEDULERS: Final[Mapping[str, Callable[[Square], Scheduler]]] = MappingProxyType(
    {"heft": Heft, "fifo": lambda square: Fifo()}
)
"""Schedulers that `[multi_access] scheduler` may name; each call makes one for all runs of a graph."""
