"""`OpenAIBackend` against servers that break HTTP, the event stream, JSON, or OpenAI's format.

Each lie gets one clear error within bounded time and memory; the next request works, over a new connection if the old
one cannot be trusted.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import socket
import struct
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

import experts.openai_http
from agora.errors import BackendError, BackendTimeout, BadReply, Rejected, Unavailable
from agora.protocols import Completion, GenerateRequest, Load, Message, ScoreRequest
from experts.openai import VLLM, OpenAIBackend
from experts.retry import Retry

Act = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n"
SSE = HEAD % b"text/event-stream"
JSON = HEAD % b"application/json"


class RawServer:
    """Plays one scripted act per request, over plain TCP; then answers well.

    Attributes:
        acts: What to do with the next requests.
        connections: Connections accepted so far.
        requests: Requests read so far.
    """

    def __init__(self) -> None:
        self.acts: list[Act] = []
        self.connections = 0
        self.requests = 0
        self.url = ""
        self.hung_up = asyncio.Event()

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(h[15:]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length:")), 0)
                await reader.readexactly(length)
                self.requests += 1
                act = self.acts.pop(0) if self.acts else say(GOOD)
                await act(reader, writer)
                await writer.drain()
                if writer.is_closing():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            self.hung_up.set()
        finally:
            writer.close()


def sized(head: bytes, body: bytes) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(*pieces: bytes, end: bool = True) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces)
    return SSE + b"Transfer-Encoding: chunked\r\n\r\n" + body + (b"0\r\n\r\n" if end else b"")


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def delta(text: str | None = "a", *, reason: str | None = None, id: str = "x", **more: Any) -> bytes:
    return event({"id": id, "choices": [{"index": 0, "delta": {"content": text, **more}, "finish_reason": reason}]})


def whole(text: Any = "good", **more: Any) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop", **more}]}


def answer(value: Any) -> bytes:
    return sized(JSON, value if isinstance(value, bytes) else json.dumps(value).encode())


DONE = b"data: [DONE]\n\n"
GOOD = answer(whole())


def say(data: bytes, *, close: bool = False, reset: bool = False) -> Act:
    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if reset:
            raw: socket.socket = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        elif close:
            writer.close()

    return act


@pytest.fixture
async def server() -> AsyncIterator[RawServer]:
    raw = RawServer()
    listening = await raw.start()
    yield raw
    listening.close()


Connect = Callable[..., OpenAIBackend]


@pytest.fixture
async def connect(server: RawServer) -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        def make(**options: Any) -> OpenAIBackend:
            options = {"capabilities": VLLM, "retry": Retry(base_s=0.001, cap_s=0.002), "name": "m", **options}
            backend = OpenAIBackend(server.url, "base", **options)
            stack.push_async_callback(backend.aclose)
            return backend

        yield make


def ask(**options: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message(role="user", content="hi"),), timeout_s=5.0, **options)


async def refusal(backend: OpenAIBackend, request: GenerateRequest | None = None) -> BackendError:
    """The error of a request; afterwards the backend is at rest and the next request works."""
    with pytest.raises(BackendError) as error:
        await backend.generate(request or ask())
    assert backend.load == Load()
    assert (await backend.generate(ask())).text == "good"
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1_000
    return error.value


NULL_LOGPROBS = {"content": [{"token": "a", "logprob": None}]}


@pytest.mark.parametrize(
    ("lie", "text"),
    [
        # No HTTP, or none to its end.
        (say(b"SSH-2.0-OpenSSH_9.6\r\n", close=True), "no HTTP reply"),
        (say(b"HTTP/1.1 200 OK\r\nContent-Ty", close=True), "within the reply's headers"),
        (say(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", close=True), "no HTTP reply"),
        (say(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000 + b"\r\n", close=True), "no HTTP reply"),
        # Other content.
        (say(sized(HEAD % b"text/html", b"<html><h1>Welcome to nginx!</h1></html>")), "text/html.*Welcome to nginx"),
        (say(sized(b"HTTP/1.1 200 OK\r\n", b"{}")), "of no type"),
        (say(sized(HEAD % b"image/png", b"\x89PNG\x00\xff")), "image/png"),
        (say(b"HTTP/1.1 204 No Content\r\n\r\n"), "of no type"),
        # JSON that is none.
        (say(answer(b"")), "not valid JSON"),
        (say(answer(b"hello")), "not valid JSON.*'hello'"),
        (say(answer(b'{"choices": [{"message": {"content": "a')), "not valid JSON"),
        (say(answer(b"\xff\xfe\x00")), "not valid JSON"),
        (say(answer(b"{} {}")), "not valid JSON"),
        (say(answer(b"[" * 200_000)), "nested too deeply"),
        (say(answer(b'{"choices": ' + b"9" * 10_000 + b"}")), "not valid JSON"),
        (say(answer(b"[1, 2]")), "not a JSON object"),
        (say(answer(b"null")), "not a JSON object"),
        # JSON that is no answer.
        (say(answer({})), "no list of choices"),
        (say(answer({"choices": []})), "no choice"),
        (say(answer({"choices": {}})), "no list of choices"),
        (say(answer({"choices": ["a"]})), "other choices"),
        (say(answer({"choices": [{"index": 1, "message": {"content": "a"}}]})), "other choices"),
        (say(answer({"choices": whole()["choices"] * 2})), "other choices"),
        (say(answer({"choices": [{"index": 0}]})), "no message"),
        (say(answer({"choices": [{"message": "a"}]})), "no message"),
        (say(answer(whole(None))), "null"),
        (say(answer(whole(7))), "not a string but int"),
        (say(answer(whole(["a"]))), "not a string but list"),
        (say(answer(whole(finish_reason="bored"))), "unknown finish_reason 'bored'"),
        (say(answer(whole(finish_reason=7))), "unknown finish_reason '7'"),
        (say(answer(whole("", finish_reason="tool_calls"))), "called a tool"),
        # Cut, or of another length than it says.
        (say(JSON + b"Content-Length: 500\r\n\r\n{}", close=True), "connection broke after 2 bytes"),
        (say(JSON + b"Content-Length: 500\r\n\r\n{}", reset=True), "connection broke after"),
        (say(JSON + b"Content-Length: -5\r\n\r\n{}", close=True), "no HTTP reply"),
        (say(JSON + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}", close=True), "connection broke|no HTTP reply"),
        (say(chunked(delta("a"), end=False), close=True), "connection broke"),
        (say(chunked(delta("a"), end=False), reset=True), "connection broke"),
        (say(SSE + b"\r\n" + delta("a"), close=True), "ended before the answer did"),
        (say(chunked(delta("a"))), "ended before the answer did"),
        (say(chunked(delta("a"), DONE)), "ended before the answer did"),
        (say(chunked(DONE)), "ended before the answer did"),
        (say(chunked()), "ended before the answer did"),
        (say(chunked(b"data: " + delta(reason="stop")[6:-2])), "ended before the answer did"),
        # A stream of other things.
        (say(chunked(event(b"hello"), DONE)), "not valid JSON.*'hello'"),
        (say(chunked(event(b'{"a": NaN}'), DONE)), "it holds NaN"),
        (say(chunked(event(["a"]))), "not a JSON object"),
        (say(chunked(event({"id": "x", "choices": 7}))), "no list of choices"),
        (say(chunked(delta("a", id="x"), delta("b", id="y"), DONE)), "mixes two replies: ids 'x' and 'y'"),
        (say(chunked(delta("a", reason="stop"), delta("b"), DONE)), "text follows the end"),
        (say(chunked(delta(None, tool_calls=[{"function": {}}]), DONE)), "called a tool"),
        (say(chunked(event({"id": "x", "choices": [{"index": 0, "delta": "a"}]}))), "no delta"),
    ],
)
async def test_lies_are_bad_replies(server: RawServer, connect: Connect, lie: Act, text: str) -> None:
    server.acts = [lie]
    error = await refusal(connect())
    assert type(error) is BadReply
    assert error.transient
    assert re.search(text, str(error)), str(error)
    assert server.requests == 2, "a reply that has begun must not be asked for again"


def with_logprobs(logprobs: Any) -> bytes:
    text = json.dumps(whole(logprobs=logprobs)).replace('"NAN"', "NaN").replace('"-INF"', "-Infinity")
    return answer(text.replace('"HUGE"', "1e999").encode())


def token(value: Any, **more: Any) -> dict[str, Any]:
    return {"content": [{"token": "a", "logprob": value, **more}]}


@pytest.mark.parametrize(
    ("logprobs", "text"),
    [
        (None, "left out the log-probabilities"),
        ({"content": []}, "left out the log-probabilities"),
        ({"content": None}, "left out the log-probabilities"),
        (7, "not an object"),
        ({"content": 7}, "not a list"),
        ({"content": [7]}, "no token"),
        ({"content": [{"logprob": -1}]}, "no token"),
        (token(None), "no number"),
        (token("-1"), "no number"),
        (token(True), "no number"),
        (token("NAN"), "it holds NaN"),
        (token("-INF"), "it holds -Infinity"),
        (token("HUGE"), "is inf"),
        (token(0.7), "is 0.7; it must be a finite number, at most 0"),
        (token(-1, top_logprobs=7), "not a list"),
        (token(-1, top_logprobs=[{"token": "b", "logprob": 3}]), "is 3"),
        ({"tokens": ["a"], "token_logprobs": [-1, -2]}, "differ in length"),
        ({"tokens": ["a"], "token_logprobs": [None]}, "no number"),
        ({"tokens": [1], "token_logprobs": [-1]}, "wrong type"),
        ({"tokens": "a", "token_logprobs": [-1]}, "not all lists"),
        ({"tokens": ["a"], "token_logprobs": [-1], "top_logprobs": [7]}, "wrong type"),
    ],
)
async def test_false_logprobs_are_bad_replies(server: RawServer, connect: Connect, logprobs: Any, text: str) -> None:
    server.acts = [say(with_logprobs(logprobs))]
    error = await refusal(connect(), ask(logprobs=1))
    assert type(error) is BadReply
    assert text in str(error)


async def test_rounding_above_zero_is_zero(server: RawServer, connect: Connect) -> None:
    server.acts = [say(with_logprobs(token(1e-4)))]
    answer = await connect().generate(ask(logprobs=0))
    assert [t.logprob for t in answer.logprobs] == [0.0]


@pytest.mark.parametrize(
    ("reply", "expected", "text"),
    [
        (answer({"error": {"message": "model crashed"}}), Unavailable, "reports an error: model crashed"),
        (answer({"error": {"message": "bad prompt", "code": 400}}), Rejected, "bad prompt"),
        (answer({"object": "error", "message": "no", "code": 404}), Rejected, "no"),
        (chunked(delta("a"), event({"error": {"message": "oom", "code": 500}}), DONE), Unavailable, "oom"),
        (chunked(delta("a"), delta("", reason="abort"), DONE), Unavailable, "broke off the answer"),
        (answer(whole("", finish_reason="content_filter")), Rejected, "content filter"),
        (answer({"choices": [{"message": {"content": None, "refusal": "I won't"}}]}), Rejected, 'refused: "I won\'t"'),
    ],
)
async def test_errors_within_good_replies(
    server: RawServer, connect: Connect, reply: bytes, expected: type[BackendError], text: str
) -> None:
    server.acts = [say(reply)]
    error = await refusal(connect())
    assert type(error) is expected
    assert text in str(error)


@pytest.mark.parametrize(
    ("reply", "text", "reason"),
    [
        # What differs from OpenAI and yet means something.
        (chunked(delta("a"), delta("b", reason="stop")), "ab", "stop"),
        (SSE + b"\r\n" + delta("a") + delta("", reason="stop"), "a", "stop"),
        (chunked(event({"id": "", "choices": []}), delta("a"), delta(None, reason="length"), DONE), "a", "length"),
        (chunked(b": ping\n\n", delta("a", id=""), delta("b", reason="eos"), b"data:[DONE]\r\n\r\n"), "ab", "stop"),
        (chunked(delta(None, reasoning_content="hm"), delta("a", reason="stop"), DONE), "a", "stop"),
        (chunked(delta(None, role="assistant"), delta(None, reason="stop"), DONE), "", "stop"),
        (chunked(*(bytes([b]) for b in delta("日本🦜") + delta("", reason="stop") + DONE)), "日本🦜", "stop"),
        (chunked(delta("\ud83e"), delta("\udd9c", reason="stop"), DONE), "🦜", "stop"),
        (chunked(delta("\ud83e"), delta("x", reason="stop"), DONE), "\ufffdx", "stop"),
        (chunked(delta("a\ud83e", reason="stop"), DONE), "a\ufffd", "stop"),
        (answer(whole("\ud83e\udd9c \ud83e")), "🦜 \ufffd", "stop"),
        (answer(whole("a", finish_reason="max_tokens")), "a", "length"),
        (answer(whole("a", finish_reason=None)), "a", "stop"),
        (answer({"choices": [{"text": "a", "finish_reason": "stop"}]}), "a", "stop"),
        (
            answer({"choices": [{"message": {"content": None, "reasoning": "hm"}, "finish_reason": "length"}]}),
            "",
            "length",
        ),
        (answer({**whole("a"), "usage": {"prompt_tokens": "many"}, "error": None}), "a", "stop"),
        (sized(HEAD % b"application/json; charset=utf-8", json.dumps(whole("é")).encode()), "é", "stop"),
        (sized(HEAD % b"application/problem+json", json.dumps(whole("a")).encode()), "a", "stop"),
        (JSON + b"\r\n" + json.dumps(whole("a")).encode(), "a", "stop"),
    ],
)
async def test_dialects_are_understood(
    server: RawServer, connect: Connect, reply: bytes, text: str, reason: str
) -> None:
    server.acts = [say(reply, close=True)]
    found = await connect().generate(ask())
    assert (found.text, found.finish_reason) == (text, reason)
    assert found.usage.calls == 1


async def test_split_surrogates_are_valid_text_in_every_chunk(server: RawServer, connect: Connect) -> None:
    server.acts = [say(chunked(delta("a\ud83e"), delta("\udd9cb"), delta("", reason="stop"), DONE))]
    chunks = [c.text async for c in connect().stream(ask())]
    assert chunks == ["a", "🦜b", ""]


# -- Size and time


async def test_declared_size_is_refused_unread(server: RawServer, connect: Connect) -> None:
    server.acts = [say(JSON + b"Content-Length: 99999999999\r\n\r\n{")]
    assert "larger than 16,777,216 bytes" in str(await refusal(connect()))


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, piece: bytes) -> None:
    while True:
        writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        await writer.drain()


@pytest.mark.parametrize(
    ("head", "piece", "text"),
    [
        (JSON, b" " * 65_536, "larger than 1,000,000 bytes"),
        (SSE, delta("a" * 60_000), "larger than 1,000,000 bytes"),
        (SSE, b": ping\n\n" * 5_000, "larger than 1,000,000 bytes"),
        (SSE, b"data: " * 10_000, "larger than"),
    ],
)
async def test_endless_replies_are_cut_off(
    server: RawServer, connect: Connect, head: bytes, piece: bytes, text: str
) -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n")
        await flood(reader, writer, piece=piece)

    server.acts = [endless]
    error = await refusal(connect(max_reply_bytes=1_000_000))
    assert type(error) is BadReply
    assert text in str(error)
    async with asyncio.timeout(2):
        await server.hung_up.wait()


async def test_a_compressed_bomb_takes_bounded_memory(server: RawServer, connect: Connect) -> None:
    bomb = gzip.compress(b" " * 200_000_000, compresslevel=9)
    server.acts = [say(sized(JSON + b"Content-Encoding: gzip\r\n", bomb))]
    backend = connect(max_reply_bytes=1_000_000)
    tracemalloc.start()
    try:
        error = await refusal(backend)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert type(error) is BadReply
    assert peak < 30_000_000


async def test_a_long_bad_reply_is_shown_short(server: RawServer, connect: Connect) -> None:
    server.acts = [say(answer({"choices": "x" * 3_000_000}))]
    began = time.perf_counter()
    assert "…" in str(await refusal(connect()))
    assert time.perf_counter() - began < 2


async def test_slow_drip_ends_at_the_time_given(server: RawServer, connect: Connect) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE + b"Transfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"1\r\n:\r\n")
            await writer.drain()
            await asyncio.sleep(0.005)

    server.acts = [drip] * 2
    with pytest.raises(BackendTimeout, match=r"no first token within 0\.1 s"):
        await connect(first_token_timeout_s=0.1).generate(ask())
    with pytest.raises(BackendTimeout, match=r"no complete reply within 0\.1 s"):
        await connect(total_timeout_s=0.1).generate(ask())
    async with asyncio.timeout(2):
        await server.hung_up.wait()


async def test_a_malformed_redirect_is_rejected(server: RawServer, connect: Connect) -> None:
    server.acts = [say(b"HTTP/1.1 302 Found\r\nLocation: http://[::1?a\r\nContent-Length: 0\r\n\r\n")]
    assert isinstance(await refusal(connect()), Rejected)


async def test_headers_that_never_end(server: RawServer, connect: Connect) -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Ty")
        await reader.read(1)

    server.acts = [hang]
    with pytest.raises(BackendTimeout, match="no first token"):
        await connect(first_token_timeout_s=0.05).generate(ask())


async def test_an_error_body_that_never_ends_does_not_hide_the_status(
    server: RawServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 500\r\n\r\nwrong")
        await reader.read(1)

    monkeypatch.setattr(experts.openai_http, "ERROR_BODY_S", 0.05)
    server.acts = [hang]
    with pytest.raises(Rejected, match="HTTP 400: 'wrong'"):
        await connect().generate(ask())


# -- Connections


async def test_a_connection_is_kept_after_good_replies_only(server: RawServer, connect: Connect) -> None:
    backend = connect()
    streamed = chunked(delta("a"), delta("", reason="stop"), DONE)
    server.acts = [say(GOOD), say(streamed), say(GOOD)]
    for _ in range(3):
        await backend.generate(ask())
    assert server.connections == 1
    # Good to its last event, but the body never ends: the connection cannot be used again.
    server.acts = [say(chunked(delta("a"), delta("", reason="stop"), DONE, end=False))]
    assert (await backend.generate(ask())).text == "a"
    await backend.generate(ask())
    assert server.connections == 2
    # Something follows the last event, but the body ends as it should.
    server.acts = [say(chunked(delta("a"), delta("", reason="stop"), DONE + b"more"))]
    assert (await backend.generate(ask())).text == "a"
    await backend.generate(ask())
    assert server.connections == 2
    # Given up within the reply: what is still to come must not be read as the answer to the next request.
    server.acts = [say(chunked(event(b"junk"), delta("left over", reason="stop"), DONE, end=False))]
    with pytest.raises(BadReply):
        await backend.generate(ask())
    assert (await backend.generate(ask())).text == "good"
    assert server.connections == 3


async def test_a_connection_that_died_while_idle_is_replaced(server: RawServer, connect: Connect) -> None:
    backend = connect()

    async def good_then_gone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GOOD)
        await writer.drain()
        await reader.read(1)  # The next request has come: it gets no answer.
        raw: socket.socket = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    server.acts = [good_then_gone]
    assert (await backend.generate(ask())).text == "good"
    assert (await backend.generate(ask())).text == "good"
    assert server.connections == 2


@pytest.mark.parametrize("end", [{"close": True}, {"reset": True}])
async def test_connections_without_a_reply_are_tried_again_then_told(
    server: RawServer, connect: Connect, end: dict[str, bool]
) -> None:
    server.acts = [say(b"", **end)] * 2
    assert (await connect().generate(ask())).text == "good"
    assert server.requests == 3
    server.acts = [say(b"", **end)] * 3
    with pytest.raises(Unavailable, match="no reply from"):
        await connect().generate(ask())
    assert server.requests == 6


async def test_no_tls_where_tls_is_asked_for() -> None:
    def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(plain, "127.0.0.1", 0) as listening, AsyncExitStack() as stack:
        backend = OpenAIBackend(f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}", "base")
        stack.push_async_callback(backend.aclose)
        with pytest.raises(Unavailable, match="no secure connection") as error:
            await backend.generate(ask())
        assert not LIBRARY_WORDS.search(str(error.value)), str(error.value)


async def test_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    backend = OpenAIBackend("http://no-such-host.invalid", "base")
    with pytest.raises(Unavailable, match=r"no such host.*check the url and the network"):
        await backend.generate(ask())
    await backend.aclose()


async def test_a_cut_stream_gives_what_came_and_then_the_error(server: RawServer, connect: Connect) -> None:
    server.acts = [say(chunked(delta("a"), delta("b"), end=False), close=True)]
    seen = []
    with pytest.raises(BadReply, match="connection broke"):
        async for chunk in connect().stream(ask()):
            seen.append(chunk.text)
    assert seen == ["a", "b"]
    assert server.requests == 1


async def test_lies_do_not_disturb_neighbours(server: RawServer, connect: Connect) -> None:
    backend = connect()
    server.acts = [say(b"junk\r\n\r\n", close=True), say(GOOD)] * 8
    outcomes = await asyncio.gather(*(backend.generate(ask()) for _ in range(16)), return_exceptions=True)
    assert sum(isinstance(o, BadReply) for o in outcomes) == 8
    assert sum(isinstance(o, Completion) and o.text == "good" for o in outcomes) == 8
    assert backend.load == Load()


# -- Scores and probes


def echo(*rows: Any, index: int = 0) -> dict[str, Any]:
    tokens, values = zip(*rows, strict=True)
    return {"index": index, "text": "", "logprobs": {"tokens": list(tokens), "token_logprobs": list(values)}}


FULL = echo(("a", None), (" b", -1.0), (" next", -2.0))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "no list of choices"),
        ({"choices": [7]}, "no list of choices"),
        ({"choices": []}, "0 choices for 1 prompts"),
        ({"choices": [FULL, FULL]}, "2 choices for 1 prompts"),
        ({"choices": [{**FULL, "index": 4}]}, "1 choices for 1 prompts"),
        ({"choices": [{"index": 0, "text": "a b"}]}, "no log-probabilities of the prompt"),
        ({"choices": [{"index": 0, "logprobs": None}]}, "do not claim 'score'"),
        ({"choices": [echo((" next", -2.0))]}, "did not echo the prompt"),
        ({"choices": [echo(("a", None), (" b", None), (" n", -1.0))]}, "no number"),
        ({"choices": [echo(("a", None), (" b", 5.0), (" n", -1.0))]}, "is 5.0"),
        ({"choices": [echo(("x", None), ("y", -1.0), (" n", -1.0))]}, "does not hold the continuation"),
        (b"<html>", "not valid JSON"),
    ],
)
async def test_false_scores_are_bad_replies(server: RawServer, connect: Connect, body: Any, text: str) -> None:
    server.acts = [say(answer(body))] * 2
    backend = connect()
    with pytest.raises(BadReply) as error:
        await backend.score(ScoreRequest(prompt="a", continuations=(" b",), timeout_s=5.0))
    assert text in str(error.value)
    assert backend.load == Load()


async def test_a_true_score(server: RawServer, connect: Connect) -> None:
    server.acts = [say(answer({"choices": [FULL]}))]
    scores = await connect().score(ScoreRequest(prompt="a", continuations=(" b",)))
    assert [(s.logprob, s.tokens) for s in scores.scores] == [(-1.0, 1)]
    assert scores.usage.prompt_tokens == 1


@pytest.mark.parametrize(
    ("body", "text"),
    [({"data": 7}, "no list of models"), ([], "not a JSON object"), ({"data": [7]}, "it serves: none")],
)
async def test_false_model_lists(server: RawServer, connect: Connect, body: Any, text: str) -> None:
    server.acts = [say(answer(body))]
    with pytest.raises((BadReply, Rejected), match=text):
        await connect().probe()


async def test_probe_without_a_context_length_changes_nothing(server: RawServer, connect: Connect) -> None:
    server.acts = [say(answer({"data": [{"id": "base", "max_model_len": -1}, {"id": 7}, "x"]}))]
    assert await connect().probe() == VLLM


LIBRARY_WORDS = re.compile(r"ssl:|Client[A-Z]|Expected HTTP|RTSP|aiohttp|\[Errno|\[SSL")
"""What the libraries below say in their own errors."""


async def test_errors_are_in_the_users_words(server: RawServer, connect: Connect) -> None:
    server.acts = [say(b"SSH-2.0-OpenSSH_9.6\r\n", close=True)]
    with pytest.raises(BadReply, match="what came is not valid HTTP") as garbage:
        await connect().generate(ask())
    server.acts = [say(b"", reset=True)] * 3
    with pytest.raises(Unavailable, match="no reply from") as cut:
        await connect().generate(ask())
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        backend = OpenAIBackend(f"http://127.0.0.1:{unused.getsockname()[1]}", "base", retry=Retry(tries=1))
        with pytest.raises(Unavailable, match="/v1: Connection refused") as refused:
            await backend.generate(ask())
        await backend.aclose()
    for error in (garbage, cut, refused):
        assert not LIBRARY_WORDS.search(str(error.value)), str(error.value)


async def test_a_servers_words_are_shown_escaped_and_cut(server: RawServer, connect: Connect) -> None:
    server.acts = [
        say(
            b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: 38\r\n\r\n"
            + b'{"error": {"message": "a\\u001b[2Jbc"}}'
        )
    ]
    with pytest.raises(Rejected, match=r"HTTP 400: a\\x1b\[2Jbc"):
        await connect().generate(ask())
    server.acts = [say(answer(b"\x07" + b"z" * 10_000))]
    with pytest.raises(BadReply) as error:
        await connect().generate(ask())
    assert "\\x07" in str(error.value)
    assert "\x07" not in str(error.value)
    assert 70 <= str(error.value).count("z") <= 80


@pytest.mark.parametrize("count", [10**26, 10**9 + 1, -1, True, "7", 7.5, None])
async def test_counts_that_cannot_be_are_estimated_instead(server: RawServer, connect: Connect, count: object) -> None:
    server.acts = [say(answer({**whole("four"), "usage": {"prompt_tokens": count, "completion_tokens": 3}}))]
    usage = (await connect().generate(ask())).usage
    assert usage.completion_tokens == 1  # four characters
    assert 0 < usage.prompt_tokens < 100
