"""One backend in front of several replicas of a server, which it starts and stops by how much there is to do.

replicas = await ReplicaSet.start(lambda n: VLLMBackend.start("models/smollm2-135m"), Targets(most=4, queue=16))
answer = await replicas.generate(GenerateRequest(prompt="Once upon a time"))

A request goes to the replica that has the fewest. One that fails before it has said anything, since its replica died or
is full, goes to another. A replica that is no longer wanted gets no more requests, and is ended when its last one is
answered. All replicas have the same adapters; one that is new gets them before its first request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar, cast

from agora.errors import AgoraError, BackendTimeout, Overloaded, Unavailable, Unsupported
from agora.protocols import (
    Backend,
    Capabilities,
    Chunk,
    Completion,
    GenerateRequest,
    Health,
    Load,
    ScoreRequest,
    Scores,
)
from agora.scheduling.scaling import Observation, ScalingState, Targets, decide
from agora.types import AdapterRef
from experts.http_reply import Reply
from experts.openai import ForwardPath, OpenAIBackend
from experts.replicas_adapters import ReplicaAdapters
from experts.replicas_crew import Care, Open, Replica, ReplicaCrew, nobody
from experts.replicas_signal import FirstTokens, Signal

__all__ = ["Care", "ReplicaSet"]

_log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R", GenerateRequest, ScoreRequest)


class ReplicaSet:
    """See the module. Made by `start`.

    Args:
        open_replica: Starts one replica, and returns it when it can take requests.
        targets: How many replicas there may be, and by what.
        name: What to call it in errors and traces.
        care: How replicas are looked after.
    """

    def __init__(
        self, open_replica: Open, targets: Targets, *, name: str = "replicas", care: Care | None = None
    ) -> None:
        self._name = name
        self._targets = targets
        self._care = care or Care()
        self._adapters = ReplicaAdapters(name=name)
        self._crew = ReplicaCrew(open_replica, self._care, name=name, prepare=self._adapters.prepare)
        self._adapters.serve(self._crew)
        self._state = ScalingState(wanted=targets.least)
        self._why = ""
        self._first = FirstTokens()
        self._capabilities = Capabilities()
        self._turn = 0
        self._closed = False
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, open_replica: Open, targets: Targets, *, name: str = "replicas", care: Care | None = None
    ) -> Self:
        """Starts as many replicas as there are to be at the least, and from then on looks after them.

        Args:
            open_replica: Starts one replica, and returns it when it can take requests.
            targets: How many replicas there may be, and by what.
            name: What to call it in errors and traces.
            care: How replicas are looked after.

        Raises:
            AgoraError: If none of them can be started. If some can, the others are tried again later.
        """
        replicas = cls(open_replica, targets, name=name, care=care)
        try:
            await replicas._crew.begin(targets.least)
        except BaseException:
            await replicas.aclose()
            raise
        replicas._capabilities = replicas._crew.all[0].backend.capabilities
        replicas._watching = asyncio.create_task(replicas._watch(), name=f"replicas-{name}")
        return replicas

    def __repr__(self) -> str:
        return f"ReplicaSet(name={self._name!r}, up={len(self._crew.up)}, wanted={self._state.wanted})"

    @property
    def name(self) -> str:
        """What to call it in errors and traces."""
        return self._name

    @property
    def capabilities(self) -> Capabilities:
        """What every replica claims."""
        return self._capabilities

    @property
    def load(self) -> Load:
        """What all replicas together are busy with."""
        loads = [r.backend.load for r in self._crew.all]
        return Load(running=sum(x.running for x in loads), waiting=sum(x.waiting for x in loads))

    @property
    def replicas(self) -> Mapping[int, Backend]:
        """Those that run, draining ones too, by their numbers."""
        return MappingProxyType({r.number: r.backend for r in sorted(self._crew.all, key=lambda r: r.number)})

    @property
    def signal(self) -> Signal:
        """How many replicas are wanted, and how many there are."""
        return Signal(
            wanted=self._state.wanted,
            up=len(self._crew.up),
            starting=self._crew.starting,
            draining=len(self._crew.draining),
            requests=self._requests(),
            ttft_s=self._first.recent(asyncio.get_running_loop().time()),
            why=self._why,
        )

    # -- Requests

    async def generate(self, request: GenerateRequest) -> Completion:
        """Generates the whole answer."""
        answer = await self._ask(request, lambda backend, r: backend.generate(r))
        if answer.first_token_s is not None:
            self._first.saw(asyncio.get_running_loop().time(), answer.first_token_s)
        return answer

    async def score(self, request: ScoreRequest) -> Scores:
        """Tells how likely each continuation is."""
        return await self._ask(request, lambda backend, r: backend.score(r))

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Generates piece by piece; what breaks off after the first piece is not begun anew."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        tried: set[Replica] = set()
        while True:
            replica = self._pick(tried)
            said = False
            with self._held(replica):
                chunks = cast("AsyncGenerator[Chunk, None]", replica.backend.stream(self._left(request, began)))
                try:
                    async with aclosing(chunks):
                        async for chunk in chunks:
                            if not said:
                                said = True
                                self._first.saw(loop.time(), loop.time() - began)
                            yield chunk
                        return
                except (Unavailable, Overloaded) as e:
                    self._note(replica, e)
                    tried.add(replica)
                    if said or not self._others(tried):
                        raise

    @property
    def server(self) -> OpenAIBackend | None:
        """One of the servers, from which to learn how all are spoken to; None if they are not of OpenAI's kind."""
        return next((r.backend for r in self._crew.up if isinstance(r.backend, OpenAIBackend)), None)

    async def forward(
        self,
        path: ForwardPath,
        payload: bytes,
        read: Callable[[Reply], Awaitable[T]],
        *,
        streamed: bool = False,
        timeout_s: float | None = None,
    ) -> T:
        """Passes a body on, as `OpenAIBackend.forward` does; to another server if one fails before it replies.

        Raises:
            Unsupported: If the replicas are no such servers.
            BackendError: If no reply comes.
        """
        loop = asyncio.get_running_loop()
        until = None if timeout_s is None else loop.time() + timeout_s
        said = False

        async def noted(reply: Reply) -> T:
            nonlocal said
            said = True
            return await read(reply)

        tried: set[Replica] = set()
        while True:
            replica = self._pick(tried)
            if not isinstance(replica.backend, OpenAIBackend):
                raise Unsupported("its replicas take no bodies of OpenAI's API", backend=self._name)
            left = None if until is None else until - loop.time()
            if left is not None and left <= 0:
                raise self._late()
            try:
                with self._held(replica):
                    return await replica.backend.forward(path, payload, noted, streamed=streamed, timeout_s=left)
            except (Unavailable, Overloaded) as e:
                self._note(replica, e)
                tried.add(replica)
                if said or not self._others(tried):
                    raise

    async def health(self) -> Health:
        """Has every replica generate a token; one of them is enough."""
        clock = asyncio.get_running_loop().time
        began = clock()
        up = self._crew.up
        if self._closed or not up:
            return Health(ok=False, detail=str(self._nobody()))
        seen = await asyncio.gather(*(r.backend.health() for r in up))
        good = [h for h in seen if h.ok]
        detail = f"{len(good)} of {len(seen)} replicas generated a token"
        if bad := [h.detail for h in seen if not h.ok]:
            detail += f"; {bad[0]}"
        return Health(ok=bool(good), detail=detail, seconds=clock() - began)

    async def aclose(self) -> None:
        """Ends all replicas; what runs fails with `Unavailable`."""
        self._closed = True
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        await self._crew.aclose()
        await self._adapters.aclose()

    async def _ask(self, request: R, ask: Callable[[Backend, R], Awaitable[T]]) -> T:
        began = asyncio.get_running_loop().time()
        tried: set[Replica] = set()
        while True:
            replica = self._pick(tried)
            try:
                with self._held(replica):
                    return await ask(replica.backend, self._left(request, began))
            except (Unavailable, Overloaded) as e:
                self._note(replica, e)
                tried.add(replica)
                if not self._others(tried):
                    raise

    def _left(self, request: R, began: float) -> R:
        """The request with the time that is left of its own."""
        if request.timeout_s is None:
            return request
        left = request.timeout_s - (asyncio.get_running_loop().time() - began)
        if left <= 0:
            raise self._late()
        return replace(request, timeout_s=left)

    def _late(self) -> BackendTimeout:
        return BackendTimeout("timeout_s passed while other replicas were tried", backend=self._name)

    def _pick(self, tried: set[Replica]) -> Replica:
        """The one with the fewest requests, of these the one that has waited longest; ailing ones last."""
        if self._closed or not (here := self._others(tried)):
            raise self._nobody()
        return min(here, key=lambda r: (r.ailing_since is not None, r.busy, r.turn))

    def _others(self, tried: set[Replica]) -> list[Replica]:
        return [] if self._closed else [r for r in self._crew.up if r not in tried]

    @contextmanager
    def _held(self, replica: Replica) -> Iterator[None]:
        self._turn += 1
        replica.take(self._turn)
        try:
            yield
        finally:
            replica.give_back()

    def _note(self, replica: Replica, error: AgoraError) -> None:
        """One that cannot be reached gets no more requests while there are others, and is looked after."""
        if isinstance(error, Unavailable) and not self._closed:
            self._crew.ails(replica, error)

    def _nobody(self) -> Unavailable:
        if self._closed:
            return Unavailable("the backend was closed", backend=self._name)
        return nobody(self._name, self._crew)

    # -- Adapters

    @property
    def adapters(self) -> tuple[AdapterRef, ...]:
        """The adapters loaded from here."""
        return self._adapters.held

    async def load_adapter(self, ref: AdapterRef, folder: str | Path) -> Any:
        """Puts a LoRA adapter on all replicas; those started later get it before their first request.

        Args:
            ref: `name@vN`, under which requests ask for it.
            folder: As peft's `save_pretrained` writes it, in safetensors. It may go away afterwards.

        Returns:
            What the replica says of it that answered first.

        Raises:
            AdapterError: If a replica refuses it; it is then on none that did not have it before.
            Unsupported: If they take no adapters.
            Unavailable: If none of them can be reached.
        """
        return await self._adapters.load(ref, Path(folder))

    async def unload_adapter(self, ref: AdapterRef) -> None:
        """Has all replicas forget an adapter; requests that run with it go on, new ones are refused.

        Raises:
            AdapterError: If they do not have it.
            Unsupported: If they take no adapters.
            Unavailable: If none of them can be reached.
        """
        await self._adapters.unload(ref)

    # -- How many

    def _requests(self) -> int:
        """Requests of ours, and what replicas know of besides."""
        return sum(max(r.busy, r.backend.load.total) for r in self._crew.all)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._care.every_s)
            try:
                self._look()
            except Exception:
                # A replica's backend may raise anything when it is asked for its load; the next look may go well.
                _log.exception("%s: a look at the replicas failed", self._name)

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        seen = Observation(at=now, requests=float(self._requests()), ttft_s=self._first.recent(now))
        before = self._state.wanted
        self._state, wanted, self._why = decide(self._state, seen, self._targets)
        if wanted != before:
            _log.info("%s: replicas wanted: %s", self._name, self._why)
        self._crew.keep(wanted)


def all_of(backend: Backend, node: str) -> Iterator[tuple[str, Backend]]:
    """What a node's figures are told of: the backend, or each of its replicas as `node/number`."""
    if isinstance(backend, ReplicaSet):
        yield from ((f"{node}/{number}", replica) for number, replica in backend.replicas.items())
    else:
        yield node, backend
