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

from agora.errors import Unsupported
from agora.network.answering import Answering
from agora.network.blame import Blame, blame_of
from agora.network.breaker import BreakerRules
from agora.network.choice import Chooser
from agora.network.course import Course
from agora.network.estimates import Estimates
from agora.network.hedge import SHARE, Hedging
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

    def _chunks(self, course: Course, kept: list[Chunk] | None) -> AsyncGenerator[Chunk, None]:
        answering = Answering(
            self._ways,
            self._hedging,
            course,
            owner=self._name,
            hedge=self._hedge,
            closed=lambda: self._closed,
            came=self._came,
        )
        return answering.chunks(kept)

    def _came(self, tokens: int) -> None:
        """An answer of so many tokens came to its end."""
        self._typical = tokens if self._typical is None else self._typical + TYPICAL_WEIGHT * (tokens - self._typical)

    def _model(self, path: str) -> str:
        way = next((w for w in self._ways.all if w.name == path), None)
        if way is None:
            return self._name
        model = getattr(way.backend, "model", None)
        return model if isinstance(model, str) else way.backend.name


def loop_time() -> float:
    """Seconds on the running event loop's clock, which never goes back."""
    return asyncio.get_running_loop().time()
