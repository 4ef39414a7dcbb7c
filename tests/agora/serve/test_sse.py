"""Server-sent events: written so that any reader understands them, and never to somebody who is no longer there."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import strategies as st

from agora.serve.sse import EventStream, encode
from experts.sse import SseParser

Client = TestClient[web.Request, web.Application]


@asynccontextmanager
async def serving(
    block: Callable[[EventStream], Awaitable[None]], **options: float | None
) -> AsyncIterator[tuple[Client, asyncio.Future[EventStream]]]:
    """A server whose one resource runs `block`; the future holds the stream once its handler has ended."""
    ended: asyncio.Future[EventStream] = asyncio.get_running_loop().create_future()

    async def handler(request: web.Request) -> web.StreamResponse:
        out = EventStream(request, **options)  # type: ignore[arg-type]
        try:
            async with out:
                await block(out)
        finally:
            ended.set_result(out)
        return out.response

    app = web.Application()
    app.router.add_get("/", handler)
    async with TestClient(TestServer(app, host="127.0.0.1")) as client:
        yield client, ended


@given(data=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), cut=st.integers(1, 7))
def test_what_is_written_is_read_back(data: str, cut: int) -> None:
    piece = encode(data, event="news", event_id=7)
    parser = SseParser()
    read = [e for at in range(0, len(piece), cut) for e in parser.feed(piece[at : at + cut])]
    assert read == [re.sub("\r\n|\r|\n", "\n", data)]
    assert not parser.pending


def test_the_fields_of_an_event_stand_before_its_data() -> None:
    assert encode(b'{"a":1}', event="Planned", event_id=3) == b'id: 3\nevent: Planned\ndata: {"a":1}\n\n'
    assert encode("one\r\ntwo\rthree") == b"data: one\ndata: two\ndata: three\n\n"
    assert encode("") == b"data: \n\n"


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\x00b"])
def test_a_field_that_would_break_the_stream_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="event"):
        encode("x", event=bad)
    with pytest.raises(ValueError, match="id"):
        encode("x", event_id=bad)


async def test_events_arrive_and_the_stream_ends() -> None:
    async def block(out: EventStream) -> None:
        await out.send("one", event="first", event_id=1)
        await out.send_encoded(encode("two") + encode("three"))

    async with serving(block) as (client, ended):
        reply = await client.get("/")
        assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert reply.headers["Cache-Control"] == "no-cache"
        assert await reply.read() == b"id: 1\nevent: first\ndata: one\n\ndata: two\n\ndata: three\n\n"
        assert not (await ended).gone


async def test_the_retry_hint_comes_before_anything_has_happened() -> None:
    go = asyncio.Event()

    async def block(out: EventStream) -> None:
        await go.wait()

    async with serving(block, retry_s=2.5) as (client, _):
        async with asyncio.timeout(5):
            reply = await client.get("/")
            assert await reply.content.readline() == b"retry: 2500\n"
        go.set()
        assert await reply.read() == b"\n"


async def test_silence_is_filled_with_comments() -> None:
    async def block(out: EventStream) -> None:
        await asyncio.sleep(0.2)
        await out.send("late")

    async with serving(block, heartbeat_s=0.05) as (client, _):
        text = await (await client.get("/")).read()
    assert text.endswith(b"data: late\n\n")
    assert text.count(b": \n\n") >= 2
    assert SseParser().feed(text) == ["late"]


async def test_a_client_that_goes_away_ends_a_block_that_waits() -> None:
    waited = asyncio.Event()
    left: list[str] = []

    async def block(out: EventStream) -> None:
        await out.send("hello")
        waited.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            left.append("stopped")
            raise

    async with serving(block, heartbeat_s=0.05) as (client, ended):
        reply = await client.get("/")
        await waited.wait()
        reply.close()
        async with asyncio.timeout(5):
            assert (await ended).gone
    assert left == ["stopped"]


async def test_a_client_that_goes_away_ends_a_block_that_writes() -> None:
    async def block(out: EventStream) -> None:
        while True:
            await out.send("x" * 1_000)
            await asyncio.sleep(0)

    async with serving(block) as (client, ended):
        reply = await client.get("/")
        await reply.content.readexactly(10)
        reply.close()
        async with asyncio.timeout(5):
            assert (await ended).gone


async def test_a_client_that_reads_nothing_is_cut_off() -> None:
    sent = 0

    async def block(out: EventStream) -> None:
        nonlocal sent
        while True:
            await out.send("x" * 100_000)
            sent += 100_000

    async with serving(block, write_timeout_s=0.2) as (client, ended):
        reader, writer = await asyncio.open_connection(client.host, client.port, limit=1_000)
        writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        async with asyncio.timeout(10):
            assert (await ended).gone
        writer.transport.abort()
        await asyncio.sleep(0)
    # What the system's own buffers hold, and not what a block without end would write.
    assert sent < 50_000_000


async def test_an_error_in_the_block_is_the_servers_to_tell() -> None:
    async def block(out: EventStream) -> None:
        await out.send("half")
        raise ValueError("broken")

    async with serving(block) as (client, ended):
        reply = await client.get("/")
        with pytest.raises(Exception, match=r"(?i)payload|closed"):
            await reply.read()
        assert not (await ended).gone


async def test_a_cancellation_from_elsewhere_is_not_taken_for_a_client_that_left() -> None:
    tasks: list[asyncio.Task[object]] = []

    async def block(out: EventStream) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        await out.send("hello")
        await asyncio.Event().wait()

    async with serving(block, heartbeat_s=0.05) as (client, ended):
        reply = await client.get("/")
        await reply.content.readline()
        tasks[0].cancel()
        out = await ended
        assert not out.gone
        await asyncio.wait(tasks)
        assert tasks[0].cancelled()
