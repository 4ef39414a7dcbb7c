"""Asking an expert on another node: what goes over the wire, and what is learnt when it goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from agora.errors import (
    AgoraError,
    BackendTimeout,
    DeadlineExceeded,
    LoopDetected,
    OutOfReach,
    Overloaded,
    Rejected,
    TooManyHops,
    Unavailable,
    Unsupported,
)
from agora.protocols import Capabilities, GenerateRequest, Load, Message, ScoreRequest
from experts.http_reply import Reply
from experts.neighbour import Engine, Line, NeighbourBackend
from experts.passage import Passage, passing
from experts.slots import Slots

HERE, THERE, BEYOND = "a" * 16, "b" * 16, "c" * 16

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def request(text: str = "what is it?", **more: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message(role="user", content=text),), **more)


async def answer(request: web.Request) -> web.Response:
    body = await request.json()
    choice = {"index": 0, "message": {"role": "assistant", "content": "It is."}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return web.json_response({"id": "1", "model": body["model"], "choices": [choice], "usage": usage})


@dataclass
class Wire:
    """A neighbour, and what was heard on both sides of the line to it."""

    url: str = ""
    seen: list[tuple[Mapping[str, str], dict[str, Any]]] = field(default_factory=list)
    handler: Handler = answer
    troubles: int = 0
    unknown: list[str] = field(default_factory=list)

    def line(self, **more: Any) -> Line:
        return Line(node=HERE, max_hops=3, on_trouble=self._trouble, on_unknown=self.unknown.append, **more)

    def _trouble(self) -> None:
        self.troubles += 1

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append((request.headers, await request.json()))
        return await self.handler(request)


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    made = Wire()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", made.handle)
    async with TestServer(app, host="127.0.0.1", handler_cancellation=True) as server:
        made.url = str(server.make_url("/")).rstrip("/")
        yield made


@asynccontextmanager
async def backend(wire: Wire, **more: Any) -> AsyncIterator[NeighbourBackend]:
    options: dict[str, Any] = {"line": wire.line(), "way": (THERE,), **more}
    made = NeighbourBackend(options.pop("url", wire.url), "finance", name="b.finance", **options)
    try:
        yield made
    finally:
        await made.aclose()


async def test_a_request_carries_its_passage(wire: Wire) -> None:
    passage = Passage(hops=2, path=(BEYOND, HERE), request_id="req-7", deadline=asyncio.get_running_loop().time() + 20)
    async with backend(wire, api_key="secret") as b:
        with passing(passage):
            done = await b.generate(request(timeout_s=60))
    assert done.text == "It is."
    assert done.usage.tokens == 5
    headers, body = wire.seen[0]
    assert body["model"] == "finance"
    assert body["stream"] is False
    assert headers["Agora-Hops"] == "1"
    assert headers["Agora-Path"] == f"{BEYOND},{HERE}"
    assert 19 < float(headers["Agora-Timeout"]) <= 20
    assert headers["X-Request-Id"] == "req-7"
    assert headers["Authorization"] == "Bearer secret"


async def test_outside_of_a_gateway_a_request_begins_here(wire: Wire) -> None:
    async with backend(wire, timeout_s=5) as b:
        await b.generate(request())
        await b.generate(request(timeout_s=2))
    first, second = (headers for headers, _ in wire.seen)
    assert (first["Agora-Hops"], first["Agora-Path"]) == ("2", HERE)
    assert 4 < float(first["Agora-Timeout"]) <= 5
    assert 1 < float(second["Agora-Timeout"]) <= 2


async def test_nothing_is_sent_that_may_not_go_on(wire: Wire) -> None:
    loop = asyncio.get_running_loop()
    async with backend(wire, way=(THERE, BEYOND)) as b:
        for passage, error in (
            (Passage(hops=1, path=(HERE,)), TooManyHops),
            (Passage(hops=9, path=(BEYOND, HERE)), LoopDetected),
            (Passage(hops=9, path=(HERE,), deadline=loop.time() - 1), DeadlineExceeded),
        ):
            with passing(passage), pytest.raises(error):
                await b.generate(request())
            with passing(passage), pytest.raises(error):
                await anext(b.stream(request()))
            with passing(passage), pytest.raises(error):
                await b.forward("chat/completions", b"{}", Reply.whole)
        assert b.load.total == 0
    assert wire.seen == []
    assert wire.troubles == 0


async def test_a_body_is_passed_on_with_the_passage(wire: Wire) -> None:
    async with backend(wire) as b:

        async def read(reply: Reply) -> bytes:
            assert b.load.total == 1
            return await reply.whole()

        assert b"It is." in await b.forward("chat/completions", b'{"model": "finance", "odd": 1}', read)
    headers, body = wire.seen[0]
    assert body == {"model": "finance", "odd": 1}
    assert headers["Agora-Path"] == HERE


async def test_what_its_card_does_not_claim_is_not_asked(wire: Wire) -> None:
    async with backend(wire, capabilities=Capabilities()) as b:
        with pytest.raises(Unsupported):
            await b.score(ScoreRequest(prompt="a", continuations=("b",)))
        with pytest.raises(Unsupported):
            await b.generate(request(logprobs=0))
    assert wire.seen == []


async def test_a_node_that_is_gone_is_told_at_once_and_only_asked_twice(wire: Wire) -> None:
    started = asyncio.get_running_loop().time()
    async with backend(wire, url=f"http://127.0.0.1:{unused_port()}") as b:
        with pytest.raises(Unavailable):
            await b.generate(request())
    assert wire.troubles == 1
    assert asyncio.get_running_loop().time() - started < 2


async def test_a_node_that_dies_within_its_answer_is_unavailable(wire: Wire) -> None:
    async def dies(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "100"})
        await response.prepare(request)
        await response.write(b'{"id": ')
        assert request.transport is not None
        request.transport.abort()
        return response

    wire.handler = dies
    async with backend(wire) as b:
        with pytest.raises(Unavailable) as failed:
            await b.generate(request())
    assert failed.value.transient
    assert wire.troubles == 1


@pytest.mark.parametrize(
    ("status", "code", "error", "troubles", "unknown"),
    [
        (404, "model_not_found", Unavailable, 0, ["finance"]),
        (404, "not_found", Rejected, 0, []),
        (400, "out_of_reach", OutOfReach, 0, []),
        (400, "model_not_found", Rejected, 0, []),
        (429, "overloaded", Overloaded, 0, []),
        (502, "unavailable", Unavailable, 1, []),
        (508, "loop_detected", Unavailable, 1, []),
    ],
)
async def test_what_a_status_tells_of_the_neighbour(
    wire: Wire, status: int, code: str, error: type[AgoraError], troubles: int, unknown: list[str]
) -> None:
    async def refuses(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "no", "type": "t", "param": None, "code": code}}, status=status)

    wire.handler = refuses
    async with backend(wire) as b:
        with pytest.raises(error):
            await b.generate(request())
        with pytest.raises(error):
            await b.forward("chat/completions", b'{"model": "finance"}', Reply.whole)
    assert wire.troubles == 2 * troubles
    assert wire.unknown == 2 * unknown
    assert len(wire.seen) == 2  # nobody is asked again: there are others


async def test_the_time_in_the_queue_of_the_line_counts(wire: Wire) -> None:
    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(0.15)
        return await answer(request)

    wire.handler = slow
    line = wire.line(slots=Slots(1, owner="b"))
    async with backend(wire, line=line) as b, backend(wire, line=line) as other:
        first = asyncio.create_task(b.generate(request()))
        await asyncio.sleep(0.01)
        with pytest.raises(BackendTimeout):
            await other.generate(request(timeout_s=0.05))
        await other.generate(request(timeout_s=5))
        await first
    assert len(wire.seen) == 2
    assert float(wire.seen[1][0]["Agora-Timeout"]) < 4.95


async def test_hanging_up_ends_the_work_there(wire: Wire) -> None:
    ended = asyncio.Event()

    async def works(request: web.Request) -> web.Response:
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()
        return await answer(request)

    wire.handler = works
    async with backend(wire) as b:
        task = asyncio.create_task(b.generate(request()))
        while not wire.seen:
            await asyncio.sleep(0.005)
        assert b.load == Load(running=1)
        task.cancel()
        async with asyncio.timeout(5):
            await ended.wait()
        assert b.load.total == 0


async def test_closing_fails_what_runs_and_blames_nobody(wire: Wire) -> None:
    async def hangs(request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return await answer(request)

    wire.handler = hangs
    async with backend(wire) as b:
        task = asyncio.create_task(b.generate(request()))
        while not wire.seen:
            await asyncio.sleep(0.005)
        idle = asyncio.create_task(b.idle())
        await asyncio.sleep(0)
        assert not idle.done()
        await b.aclose()
        with pytest.raises(Unavailable):
            await task
        await idle
    assert wire.troubles == 0


def test_a_load_that_is_told_holds_our_own_requests_once() -> None:
    engine = Engine()
    engine.asked = 5
    engine.told(Load(running=3, waiting=4))
    assert engine.load.total == 7
    engine.asked = 0
    assert engine.load.total == 2
    engine.told(Load(running=4))
    engine.asked += 2
    assert engine.load == Load(running=6)
    engine.asked = 9
    engine.told(Load())  # ours have not arrived there yet
    assert engine.load.total == 9


def test_an_engine_that_loses_requests_does_not_look_idle() -> None:
    engine = Engine()
    engine.told(Load(running=2))
    engine.lost = 1
    assert engine.load.total > 8
    engine.told(Load(running=2))
    assert engine.load.total == 2


async def test_a_request_that_broke_off_still_weighs_until_the_node_tells(wire: Wire) -> None:
    engine = Engine()
    async with backend(wire, url=f"http://127.0.0.1:{unused_port()}", engine=engine) as b:
        with pytest.raises(Unavailable):
            await b.generate(request())
        assert b.load.total > 1
