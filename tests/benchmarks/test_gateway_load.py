"""The load of the gateway benchmark counts right: an answer is an answer, and whatever is not one ends the run."""

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from benchmarks.gateway_parts import mock
from benchmarks.gateway_parts.contenders import request
from benchmarks.gateway_parts.load import Connection, Load, LoadFailed, Request, Window

BODY = b'{"said": "Lutetia ... Seine"}'
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)

Answer = Callable[[int, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    """A server that reads requests of known length; `answer` writes the reply to the n-th one."""
    count = 0
    open_: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        open_.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]))
                count += 1
                await answer(count, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()
        for writer in open_:
            writer.close()
        await listening.wait_closed()


@asynccontextmanager
async def upstream() -> AsyncIterator[str]:
    listening, url = await mock.start()
    try:
        yield url
    finally:
        listening.close()
        await listening.wait_closed()


def always(data: bytes) -> Answer:
    async def answer(n: int, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


async def ask(url: str, *, connections: int = 2, seconds: float = 0.02, patience_s: float = 5.0) -> Window:
    async with Load(url, patience_s=patience_s) as load:
        return await load.closed(request(url, mock.MODEL), connections=connections, seconds=seconds)


async def answered(url: str) -> int:
    connection = await Connection.open(url)
    get = Request(data=b"GET /answered HTTP/1.1\r\nHost: x\r\n\r\n", first=b"answered", last=())
    assert await connection.send(get) is None
    connection.close()
    return int(connection.json()["answered"])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_closed_loop_counts_each_answer_once_and_ends_drained(stream: bool) -> None:
    async with upstream() as url, Load(url) as load:
        window = await load.closed(request(url, mock.MODEL, stream=stream), connections=4, seconds=0.05)
        window.check("mock")
        # Had any been in flight at the end, the upstream would have answered more than were counted.
        assert await answered(url) == window.answered > 20
        assert len(window.whole_s) == len(window.first_token_s) == window.answered
        assert all(0 < f <= w for f, w in zip(window.first_token_s, window.whole_s, strict=True))
        assert 0.05 <= window.seconds < 0.5


async def test_no_more_than_so_many_are_in_flight() -> None:
    at_once = most = 0

    async def slow(n: int, writer: asyncio.StreamWriter) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.01)
        at_once -= 1
        writer.write(GOOD)

    async with server(slow) as url:
        window = await ask(url, connections=5, seconds=0.08)
    assert most == 5 and window.errors == {} and window.answered % 5 == 0


async def test_a_request_begun_in_time_is_waited_for_beyond_it() -> None:
    async def slow(n: int, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)
        writer.write(GOOD)

    async with server(slow) as url:
        window = await ask(url, connections=3, seconds=0.01)
    assert window.answered == 3 and window.seconds >= 0.1 and min(window.whole_s) >= 0.1


async def test_the_first_token_is_told_apart_from_the_whole() -> None:
    async with upstream() as url, Load(url) as load:
        window = await load.at_rate(request(url, mock.PACED, stream=True), per_second=50, seconds=0.06)
    window.check("mock")
    length = len(mock.TOKENS) * mock.PACE_S
    assert min(window.whole_s) >= length and max(window.first_token_s) < length / 2


async def test_a_rate_is_kept_whatever_the_server_does() -> None:
    began: list[float] = []

    async def slow(n: int, writer: asyncio.StreamWriter) -> None:
        began.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.15)
        writer.write(GOOD)

    async with server(slow) as url, Load(url) as load:
        window = await load.at_rate(request(url, "m"), per_second=100, seconds=0.1)
    # All ten were asked before the first was answered: a slow server is not spared.
    assert window.check("slow").answered == 10 and began[-1] - began[0] < 0.15
    assert min(window.whole_s) >= 0.15


async def test_a_connection_that_the_server_closed_while_idle_is_no_error() -> None:
    async def once(n: int, writer: asyncio.StreamWriter) -> None:
        writer.write(GOOD)
        writer.close()

    async with server(once) as url, Load(url) as load:
        await load.connect(1)
        window = await load.at_rate(request(url, "m"), per_second=50, seconds=0.1)
    assert window.check("it").answered == 5


async def test_a_connection_long_idle_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    writers: set[asyncio.StreamWriter] = set()

    async def answer(n: int, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        writer.write(GOOD)

    async with server(answer) as url, Load(url) as load:
        assert (await load.at_rate(request(url, "m"), per_second=50, seconds=0.1)).answered == 5
        assert len(writers) == 1
        monkeypatch.setattr("benchmarks.gateway_parts.load.IDLE_S", 0.0)
        assert (await load.at_rate(request(url, "m"), per_second=50, seconds=0.1)).check("it").answered == 5
        assert len(writers) == 6


WRONG = {
    "a refusal": (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", "status 503.*busy"),
    "a redirect": (b"HTTP/1.1 307 Go\r\nContent-Length: 0\r\n\r\n", "status 307"),
    "another answer": (b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nLutetia", "without b'Seine'"),
    "an error inside a 200": (b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"error": {}}', "without b'Lutetia'"),
    "no HTTP": (b"what?\r\n\r\n", "no HTTP"),
    "no length": (b"HTTP/1.1 200 OK\r\n\r\nLutetia Seine", "no HTTP"),
    "a broken chunk": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n0\r\n\r\n",
        "no HTTP",
    ),
    "more than it said": (GOOD + b"surplus", "no HTTP"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_what_is_no_right_answer_is_an_error_and_the_run_fails(what: str) -> None:
    data, said = WRONG[what]
    async with server(always(data)) as url:
        window = await ask(url)
    assert window.answered == 0 and window.errors.total() >= 2
    with pytest.raises(LoadFailed, match=said):
        window.check("it")


async def test_one_wrong_reply_among_many_right_ones_fails_the_run() -> None:
    async def once(n: int, writer: asyncio.StreamWriter) -> None:
        writer.write(GOOD if n != 7 else WRONG["a refusal"][0])

    async with server(once) as url:
        window = await ask(url, seconds=0.05)
    assert window.answered > 10 and window.errors.total() == 1
    with pytest.raises(LoadFailed, match=rf"it: 1 of {window.answered + 1} requests went wrong: 1 x status 503"):
        window.check("it")


async def test_a_stream_cut_short_is_an_error() -> None:
    async def cut(n: int, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n16\r\nLutetia ... Seine [DONE]")
        writer.close()

    async with server(cut) as url:
        window = await ask(url)
    assert window.answered == 0
    with pytest.raises(LoadFailed, match="lost before the end"):
        window.check("it")


async def test_a_stream_without_its_end_mark_is_an_error() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n11\r\nLutetia ... Seine\r\n0\r\n\r\n"
    async with server(always(chunked)) as url, Load(url) as load:
        window = await load.closed(request(url, "m", stream=True), connections=1, seconds=0.01)
    with pytest.raises(LoadFailed, match=r"without b'\[DONE\]'"):
        window.check("it")


async def test_a_reply_in_any_pieces_is_the_same_reply() -> None:
    stream = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\nLutetia\r\nA;x=1\r\n ... Seine\r\n0\r\n\r\n"
    assert stream.endswith(b"0\r\n\r\n")

    async def bytewise(n: int, writer: asyncio.StreamWriter) -> None:
        for byte in stream if n % 2 else GOOD:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)

    async with server(bytewise) as url:
        window = await ask(url, connections=1, seconds=0.03)
    assert window.check("it").answered >= 2


async def test_a_server_that_hangs_is_an_error_and_not_waited_for_without_end() -> None:
    async def never(n: int, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0)

    async with server(never) as url:
        window = await asyncio.wait_for(ask(url, connections=3, patience_s=0.05), 2.0)
    assert window.answered == 0 and window.errors == {"no whole reply within 0.05 s": 3}


async def test_nobody_listening_is_one_clear_error() -> None:
    async with server(always(GOOD)) as url:
        pass
    with pytest.raises(LoadFailed, match=r"cannot connect to http://127\.0\.0\.1"):
        await ask(url)
    async with Load(url) as load:
        window = await load.at_rate(request(url, "m"), per_second=100, seconds=0.03)
    assert window.answered == 0 and window.errors.total() == 3


def test_nothing_answered_is_no_result() -> None:
    with pytest.raises(LoadFailed, match="no request was answered"):
        Window().check("it")


async def test_garbage_is_collected_again_afterwards() -> None:
    async with server(always(b"no HTTP\r\n\r\n")) as url:
        await ask(url)
    assert gc.isenabled()


async def test_the_request_is_what_openai_clients_send_and_carries_the_key() -> None:
    head, _, body = request("http://127.0.0.1:81", "m", key="sk-1", stream=True).data.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:81\r\n")
    assert b"Authorization: Bearer sk-1" in head and b"Content-Length: %d" % len(body) in head
    asked = json.loads(body)
    assert asked["model"] == "m" and asked["stream"] is True and asked["messages"][0]["role"] == "user"
