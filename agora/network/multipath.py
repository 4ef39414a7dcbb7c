"""A backend over several paths: each request takes the one that is best now, and moves to another when that fails.

    backend = MultipathBackend([Way(path=wifi, backend=over_wifi), Way(path=nr, backend=over_5g)], name="cloud")
    answer = await backend.generate(request)
    answer.path          # "wifi"

Repeating a request has no side effect here: all that is asked is generation. So a copy that is not needed is broken
off, and nothing but its tokens is lost; they are counted in the answer's `usage`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import fields, replace
from typing import Final

from agora.errors import AgoraError, BackendError, BackendTimeout, Unavailable, Unsupported
from agora.network.blame import Blame, blame_of
from agora.network.breaker import BreakerRules
from agora.network.choice import Chooser
from agora.network.course import Course
from agora.network.estimates import Estimates
from agora.network.hedge import SHARE, Hedging
from agora.network.race import Flight, Race, failed, seen
from agora.network.rest import Rest
from agora.network.resume import Emitted
from agora.network.topology import Topology
from agora.network.ways import NoWay, PathState, Way, Ways
from agora.protocols import (
    Capabilities,
    Chunk,
    Completion,
    GenerateRequest,
    Health,
    Load,
    ScoreRequest,
    Scores,
)
from agora.types import Usage

GAP_S: Final = 20.0
"""Seconds a further token is waited for while another path can go on: a server that puts a request aside for others
(vLLM's preemption) takes it up again within seconds."""

TYPICAL_WEIGHT: Final = 0.1
"""Weight of the newest answer in the mean number of tokens: that of the last twenty, or so."""


class MultipathBackend:
    """A `Backend` over several ways to the same help.

    A request goes out on the path that `chooser` takes, given what `estimates` expect of each. On what may pass it
    moves to another path, each path once at most, within its time. Paths that keep failing are left alone by breakers.
    A first token that is late is asked for a second time on another path (`hedge`). Streams that break before the
    first token move unseen; later ones go on where they were (`agora.network.resume`), or end with an error.

    Capabilities are what every way claims; the load is that of all ways together; it is well if one of them is.

    Args:
        ways: The ways; their backends are closed with this one.
        name: What to call it in errors and traces.
        estimates: What is learned; may be shared. Its clock must be the event loop's.
        chooser: How a path is chosen; may be shared.
        topology: The links as they are now, where they change.
        hedge: Whether second copies are sent.
        hedge_share: Most extra requests, as a share of all.
        rules: When breakers open.
        rng: Where chance comes from.

    Raises:
        InvalidRequest: If there is no way, two have one name, or a number is out of range.
    """

    def __init__(
        self,
        ways: Sequence[Way],
        *,
        name: str,
        estimates: Estimates | None = None,
        chooser: Chooser | None = None,
        topology: Topology | None = None,
        hedge: bool = True,
        hedge_share: float = SHARE,
        rules: BreakerRules | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._name = name
        self._ways = Ways(
            ways,
            owner=name,
            estimates=estimates or Estimates(loop_time),
            chooser=chooser or Chooser(loop_time),
            topology=topology,
            rules=rules,
            clock=loop_time,
            rng=rng or random.Random(),
        )
        self._hedge = hedge and hedge_share > 0 and len(ways) > 1
        self._hedging = Hedging(clock=loop_time, share=hedge_share)
        self._typical: float | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"MultipathBackend({self._name!r}, paths={[w.name for w in self._ways.all]!r})"

    @property
    def name(self) -> str:
        """What to call it in errors and traces."""
        return self._name

    @property
    def ways(self) -> tuple[Way, ...]:
        """The ways."""
        return self._ways.all

    @property
    def capabilities(self) -> Capabilities:
        """What every way claims."""
        claims = [w.backend.capabilities for w in self._ways.all]
        said = {
            f.name: all(getattr(c, f.name) for c in claims) for f in fields(Capabilities) if f.name != "max_context"
        }
        rooms = [c.max_context for c in claims if c.max_context is not None]
        return Capabilities(**said, max_context=min(rooms) if rooms else None)

    @property
    def load(self) -> Load:
        """What the backends of all ways are busy with."""
        loads = [b.load for b in {id(w.backend): w.backend for w in self._ways.all}.values()]
        return Load(running=sum(x.running for x in loads), waiting=sum(x.waiting for x in loads))

    @property
    def hedged(self) -> tuple[int, int]:
        """Second copies that were sent, and requests."""
        return self._hedging.bucket.taken, self._hedging.bucket.asked

    def states(self) -> tuple[PathState, ...]:
        """How each path is; asked on the event loop."""
        return self._ways.states()

    async def generate(self, request: GenerateRequest) -> Completion:
        """Generates the whole answer.

        Raises:
            Unavailable: If no path can be used; it names each, and why.
            BackendTimeout: If the time is up.
            AgoraError: If the request itself cannot be served.
        """
        course = self._course(request)
        kept: list[Chunk] = []
        first: float | None = None
        clock = loop_time
        async with aclosing(self._chunks(course, kept)) as chunks:
            async for _ in chunks:
                first = first if first is not None else clock() - course.began
        last = kept[-1]
        assert last.finish_reason is not None
        assert last.usage is not None
        return Completion(
            text="".join(c.text for c in kept),
            finish_reason=last.finish_reason,
            usage=last.usage,
            model=self._model(last.path),
            logprobs=tuple(t for c in kept for t in c.logprobs),
            first_token_s=first,
            seconds=clock() - course.began,
            path=last.path,
            notes=last.notes,
        )

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Generates piece by piece; closing it frees the work on every path. Raises what `generate` does."""
        async with aclosing(self._chunks(self._course(request), None)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def score(self, request: ScoreRequest) -> Scores:
        """Tells how likely each continuation is. Raises what `generate` does."""
        self._claimed(score=True, chat=bool(request.messages), completion=request.prompt is not None)
        asked = GenerateRequest(
            messages=request.messages, prompt=request.prompt, max_tokens=1, timeout_s=request.timeout_s
        )
        course = Course(asked, owner=self._name)
        while True:
            way = await self._next(course)
            self._ways.started(way)
            try:
                async with asyncio.timeout(course.left_s):
                    scores = await way.backend.score(replace(request, timeout_s=course.left_s))
            except TimeoutError:
                self._ways.ended(way, None)
                raise course.late() from None
            except Exception as e:
                # A backend of somebody else's may raise anything.
                self._ways.ended(way, None)
                course.gave_up(way, e)
                if blame_of(e) is Blame.PATH:
                    self._ways.failed(way, course.tried[way.name])
                if blame_of(e) is Blame.REQUEST:
                    raise
            except BaseException:
                self._ways.ended(way, None)
                raise
            else:
                self._ways.ended(way, None)
                self._ways.breaker(way).succeeded()
                return scores

    async def health(self) -> Health:
        """Has every path generate a token; well as soon as one has."""
        began = loop_time()
        probes = {asyncio.create_task(w.backend.health()): w for w in self._ways.all}
        details: list[str] = []
        try:
            for probe in asyncio.as_completed(probes):
                try:
                    health = await probe
                except Exception as e:
                    # A backend that breaks its promise not to raise must not hide the others.
                    health = Health(ok=False, detail=f"{type(e).__name__}: {e}")
                if health.ok:
                    return Health(ok=True, detail=health.detail, seconds=loop_time() - began)
                details.append(health.detail)
        finally:
            for task in probes:
                task.cancel()
            await asyncio.gather(*probes, return_exceptions=True)
        return Health(ok=False, detail=f"no path works: {'; '.join(details)}", seconds=loop_time() - began)

    async def aclose(self) -> None:
        """Closes every way's backend; what runs fails with `Unavailable`."""
        self._closed = True
        await self._ways.aclose()
        backends = {id(w.backend): w.backend for w in self._ways.all}
        ends = await asyncio.gather(*(b.aclose() for b in backends.values()), return_exceptions=True)
        if errors := [e for e in ends if isinstance(e, BaseException)]:
            raise errors[0]

    # -- Behind it

    def _course(self, request: GenerateRequest) -> Course:
        self._claimed(
            chat=bool(request.messages),
            completion=request.prompt is not None,
            adapters=request.adapter is not None,
            logprobs=request.logprobs is not None,
            json_schema=request.json_schema is not None,
            continues=request.goes_on,
        )
        self._hedging.bucket.fill()
        return Course(request, owner=self._name, typical_tokens=self._typical)

    def _claimed(self, **needed: bool) -> None:
        claimed = self.capabilities
        if missing := [what for what, is_needed in needed.items() if is_needed and not getattr(claimed, what)]:
            raise Unsupported(
                f"this request needs {' and '.join(missing)}, which not every path to it claims",
                backend=self._name,
                hint="ask another backend, or leave it out",
            )

    async def _next(self, course: Course) -> Way:
        try:
            return await self._ways.choose(course.job, without=course.tried, until=course.until, fits=lambda _: True)
        except NoWay as e:
            raise course.failure(str(e)) from None

    async def _chunks(self, course: Course, kept: list[Chunk] | None) -> AsyncGenerator[Chunk, None]:
        """The chunks of an answer, from however many copies.

        Args:
            course: The request.
            kept: Where chunks are kept for an answer that is shown whole; what one copy left unfinished may then be
                thrown away. None for a stream, whose reader has seen it.
        """
        emitted = Emitted()
        while True:
            rest = Rest(course.request, emitted)
            if emitted and rest.ended:
                last = self._last(course, Chunk(finish_reason="length", usage=Usage()), path="")
                if kept is not None:
                    kept.append(last)
                yield last
                return
            flight = await self._first(course, rest)
            pass_on = rest.joined(flight.way)
            try:
                async with aclosing(self._of(course, flight)) as chunks:
                    async for chunk in chunks:
                        new = pass_on(chunk)
                        if new.finish_reason is not None:
                            new = self._last(course, new, path=flight.way.name)
                        elif not new.text and not new.logprobs:
                            continue
                        emitted.add(new)
                        if kept is not None:
                            kept.append(new)
                        yield new
                return
            except _Broke as broke:
                if self._closed or not emitted:
                    continue
                if kept is not None and not self._goes_on(course, emitted):
                    # Nobody has seen it: the whole is asked for again.
                    kept.clear()
                    emitted = Emitted()
                    continue
                if not self._goes_on(course, emitted):
                    raise self._cut(broke.error, emitted) from None
                course.notes.append(f"path {flight.way.name} broke off after {len(emitted.text)} characters")

    async def _first(self, course: Course, rest: Rest) -> Flight:
        """The copy that begins first."""
        if self._closed:
            raise Unavailable("the backend was closed", backend=self._name)
        race = Race(self._ways, self._hedging, course, make=rest.make, fits=rest.fits, hedge=self._hedge)
        try:
            return await race.first()
        except NoWay as e:
            if self._closed:
                raise Unavailable("the backend was closed", backend=self._name) from None
            error = course.failure(str(e))
            raise self._cut(error, rest.emitted) if rest.emitted else error from None

    async def _of(self, course: Course, flight: Flight) -> AsyncGenerator[Chunk, None]:
        """The chunks of one copy that has begun, and what it teaches.

        Raises:
            _Broke: If it breaks off through no fault of the request.
            AgoraError: If it is the request's.
        """
        copy, over = flight.copy, False
        try:
            while True:
                patient = not any(w is not flight.way for w in self._ways.usable(course.tried))
                chunk = await copy.next(None if patient else GAP_S)
                if chunk is None:
                    return
                if chunk.finish_reason is not None:
                    over = True
                    usage = chunk.usage or Usage()
                    self._came(course, flight, usage)
                    chunk = replace(chunk, usage=replace(usage, cost=usage.cost + course.fare(flight.way, copy)))
                yield chunk
        except AgoraError as e:
            over = True
            self._failed(course, flight, e)
            raise _Broke(e) from None
        except (_Broke, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as e:
            over = True
            self._failed(course, flight, e)
            raise _Broke(BackendError(f"{type(e).__name__}: {e}", backend=flight.way.backend.name)) from e
        finally:
            age = copy.age_s
            await copy.stop()
            if not over:
                self._ways.ended(flight.way, seen(course, flight, ok=False, cancelled=True, total_s=age))

    def _failed(self, course: Course, flight: Flight, error: Exception) -> None:
        late = isinstance(error, BackendTimeout) and loop_time() >= course.until
        if late or blame_of(error) is Blame.REQUEST:
            # It was answering: a short time says nothing against the path.
            self._ways.ended(flight.way, None)
            raise course.late() if late else error
        failed(self._ways, course, flight, error)

    def _came(self, course: Course, flight: Flight, usage: Usage) -> None:
        """An answer came to its end."""
        tokens = usage.completion_tokens
        self._typical = tokens if self._typical is None else self._typical + TYPICAL_WEIGHT * (tokens - self._typical)
        self._ways.ended(
            flight.way, seen(course, flight, ok=True, cancelled=False, total_s=flight.copy.age_s, usage=usage)
        )

    def _last(self, course: Course, chunk: Chunk, *, path: str) -> Chunk:
        """The last chunk, with what all copies used, and how the answer came."""
        usage = (chunk.usage or Usage()) + course.lost
        notes = (*self._ways.unusable(course.tried), *course.notes, *chunk.notes)
        if course.copies > 1 and not course.tried and not course.notes:
            notes = ("its first token was late: it was asked for on two paths", *notes)
        return replace(chunk, usage=usage, path=path or ",".join(course.tried), notes=notes)

    def _goes_on(self, course: Course, emitted: Emitted) -> bool:
        """Whether some way that is left could go on with what was emitted."""
        rest = Rest(course.request, emitted)
        return any(rest.fits(w) for w in self._ways.usable(course.tried))

    def _cut(self, error: Exception, emitted: Emitted) -> Unavailable:
        said = error.message if isinstance(error, AgoraError) else str(error)
        return Unavailable(
            f"the stream broke off after {len(emitted.text):,} characters, and no other path can go on with it: {said}",
            backend=self._name,
            hint="ask again; what came so far is not the whole answer",
        )

    def _model(self, path: str) -> str:
        way = next((w for w in self._ways.all if w.name == path), None)
        if way is None:
            return self._name
        model = getattr(way.backend, "model", None)
        return model if isinstance(model, str) else way.backend.name


class _Broke(Exception):
    """A copy that had begun broke off."""

    def __init__(self, error: AgoraError) -> None:
        super().__init__(str(error))
        self.error = error


def loop_time() -> float:
    """Seconds on the running event loop's clock, which never goes back."""
    return asyncio.get_running_loop().time()
