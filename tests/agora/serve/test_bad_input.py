"""What clients do that mean harm, or know no better: one clear error, bounded time, and the next request works."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import zlib
from typing import Any
from urllib.parse import urlsplit

import pytest

from agora.serve import connections
from agora.serve.limits import Bodies

GOOD = {"model": "one", "messages": [{"role": "user", "content": "hi"}]}


async def raw(gateway: Any, data: bytes, *, wait_s: float = 5.0) -> bytes:
    """What the gateway says to bytes until it closes the connection, or for so long."""
    where = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(data)
        async with asyncio.timeout(wait_s):
            return await reader.read(100_000)
    finally:
        writer.close()


async def works(gateway: Any) -> None:
    assert (await gateway.post("/v1/chat/completions", GOOD))[0] == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b'"x"', b"null", b'{"model": NaN}', b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 100_000],
)
async def test_what_is_no_json_object_is_told_so(gateway: Any, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/runs"):
        async with gateway.http.post(
            f"{gateway.url}{path}", data=body, headers={"Content-Type": "application/json"}
        ) as reply:
            assert reply.status == 400, path
            assert (await reply.json())["error"]["message"]
    await works(gateway)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_another_type_of_body_is_refused(gateway: Any, kind: str) -> None:
    async with gateway.http.post(
        f"{gateway.url}/v1/chat/completions", data=json.dumps(GOOD), headers={"Content-Type": kind}
    ) as reply:
        assert reply.status == 415
        assert (await reply.json())["error"]["code"] == "unsupported_media_type"


async def test_a_body_that_is_too_large_is_refused(start: Any) -> None:
    gateway = await start("[server]\nmax_body_bytes = 2048")
    status, body = await gateway.chat("one", "x" * 3000)
    assert status == 413
    assert "2,048" in body["error"]["message"]

    async def pieces() -> Any:
        for _ in range(10):
            yield b"x" * 1000

    async with gateway.http.post(
        f"{gateway.url}/v1/chat/completions", data=pieces(), headers={"Content-Type": "application/json"}
    ) as reply:
        assert reply.status == 413
    bomb = zlib.compress(b" " * 50_000_000)
    async with gateway.http.post(
        f"{gateway.url}/v1/chat/completions",
        data=bomb[:2000] if len(bomb) > 2000 else bomb,
        headers={"Content-Type": "application/json", "Content-Encoding": "deflate"},
    ) as reply:
        assert reply.status in (400, 413)
    await works(gateway)


async def test_a_body_that_does_not_come_is_given_up(start: Any) -> None:
    gateway = await start("[server]\nbody_timeout_s = 0.2")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    said = await raw(gateway, head + b"Content-Length: 1000\r\n\r\n{")
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b'"body_timeout"' in said
    await works(gateway)


async def test_a_head_that_does_not_come_is_given_up(start: Any) -> None:
    """Slow loris: one more header line every now and then keeps no connection open for longer."""
    gateway = await start("[server]\nheader_timeout_s = 0.3")
    where = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\n")
    began = time.monotonic()
    closed = asyncio.ensure_future(reader.read())
    while not closed.done():
        writer.write(b"X-Slow: 1\r\n")
        await asyncio.wait({closed}, timeout=0.05)
        assert time.monotonic() - began < 5
    writer.close()
    await works(gateway)


@pytest.mark.parametrize(
    "head",
    [
        b"X-Many: 1\r\n" * 5000,
        b"X-Long: " + b"a" * 200_000 + b"\r\n",
        b"X-Bad\x00: 1\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: -5\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
    ],
)
async def test_a_head_that_cannot_be_is_refused(gateway: Any, head: bytes) -> None:
    said = await raw(gateway, b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + head + b"\r\n")
    assert said.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    await works(gateway)


async def test_a_line_that_is_too_long_is_refused(gateway: Any) -> None:
    said = await raw(gateway, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert said.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    said = await raw(gateway, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50 + b"\r\n\r\n")
    assert said.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    await works(gateway)


async def test_there_are_only_so_many_connections(start: Any) -> None:
    gateway = await start("[server]\nmax_connections = 3")
    where = urlsplit(gateway.url)
    held = [await asyncio.open_connection(where.hostname, where.port) for _ in range(3)]
    await asyncio.sleep(0.05)
    said = await raw(gateway, b"")
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert json.loads(body)["error"]["code"] == "overloaded"
    for _, writer in held:
        writer.close()
    await asyncio.sleep(0.05)
    await works(gateway)


async def test_there_are_only_so_many_requests(start: Any) -> None:
    gateway = await start("[server]\nmax_running = 2\nmax_waiting = 1\nrequest_timeout_s = 20")
    asked = [asyncio.ensure_future(gateway.chat("slow")) for _ in range(3)]
    while gateway.node.admission.load.total < 3:
        await asyncio.sleep(0.01)
    async with gateway.http.post(f"{gateway.url}/v1/chat/completions", json=GOOD) as reply:
        assert reply.status == 429
        assert int(reply.headers["Retry-After"]) >= 1
        assert (await reply.json())["error"]["code"] == "overloaded"
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    while gateway.node.admission.load.total:
        await asyncio.sleep(0.01)
    await works(gateway)


async def test_paths_and_methods_that_are_not_there(gateway: Any) -> None:
    status, body = await gateway.get("/v1/nothing")
    assert (status, body["error"]["code"]) == (404, "not_found")
    status, body = await gateway.get("/v1/chat/completions")
    assert (status, body["error"]["code"]) == (405, "method_not_allowed")
    status, body = await gateway.get("/v1/models/../../etc/passwd")
    assert status == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Agora-Hops": "1"}, 400),
        ({"Agora-Hops": "x", "Agora-Path": "0123456789abcdef"}, 400),
        ({"Agora-Hops": "1", "Agora-Path": "../x"}, 400),
        ({"Agora-Hops": "1", "Agora-Path": "0123456789abcdef", "Agora-Timeout": "-1"}, 400),
        ({"Agora-Hops": "1", "Agora-Path": "0123456789abcdef"}, 200),
    ],
)
async def test_what_neighbours_send_is_checked(gateway: Any, headers: dict[str, str], status: int) -> None:
    got, _ = await gateway.post("/v1/chat/completions", GOOD, **headers)
    assert got == status


async def test_a_request_that_went_in_a_circle_is_refused(gateway: Any) -> None:
    here = {"Agora-Hops": "2", "Agora-Path": f"0123456789abcdef,{gateway.node.id}"}
    status, body = await gateway.post("/v1/chat/completions", GOOD, **here)
    assert (status, body["error"]["code"]) == (508, "loop_detected")


async def test_the_originators_deadline_holds_here(gateway: Any) -> None:
    headers = {"Agora-Hops": "1", "Agora-Path": "0123456789abcdef", "Agora-Timeout": "0.2"}
    began = time.monotonic()
    status, _ = await gateway.post("/v1/chat/completions", {**GOOD, "model": "slow"}, **headers)
    assert status == 504
    assert time.monotonic() - began < 5
    assert gateway.node.square.get("slow").backend.load.total == 0


async def test_a_bug_is_told_as_one_and_says_nothing_of_itself(gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(gateway.node), "target", lambda self, model: 1 / 0)
    status, body = await gateway.post("/v1/chat/completions", GOOD)
    assert status == 500
    assert body["error"]["code"] == "internal_error"
    assert "ZeroDivision" not in json.dumps(body)


async def test_a_body_that_is_not_what_its_encoding_says_is_refused(gateway: Any) -> None:
    async with gateway.http.post(
        f"{gateway.url}/v1/chat/completions",
        data=b"this is no gzip",
        headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ) as reply:
        assert reply.status == 400
        assert (await reply.json())["error"]["code"] == "invalid_body"
    await works(gateway)


async def test_a_value_too_deep_to_be_shown_is_refused(gateway: Any) -> None:
    for field in (b'"metadata"', b'"stream"'):
        body = json.dumps(GOOD).encode()[:-1] + b"," + field + b":" + b'{"a":' * 1000 + b"1" + b"}" * 1001
        async with gateway.http.post(
            f"{gateway.url}/v1/chat/completions", data=body, headers={"Content-Type": "application/json"}
        ) as reply:
            assert reply.status == 400
            assert len(await reply.read()) < 500
    await works(gateway)


async def test_what_is_no_http_is_told_in_the_same_shape_and_its_bytes_are_not_logged(
    gateway: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A key that is sent in a broken header must not stand in the log."""
    caplog.set_level("DEBUG")
    said = await raw(gateway, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer agora-secret\x00\r\n\r\n")
    head, _, body = said.partition(b"\r\n\r\n")
    assert b" 400 " in head
    error = json.loads(body)["error"]
    assert (error["code"], error["type"]) == ("invalid_http", "invalid_request_error")
    assert "agora-secret" not in json.dumps(error)
    assert "is not HTTP" in caplog.text
    assert "agora-secret" not in caplog.text
    await works(gateway)


async def test_a_client_that_does_not_read_its_answer_is_cut_off(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else bounds how long the answer is kept for it: the request has long given its place back."""
    monkeypatch.setattr(connections, "UNREAD_S", 0.2)
    gateway = await start()
    where = urlsplit(gateway.url)
    body = json.dumps({"model": "dull", "messages": [{"role": "user", "content": "x" * 90_000}]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    request = b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(lazy, (where.hostname, where.port))
        with pytest.raises(OSError):
            async with asyncio.timeout(10):
                while True:
                    await loop.sock_sendall(lazy, request)
    assert gateway.node.admission.load.total == 0
    await works(gateway)


async def test_large_bodies_count_until_they_are_answered(gateway: Any) -> None:
    """Also while they wait for a place: a thousand of them would fill the memory."""
    gateway.node.bodies = Bodies(900_000)

    async def large(model: str) -> tuple[int, Any]:
        body = json.dumps({**GOOD, "model": model}).encode() + b" " * 600_000
        async with gateway.http.post(
            f"{gateway.url}/v1/chat/completions", data=body, headers={"Content-Type": "application/json"}
        ) as reply:
            return reply.status, await reply.json()

    slow = asyncio.ensure_future(large("slow"))
    while not gateway.node.square.get("slow").backend.load.running:
        assert not slow.done()
        await asyncio.sleep(0.01)
    status, body = await large("one")
    assert (status, body["error"]["code"]) == (429, "overloaded")
    await works(gateway)
    slow.cancel()
    async with asyncio.timeout(5):
        while gateway.node.bodies.held:
            await asyncio.sleep(0.01)
    assert (await large("one"))[0] == 200
    assert gateway.node.bodies.held == 0
