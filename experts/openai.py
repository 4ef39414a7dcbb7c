"""A backend for every server that speaks OpenAI's HTTP API: vLLM, llama.cpp, SGLang, Ollama, OpenAI, and others.

backend = OpenAIBackend("http://127.0.0.1:8000", "qwen2.5-7b", capabilities=VLLM, scorer="vllm")
answer = await backend.generate(GenerateRequest(prompt="Once upon a time"))
await backend.aclose()
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, ClassVar, Final, Literal, TypeVar, get_args

from agora.errors import AdapterError, BackendError, BadReply, InvalidRequest, Rejected, Unavailable
from agora.protocols import (
    Capabilities,
    Chunk,
    Completion,
    GenerateRequest,
    Health,
    Load,
    Message,
    ScoreRequest,
    Scores,
)
from experts.claims import refuse_unclaimed
from experts.http_reply import Patience, Reply
from experts.openai_http import Http, normal_url
from experts.openai_reply import Part, ReplyReader
from experts.openai_score import ChatTemplate, EchoScorer
from experts.openai_wire import CHAT, COMPLETIONS, MaxTokensField, generate_body, parse_object, shown
from experts.retry import Retry
from experts.slots import Slots
from experts.sse import SseParser
from experts.vllm_score import VllmScorer

__all__ = ["OPENAI", "VLLM", "OpenAIBackend"]

OPENAI: Final = Capabilities(logprobs=True, json_schema=True, seed=True)
"""What OpenAI's own chat models do."""

VLLM: Final = Capabilities(
    completion=True, score=True, logprobs=True, json_schema=True, seed=True, adapters=True, continues=True
)
"""What a vLLM server does (`adapters` if it was started with `--enable-lora`); use it with `scorer="vllm"`."""

CONNECT_TIMEOUT_S: Final = 10.0
"""A TCP and a TLS handshake over a bad mobile link take 3 s with one lost packet each; three times that."""

FIRST_TOKEN_TIMEOUT_S: Final = 120.0
"""A full batch ahead of us and a long prompt: vLLM on 2 CPU cores reads 2,000 tokens in ~40 s; three times that."""

TOTAL_TIMEOUT_S: Final = 600.0
"""The value of the OpenAI Python client."""

HEALTH_TIMEOUT_S: Final = 30.0
"""One token behind other requests; a server that needs longer is of no use to who is asking."""

MAX_REPLY_BYTES: Final = 16 * 2**20
"""Largest reply taken. 8,192 tokens, each with 20 alternatives of ~90 bytes, are 15 MB."""

RESERVED: Final = frozenset({"model", "messages", "prompt", "stream", "n", "echo"})
"""Body fields that `extra_body` must leave alone: the reply is read according to them."""

CONTEXT_FIELDS: Final = ("max_model_len", "context_length", "context_window", "max_context_length")
"""How /v1/models names the context: vLLM and SGLang, OpenRouter, Groq, Mistral."""

T = TypeVar("T")

Scoring = Literal["echo", "vllm"]

ForwardPath = Literal["chat/completions", "completions"]
"""Endpoints to which a body may be passed on."""

SCORERS: Final[Mapping[Scoring, type[EchoScorer] | type[VllmScorer]]] = {"echo": EchoScorer, "vllm": VllmScorer}
"""The ways to have a server score."""

_DONE: Final = "[DONE]"


class OpenAIBackend:
    """A `Backend` over HTTP.

    How an answer ends: `stop` and `length` (and other servers' words for them) are what they are. `content_filter` is
    `Rejected`: asking again will not help. `tool_calls` is a `BadReply`, since no tool was offered. `abort` is
    `Unavailable`. Where a server counts no tokens, `usage` is estimated from the text.

    Asked again, within the time given and never once the reply has begun: refused connections, connections that end
    before the first byte of a reply, and the statuses of `retry` (429, 503, 529), with `Retry-After` honoured.

    Args:
        url: The server, with or without `/v1`.
        model: The server's name for the model. A request's adapter is sent in its place, as vLLM serves LoRA.
        name: What to call the backend in errors and traces; the model's name by default.
        api_key: Sent as a bearer token; never shown.
        headers: Sent with every request; their values are never shown.
        capabilities: What the server can do. By default only chat, which every such server can; see `OPENAI`, `VLLM`.
        scorer: How the server tells scores: `"echo"` by echoing prompts with log-probabilities
            (`experts.openai_score`); `"vllm"` by vLLM's own means, cheaper there, and the only right way beside LoRA
            (`experts.vllm_score`).
        chat_template: Writes a chat as raw text, to score it. Without it `"echo"` scores raw prompts only; a vLLM
            server applies the model's own.
        streaming: Whether `generate` reads a stream too. Then a server that hangs is found out by
            `first_token_timeout_s`, and `first_token_s` is known. False for servers that cannot stream.
        include_usage: Whether to ask streams for the token counts. False for servers that refuse `stream_options`.
        max_tokens_field: `max_completion_tokens` for OpenAI's reasoning models, which refuse `max_tokens`.
        extra_body: Fields added to every request; None as a value removes a field.
        connect_timeout_s: Seconds to connect, name look-up and TLS included.
        first_token_timeout_s: Seconds from each try to the first token.
        total_timeout_s: Seconds for everything, where the request's `timeout_s` is not shorter.
        health_timeout_s: Seconds that `health` waits for its token.
        retry: When to ask again.
        max_running: Requests sent at once; None for any number.
        max_waiting: Requests that may wait for that; beyond it they get `Overloaded`. None for any number.
        max_reply_bytes: Largest reply taken.
        rng: Where the jitter of the retries comes from.
        local_address: IP address of this machine that connections go out from, so by which interface; None for any.
        slots: What limits the requests at once, in place of `max_running` and `max_waiting`, if it is shared with other
            backends of the same server.

    Raises:
        InvalidRequest: If an argument is out of range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        name: str = "",
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        capabilities: Capabilities | None = None,
        scorer: Scoring = "echo",
        chat_template: ChatTemplate | None = None,
        streaming: bool = True,
        include_usage: bool = True,
        max_tokens_field: MaxTokensField = "max_tokens",
        extra_body: Mapping[str, Any] | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        first_token_timeout_s: float = FIRST_TOKEN_TIMEOUT_S,
        total_timeout_s: float = TOTAL_TIMEOUT_S,
        health_timeout_s: float = HEALTH_TIMEOUT_S,
        retry: Retry | None = None,
        max_running: int | None = None,
        max_waiting: int | None = None,
        max_reply_bytes: int = MAX_REPLY_BYTES,
        rng: random.Random | None = None,
        local_address: str | None = None,
        slots: Slots | None = None,
    ) -> None:
        self._url = normal_url(url)
        if not model.strip():
            raise InvalidRequest("the model's name is empty", hint="give the name under which the server serves it")
        if max_tokens_field not in get_args(MaxTokensField):
            raise InvalidRequest(
                f"max_tokens_field is {max_tokens_field!r}; allowed: {', '.join(get_args(MaxTokensField))}"
            )
        if scorer not in SCORERS:
            raise InvalidRequest(f"scorer is {scorer!r}; allowed: {', '.join(SCORERS)}")
        if reserved := RESERVED & set(extra_body or ()):
            raise InvalidRequest(f"extra_body may not set {sorted(reserved)}")
        for what, value in {
            "connect_timeout_s": connect_timeout_s,
            "first_token_timeout_s": first_token_timeout_s,
            "total_timeout_s": total_timeout_s,
            "health_timeout_s": health_timeout_s,
            "max_reply_bytes": max_reply_bytes,
        }.items():
            if not value > 0:
                raise InvalidRequest(f"{what} is {value}; it must be above 0")
        self._model = model
        self._name = name or model
        self._capabilities = capabilities or Capabilities()
        self._streaming = streaming
        self._include_usage = include_usage
        self._max_tokens_field = max_tokens_field
        self._extra = dict(extra_body or {})
        self._first_token_s = first_token_timeout_s
        self._total_s = total_timeout_s
        self._health_s = health_timeout_s
        self._slots = slots or Slots(max_running, max_waiting, owner=self._name)
        self._http = Http(
            self._url,
            backend=self._name,
            headers=_headers(api_key, headers or {}),
            connect_timeout_s=connect_timeout_s,
            retry=retry or Retry(),
            max_reply_bytes=max_reply_bytes,
            rng=rng or random.Random(),
            local_address=local_address,
        )
        self._scorer = SCORERS[scorer](
            self._http, backend=self._name, model=model, chat_template=chat_template, extra=self._extra
        )

    relays: ClassVar[bool] = False
    """Whether the server knows the expert itself, and adds what belongs to it: prompt, temperature, limits."""

    def __repr__(self) -> str:
        return f"OpenAIBackend({self._url!r}, {self._model!r}, name={self._name!r})"

    @property
    def name(self) -> str:
        """What to call it in errors and traces."""
        return self._name

    @property
    def model(self) -> str:
        """The server's name for the model."""
        return self._model

    @property
    def max_tokens_field(self) -> MaxTokensField:
        """What the server calls the most tokens to generate in a chat."""
        return self._max_tokens_field

    @property
    def capabilities(self) -> Capabilities:
        """What it claims; `probe` fills in `max_context`."""
        return self._capabilities

    @property
    def load(self) -> Load:
        """Requests sent and waiting to be sent, by this process."""
        return self._slots.load

    async def generate(self, request: GenerateRequest) -> Completion:
        """Generates the whole answer."""
        refuse_unclaimed(request, self._capabilities, backend=self._name)
        patience = self._patience(request.timeout_s)
        with self._http.redacting():
            async with self._slots.hold(patience.until):
                return await self._complete(request, patience, retry=True)

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Generates piece by piece; closing it closes the connection, so that the server stops."""
        refuse_unclaimed(request, self._capabilities, backend=self._name)
        patience = self._patience(request.timeout_s)
        reader = ReplyReader(backend=self._name, logprobs=request.logprobs)
        with self._http.redacting():
            async with (
                self._slots.hold(patience.until),
                aclosing(self._answer(request, reader, patience, streamed=True, retry=True)) as chunks,
            ):
                async for chunk in chunks:
                    yield chunk

    async def forward(
        self,
        path: ForwardPath,
        payload: bytes,
        read: Callable[[Reply], Awaitable[T]],
        *,
        streamed: bool = False,
        timeout_s: float | None = None,
    ) -> T:
        """Passes a body on that is written for such a server already, and gives the reply as it is.

        What it asks for is not checked against the capabilities: the server itself refuses what it cannot do.

        Args:
            path: Which of the API's endpoints.
            payload: JSON with the server's own name for the model.
            read: Called with the reply once it has a good status; if it leaves before the reply's end, the server is
                made to stop.
            streamed: Whether the reply is a stream, so that the time for the first token counts.
            timeout_s: Seconds for everything, the reading of the reply included.

        Returns:
            What `read` returns.

        Raises:
            Rejected: If the server refuses it; `body` has its own words.
            BackendError: If no reply comes.
        """
        patience = self._patience(timeout_s)
        try:
            await self._slots.take(patience.until)
            try:
                async with patience.bound():
                    headers = self.headers_for(timeout_s)
                    reply = await self._http.send(path, payload, patience, streamed=streamed, headers=headers)
                    async with reply:
                        return await read(reply)
            except TimeoutError:
                raise patience.late() from None
            finally:
                self._slots.release()
        except BackendError as e:
            self._http.redact(e)
            raise

    def headers_for(self, timeout_s: float | None) -> Mapping[str, str]:
        """Headers of one request besides those given at the start; none, but for kinds of servers that want some.

        Args:
            timeout_s: Seconds that this request may take, if that is limited.
        """
        return {}

    async def score(self, request: ScoreRequest) -> Scores:
        """Tells how likely each continuation is, the way that `scorer` names."""
        refuse_unclaimed(request, self._capabilities, backend=self._name)
        patience = self._patience(request.timeout_s)
        with self._http.redacting():
            async with self._slots.hold(patience.until):
                try:
                    return await self._scorer.score(request, patience)
                except Rejected as e:
                    raise self._about_adapter(e, request) from None

    async def health(self) -> Health:
        """Has one token generated, past the queue of this process and without a second try."""
        clock = asyncio.get_running_loop().time
        began = clock()
        if self._capabilities.chat:
            request = GenerateRequest(messages=(Message(role="user", content="ping"),), max_tokens=1)
        else:
            request = GenerateRequest(prompt="ping", max_tokens=1)
        patience = Patience(self._name, total_s=self._health_s, first_token_s=self._health_s)
        try:
            with self._http.redacting():
                answer = await self._complete(request, patience, retry=False)
        except BackendError as e:
            return Health(ok=False, detail=str(e), seconds=clock() - began)
        detail = f"{answer.model or self._model} generated {answer.usage.completion_tokens} token"
        return Health(ok=True, detail=detail, seconds=clock() - began)

    async def probe(self) -> Capabilities:
        """Asks the server which models it serves, and for the context length of this one.

        Returns:
            The capabilities, with `max_context` filled in if the server tells it.

        Raises:
            Rejected: If the model is not among them.
            BackendError: If the server cannot be asked.
        """
        with self._http.redacting():
            async with await self._http.get("models", self._patience(None)) as reply:
                data = await reply.whole()
            models = parse_object(data, backend=self._name).get("data")
        if not isinstance(models, list):
            raise BadReply(f"/models gave no list of models: {shown(data)}", backend=self._name)
        served = {m["id"]: m for m in models if isinstance(m, dict) and isinstance(m.get("id"), str)}
        if self._model not in served:
            some = ", ".join(sorted(served)[:20]) or "none"
            raise Rejected(f"the server does not serve {self._model!r}; it serves: {some}", backend=self._name)
        context = next((c for f in CONTEXT_FIELDS if isinstance(c := served[self._model].get(f), int) and c > 0), None)
        if context is not None:
            self._capabilities = replace(self._capabilities, max_context=context)
        return self._capabilities

    async def aclose(self) -> None:
        """Closes the connections; what runs or waits fails with `Unavailable`."""
        self._slots.abort(Unavailable("the backend was closed", backend=self._name))
        await self._http.aclose()

    def _patience(self, timeout_s: float | None) -> Patience:
        total = self._total_s if timeout_s is None else min(timeout_s, self._total_s)
        return Patience(self._name, total_s=total, first_token_s=self._first_token_s)

    async def _complete(self, request: GenerateRequest, patience: Patience, *, retry: bool) -> Completion:
        clock = asyncio.get_running_loop().time
        reader = ReplyReader(backend=self._name, logprobs=request.logprobs)
        chunks: list[Chunk] = []
        first: float | None = None
        async with aclosing(self._answer(request, reader, patience, streamed=self._streaming, retry=retry)) as answer:
            async for chunk in answer:
                first = first if first is not None else clock() - patience.began
                chunks.append(chunk)
        last = chunks[-1]
        assert last.finish_reason is not None
        assert last.usage is not None
        return Completion(
            text="".join(c.text for c in chunks),
            finish_reason=last.finish_reason,
            usage=last.usage,
            model=reader.model,
            logprobs=tuple(t for c in chunks for t in c.logprobs),
            first_token_s=first if self._streaming else None,
            seconds=clock() - patience.began,
        )

    async def _answer(
        self, request: GenerateRequest, reader: ReplyReader, patience: Patience, *, streamed: bool, retry: bool
    ) -> AsyncGenerator[Chunk, None]:
        """One request and its reply, in chunks."""
        body = generate_body(
            request,
            model=self._model,
            streamed=streamed,
            seed=self._capabilities.seed,
            include_usage=self._include_usage,
            max_tokens_field=self._max_tokens_field,
            extra=self._extra,
        )
        path = CHAT if request.prompt is None else COMPLETIONS
        try:
            headers = self.headers_for(request.timeout_s)
            reply = await self._http.post(path, body, patience, streamed=streamed, retry=retry, headers=headers)
        except Rejected as e:
            raise self._about_adapter(e, request) from None
        async with reply:
            if reply.content_type == "text/event-stream":
                async with aclosing(self._events(reply, reader)) as parts:
                    async for part in parts:
                        yield Chunk(text=part.text, logprobs=part.logprobs)
            elif reply.content_type == "application/json" or reply.content_type.endswith("+json"):
                # Also what a server sends that does not know how to stream.
                part = reader.read(await reply.whole(), whole=True)
                if part.text or part.logprobs:
                    yield Chunk(text=part.text, logprobs=part.logprobs)
            else:
                start = await reply.read(first=True)
                raise BadReply(
                    f"the reply is {reply.content_type or 'of no type'}, not JSON or a stream: {shown(start)}",
                    backend=self._name,
                    hint="check that the url is that of the API",
                )
        prompt = request.prompt if request.prompt is not None else "".join(m.content for m in request.messages)
        yield Chunk(text=reader.end(), finish_reason=reader.finish_reason, usage=reader.used(len(prompt)))

    async def _events(self, reply: Reply, reader: ReplyReader) -> AsyncGenerator[Part, None]:
        parser = SseParser()
        while data := await reply.read(first=not reader.begun):
            try:
                events = parser.feed(data)
            except ValueError as e:
                raise BadReply(str(e), backend=self._name) from None
            for event in events:
                if event.strip() == _DONE:
                    await reply.drain()
                    return
                part = reader.read(event)
                if part.text or part.logprobs:
                    yield part

    def _about_adapter(self, error: Rejected, request: GenerateRequest | ScoreRequest) -> BackendError:
        """A refusal that is about the request's adapter, said so."""
        adapter = str(request.adapter)
        if request.adapter is None or not (error.status == 404 or (error.status == 400 and adapter in error.message)):
            return error
        why = error.message.removeprefix(f"{self._name}: ")
        return AdapterError(
            f"the server does not serve adapter {adapter!r}: {why}",
            backend=self._name,
            hint="load it on the server, or check its name",
        )


def _headers(api_key: str | None, headers: Mapping[str, str]) -> dict[str, str]:
    found = dict(headers)
    if api_key is not None:
        # A key read from a file often ends in a newline.
        found["Authorization"] = f"Bearer {api_key.strip()}"
        if not api_key.strip():
            raise InvalidRequest("the API key is empty", hint="leave it out if the server needs none")
    for name, value in found.items():
        if not value.isascii() or not value.isprintable():
            raise InvalidRequest(f"the value of header {name} holds characters that a header cannot")
    return found
