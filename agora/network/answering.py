"""The chunks of one answer over several paths: from the copy that begins first, and from others where that breaks off.

Streams that break before the first token move unseen; later ones go on where they were (`agora.network.resume`), or end
with an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Final

from agora.errors import AgoraError, BackendError, BackendTimeout, Unavailable
from agora.network.blame import Blame, blame_of
from agora.network.course import Course
from agora.network.hedge import Hedging
from agora.network.race import Flight, Race, failed, seen
from agora.network.rest import Rest
from agora.network.resume import Emitted
from agora.network.ways import NoWay, Ways
from agora.protocols import Chunk
from agora.types import Usage

GAP_S: Final = 20.0
"""Seconds a further token is waited for while another path can go on: a server that puts a request aside for others
(vLLM's preemption) takes it up again within seconds."""


class Answering:
    """Answers one request.

    Args:
        ways: The ways.
        hedging: What is under way on them.
        course: The request.
        owner: What to call all ways together in errors.
        hedge: Whether a second copy may be sent.
        closed: Whether the backend was closed meanwhile.
        came: Told the tokens of an answer that came to its end.
    """

    def __init__(
        self,
        ways: Ways,
        hedging: Hedging,
        course: Course,
        *,
        owner: str,
        hedge: bool,
        closed: Callable[[], bool],
        came: Callable[[int], None],
    ) -> None:
        self._ways = ways
        self._hedging = hedging
        self._course = course
        self._owner = owner
        self._hedge = hedge
        self._closed = closed
        self._tell = came
        self._clock = asyncio.get_running_loop().time

    async def chunks(self, kept: list[Chunk] | None) -> AsyncGenerator[Chunk, None]:
        """The chunks of the answer, from however many copies.

        Args:
            kept: Where chunks are kept for an answer that is shown whole; what one copy left unfinished may then be
                thrown away. None for a stream, whose reader has seen it.

        Raises:
            Unavailable: If no path can be used, or the answer cannot be gone on with.
            BackendTimeout: If the time is up.
            AgoraError: If the request itself cannot be served.
        """
        course = self._course
        emitted = Emitted()
        while True:
            rest = Rest(course.request, emitted)
            if emitted and rest.ended:
                last = self._last(Chunk(finish_reason="length", usage=Usage()), path="")
                if kept is not None:
                    kept.append(last)
                yield last
                return
            flight = await self._first(rest)
            pass_on = rest.joined(flight.way)
            try:
                async with aclosing(self._of(flight)) as chunks:
                    async for chunk in chunks:
                        new = pass_on(chunk)
                        if new.finish_reason is not None:
                            new = self._last(new, path=flight.way.name)
                        elif not new.text and not new.logprobs:
                            continue
                        emitted.add(new)
                        if kept is not None:
                            kept.append(new)
                        yield new
                return
            except _Broke as broke:
                if self._closed() or not emitted:
                    continue
                if kept is not None and not self._goes_on(emitted):
                    # Nobody has seen it: the whole is asked for again.
                    kept.clear()
                    emitted = Emitted()
                    continue
                if not self._goes_on(emitted):
                    raise self._cut(broke.error, emitted) from None
                course.notes.append(f"path {flight.way.name} broke off after {len(emitted.text)} characters")

    async def _first(self, rest: Rest) -> Flight:
        """The copy that begins first."""
        if self._closed():
            raise Unavailable("the backend was closed", backend=self._owner)
        race = Race(self._ways, self._hedging, self._course, make=rest.make, fits=rest.fits, hedge=self._hedge)
        try:
            return await race.first()
        except NoWay as e:
            if self._closed():
                raise Unavailable("the backend was closed", backend=self._owner) from None
            error = self._course.failure(str(e))
            raise self._cut(error, rest.emitted) if rest.emitted else error from None

    async def _of(self, flight: Flight) -> AsyncGenerator[Chunk, None]:
        """The chunks of one copy that has begun, and what it teaches.

        Raises:
            _Broke: If it breaks off through no fault of the request.
            AgoraError: If it is the request's.
        """
        copy, over = flight.copy, False
        try:
            while True:
                patient = not any(w is not flight.way for w in self._ways.usable(self._course.tried))
                chunk = await copy.next(None if patient else GAP_S)
                if chunk is None:
                    return
                if chunk.finish_reason is not None:
                    over = True
                    usage = chunk.usage or Usage()
                    self._came(flight, usage)
                    chunk = replace(chunk, usage=replace(usage, cost=usage.cost + self._course.fare(flight.way, copy)))
                yield chunk
        except AgoraError as e:
            over = True
            self._failed(flight, e)
            raise _Broke(e) from None
        except (_Broke, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as e:
            over = True
            self._failed(flight, e)
            raise _Broke(BackendError(f"{type(e).__name__}: {e}", backend=flight.way.backend.name)) from e
        finally:
            age = copy.age_s
            await copy.stop()
            if not over:
                self._ways.ended(flight.way, seen(self._course, flight, ok=False, cancelled=True, total_s=age))

    def _failed(self, flight: Flight, error: Exception) -> None:
        late = isinstance(error, BackendTimeout) and self._clock() >= self._course.until
        if late or blame_of(error) is Blame.REQUEST:
            # It was answering: a short time says nothing against the path.
            self._ways.ended(flight.way, None)
            raise self._course.late() if late else error
        failed(self._ways, self._course, flight, error)

    def _came(self, flight: Flight, usage: Usage) -> None:
        """An answer came to its end."""
        self._tell(usage.completion_tokens)
        self._ways.ended(
            flight.way, seen(self._course, flight, ok=True, cancelled=False, total_s=flight.copy.age_s, usage=usage)
        )

    def _last(self, chunk: Chunk, *, path: str) -> Chunk:
        """The last chunk, with what all copies used, and how the answer came."""
        usage = (chunk.usage or Usage()) + self._course.lost
        notes = (*self._ways.unusable(self._course.tried), *self._course.notes, *chunk.notes)
        if self._course.copies > 1 and not self._course.tried and not self._course.notes:
            notes = ("its first token was late: it was asked for on two paths", *notes)
        return replace(chunk, usage=usage, path=path or ",".join(self._course.tried), notes=notes)

    def _goes_on(self, emitted: Emitted) -> bool:
        """Whether some way that is left could go on with what was emitted."""
        rest = Rest(self._course.request, emitted)
        return any(rest.fits(w) for w in self._ways.usable(self._course.tried))

    def _cut(self, error: Exception, emitted: Emitted) -> Unavailable:
        said = error.message if isinstance(error, AgoraError) else str(error)
        return Unavailable(
            f"the stream broke off after {len(emitted.text):,} characters, and no other path can go on with it: {said}",
            backend=self._owner,
            hint="ask again; what came so far is not the whole answer",
        )


class _Broke(Exception):
    """A copy that had begun broke off."""

    def __init__(self, error: AgoraError) -> None:
        super().__init__(str(error))
        self.error = error
