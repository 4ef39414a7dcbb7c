"""The replicas behind a `ReplicaSet`: started, looked after, drained and ended, as many as are wanted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final

from agora.errors import AgoraError, InvalidRequest, Unavailable
from agora.protocols import Backend

_log = logging.getLogger(__name__)

Open = Callable[[int], Awaitable[Backend]]
"""Starts the replica of that number, from 0, and returns when it can take requests; what it has half started when it
fails or is cancelled, it ends itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Care:
    """How replicas are looked after.

    Attributes:
        every_s: Seconds between two looks.
        drain_s: Seconds that a replica has to end its last requests: the longest that a request may take by default.
        health_s: Seconds that a replica has to generate a token when it is asked for one.
        give_up_s: Seconds for which a replica may fail to generate a token before it is ended and another one started
            in its place. A vLLM server starts itself again in that time (`experts.vllm_supervisor`).
        backoff_s: Wait after a start that failed; doubled with each further one.
        backoff_cap_s: Longest such wait.

    Raises:
        InvalidRequest: If a value is not positive.
    """

    every_s: float = 2.0
    drain_s: float = 600.0
    health_s: float = 30.0
    give_up_s: float = 900.0
    backoff_s: float = 5.0
    backoff_cap_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("every_s", "drain_s", "health_s", "give_up_s", "backoff_s", "backoff_cap_s"):
            if not getattr(self, name) > 0:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must be above 0 seconds")


MAX_DOUBLINGS: Final = 32
"""Doublings of the wait, past which the cap holds in any case."""


@dataclass(eq=False, slots=True)
class Replica:
    """One of them.

    Attributes:
        number: Its number, from 0, which no other has at the same time.
        backend: Where requests go.
        busy: Requests of ours on it.
        draining: Whether it takes no more requests.
        ailing_since: Since when it could not be reached, on the event loop's clock; None if it can.
        turn: When it was given a request last, by the count of all requests.
        behind: Whether it may lack adapters that the others have.
    """

    number: int
    backend: Backend
    busy: int = 0
    draining: bool = False
    ailing_since: float | None = None
    turn: int = 0
    behind: bool = False
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, turn: int) -> None:
        """A request goes there."""
        self.busy += 1
        self.turn = turn
        self._idle.clear()

    def give_back(self) -> None:
        """A request has ended."""
        self.busy -= 1
        if not self.busy:
            self._idle.set()

    async def idle(self) -> None:
        """Waits until none is left."""
        while self.busy:
            await self._idle.wait()


class ReplicaCrew:
    """Has as many replicas as are wanted, as far as they can be had.

    Args:
        open_replica: Starts one.
        care: How they are looked after.
        name: What to call them in the log.
        prepare: Makes a new or recovered replica ready for requests: loads its adapters.
    """

    def __init__(
        self, open_replica: Open, care: Care, *, name: str, prepare: Callable[[Replica], Awaitable[None]]
    ) -> None:
        self._open = open_replica
        self._care = care
        self._name = name
        self._prepare = prepare
        self._opening: dict[int, asyncio.Task[None]] = {}
        self._work: set[asyncio.Task[None]] = set()
        self._ends: set[asyncio.Task[None]] = set()
        self._nursed: set[Replica] = set()
        self._failures = 0
        self._not_before = 0.0
        self.all: list[Replica] = []
        self.why = ""

    @property
    def up(self) -> list[Replica]:
        """Those that take requests."""
        return [r for r in self.all if not r.draining]

    @property
    def draining(self) -> list[Replica]:
        """Those that end their last requests."""
        return [r for r in self.all if r.draining]

    @property
    def starting(self) -> int:
        """How many are on their way."""
        return len(self._coming)

    @property
    def _coming(self) -> dict[int, asyncio.Task[None]]:
        """Those on their way that are still wanted; who was told to stop may take a while to clean up."""
        return {n: task for n, task in self._opening.items() if not task.cancelling()}

    async def begin(self, count: int) -> None:
        """Starts so many and waits for them; those that cannot be started are tried again later.

        Raises:
            AgoraError: If none can be started; of the first one.
        """
        tasks = [asyncio.create_task(self._add(n)) for n in range(count)]
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            for t in tasks:
                t.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        errors = [e for t in tasks if (e := t.exception()) is not None]
        if errors and not self.all:
            raise errors[0]
        for e in errors:
            self._failed(e)

    def keep(self, wanted: int) -> None:
        """Makes them more or fewer: at once, as far as that needs no waiting."""
        loop = asyncio.get_running_loop()
        for r in self.up:
            if r.ailing_since is not None and r not in self._nursed:
                self._nursed.add(r)
                self._go(self._nurse(r))
        have = len(self.up) + len(self._coming)
        for r in self.draining[: max(wanted - have, 0)]:
            r.draining = False  # Its server still runs: the quickest way to one more.
            have += 1
        if have < wanted and loop.time() >= self._not_before:
            # After a failure one at a time: all would fail alike.
            for _ in range(int(not self._coming) if self._failures else wanted - have):
                self._start()
        # Those on their way first, as nobody misses them; then the ailing, then those with the least to do.
        spare = have - wanted
        coming = self._coming
        for number in sorted(coming, reverse=True)[: max(spare, 0)]:
            # Once: a second time would break off what ends a server that is half started.
            coming[number].cancel()
            spare -= 1
        by_use = sorted(self.up, key=lambda r: (r.ailing_since is None, r.busy, -r.number))
        for r in by_use[: max(spare, 0)]:
            r.draining = True
            self._go(self._drain(r))

    def ails(self, replica: Replica, error: AgoraError) -> None:
        """One could not be reached: it is looked after, and comes last until it generates a token."""
        if replica.ailing_since is None:
            replica.ailing_since = asyncio.get_running_loop().time()
            _log.warning("%s: replica %d is ailing: %s", self._name, replica.number, error.message)

    async def aclose(self) -> None:
        """Ends all of them."""
        tasks = [*self._opening.values(), *self._work]
        for t in (*self._coming.values(), *self._work):
            t.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for r in tuple(self.all):
            self._retire(r)
        await asyncio.gather(*self._ends)

    def _go(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s: looking after a replica failed", self._name, exc_info=error)

    def _start(self) -> None:
        taken = {r.number for r in self.all} | self._opening.keys()
        number = next(n for n in range(len(taken) + 1) if n not in taken)
        task = asyncio.create_task(self._add(number))
        self._opening[number] = task
        task.add_done_callback(lambda t: self._started(number, t))

    def _started(self, number: int, task: asyncio.Task[None]) -> None:
        del self._opening[number]
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            self._failed(error)
        else:
            self._failures = 0
            self.why = ""

    def _failed(self, error: BaseException) -> None:
        self._failures += 1
        doublings = min(self._failures - 1, MAX_DOUBLINGS)
        wait = min(self._care.backoff_s * 2.0**doublings, self._care.backoff_cap_s)
        self._not_before = asyncio.get_running_loop().time() + wait
        self.why = error.message if isinstance(error, AgoraError) else repr(error)
        expected = isinstance(error, AgoraError)
        _log.warning(
            "%s: a replica could not be started, next try in %.0f s: %s",
            self._name,
            wait,
            self.why,
            exc_info=None if expected else error,
        )

    async def _add(self, number: int) -> None:
        replica = Replica(number=number, backend=await self._open(number))
        try:
            await self._prepare(replica)
        except BaseException:
            await self._end(replica)
            raise
        self.all.append(replica)

    def _retire(self, replica: Replica) -> asyncio.Task[None]:
        """Takes one out for good and ends it, whoever stops waiting for that."""
        self.all.remove(replica)
        task = asyncio.create_task(self._end(replica))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)
        return task

    async def _end(self, replica: Replica) -> None:
        try:
            await replica.backend.aclose()
        except AgoraError as e:
            _log.warning("%s: replica %d could not be ended in order: %s", self._name, replica.number, e)

    async def _drain(self, replica: Replica) -> None:
        """Ends it when its last request has ended, unless it is wanted again before."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._care.drain_s
        while replica.busy and loop.time() < until:
            try:
                async with asyncio.timeout_at(min(until, loop.time() + self._care.every_s)):
                    await replica.idle()
            except TimeoutError:
                pass
            if not replica.draining:
                return
        if replica.draining and replica in self.all:
            await asyncio.shield(self._retire(replica))

    async def _nurse(self, replica: Replica) -> None:
        """Asks an ailing replica for a token until it gives one, or has not for too long."""
        loop = asyncio.get_running_loop()
        try:
            while (since := replica.ailing_since) is not None and replica in self.all:
                try:
                    async with asyncio.timeout(self._care.health_s):
                        health = await replica.backend.health()
                        if health.ok and replica.behind:
                            await self._prepare(replica)
                    told = health.detail
                    if health.ok:
                        replica.ailing_since = None
                        return
                except TimeoutError:
                    told = f"no token within {self._care.health_s:g} s"
                except AgoraError as e:
                    told = e.message
                if loop.time() - since >= self._care.give_up_s and replica in self.all:
                    _log.warning("%s: replica %d is given up: %s", self._name, replica.number, told)
                    await asyncio.shield(self._retire(replica))
                    return
                await asyncio.sleep(self._care.every_s)
        finally:
            self._nursed.discard(replica)


def nobody(name: str, crew: ReplicaCrew) -> Unavailable:
    """Why a request cannot be answered: there is no replica to give it to."""
    why = f": {crew.why}" if crew.why else ""
    return Unavailable(
        f"no replica is up, {crew.starting} are starting{why}", backend=name, hint="ask another backend meanwhile"
    )
