"""Asks a vLLM server, and tells it things: requests, metrics, adapters. It starts nothing; see `experts.vllm`."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypedDict, TypeVar, Unpack

from agora.errors import BackendError, BackendTimeout, BadReply, Rejected, Unavailable, Unsupported
from agora.protocols import Capabilities, Chunk, Completion, GenerateRequest, Health, Message, ScoreRequest, Scores
from agora.types import AdapterRef
from experts.adapters import AdapterInfo
from experts.http_reply import Patience, Reply
from experts.openai import VLLM, ForwardPath, OpenAIBackend
from experts.openai_wire import messages_body
from experts.retry import Retry
from experts.slots import Slots
from experts.vllm_adapters import VllmAdapters, base_layers
from experts.vllm_metrics import VllmMetrics, read_metrics

T = TypeVar("T")

METRICS_TIMEOUT_S: Final = 5.0
"""Seconds for /metrics, which a vLLM at work answers within 50 ms."""

ADAPTER_TIMEOUT_S: Final = 120.0
"""Seconds to load an adapter: one of 2.7 GB from a disk that reads 50 MB/s takes 54; twice that."""

PING: Final = Message(role="user", content="ping")
"""What a server is asked for a token with."""


class HttpOptions(TypedDict, total=False):
    """What `OpenAIBackend` takes, as far as it is of use here."""

    headers: Mapping[str, str] | None
    connect_timeout_s: float
    first_token_timeout_s: float
    total_timeout_s: float
    health_timeout_s: float
    retry: Retry | None
    max_running: int | None
    max_waiting: int | None
    rng: random.Random | None
    local_address: str | None
    slots: Slots | None


class VllmClient(OpenAIBackend):
    """An `OpenAIBackend` that knows what is vLLM's own.

    Args:
        url: The server, with or without `/v1`.
        model: The server's name for the model.
        name: What to call the backend in errors and traces; the model's name by default.
        api_key: Sent as a bearer token; never shown.
        capabilities: What the server can do.
        copies: Where adapters are copied to before the server reads them; None for a server elsewhere.
        base: Folder of the base model, by which adapters are checked; None if it is not here.
        max_lora_rank: Highest rank of an adapter; None if that is not known.
        options: As of `OpenAIBackend`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        name: str = "",
        api_key: str | None = None,
        capabilities: Capabilities = VLLM,
        copies: Path | None = None,
        base: Path | None = None,
        max_lora_rank: int | None = None,
        **options: Unpack[HttpOptions],
    ) -> None:
        super().__init__(url, model, name=name, api_key=api_key, capabilities=capabilities, scorer="vllm", **options)
        self._leashes: set[asyncio.Timeout] = set()
        self._adapters = VllmAdapters(
            self._http,
            backend=self.name,
            patience=partial(self._bounded, ADAPTER_TIMEOUT_S),
            copies=copies,
            base=None if base is None else partial(base_layers, base),
            max_rank=max_lora_rank,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def url(self) -> str:
        """The base of the server's API; the same over restarts."""
        return self._url

    # -- Requests

    async def generate(self, request: GenerateRequest) -> Completion:
        """Generates the whole answer; `Unavailable` at once while the server is down."""
        async with self._up():
            answer = await super().generate(request)
            self._saw_life()
            return answer

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Generates piece by piece; `Unavailable` at once while the server is down."""
        async with aclosing(super().stream(request)) as chunks:
            while True:
                async with self._up():
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                self._saw_life()
                yield chunk

    async def score(self, request: ScoreRequest) -> Scores:
        """Tells how likely each continuation is; `Unavailable` at once while the server is down."""
        async with self._up():
            scores = await super().score(request)
            self._saw_life()
            return scores

    async def forward(
        self,
        path: ForwardPath,
        payload: bytes,
        read: Callable[[Reply], Awaitable[T]],
        *,
        streamed: bool = False,
        timeout_s: float | None = None,
    ) -> T:
        """Passes a body on, as `OpenAIBackend` does; `Unavailable` at once while the server is down."""
        async with self._up():
            told = await super().forward(path, payload, read, streamed=streamed, timeout_s=timeout_s)
            self._saw_life()
            return told

    async def health(self) -> Health:
        """Has one token generated, past the queue of this process; tells why a server is down."""
        down = self._down()
        return await self._one_token() if down is None else Health(ok=False, detail=str(down))

    async def probe(self) -> Capabilities:
        """Asks the server for the context length, and whether its model has a chat template.

        Raises:
            Rejected: If it does not serve the model.
            BackendError: If it cannot be asked.
        """
        await super().probe()
        body = {"model": self._model, "messages": messages_body((PING,))}
        with self._http.redacting():
            try:
                async with await self._http.post("tokenize", body, self._patience(None), root=True) as reply:
                    await reply.whole()
            except Rejected as e:
                # 404: a server that keeps this endpoint to itself says nothing about chats.
                if e.status == 400:
                    self._capabilities = replace(self._capabilities, chat=False)
        return self._capabilities

    async def metrics(self) -> VllmMetrics:
        """What the server tells about its load, its cache and its speed.

        Raises:
            BadReply: If what it tells cannot be read.
            BackendError: If it cannot be asked.
        """
        patience = self._bounded(METRICS_TIMEOUT_S)
        async with self._up(), await self._http.get("metrics", patience, root=True) as reply:
            data = await reply.whole()
        try:
            return read_metrics(data.decode("utf-8"))
        except ValueError as e:
            raise BadReply(f"/metrics cannot be read: {e}", backend=self._name) from None

    # -- Adapters

    @property
    def adapters(self) -> Mapping[AdapterRef, AdapterInfo]:
        """The adapters loaded from here."""
        return self._adapters.held

    async def served_adapters(self) -> tuple[str, ...]:
        """The names of all adapters that the server has, whoever loaded them.

        Raises:
            BackendError: If it cannot be asked.
        """
        async with self._up():
            return tuple(sorted(await self._adapters.served()))

    async def load_adapter(self, ref: AdapterRef, folder: str | os.PathLike[str]) -> AdapterInfo:
        """Puts a LoRA adapter beside the others; running requests neither stop nor change.

        An adapter is immutable: loading the same weights under the same name again does nothing, and other weights
        never get the name of one, even after it was unloaded. After a restart it is loaded again by itself.

        Args:
            ref: `name@vN`, under which requests ask for it.
            folder: As peft's `save_pretrained` writes it, in safetensors.

        Raises:
            AdapterError: If the folder holds no safe adapter for this model, other weights have that name, or the
                server refuses it.
            Unsupported: If the server was started without adapters.
            Unavailable: If the server is down.
        """
        self._check_adapters()
        async with self._up():
            return await self._adapters.load(ref, Path(folder))

    async def unload_adapter(self, ref: AdapterRef) -> None:
        """Has the server forget an adapter; requests that run with it go on, new ones are refused.

        Raises:
            AdapterError: If the server does not have it.
            Unsupported: If the server was started without adapters.
            Unavailable: If the server is down.
        """
        self._check_adapters()
        async with self._up():
            await self._adapters.unload(ref)

    # -- Behind it

    async def aclose(self) -> None:
        """Closes the connections; what runs or waits fails with `Unavailable`."""
        self._let_go(Unavailable("the backend was closed", backend=self._name))
        await super().aclose()

    def _down(self) -> Unavailable | None:
        """Why requests cannot be answered now, if that is known; None if they can."""
        return None

    def _saw_life(self) -> None:
        """Told of every success."""

    async def _one_token(self) -> Health:
        """As `OpenAIBackend.health`, with raw text: not every model has a chat template."""
        clock = asyncio.get_running_loop().time
        began = clock()
        request = GenerateRequest(prompt=PING.content, max_tokens=1)
        try:
            with self._http.redacting():
                answer = await self._complete(request, self._bounded(self._health_s), retry=False)
        except BackendError as e:
            return Health(ok=False, detail=str(e), seconds=clock() - began)
        detail = f"{answer.model or self._model} generated {answer.usage.completion_tokens} token"
        return Health(ok=True, detail=detail, seconds=clock() - began)

    @asynccontextmanager
    async def _up(self) -> AsyncIterator[None]:
        """For the time of a request: it fails at once if the server is down, or goes down, or the backend is closed.

        Without this a request whose reply has begun would wait in vain: closing a session of aiohttp does not wake
        those who read from its connections.
        """
        if (down := self._down()) is not None:
            raise down
        leash = asyncio.timeout(None)
        try:
            async with leash:
                self._leashes.add(leash)
                with self._http.redacting():
                    yield
        except (TimeoutError, Unavailable, BadReply, BackendTimeout) as e:
            if (down := self._down()) is not None:
                raise down from None
            if isinstance(e, TimeoutError):
                raise Unavailable("the backend was closed", backend=self._name) from None
            raise
        finally:
            self._leashes.discard(leash)

    def _let_go(self, error: Unavailable) -> None:
        """Ends what runs and what waits."""
        self._slots.abort(error)
        for leash in self._leashes:
            if not leash.expired():
                leash.reschedule(asyncio.get_running_loop().time())

    def _check_adapters(self) -> None:
        if not self._capabilities.adapters:
            raise Unsupported(
                "the server was started without adapters", backend=self._name, hint="start it with adapters=True"
            )

    def _bounded(self, seconds: float) -> Patience:
        return Patience(self._name, total_s=seconds, first_token_s=seconds)
