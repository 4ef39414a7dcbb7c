"""What is left of a connection over which nothing can be sent any more."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import pytest

from agora.errors import BackendTimeout, Unavailable
from experts.http_reply import Reply
from experts.openai import OpenAIBackend
from experts.sockets import UNSENT_S, Sockets

# aiohttp's advice on large bodies; such a one is what is wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")

BODY = b"{" + b" " * 30_000_000 + b"}"
"""More than the socket buffers of both sides hold, whatever the kernel lets them grow to for one who never reads."""


@asynccontextmanager
async def never_reads() -> AsyncIterator[str]:
    """A server that accepts, and reads nothing."""
    taken: list[socket.socket] = []
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)

        async def accept() -> None:
            while True:
                taken.append((await asyncio.get_running_loop().sock_accept(listening))[0])

        accepting = asyncio.create_task(accept())
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
            for one in taken:
                one.close()


async def until(holds: Callable[[], bool], *, within_s: float = 5.0) -> None:
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, f"not within {within_s} s"
        await asyncio.sleep(0.02)


def opened(sockets: Sockets) -> list[socket.socket]:
    return [s for s in sockets._made if s.fileno() != -1]


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this platform has no TCP_USER_TIMEOUT")
async def test_an_upload_that_nobody_takes_is_broken_by_the_kernel_in_time() -> None:
    async with never_reads() as url, aclosing(OpenAIBackend(url, "m", name="m")) as backend:
        sockets = backend._http._sockets = Sockets(unsent_s=0.4)
        began = time.monotonic()
        # Far sooner than the request's own time: whoever asks is told, and may ask elsewhere.
        with pytest.raises(Unavailable, match="no reply from"):
            await backend.forward("chat/completions", BODY, Reply.whole, timeout_s=60.0)
        assert time.monotonic() - began < 20
        await until(lambda: not opened(sockets))


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this platform has no TCP_USER_TIMEOUT")
async def test_what_an_abandoned_upload_leaves_behind_is_freed_in_time() -> None:
    async with never_reads() as url, aclosing(OpenAIBackend(url, "m", name="m")) as backend:
        sockets = backend._http._sockets = Sockets(unsent_s=0.6)
        with pytest.raises(BackendTimeout):
            await backend.forward("chat/completions", BODY, Reply.whole, timeout_s=0.15)
        assert opened(sockets), "it still has something to send"
        await until(lambda: not opened(sockets))


async def test_closing_a_backend_ends_its_uploads_at_once() -> None:
    async with never_reads() as url:
        backend = OpenAIBackend(url, "m", name="m")
        sockets = backend._http._sockets
        with pytest.raises(BackendTimeout):
            await backend.forward("chat/completions", BODY, Reply.whole, timeout_s=0.15)
        assert opened(sockets)
        await backend.aclose()
        await until(lambda: not opened(sockets), within_s=1.0)


def test_sockets_are_bounded_where_the_platform_can() -> None:
    made = Sockets().make((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1)))
    with made:
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == UNSENT_S * 1000


def test_without_the_option_there_is_a_socket_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT", raising=False)
    with Sockets().make((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1))) as made:
        assert made.fileno() != -1
