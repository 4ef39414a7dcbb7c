"""`OpenAIBackend` against a real server in this process: OpenAI's API, answered by a `FakeBackend`."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from aiohttp import web

from agora.errors import (
    AdapterError,
    AgoraError,
    BackendError,
    BackendTimeout,
    BadReply,
    InvalidRequest,
    Overloaded,
    Rejected,
    Unavailable,
    Unsupported,
)
from agora.protocols import Backend, Capabilities, GenerateRequest, Load, Message, ScoreRequest, TokenLogprob
from agora.types import AdapterRef, Usage
from experts.conformance import BackendConformance
from experts.fake import TOKEN_LOGPROB, FakeBackend, Hang, Reply, question_of, tokens_of
from experts.openai import OPENAI, VLLM, OpenAIBackend
from experts.openai_http import normal_url
from experts.openai_wire import SHOWN_CHARS
from experts.retry import Retry

FAST = Retry(base_s=0.001, cap_s=0.002)

Hook = Callable[[web.Request], "web.StreamResponse | None"]


@dataclass
class Server:
    """OpenAI's API in front of a `FakeBackend`, as vLLM serves it.

    Attributes:
        backend: What answers.
        hooks: For the next requests, one each: a function that may answer in the backend's place.
        bodies: What was asked, per request to an endpoint that generates.
        seen: Every request: its path and headers.
        tells_usage: Whether usage is reported.
        token_logprob: The log-probability of a token that is scored.
        vocabulary: The tokens it has met; a token's id is its place.
        specials: For every text tokenized: whether special tokens were asked for.
    """

    backend: FakeBackend
    hooks: list[Hook] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    tells_usage: bool = True
    token_logprob: Callable[[str], float] = lambda token: TOKEN_LOGPROB
    extra_echo_token: bool = True
    vocabulary: list[str] = field(default_factory=list)
    specials: list[bool] = field(default_factory=list)
    url: str = ""

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Server]:
        app = web.Application(middlewares=[self._first])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        # A client that hangs up cancels the handler, as vLLM does.
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        try:
            yield self
        finally:
            await self.backend.aclose()
            await runner.cleanup()

    @web.middleware
    async def _first(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.seen.append((request.path, dict(request.headers)))
        if self.hooks and (response := self.hooks.pop(0)(request)) is not None:
            return response
        try:
            return await handler(request)
        except AgoraError as e:
            status = 400 if isinstance(e, Rejected) else 404 if isinstance(e, AdapterError) else 500
            body = {"error": {"message": e.message, "type": type(e).__name__, "code": status}}
            return web.json_response(body, status=status)

    def _request(self, body: dict[str, Any]) -> GenerateRequest:
        adapter = None if body["model"] == "base" else AdapterRef.parse(body["model"])
        chat = "messages" in body
        schema = body.get("response_format")
        return GenerateRequest(
            messages=tuple(Message(**m) for m in body.get("messages", ())),
            prompt=body.get("prompt"),
            max_tokens=body.get("max_tokens") or body.get("max_completion_tokens", 16),
            stop=tuple(body.get("stop", ())),
            seed=body.get("seed"),
            logprobs=body.get("top_logprobs") if chat else body.get("logprobs"),
            json_schema=schema and schema["json_schema"]["schema"],
            adapter=adapter,
        )

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        return await self._generate(request, body)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if "logprob_token_ids" in body:
            return self._tell(body)
        return self._echo(body) if body.get("echo") else await self._generate(request, body)

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        asked = self._request(body)
        chat = "messages" in body
        head = {"id": f"cmpl-{len(self.bodies)}", "object": "chat.completion", "created": 0, "model": body["model"]}

        def choice(text: str, logprobs: tuple[TokenLogprob, ...], reason: str | None, key: str) -> dict[str, Any]:
            said = {key: {"role": "assistant", "content": text}} if chat else {"text": text}
            return {
                "index": 0,
                **said,
                "logprobs": _logprobs(logprobs, chat=chat) if asked.logprobs is not None else None,
                "finish_reason": reason,
            }

        if not body.get("stream"):
            done = await self.backend.generate(asked)
            reply = {**head, "choices": [choice(done.text, done.logprobs, done.finish_reason, "message")]}
            if self.tells_usage:
                reply["usage"] = _usage(done.usage)
            return web.json_response(reply)
        async with aclosing(self.backend.stream(asked)) as chunks:
            ahead = [await anext(chunks)]  # An error before the first chunk is still a status.
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
            await response.prepare(request)

            async def send(event: dict[str, Any] | str) -> None:
                text = event if isinstance(event, str) else json.dumps(event)
                await response.write(f"data: {text}\n\n".encode())

            if chat:
                await send({**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            while ahead:
                chunk = ahead.pop()
                await send({**head, "choices": [choice(chunk.text, chunk.logprobs, chunk.finish_reason, "delta")]})
                if chunk.usage is not None and self.tells_usage and body.get("stream_options"):
                    await send({**head, "choices": [], "usage": _usage(chunk.usage)})
                ahead += [c async for c in _next(chunks)]
            await send("[DONE]")
            await response.write_eof()
            return response

    def _echo(self, body: dict[str, Any]) -> web.Response:
        choices, prompt_tokens = [], 0
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        for n, prompt in enumerate(prompts):
            tokens = tokens_of(prompt)
            prompt_tokens += len(tokens)
            tokens += [" next"] * self.extra_echo_token
            values = [None, *(self.token_logprob(t) for t in tokens[1:])]
            logprobs = {
                "tokens": tokens,
                "token_logprobs": values,
                "top_logprobs": [v if v is None else {t: v} for t, v in zip(tokens, values, strict=True)],
                "text_offset": [0] * len(tokens),
            }
            choices.append({"index": n, "text": "".join(tokens), "logprobs": logprobs, "finish_reason": "length"})
        used = Usage(prompt_tokens=prompt_tokens, completion_tokens=len(prompts) * self.extra_echo_token)
        # Choices in another order than asked, as servers that answer prompts side by side may have them.
        return web.json_response({"id": "e", "choices": choices[::-1], "usage": _usage(used)})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "base", "max_model_len": 2048}, {"id": "med@v1"}]})

    def _ids(self, text: str) -> list[int]:
        tokens = tokens_of(text)
        self.vocabulary += [t for t in dict.fromkeys(tokens) if t not in self.vocabulary]
        return [self.vocabulary.index(t) for t in tokens]

    def _tell(self, body: dict[str, Any]) -> web.Response:
        """One token after each beginning, and the log-probabilities of those that were asked for, as vLLM."""
        top = {f"token_id:{i}": self.token_logprob(self.vocabulary[i]) for i in body["logprob_token_ids"]}
        logprobs = {"tokens": ["token_id:0"], "token_logprobs": [-9.0], "top_logprobs": [top], "text_offset": [0]}
        choices = [{"index": n, "text": "", "logprobs": logprobs} for n, _ in enumerate(body["prompt"])]
        used = Usage(prompt_tokens=sum(map(len, body["prompt"])), completion_tokens=len(choices))
        return web.json_response({"id": "t", "choices": choices[::-1], "usage": _usage(used)})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if (text := body.get("prompt")) is None:
            assert body["add_generation_prompt"] is True
            text = "".join(f"<|{m['role']}|> {m['content']}<|end|>" for m in body["messages"]) + "<|assistant|>"
        else:
            self.specials.append(body["add_special_tokens"])
        return web.json_response({"tokens": self._ids(text), "max_model_len": 2048})

    async def _detokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"prompt": "".join(self.vocabulary[i] for i in (await request.json())["tokens"])})


async def _next(chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for chunk in chunks:
        yield chunk
        return


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.tokens,
    }


def _logprobs(tokens: tuple[TokenLogprob, ...], *, chat: bool) -> dict[str, Any]:
    if chat:
        return {
            "content": [
                {
                    "token": t.token,
                    "logprob": t.logprob,
                    "bytes": list(t.token.encode()),
                    # Worst first: the order is not promised, so the reader sorts.
                    "top_logprobs": [{"token": o, "logprob": p} for o, p in t.top[::-1]],
                }
                for t in tokens
            ]
        }
    return {
        "tokens": [t.token for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        # One more than asked for, as vLLM does.
        "top_logprobs": [{**dict(t.top), t.token: t.logprob, f"{t.token}~more": -9999.0} for t in tokens],
        "text_offset": [0 for _ in tokens],
    }


def json_reply(request: GenerateRequest) -> str:
    return f" {question_of(request)}" if request.json_schema is None else json.dumps({"ok": True})


def served(**options: Any) -> Server:
    claimed = replace(VLLM, max_context=512)
    options = {"latency": 0.003, "seconds_per_token": 0.0005, "adapters": ["med@v1"], **options}
    return Server(FakeBackend(options.pop("replies", json_reply), capabilities=claimed, **options))


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with served().serve() as server:
        yield server


@pytest.fixture
async def connect(server: Server) -> AsyncIterator[Callable[..., OpenAIBackend]]:
    """Makes backends on the server that are closed at the end."""
    async with AsyncExitStack() as stack:

        def make(**options: Any) -> OpenAIBackend:
            options = {"capabilities": VLLM, "retry": FAST, **options}
            backend = OpenAIBackend(options.pop("url", server.url), options.pop("model", "base"), **options)
            stack.push_async_callback(backend.aclose)
            return backend

        yield make


Connect = Callable[..., OpenAIBackend]


def ask(text: str = "hello there", **options: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message(role="user", content=text),), **options)


class TestConformance(BackendConformance):
    """`generate` reads a stream."""

    @pytest.fixture
    async def backend(self, server: Server) -> AsyncIterator[Backend]:
        backend = OpenAIBackend(server.url, "base", capabilities=replace(VLLM, max_context=512))
        yield backend
        await backend.aclose()

    @pytest.fixture
    def adapter(self) -> AdapterRef:
        return AdapterRef.parse("med@v1")


class TestConformanceUnstreamed(TestConformance):
    """`generate` asks for one JSON object; scores come vLLM's way."""

    @pytest.fixture
    async def backend(self, server: Server) -> AsyncIterator[Backend]:
        backend = OpenAIBackend(
            server.url,
            "base",
            streaming=False,
            scorer="vllm",
            max_running=3,
            capabilities=replace(VLLM, max_context=512),
        )
        yield backend
        await backend.aclose()


class TestConformanceOfAPlainChat(TestConformance):
    """A server of which only chat is known."""

    @pytest.fixture
    async def backend(self, server: Server) -> AsyncIterator[Backend]:
        backend = OpenAIBackend(server.url, "base")
        yield backend
        await backend.aclose()


# -- What goes over the wire


async def test_chat_request_on_the_wire(server: Server, connect: Connect) -> None:
    request = GenerateRequest(
        messages=(Message(role="system", content="be brief"), Message(role="user", content="hi 🦜")),
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        stop=("\n", "END"),
        seed=7,
        logprobs=3,
        json_schema={"type": "object"},
        adapter=AdapterRef.parse("med@v1"),
    )
    await connect(extra_body={"top_k": 5, "temperature": None}).generate(request)
    assert server.bodies == [
        {
            "model": "med@v1",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi 🦜"}],
            "max_tokens": 9,
            "top_p": 0.9,
            "stop": ["\n", "END"],
            "seed": 7,
            "logprobs": True,
            "top_logprobs": 3,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
            },
            "stream": True,
            "stream_options": {"include_usage": True},
            "top_k": 5,
        }
    ]


async def test_completion_request_on_the_wire(server: Server, connect: Connect) -> None:
    backend = connect(streaming=False, capabilities=replace(VLLM, seed=False))
    await backend.generate(GenerateRequest(prompt="hi", seed=7, logprobs=0, max_tokens=3))
    assert server.bodies == [
        {"model": "base", "prompt": "hi", "max_tokens": 3, "temperature": 0.0, "logprobs": 0, "stream": False}
    ]


async def test_reasoning_models_get_their_own_name_for_the_limit(server: Server, connect: Connect) -> None:
    answer = await connect(max_tokens_field="max_completion_tokens").generate(ask("one two three", max_tokens=2))
    assert answer.text == " one two"
    assert "max_tokens" not in server.bodies[0]
    assert server.bodies[0]["max_completion_tokens"] == 2


async def test_answer_carries_everything(server: Server, connect: Connect) -> None:
    server.backend = FakeBackend(Reply("a b c", logprobs=(-0.1, -0.2, -0.3)), latency=0.02)
    for prompt, options in ((ask(), {}), (GenerateRequest(prompt="hello there"), {})):
        for streaming in (True, False):
            answer = await connect(streaming=streaming, **options).generate(replace(prompt, logprobs=2))
            assert answer.text == "a b c"
            assert answer.finish_reason == "stop"
            assert answer.usage == Usage(prompt_tokens=2, completion_tokens=3, calls=1)
            assert answer.model == "base"
            assert [t.logprob for t in answer.logprobs] == [-0.1, -0.2, -0.3]
            assert answer.logprobs[1].top == ((" b", -0.2), (" b~1", -1.2))
            assert answer.seconds >= 0.02
            assert (answer.first_token_s is not None) == streaming


async def test_tokens_are_estimated_where_the_server_counts_none(server: Server, connect: Connect) -> None:
    server.tells_usage = False
    request = ask("x" * 41)
    answer = await connect(streaming=False).generate(request)
    assert answer.usage == Usage(prompt_tokens=11, completion_tokens=11, calls=1)
    by_chunks = await connect(include_usage=False).generate(ask("a b c d"))
    assert by_chunks.usage.completion_tokens == 4
    assert "stream_options" not in server.bodies[-1]
    by_logprobs = await connect(streaming=False).generate(ask("a b c d", logprobs=0))
    assert by_logprobs.usage.completion_tokens == 4


# -- Scores


async def test_scores_come_from_one_request(server: Server, connect: Connect) -> None:
    request = ScoreRequest(prompt="Review: fine", continuations=(" good", " quite bad"))
    server.token_logprob = lambda token: {" good": -0.25, " bad": -2.0, " quite": -1.0}.get(token, -9.0)
    scores = await connect().score(request)
    assert [(s.text, s.logprob, s.tokens) for s in scores.scores] == [(" good", -0.25, 1), (" quite bad", -3.0, 2)]
    assert scores.usage == Usage(prompt_tokens=7, completion_tokens=2, calls=1)
    assert [b["prompt"] for b in server.bodies] == [["Review: fine good", "Review: fine quite bad"]]


async def test_score_of_a_token_across_the_border_compares_with_the_prompt_alone(
    server: Server, connect: Connect
) -> None:
    # "fine" and "finely" are other tokens: log P = P(Review: finely) − P(Review: fine), from the border on.
    server.token_logprob = lambda token: {" finely": -3.0, " fine": -1.0, " so": -0.5}.get(token, -9.0)
    request = ScoreRequest(prompt="Review: fine", continuations=("ly so", " so"))
    scores = await connect().score(request)
    assert [(s.logprob, s.tokens) for s in scores.scores] == [(-3.0 - 0.5 + 1.0, 2), (-0.5, 1)]
    assert [b["prompt"] for b in server.bodies][1] == ["Review: fine"]


async def test_score_reads_servers_that_generate_nothing(server: Server, connect: Connect) -> None:
    server.extra_echo_token = False
    scores = await connect().score(ScoreRequest(prompt="a b", continuations=(" c d",)))
    assert scores.scores[0].tokens == 2


async def test_score_with_an_adapter(server: Server, connect: Connect) -> None:
    await connect().score(ScoreRequest(prompt="a", continuations=(" b",), adapter=AdapterRef.parse("med@v1")))
    assert server.bodies[0]["model"] == "med@v1"


async def test_chats_are_echoed_where_there_is_a_template(server: Server, connect: Connect) -> None:
    request = ScoreRequest(messages=ask("sky?").messages, continuations=(" blue", " green"))
    with pytest.raises(Unsupported, match="chat template"):
        await connect().score(request)
    backend = connect(chat_template=lambda messages: f"Q: {messages[-1].content} A:")
    await backend.score(request)
    assert server.bodies[-1]["prompt"] == ["Q: sky? A: blue", "Q: sky? A: green"]
    assert server.bodies[-1]["add_special_tokens"] is False


async def test_vllm_reads_the_prompt_once_for_labels_of_one_token(server: Server, connect: Connect) -> None:
    server.token_logprob = lambda token: {" good": -0.25, " bad": -2.0}.get(token, -9.0)
    labels = (" good", " bad", " good")
    scores = await connect(scorer="vllm").score(ScoreRequest(prompt="Review: fine", continuations=labels))
    assert [(s.text, s.logprob, s.tokens) for s in scores.scores] == [
        (w, {" good": -0.25, " bad": -2.0}[w], 1) for w in labels
    ]
    assert scores.usage == Usage(prompt_tokens=2, completion_tokens=1, calls=1)
    (body,) = server.bodies
    assert [server.vocabulary[i] for i in body["prompt"][0]] == ["Review:", " fine"]
    assert len(body["prompt"]) == 1
    assert body["max_tokens"] == 1
    assert server.specials == [True] * 3


async def test_vllm_scores_longer_continuations_token_by_token(server: Server, connect: Connect) -> None:
    server.token_logprob = lambda token: {" a": -1.0, " b": -2.0, " c": -4.0, "x": -9.0, " p": -9.0}[token]
    request = ScoreRequest(prompt="x p", continuations=(" a b c", " a c"), adapter=AdapterRef.parse("med@v1"))
    scores = await connect(scorer="vllm").score(request)
    assert [(s.logprob, s.tokens) for s in scores.scores] == [(-7.0, 3), (-5.0, 2)]
    words = [[server.vocabulary[i] for i in p] for p in server.bodies[0]["prompt"]]
    assert words == [["x", " p"], ["x", " p", " a"], ["x", " p", " a", " b"]]
    assert server.bodies[0]["model"] == "med@v1"


async def test_vllm_scores_a_token_across_the_border(server: Server, connect: Connect) -> None:
    server.token_logprob = lambda token: {" finely": -3.0, " fine": -1.0, " so": -0.5}.get(token, -9.0)
    backend = connect(scorer="vllm")
    scores = await backend.score(ScoreRequest(prompt="Review: fine", continuations=("ly so", " so")))
    assert [(s.logprob, s.tokens) for s in scores.scores] == [(-3.0 - 0.5 + 1.0, 2), (-0.5, 1)]
    with pytest.raises(Rejected, match="'ly' changes the first token"):
        await backend.score(ScoreRequest(prompt="fine", continuations=("ly",)))


async def test_vllm_scores_chats_with_the_servers_template(server: Server, connect: Connect) -> None:
    request = ScoreRequest(messages=ask("sky?").messages, continuations=(" blue", " green"))
    scores = await connect(scorer="vllm").score(request)
    assert [s.tokens for s in scores.scores] == [1, 1]
    assert "".join(server.vocabulary[i] for i in server.bodies[-1]["prompt"][0]) == "<|user|> sky?<|end|><|assistant|>"
    assert set(server.specials) == {False}, "the template has written the special tokens already"
    own = connect(scorer="vllm", chat_template=lambda messages: f"Q: {messages[-1].content} A:")
    await own.score(request)
    assert [server.vocabulary[i] for i in server.bodies[-1]["prompt"][0]] == ["Q:", " sky?", " A:"]


async def test_vllm_parts_what_is_too_much_for_one_request(server: Server, connect: Connect) -> None:
    server.token_logprob = lambda token: -1.0
    many = tuple(f" word{n}" for n in range(300))
    long = "".join(f" step{n}" for n in range(150))
    scores = await connect(scorer="vllm").score(ScoreRequest(prompt="x p", continuations=(*many, long)))
    assert [(s.logprob, s.tokens) for s in scores.scores] == [(-1.0, 1)] * 300 + [(-150.0, 150)]
    assert len(server.bodies) > 4
    assert all(len(b["prompt"]) <= 64 and len(b["logprob_token_ids"]) <= 128 for b in server.bodies)
    assert scores.usage.calls == 1


async def test_vllm_too_old_for_this_is_said_so(server: Server, connect: Connect) -> None:
    server.hooks = [lambda request: None] * 2  # Two texts are tokenized first.
    reply = {"choices": [{"index": 0, "logprobs": {"top_logprobs": [{" a": -1.0}]}}]}
    server.hooks.append(lambda request: web.json_response(reply))
    with pytest.raises(BadReply, match=r"did not tell.*use a vLLM that knows logprob_token_ids"):
        await connect(scorer="vllm").score(ScoreRequest(prompt="x", continuations=(" a",)))


async def test_vllm_that_fails_to_tokenize(server: Server, connect: Connect) -> None:
    request = ScoreRequest(prompt="x", continuations=(" a", " b"))
    server.hooks = [lambda request: web.json_response({"tokens": "abc"})] * 3
    with pytest.raises(BadReply, match="no list of token ids"):
        await connect(scorer="vllm").score(request)
    server.hooks = [refuse(404, {"detail": "Not Found"})] * 3
    with pytest.raises(Rejected, match="HTTP 404"):
        await connect(scorer="vllm").score(request)


# -- Probing


async def test_probe_learns_the_context_and_checks_the_model(connect: Connect) -> None:
    backend = connect()
    assert (await backend.probe()).max_context == 2048
    assert backend.capabilities == replace(VLLM, max_context=2048)
    unknown = connect(model="other")
    with pytest.raises(Rejected, match=r"does not serve 'other'; it serves: base, med@v1"):
        await unknown.probe()


async def test_health_says_why_not(server: Server, connect: Connect) -> None:
    backend = connect(max_running=1)
    assert (await backend.health()).ok
    server.backend.down = Unavailable("engine died")
    health = await backend.health()
    assert not health.ok
    assert "engine died" in health.detail
    server.backend.down = Hang()
    slow = await connect(health_timeout_s=0.05).health()
    assert not slow.ok
    assert "0.05 s" in slow.detail


# -- The server's own errors


def refuse(status: int, body: Any = None, **headers: str) -> Hook:
    content = body if isinstance(body, str) else json.dumps(body)
    kind = "text/html" if content.startswith("<") else "application/json"
    return lambda request: web.Response(
        status=status, text=content, content_type=kind, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


OPENAI_ERROR = {"error": {"message": "max_tokens is too large", "type": "invalid_request_error", "code": None}}


@pytest.mark.parametrize(
    ("status", "body", "expected", "text"),
    [
        (400, OPENAI_ERROR, Rejected, "m: HTTP 400: max_tokens is too large"),
        (400, {"object": "error", "message": "vllm says no"}, Rejected, "vllm says no"),
        (422, {"detail": [{"loc": ["body"], "msg": "field required"}]}, Rejected, "field required"),
        (400, {"error": "plain text"}, Rejected, "plain text"),
        (404, "<html><body>nginx</body></html>", Rejected, "HTTP 404: Not Found"),
        (400, "not json at all", Rejected, "not json at all"),
        (400, {"error": {"message": "two\n  lines"}}, Rejected, "m: HTTP 400: two lines"),
        (401, {"error": {"message": "no"}}, Rejected, "check the API key"),
        (403, {"error": {"message": "no"}}, Rejected, "check its rights"),
        (500, {"error": {"message": "CUDA error"}}, Unavailable, "HTTP 500: CUDA error"),
        (502, "<html>bad gateway</html>", Unavailable, "HTTP 502: Bad Gateway"),
        (504, "", Unavailable, "HTTP 504"),
        (408, "", Unavailable, "HTTP 408"),
        (429, {"error": {"message": "slow down"}}, Overloaded, "slow down"),
        (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, Rejected, "HTTP 429: pay"),
        (503, "", Unavailable, "HTTP 503"),
        (307, "", Rejected, "redirects"),
    ],
)
async def test_statuses(
    server: Server, connect: Connect, status: int, body: Any, expected: type[BackendError], text: str
) -> None:
    backend = connect(name="m", retry=Retry(tries=1))
    server.hooks = [refuse(status, body)]
    with pytest.raises(BackendError) as error:
        await backend.generate(ask())
    assert type(error.value) is expected
    assert text in str(error.value)
    if isinstance(error.value, Rejected):
        assert error.value.status == status
        assert error.value.body == (body if isinstance(body, str) else json.dumps(body))
    assert len(server.seen) == 1
    assert (await backend.generate(ask())).text == " hello there"


async def test_long_error_bodies_are_cut(server: Server, connect: Connect) -> None:
    server.hooks = [refuse(400, {"error": {"message": "x" * 5_000_000}})]
    with pytest.raises(Rejected) as error:
        await connect().generate(ask())
    assert len(error.value.body) == 2_000
    assert len(str(error.value)) < 2_500


async def test_unknown_adapter_is_said_so(connect: Connect) -> None:
    with pytest.raises(AdapterError, match="does not serve adapter 'law@v9'"):
        await connect().generate(ask(adapter=AdapterRef.parse("law@v9")))


async def test_redirects_are_not_followed(server: Server, connect: Connect) -> None:
    server.hooks = [refuse(302, "", Location="http://127.0.0.1:1/v1?token=abc")]
    with pytest.raises(Rejected, match=r"redirects to 'http://127\.0\.0\.1:1/v1' \(set the url") as error:
        await connect().generate(ask())
    assert "abc" not in str(error.value)
    assert len(server.seen) == 1


async def test_the_key_is_sent_and_never_shown(
    server: Server, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = "sk-very-secret"
    backend = connect(api_key=f"{key}\n", headers={"X-Team": "team-secret"})
    await backend.generate(ask())
    headers = server.seen[0][1]
    assert headers["Authorization"] == f"Bearer {key}"
    assert headers["X-Team"] == "team-secret"
    told = []
    for hook in (
        refuse(401, {"error": {"message": f"Incorrect API key: {key} of team-secret"}}),
        refuse(429, {"error": {"message": key}}),
        lambda request: web.Response(text=f"{key}", content_type="text/html"),
        lambda request: web.json_response({"choices": key}),
        lambda request: web.json_response({"error": key}),
        lambda request: web.Response(text="x" * (SHOWN_CHARS - 9) + key, content_type="text/html"),
    ):
        server.hooks = [hook] * 3
        with pytest.raises(BackendError) as error:
            await backend.generate(ask())
        told += [str(error.value), repr(error.value), getattr(error.value, "body", "")]
    told += [repr(backend), str(backend), caplog.text]
    assert "Incorrect API key: *** of ***" in told[0]
    assert not [t for t in told if key[:8] in t or "team-s" in t]
    server.hooks.clear()
    await connect().generate(ask())
    assert "Authorization" not in server.seen[-1][1]


# -- Retries


async def test_refusals_before_work_are_asked_again(server: Server, connect: Connect) -> None:
    for status in (429, 503, 529):
        server.seen.clear()
        server.hooks = [refuse(status), refuse(status)]
        assert (await connect().generate(ask())).text == " hello there"
        assert len(server.seen) == 3


async def test_tries_are_counted(server: Server, connect: Connect) -> None:
    server.hooks = [refuse(429)] * 9
    with pytest.raises(Overloaded):
        await connect(retry=Retry(tries=4, base_s=0.001)).generate(ask())
    assert len(server.seen) == 4


async def test_failures_within_work_are_asked_again_only_if_configured(server: Server, connect: Connect) -> None:
    server.hooks = [refuse(500)]
    with pytest.raises(Unavailable):
        await connect().generate(ask())
    assert len(server.seen) == 1
    server.hooks = [refuse(409)]
    conflict = Retry(base_s=0.001, statuses=frozenset({409}))
    assert (await connect(retry=conflict).generate(ask())).text == " hello there"
    server.hooks = [refuse(500)]
    again = Retry(base_s=0.001, statuses=frozenset({500}))
    assert (await connect(retry=again).generate(ask())).text == " hello there"


async def test_retry_after_is_waited_for(server: Server, connect: Connect) -> None:
    server.hooks = [refuse(503, Retry_After="0.1")]
    clock = asyncio.get_running_loop().time
    began = clock()
    await connect().generate(ask())
    assert clock() - began >= 0.1


@pytest.mark.parametrize(("after", "options"), [("3600", {}), ("5", {"timeout_s": 1.0})])
async def test_retry_after_beyond_what_may_be_waited_is_told_at_once(
    server: Server, connect: Connect, after: str, options: dict[str, Any]
) -> None:
    server.hooks = [refuse(503, Retry_After=after)]
    with pytest.raises(Overloaded) as error:
        await connect().generate(ask(**options))
    assert error.value.retry_after_s == float(after)
    assert len(server.seen) == 1


async def test_refused_connections_are_tried_again_and_then_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="experts.openai_http")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        backend = OpenAIBackend(f"http://127.0.0.1:{port}", "base", retry=FAST)
        with pytest.raises(Unavailable, match=rf"cannot connect to http://127.0.0.1:{port}/v1.*is running"):
            await backend.generate(ask())
        assert len(caplog.records) == 2
        assert not (await backend.health()).ok
        await backend.aclose()


# -- Time


async def test_timeouts_say_which(server: Server, connect: Connect) -> None:
    server.backend = FakeBackend("a b c d", latency=0.01, seconds_per_token=0.2)
    with pytest.raises(BackendTimeout, match=r"no complete reply within 0\.1 s"):
        await connect().generate(ask(timeout_s=0.1))
    with pytest.raises(BackendTimeout, match=r"no complete reply within 0\.1 s"):
        await connect(total_timeout_s=0.1).generate(ask(timeout_s=5))
    server.backend = FakeBackend(Hang())
    with pytest.raises(BackendTimeout, match=r"no first token within 0\.1 s"):
        await connect(first_token_timeout_s=0.1).generate(ask(timeout_s=5))
    with pytest.raises(BackendTimeout, match=r"no complete reply within 0\.1 s"):
        await connect().generate(ask(timeout_s=0.1))


async def test_replies_that_come_whole_have_no_first_token(server: Server, connect: Connect) -> None:
    server.backend = FakeBackend(latency=0.1)
    assert (await connect(streaming=False, first_token_timeout_s=0.02).generate(ask())).text == "hello there"


async def test_the_first_token_timeout_ends_with_the_first_token(server: Server, connect: Connect) -> None:
    server.backend = FakeBackend("a b c d", latency=0.01, seconds_per_token=0.05)
    assert (await connect(first_token_timeout_s=0.1).generate(ask())).text == "a b c d"


async def test_connect_timeout() -> None:
    async with AsyncExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        # The queue of connections is full after these, and the system drops further ones silently.
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        backend = OpenAIBackend(f"http://127.0.0.1:{full.getsockname()[1]}", "base", connect_timeout_s=0.1)
        stack.push_async_callback(backend.aclose)
        with pytest.raises(BackendTimeout, match=r"no connection to .* within 0\.1 s"):
            await backend.generate(ask())


async def test_waiting_in_the_queue_counts(server: Server, connect: Connect) -> None:
    server.backend = FakeBackend(latency=1.0)
    backend = connect(max_running=1, max_waiting=1)
    first = asyncio.create_task(backend.generate(ask()))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(backend.generate(ask(timeout_s=0.05)))
    await asyncio.sleep(0.01)
    assert backend.load == Load(running=1, waiting=1)
    with pytest.raises(Overloaded, match="1 requests are running and 1 waiting"):
        await backend.generate(ask())
    with pytest.raises(BackendTimeout, match="places"):
        await second
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert backend.load == Load()


# -- Ending early


async def _ended(server: Server) -> None:
    async with asyncio.timeout(2):
        while server.backend.load != Load():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("streaming", [True, False])
async def test_cancelling_reaches_the_server(server: Server, connect: Connect, streaming: bool) -> None:
    server.backend = FakeBackend("a b c d", latency=0.01, seconds_per_token=30.0)
    task = asyncio.create_task(connect(streaming=streaming).generate(ask()))
    async with asyncio.timeout(2):
        while server.backend.load.running == 0:
            await asyncio.sleep(0.002)
    await asyncio.sleep(0.03)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _ended(server)
    assert [c.outcome for c in server.backend.calls] == ["cancelled"]


async def test_closing_a_stream_reaches_the_server(server: Server, connect: Connect) -> None:
    server.backend = FakeBackend("a b c d", seconds_per_token=30.0)
    backend = connect()
    async with aclosing(backend.stream(ask())) as chunks:
        assert (await anext(chunks)).text == "a"
        assert backend.load == Load(running=1)
    assert backend.load == Load()
    await _ended(server)
    assert [c.outcome for c in server.backend.calls] == ["cancelled"]


async def test_closing_while_waiting_to_try_again(server: Server, connect: Connect) -> None:
    server.hooks = [refuse(503, Retry_After="30")]
    backend = connect()
    task = asyncio.create_task(backend.generate(ask()))
    async with asyncio.timeout(2):
        while not server.seen:
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.02)
        await backend.aclose()
        with pytest.raises(Unavailable, match="closed"):
            await task


async def test_one_connection_serves_many_requests(server: Server, connect: Connect) -> None:
    ports = set()

    def note(request: web.Request) -> None:
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername")[1])

    server.hooks = [note] * 6  # type: ignore[list-item]
    backend = connect()
    for n in range(6):
        await backend.generate(ask(f"question {n}"))
    assert len(ports) == 1, "a stream that was read to its end must give its connection back"


# -- What is refused before anything is sent


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("http://h", "http://h/v1"),
        ("http://h:8000/", "http://h:8000/v1"),
        (" https://h/v1/ ", "https://h/v1"),
        ("https://h/v1/chat/completions", "https://h/v1"),
        ("https://h/v1/completions", "https://h/v1"),
        ("https://h/openai/v1", "https://h/openai/v1"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
        ("https://h/gateway", "https://h/gateway/v1"),
        ("https://h/vault", "https://h/vault/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_urls_are_normalised(given: str, normal: str) -> None:
    assert normal_url(given) == normal


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h:8000",
        "ftp://h",
        "file:///etc/passwd",
        "http://",
        "http://h:99999",
        "http://h:0",
        "http://[::1",
        "http://a b",
    ],
)
def test_bad_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="url"):
        OpenAIBackend(url, "base")


@pytest.mark.parametrize("url", ["http://me:secret@h/v1", "http://h/v1?key=secret", "http://h/v1#secret"])
def test_urls_with_secrets_are_refused_without_showing_them(url: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        OpenAIBackend(url, "base")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model": " "}, "model's name is empty"),
        ({"api_key": " "}, "API key is empty"),
        ({"api_key": "a\nsecret"}, "header Authorization"),
        ({"headers": {"X": "sécret"}}, "header X"),
        ({"connect_timeout_s": 0}, "connect_timeout_s is 0"),
        ({"total_timeout_s": float("nan")}, "total_timeout_s is nan"),
        ({"max_tokens_field": "limit"}, "max_tokens_field is 'limit'"),
        ({"extra_body": {"n": 2, "stream": False}}, r"\['n', 'stream'\]"),
        ({"scorer": "llama"}, "scorer is 'llama'; allowed: echo, vllm"),
        ({"max_running": 0}, "it must be ≥ 1"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text) as error:
        OpenAIBackend("http://h", options.pop("model", "base"), **options)
    assert "secret" not in str(error.value)
    assert "sécret" not in str(error.value)


async def test_extra_body_that_is_no_json_is_refused(connect: Connect) -> None:
    with pytest.raises(InvalidRequest, match="JSON"):
        await connect(extra_body={"x": object()}).generate(ask())


def test_claims_only_chat_unless_told(server: Server) -> None:
    assert OpenAIBackend(server.url, "base").capabilities == Capabilities(chat=True)
    assert OPENAI.json_schema
    assert not OPENAI.score


async def test_another_event_loop_is_refused(connect: Connect) -> None:
    backend = connect()
    await backend.generate(ask())
    with pytest.raises(BackendError, match="another event loop"):
        await asyncio.to_thread(asyncio.run, backend.generate(ask()))


async def test_other_json_answers_a_request_to_stream(server: Server, connect: Connect) -> None:
    """A server that does not know how to stream answers whole."""
    body = {"choices": [{"message": {"content": "whole"}, "finish_reason": "stop"}]}
    server.hooks = [lambda request: web.json_response(body)] * 2
    assert (await connect().generate(ask())).text == "whole"
    chunks = [c async for c in connect().stream(ask())]
    assert [c.text for c in chunks] == ["whole", ""]
    server.hooks = [lambda request: web.Response(text="{}", content_type="text/plain")]
    with pytest.raises(BadReply, match="text/plain"):
        await connect().generate(ask())


async def test_closing_ends_what_is_reading_a_body() -> None:
    """At every moment of a stream: before its head, between its events, at its end."""

    async def slowly(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(1000):
            await response.write(b'data: {"choices": [{"index": 0, "delta": {"content": "x"}}]}\n\n')
            await asyncio.sleep(0.001)
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", slowly)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        for n in range(12):
            backend = OpenAIBackend(f"http://127.0.0.1:{runner.addresses[0][1]}", "m")
            request = GenerateRequest(messages=(Message(role="user", content="hi"),))
            asked = asyncio.ensure_future(backend.generate(request))
            await asyncio.sleep(n * 0.001)
            await backend.aclose()
            with pytest.raises(Unavailable, match="closed"):
                await asyncio.wait_for(asked, 5)
    finally:
        await runner.cleanup()
