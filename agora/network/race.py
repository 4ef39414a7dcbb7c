"""Gets a first token: asks on the best path, on another one when that is late, and takes the copy that begins first."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from agora.errors import BackendTimeout
from agora.network.blame import Blame, blame_of
from agora.network.copies import Copy
from agora.network.course import TOKEN_BYTES, Course, Make
from agora.network.hedge import Hedging, Sent
from agora.network.jobs import Observation
from agora.network.ways import PAST_S, Way, Ways
from agora.types import Usage

PATIENCE: Final = 6.0
"""Times its usual latest (the 95th percentile) after which a first token is no longer waited for on a path while there
are others. Queues that build up make requests a few times later; one that is later than that has most likely met a
machine that hangs."""

LEAST_PATIENCE_S: Final = 2.0
"""Seconds a first token is waited for at least: a hand-over between cells, a garbage collection, a lost packet or two
are over by then."""

UNKNOWN_PATIENCE_S: Final = 30.0
"""Seconds a first token is waited for on a path of which nothing is known yet, while there are others: a prompt of
2,000 tokens is read by a small model on two CPU cores in that time."""

DEADLINE_SHARE: Final = 0.5
"""Share of the time left in which the first token must come on a path of which nothing is known, while there are
others: one more can then be asked in time."""

AGAIN: Final = 0.5
"""Part of its 95th percentile after which a request that was not hedged, since all were late, is looked at again: a
slow-down that ended is noticed by first tokens, which come within such a time."""


@dataclass(eq=False, slots=True)
class Flight:
    """A copy under way."""

    way: Way
    copy: Copy
    sent: Sent
    patience_until: float
    landed: bool = False


class Race:
    """Sends copies of one request until one of them has begun to answer.

    Args:
        ways: The ways.
        hedging: What is under way on them.
        course: The request.
        make: What is asked on a way.
        fits: Whether a way can do what is wanted.
        hedge: Whether a second copy may be sent.
    """

    def __init__(
        self, ways: Ways, hedging: Hedging, course: Course, *, make: Make, fits: Callable[[Way], bool], hedge: bool
    ) -> None:
        self._ways = ways
        self._hedging = hedging
        self._course = course
        self._make = make
        self._fits = fits
        self._hedge = hedge
        self._clock = asyncio.get_running_loop().time
        self._flights: list[Flight] = []

    async def first(self) -> Flight:
        """The copy that begins first; the others are broken off, and have ended.

        Raises:
            NoWay: If no way is left.
            BackendTimeout: If the time is up.
            AgoraError: If the request itself cannot be served.
        """
        token: asyncio.Task[int] | None = None
        hedge_at = math.inf
        try:
            while True:
                if not self._flights:
                    if token is not None:
                        await self._give_back(token)
                        token = None
                    flight = await self._send_next()
                    hedge_at = self._late_at(flight) if self._hedge else math.inf
                await self._wait(hedge_at, token)
                if (won := await self._landed()) is not None:
                    return won
                if self._clock() >= self._course.until:
                    raise self._late()
                await self._lose_patience()
                if not self._flights:
                    continue
                if token is not None and token.done():
                    self._second(token.result())
                    token, self._hedge = None, False
                elif self._hedge and token is None and self._clock() >= hedge_at:
                    first = self._flights[0]
                    if self._hedging.correlated(first.sent):
                        hedge_at = self._clock() + AGAIN * (first.sent.late_after_s or math.inf)
                    elif self._others():
                        token = asyncio.create_task(self._hedging.bucket.take())
                        hedge_at = math.inf
                    else:
                        hedge_at = math.inf
        finally:
            if token is not None:
                await self._give_back(token)
            for flight in list(self._flights):
                await self._drop(flight)

    async def _send_next(self) -> Flight:
        way = await self._ways.choose(
            self._course.job, without=self._course.tried, until=self._course.until, fits=self._fits
        )
        return self._send(way)

    def _send(self, way: Way) -> Flight:
        course = self._course
        p95 = self._ways.expect(way, course.job).first_token_p95_s
        copy = Copy(way.backend, course.as_now(self._make(way)), until=course.until)
        course.copies += 1
        self._ways.started(way)
        patience = UNKNOWN_PATIENCE_S if p95 is None else max(LEAST_PATIENCE_S, PATIENCE * p95)
        if p95 is None and course.left_s is not None:
            patience = min(patience, DEADLINE_SHARE * course.left_s)
        flight = Flight(way, copy, self._hedging.sent(way.name, p95), self._clock() + patience)
        self._flights.append(flight)
        return flight

    def _late_at(self, flight: Flight) -> float:
        late = self._hedging.late_in_s(flight.sent)
        return math.inf if late is None else self._clock() + late

    async def _wait(self, hedge_at: float, token: asyncio.Task[int] | None) -> None:
        """Until a copy has begun or failed, or something is to be done about those that have not."""
        now = self._clock()
        patience = min(f.patience_until for f in self._flights)
        until = min(patience, hedge_at, self._course.until)
        waited: list[asyncio.Future[Any]] = [f.copy.ready for f in self._flights]
        if token is not None:
            waited.append(token)
        if all(not w.done() for w in waited):
            timeout = None if until == math.inf else max(0.0, until - now) + PAST_S
            await asyncio.wait(waited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)

    async def _landed(self) -> Flight | None:
        """The copy that has begun, the others broken off; those that failed are put aside."""
        for flight in [f for f in self._flights if f.copy.ready.done()]:
            if flight.copy.first_at is not None:
                self._hedging.first_token(flight.sent)
                self._flights.remove(flight)
                for other in list(self._flights):
                    await self._drop(other)
                return flight
            error = flight.copy.error
            assert error is not None
            self._flights.remove(flight)
            self._hedging.gone(flight.sent)
            await flight.copy.stop()
            failed(self._ways, self._course, flight, error)
            if blame_of(error) is Blame.REQUEST:
                raise error
        return None

    async def _lose_patience(self) -> None:
        for flight in [f for f in self._flights if f.patience_until <= self._clock()]:
            if self._hedging.correlated(flight.sent, leaving=True) or not (self._others() or len(self._flights) > 1):
                # Everything is slow, or there is nobody else: it is waited on.
                flight.patience_until = self._clock() + LEAST_PATIENCE_S
                continue
            self._flights.remove(flight)
            self._hedging.gone(flight.sent)
            await flight.copy.stop()
            waited = f"no first token within {flight.copy.age_s:.3g} s"
            usual = (
                "" if flight.sent.late_after_s is None else f", where it usually takes {flight.sent.late_after_s:.3g}"
            )
            failed(self._ways, self._course, flight, BackendTimeout(waited + usual, backend=flight.way.backend.name))

    def _second(self, place: int) -> None:
        """The second copy; its place in the bucket is paid."""
        way = None
        if not self._hedging.correlated(self._flights[0].sent):
            taken = {*self._course.tried, *(f.way.name for f in self._flights)}
            way = self._ways.other(self._course.job, without=taken, fits=self._fits)
        if way is None:
            self._hedging.bucket.give_back(place)
        else:
            self._send(way)

    def _others(self) -> bool:
        # While this one waits, those that were broken may have come back.
        self._ways.tend()
        taken = {*self._course.tried, *(f.way.name for f in self._flights)}
        return any(self._fits(w) for w in self._ways.usable(taken))

    async def _drop(self, flight: Flight) -> None:
        """Breaks off a copy that is not needed any more."""
        self._flights.remove(flight)
        self._hedging.gone(flight.sent)
        age = flight.copy.age_s
        await flight.copy.stop()
        self._course.lose(flight.way, flight.copy)
        self._ways.ended(flight.way, seen(self._course, flight, ok=False, cancelled=True, total_s=age))

    def _late(self) -> BackendTimeout:
        """The time is up with no token from anybody: what hangs longer than usual is to blame, if not all are slow."""
        for flight in list(self._flights):
            usual = flight.sent.late_after_s
            if (usual is None or flight.copy.age_s > 2 * usual) and not self._hedging.correlated(flight.sent):
                why = f"no first token within {flight.copy.age_s:.3g} s"
                self._course.tried[flight.way.name] = why
                self._ways.failed(flight.way, why)
        return self._course.late()

    async def _give_back(self, token: asyncio.Task[int]) -> None:
        if token.cancel():
            await asyncio.wait([token])
        if not token.cancelled():
            self._hedging.bucket.give_back(token.result())


def failed(ways: Ways, course: Course, flight: Flight, error: Exception) -> None:
    """Takes in that a copy failed."""
    course.gave_up(flight.way, error)
    course.lose(flight.way, flight.copy)
    blame = blame_of(error)
    told = blame is not Blame.REQUEST
    total = flight.copy.age_s
    ways.ended(flight.way, seen(course, flight, ok=False, cancelled=False, total_s=total) if told else None)
    if blame is Blame.PATH:
        ways.failed(flight.way, course.tried[flight.way.name])


def seen(
    course: Course, flight: Flight, *, ok: bool, cancelled: bool, total_s: float, usage: Usage | None = None
) -> Observation:
    """What was seen of a copy."""
    copy = flight.copy
    return Observation(
        path=flight.way.path,
        at=copy.sent_at + copy.age_s,
        ok=ok,
        cancelled=cancelled,
        up_bytes=course.up_bytes,
        down_bytes=TOKEN_BYTES * copy.pieces,
        prompt_tokens=usage.prompt_tokens if usage else course.prompt_tokens,
        completion_tokens=usage.completion_tokens if usage else copy.tokens,
        first_token_s=copy.first_s,
        total_s=total_s,
    )
