"""Requests for an expert behind an OpenAI-compatible server are passed on, and its replies back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

MESSAGES = [{"role": "user", "content": "Six times seven?"}]
REPLY = {
    "id": "chatcmpl-up",
    "object": "chat.completion",
    "created": 1,
    "model": "up-model",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "42"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8},
    "system_fingerprint": "kept",
}
CHUNKS = [
    {"id": "x", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": c}}]}
    for c in ("4", "2")
]


class Upstream:
    """An OpenAI-compatible server that notes what it is sent, and answers as it is told."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.answer: Any = None
        self.gone = asyncio.Event()
        self.begun = asyncio.Event()
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.read())  # type: ignore[arg-type]
        self.headers.append(request.headers)
        self.begun.set()
        try:
            if self.answer is not None:
                return await self.answer(request)
            if json.loads(self.bodies[-1]).get("stream"):
                return await self.stream(request)
            return web.json_response(REPLY)
        except (asyncio.CancelledError, ConnectionResetError):
            self.gone.set()
            raise

    async def stream(self, request: web.Request, *, end: bytes = b"data: [DONE]\n\n") -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in CHUNKS:
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        last = {"id": "x", "object": "chat.completion.chunk", "choices": [], "usage": REPLY["usage"]}
        await response.write(b"data: " + json.dumps(last).encode() + b"\n\n" + end)
        return response

    @property
    def body(self) -> dict[str, Any]:
        """The last body it was sent."""
        found: dict[str, Any] = json.loads(self.bodies[-1])
        return found


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    up = Upstream()
    app = web.Application()
    app.router.add_post("/v1/{path:.*}", up.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    up.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield up
    await runner.cleanup()


@pytest.fixture
async def gateway(start: Any, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("UP_KEY", "sk-secret-of-upstream")
    return await start(
        experts=f"""
[nodes.up]
kind = "openai"
url = "{upstream.url}"
model = "up-model"
api_key_env = "UP_KEY"
first_token_timeout_s = 1.0
timeout_s = 2.0

[nodes.tuned]
kind = "openai"
url = "{upstream.url}"
model = "base"
server = "vllm"
max_tokens_field = "max_completion_tokens"

[nodes.gone]
kind = "openai"
url = "http://127.0.0.1:9/v1"
model = "nobody"

[experts.plain]
node = "up"
description = "everything"
temperature = 0.25
max_tokens = 50

[experts.doctor]
node = "tuned"
description = "health"
system_prompt = "You are a doctor."
adapter = {{ name = "med@v3" }}

[experts.gone]
node = "gone"
description = "nothing"
"""
    )


async def test_a_body_goes_on_with_the_servers_own_name_for_the_model(gateway: Any, upstream: Upstream) -> None:
    """Fields that agora knows nothing of stay as they are."""
    sent = {"model": "plain", "messages": MESSAGES, "tools": [{"type": "function"}], "reasoning_effort": "low", "n": 2}
    status, body = await gateway.post("/v1/chat/completions", sent)
    assert (status, body) == (200, REPLY)
    assert upstream.body == {**sent, "model": "up-model", "max_tokens": 50, "temperature": 0.25}
    assert upstream.headers[-1]["Authorization"] == "Bearer sk-secret-of-upstream"
    assert "Agora-Path" not in upstream.headers[-1]


async def test_what_belongs_to_the_expert_is_added(gateway: Any, upstream: Upstream) -> None:
    await gateway.chat("doctor", max_tokens=5, temperature=1.5)
    assert upstream.body["model"] == "med@v3"
    assert upstream.body["messages"][0] == {"role": "system", "content": "You are a doctor."}
    assert upstream.body["max_completion_tokens"] == 5
    assert "max_tokens" not in upstream.body
    assert upstream.body["temperature"] == 1.5
    own = [{"role": "system", "content": "You are a vet."}, *MESSAGES]
    await gateway.post("/v1/chat/completions", {"model": "doctor", "messages": own, "max_completion_tokens": 10_000})
    assert upstream.body["messages"] == own
    assert upstream.body["max_completion_tokens"] == 192
    await gateway.post("/v1/completions", {"model": "doctor", "prompt": "Once", "max_tokens": 3})
    assert upstream.body == {"model": "med@v3", "prompt": "Once", "max_tokens": 3, "temperature": 0.0}


async def test_a_stream_comes_back_byte_for_byte(gateway: Any, upstream: Upstream) -> None:
    body = {"model": "plain", "messages": MESSAGES, "stream": True}
    async with (
        gateway.http.post(f"{gateway.url}/v1/chat/completions", json=body) as ours,
        gateway.http.post(f"{upstream.url}/chat/completions", json=body) as theirs,
    ):
        assert ours.content_type == "text/event-stream"
        assert await ours.read() == await theirs.read()


async def test_tokens_are_counted(gateway: Any) -> None:
    await gateway.chat("plain")
    async with gateway.http.post(
        f"{gateway.url}/v1/chat/completions", json={"model": "plain", "messages": MESSAGES, "stream": True}
    ) as reply:
        await reply.read()
    async with gateway.http.get(f"{gateway.url}/metrics") as reply:
        text = await reply.text()
    assert 'agora_tokens_total{kind="prompt",model="plain"} 14.0' in text
    assert 'agora_requests_total{model="plain",route="/v1/chat/completions",status="200"} 2.0' in text
    assert 'agora_first_token_seconds_count{model="plain"} 1.0' in text


@pytest.mark.parametrize(
    ("status", "ours"), [(400, 400), (404, 404), (422, 422), (401, 502), (403, 502), (429, 429), (500, 502), (503, 502)]
)
async def test_an_error_of_the_servers_is_told_as_what_it_means_here(
    gateway: Any, upstream: Upstream, status: int, ours: int
) -> None:
    """A key of the gateway's own that is refused is no matter of the asker's; nor does anybody see it."""

    async def refuse(request: web.Request) -> web.Response:
        return web.json_response(
            {"error": {"message": f"no, sk-secret-of-upstream: {status}", "type": "x", "code": None}}, status=status
        )

    upstream.answer = refuse
    for stream in (False, True):
        got, body = await gateway.chat("plain", stream=stream)
        assert got == ours
        assert "no, " in body["error"]["message"]
        assert "sk-secret-of-upstream" not in json.dumps(body)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"choices": []}', "<html>", '{"error": "dead"}'])
async def test_a_server_that_says_200_while_dead_is_found_out(gateway: Any, upstream: Upstream, text: str) -> None:
    async def lie(request: web.Request) -> web.Response:
        return web.Response(text=text, content_type="application/json")

    upstream.answer = lie
    status, body = await gateway.chat("plain")
    assert status == 502
    assert body["error"]["code"] == "bad_reply"


async def test_a_server_that_hangs_is_given_up(gateway: Any, upstream: Upstream) -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        raise AssertionError

    async def hang_after_the_head(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(60)
        raise AssertionError

    for answer, stream in ((hang, False), (hang, True), (hang_after_the_head, True)):
        upstream.answer = answer
        upstream.gone.clear()
        status, body = await gateway.chat("plain", stream=stream)
        assert status == 504
        assert body["error"]["code"] == "timeout"
        await asyncio.wait_for(upstream.gone.wait(), 5)
    upstream.answer = None
    assert (await gateway.chat("plain"))[0] == 200


async def test_a_server_that_is_not_there(gateway: Any) -> None:
    status, body = await gateway.chat("gone")
    assert status == 502
    assert body["error"]["code"] == "unavailable"


async def test_a_stream_that_breaks_off_says_so_and_has_no_end(gateway: Any, upstream: Upstream) -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        response = await upstream.stream(request, end=b"")
        assert request.transport is not None
        await asyncio.sleep(0.05)
        request.transport.abort()
        return response

    async def short(request: web.Request) -> web.StreamResponse:
        return await upstream.stream(request, end=b"")

    for answer in (cut, short):
        upstream.answer = answer
        async with gateway.http.post(
            f"{gateway.url}/v1/chat/completions", json={"model": "plain", "messages": MESSAGES, "stream": True}
        ) as reply:
            text = await reply.text()
        assert reply.status == 200
        assert "[DONE]" not in text
        last = json.loads(text.strip().rpartition("data: ")[2])
        assert last["error"]["code"] == "bad_reply"


async def test_a_client_that_leaves_a_stream_stops_the_server(gateway: Any, upstream: Upstream) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while True:
            await response.write(b"data: {}\n\n")
            await asyncio.sleep(0.005)

    upstream.answer = endless
    async with aiohttp.ClientSession() as http:
        reply = await http.post(
            f"{gateway.url}/v1/chat/completions", json={"model": "plain", "messages": MESSAGES, "stream": True}
        )
        await reply.content.readany()
        reply.close()
    await asyncio.wait_for(upstream.gone.wait(), 5)
    while gateway.node.admission.load.total:
        await asyncio.sleep(0.01)
    assert gateway.node.square.get("plain").backend.load.total == 0


async def test_a_client_that_hangs_up_stops_the_server(gateway: Any, upstream: Upstream) -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        raise AssertionError

    upstream.answer = slow
    asked = asyncio.ensure_future(gateway.chat("plain"))
    await upstream.begun.wait()
    asked.cancel()
    await asyncio.wait_for(upstream.gone.wait(), 5)
    async with asyncio.timeout(5):
        while gateway.node.admission.load.total:
            await asyncio.sleep(0.01)
    assert gateway.node.square.get("plain").backend.load.total == 0


@pytest.mark.parametrize(("field", "value"), [("prompt_logprobs", 0), ("echo", True), ("priority", 1), ("best_of", 2)])
async def test_fields_that_can_harm_a_server_are_not_passed_on(
    gateway: Any, upstream: Upstream, field: str, value: Any
) -> None:
    status, body = await gateway.chat("plain", **{field: value})
    assert status == 400
    assert body["error"]["param"] == field
    assert not upstream.bodies


@pytest.mark.parametrize("more", [{"n": 1000}, {"n": "x"}, {"max_tokens": -1}, {"max_tokens": "many"}])
async def test_what_would_multiply_the_work_is_refused(gateway: Any, upstream: Upstream, more: dict[str, Any]) -> None:
    assert (await gateway.chat("plain", **more))[0] == 400
    assert not upstream.bodies


async def test_harmful_fields_with_harmless_values_are_left_out(gateway: Any, upstream: Upstream) -> None:
    """So clients send them that write out every default."""
    sent = {"model": "plain", "prompt": "x", "echo": False, "best_of": 1, "prompt_logprobs": None}
    assert (await gateway.post("/v1/completions", sent))[0] == 200
    assert not {"echo", "best_of", "prompt_logprobs"} & upstream.body.keys()


async def test_a_limit_that_is_null_is_none(gateway: Any, upstream: Upstream) -> None:
    await gateway.chat("plain", max_completion_tokens=None, max_tokens=5)
    assert upstream.body["max_tokens"] == 5


async def test_a_body_nested_too_deep_to_pass_on_is_refused(gateway: Any, upstream: Upstream) -> None:
    deep: Any = 1
    for _ in range(500):
        deep = {"a": deep}
    status, body = await gateway.chat("plain", tools=[deep])
    assert (status, body["error"]["code"]) == (400, "invalid_json")
    assert (await gateway.chat("plain", n=deep))[0] == 400
    assert not upstream.bodies


async def test_a_stream_whose_time_is_up_says_so_in_its_own_frame(gateway: Any, upstream: Upstream) -> None:
    async def trickle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while True:
            await response.write(b'data: {"choices":[]}\n\n')
            await asyncio.sleep(0.1)

    upstream.answer = trickle
    async with gateway.http.post(
        f"{gateway.url}/v1/chat/completions", json={"model": "plain", "messages": MESSAGES, "stream": True}
    ) as reply:
        text = await reply.text()
    assert "HTTP/1.1" not in text
    assert "[DONE]" not in text
    assert json.loads(text.strip().rpartition("data: ")[2])["error"]["code"] == "timeout"
    await asyncio.wait_for(upstream.gone.wait(), 5)
    assert gateway.node.square.get("plain").backend.load.total == 0


async def test_a_stream_that_is_none_is_found_out(gateway: Any, upstream: Upstream) -> None:
    async def whole(request: web.Request) -> web.Response:
        return web.json_response(REPLY)

    async def empty(request: web.Request) -> web.Response:
        return web.Response(content_type="text/event-stream")

    for answer in (whole, empty):
        upstream.answer = answer
        status, body = await gateway.chat("plain", stream=True)
        assert (status, body["error"]["code"]) == (502, "bad_reply")
