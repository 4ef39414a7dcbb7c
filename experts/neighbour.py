"""An expert on another node of agora, asked over HTTP.

To the one who asks it is a backend like any other. Between nodes more has to be right than between a client and a
server: a request carries its passage (`experts.passage`), so that it ends when its asker stops waiting and never goes
in a circle; and what one request learns of a node, that it does not answer, helps all that would be sent there next.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Final, TypeVar

from agora.errors import (
    BackendError,
    BackendTimeout,
    BadReply,
    DeadlineExceeded,
    OutOfReach,
    Rejected,
    Unavailable,
)
from agora.protocols import Capabilities, Chunk, Completion, GenerateRequest, Load, ScoreRequest, Scores
from experts.http_reply import Reply
from experts.openai import ForwardPath, OpenAIBackend
from experts.openai_wire import error_of, parse_json
from experts.passage import Passage, current_passage
from experts.retry import Retry
from experts.slots import Slots

T = TypeVar("T")

CONNECT_TIMEOUT_S: Final = 3.0
"""A TCP and a TLS handshake over a bad mobile link with one lost packet each. There are other nodes to ask, so no more
patience than that."""

RETRY: Final = Retry(tries=2, base_s=0.05, statuses=frozenset())
"""One more try where a kept-alive connection had just been closed. Not after a 429: somebody else has time now, which
those who route know, and a client that named this very expert is told how long to wait."""

TIMEOUT_S: Final = 600.0
"""Seconds for a request without a limit of its own; that of every other server."""

LOST_WEIGHT: Final = 8
"""Requests that one which broke off counts as: three doublings of the load, which decides any near tie
(`agora.routing.order`) but leaves an expert that nobody else comes near in its place."""

MODEL_NOT_FOUND: Final = "model_not_found"
"""Code of the error by which a node says that it has no such expert."""


class Engine:
    """What generates for one or more experts of another node, and how busy it is.

    The node tells its load from time to time; what this process asks in between is counted here. Requests of ours that
    were in that figure are taken out of it, so that none counts twice. Those that broke off stay in it, with more
    weight, until the node tells anew: else one that fails at once would look idle, and draw all the work there is.
    """

    def __init__(self) -> None:
        self._others = Load()
        self.asked = 0
        self.lost = 0

    @property
    def load(self) -> Load:
        """Requests on it now: those of others when it last told, ours, and what we lost there since."""
        running = self._others.running + self.asked + LOST_WEIGHT * self.lost
        return Load(running=running, waiting=self._others.waiting)

    def told(self, load: Load) -> None:
        """Takes over what the node says; of ours, those that wait there are taken for the last in its queue."""
        self.lost = 0
        waiting = max(0, load.waiting - max(0, self.asked - load.running))
        running = max(0, load.total - self.asked - waiting)
        self._others = Load(running=running, waiting=waiting)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What all experts reached through one neighbour share.

    Attributes:
        node: The id of this node.
        max_hops: Machines that a request which begins here may pass.
        slots: Limits the requests on the line.
        on_trouble: Called when a request gets no proper reply: the neighbour may be gone.
        on_unknown: Called with an expert's name there, when the neighbour says it has no such expert.
    """

    node: str
    max_hops: int
    slots: Slots = field(default_factory=Slots)
    on_trouble: Callable[[], None] = lambda: None
    on_unknown: Callable[[str], None] = lambda _: None


class NeighbourBackend(OpenAIBackend):
    """A `Backend` that is an expert of another node, which may in turn ask the node after it.

    The node adds the expert's system prompt and adapter by itself. Answers come whole unless a stream is asked for: a
    node that hangs is found out by the looks at its card, which costs less than watching every token.

    Args:
        url: Where the neighbour listens.
        expert: The expert's name there.
        name: What to call the backend in errors and traces.
        line: What it shares with the neighbour's other experts.
        way: Ids of the machines that a request passes: the neighbour first, the one that answers last.
        engine: What generates there.
        told_version: What the neighbour's card says stands for the version of the expert; empty if it says nothing.
        capabilities: What the neighbour's card says it can do.
        api_key: The key that the neighbour gave to this node.
        timeout_s: Most seconds for one request.
        local_address: IP address of this machine that connections go out from; None for any.

    Raises:
        InvalidRequest: If an argument is out of range.
    """

    relays: ClassVar[bool] = True

    def __init__(
        self,
        url: str,
        expert: str,
        *,
        name: str,
        line: Line,
        way: tuple[str, ...],
        engine: Engine | None = None,
        told_version: str = "",
        capabilities: Capabilities | None = None,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        local_address: str | None = None,
    ) -> None:
        super().__init__(
            url,
            expert,
            name=name,
            api_key=api_key,
            capabilities=capabilities,
            streaming=False,
            connect_timeout_s=CONNECT_TIMEOUT_S,
            total_timeout_s=timeout_s,
            retry=RETRY,
            local_address=local_address,
        )
        self._line = line
        self._way = way
        self._engine = engine or Engine()
        self.told_version = told_version
        self._asked = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    @property
    def load(self) -> Load:
        """What the expert is busy with: as it told itself, and what was asked from here since."""
        return self._engine.load

    async def generate(self, request: GenerateRequest) -> Completion:
        """Has the whole answer generated.

        Raises:
            TooManyHops: If the request may not pass that many machines.
            LoopDetected: If it would come back to one that it has passed.
            DeadlineExceeded: If nobody waits for it any more.
            BackendError: What went wrong on the way.
        """
        async with self._asking(request.timeout_s) as left:
            return await super().generate(dataclasses.replace(request, timeout_s=left))

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Has it generated piece by piece; closing it makes the neighbour stop. Raises what `generate` does."""
        async with (
            self._asking(request.timeout_s) as left,
            aclosing(super().stream(dataclasses.replace(request, timeout_s=left))) as chunks,
        ):
            async for chunk in chunks:
                yield chunk

    async def score(self, request: ScoreRequest) -> Scores:
        """Tells how likely each continuation is, if the card says that it can. Raises what `generate` does."""
        async with self._asking(request.timeout_s) as left:
            return await super().score(dataclasses.replace(request, timeout_s=left))

    async def forward(
        self,
        path: ForwardPath,
        payload: bytes,
        read: Callable[[Reply], Awaitable[T]],
        *,
        streamed: bool = False,
        timeout_s: float | None = None,
    ) -> T:
        """Passes a body on as it is; see `OpenAIBackend.forward`. Raises what `generate` does."""
        async with self._asking(timeout_s) as left:
            return await super().forward(path, payload, read, streamed=streamed, timeout_s=left)

    def headers_for(self, timeout_s: float | None) -> Mapping[str, str]:
        """The passage of the request that this is asked for."""
        return self._passage().headers(self._total_s if timeout_s is None else min(timeout_s, self._total_s))

    async def idle(self) -> None:
        """Returns when nothing is being asked."""
        await self._idle.wait()

    async def aclose(self) -> None:
        """Closes the connections; what runs fails with `Unavailable`, so that somebody else can be asked."""
        self._closed = True
        await super().aclose()

    def _passage(self) -> Passage:
        return current_passage() or Passage.begin(node=self._line.node, max_hops=self._line.max_hops)

    @asynccontextmanager
    async def _asking(self, timeout_s: float | None) -> AsyncIterator[float]:
        """One request: may it go on at all, is there a place on the line, and what does its end tell of the neighbour?

        Yields:
            Seconds left for it.
        """
        passage = self._passage()
        passage.allow(self._way)
        left = min(passage.left_s, self._total_s if timeout_s is None else min(timeout_s, self._total_s))
        if left <= 0:
            raise DeadlineExceeded(f"{self.name}: the time of the request was up before it was sent on")
        clock = asyncio.get_running_loop().time
        until = clock() + left
        self._count(1)
        try:
            async with self._line.slots.hold(until):
                yield max(until - clock(), 1e-3)
        except (Unavailable, BackendTimeout):
            self._trouble()
            raise
        except BadReply as e:
            # What a model says wrong, its own node tells by a status. So here it is the node that fails, and it most
            # likely died while it answered.
            self._trouble()
            raise self._gone(e.message, hint=e.hint) from None
        except Rejected as e:
            if e.status == 404 and _code(e) == MODEL_NOT_FOUND:
                # It was here a moment ago, for all that was known; somebody else may be asked instead.
                self._line.on_unknown(self._model)
                raise self._gone(f"{self.name}: the neighbour has no expert {self._model!r} (any more)") from None
            if e.status == 400 and _code(e) == OutOfReach.code:
                # It knows better than we how far up its expert is. What else can be asked may be nearer.
                raise OutOfReach(f"{self.name}: {e.message}", hint="ask another expert") from None
            raise
        finally:
            self._count(-1)

    def _gone(self, message: str, *, hint: str | None = None) -> Unavailable:
        error = Unavailable(message, hint=hint)
        error.backend = self.name
        return error

    def _trouble(self) -> None:
        if not self._closed:
            self._engine.lost += 1
            self._line.on_trouble()

    def _count(self, change: int) -> None:
        self._engine.asked += change
        self._asked += change
        if self._asked:
            self._idle.clear()
        else:
            self._idle.set()


def _code(error: Rejected) -> str:
    try:
        return error_of(parse_json(error.body, backend=""))[1]
    except BackendError:
        return ""
