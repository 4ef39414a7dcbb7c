"""Listening: connections bounded in number and patience, and an end that loses nothing.

On SIGTERM or SIGINT the node takes nothing new (503), lets what is in flight end for `drain_s`, and then cuts it off;
runs that were cut off are written down as interrupted, and the next start goes on with them. A second signal cuts off
at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import orjson
from aiohttp import web

from agora.errors import ConfigError
from agora.serve.app import make_app
from agora.serve.connections import Connection, reading, taken
from agora.serve.errors import ApiError, error_body
from agora.serve.node import Node

log = logging.getLogger(__name__)

BACKLOG: Final = 512
"""Connections that the system holds until they are accepted: a burst of a second at a few hundred a second."""

CUT_OFF_S: Final = 0.1
"""Seconds that handlers have to end once the drain is over, before they are cancelled: time for a last write."""

LOOK_AGAIN_S: Final = 0.05
"""Seconds after which the end of a drain looks again for bodies that are still arriving."""

MAX_HEADERS: Final = 100
"""Header lines of one request; browsers behind proxies send 40."""

MAX_LINE_BYTES: Final = 8_190
"""Bytes of a request line or a header: those of nginx and Apache."""

_BUSY_BODY: Final = orjson.dumps(
    error_body(ApiError(503, "too many connections", code="overloaded", hint="try again later"))
)

BUSY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_BUSY_BODY), _BUSY_BODY)
)
"""What a connection beyond the limit gets; its request is not even read."""


class _TooMany(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(BUSY)
        transport.close()


@asynccontextmanager
async def listening(node: Node, *, host: str, port: int) -> AsyncIterator[str]:
    """Serves a node for the length of a block.

    Args:
        node: The node.
        host: Address to bind to.
        port: TCP port; 0 for a free one.

    Yields:
        The base URL, without `/v1`.

    Raises:
        ConfigError: If the address cannot be bound.
    """
    limits = node.config.server
    each: dict[str, Any] = {
        "access_log": None,
        # How long a connection may be idle, or busy with the head of a request: aiohttp counts both as one.
        "keepalive_timeout": limits.header_timeout_s,
        "max_headers": MAX_HEADERS,
        "max_line_size": MAX_LINE_BYTES,
        "max_field_size": MAX_LINE_BYTES,
        "lingering_time": 1.0,
    }
    runner = web.AppRunner(make_app(node), handler_cancellation=True, shutdown_timeout=CUT_OFF_S, **each)
    await runner.setup()
    try:
        server = runner.server
        assert server is not None

        loop = asyncio.get_running_loop()

        def accept() -> asyncio.Protocol:
            if len(server.connections) >= limits.max_connections:
                return _TooMany()
            return Connection(server, loop=loop, **each)

        try:
            listener = await loop.create_server(accept, host, port, backlog=BACKLOG)
        except OSError as e:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {e.strerror or e}",
                hint="is another program using the port? Choose one with --port, or [server] port",
            ) from e
        try:
            async with reading(server):
                yield _url(host, listener.sockets[0])
        finally:
            listener.close()
            with contextlib.suppress(TimeoutError):
                # Only closed, not waited for without end: 3.12 waits for connections too.
                await asyncio.wait_for(listener.wait_closed(), 1.0)
            await taken(server)
    finally:
        await runner.cleanup()


def _url(host: str, bound: socket.socket) -> str:
    port = bound.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    node: Node, *, host: str, port: int, on_ready: Callable[[str], None], on_drain: Callable[[int], None]
) -> None:
    """Serves a node until SIGTERM or SIGINT, and drains it.

    Args:
        node: The node.
        host: Address to bind to.
        port: TCP port; 0 for a free one.
        on_ready: Called with the base URL once requests are accepted.
        on_drain: Called with the number of requests in flight when the end begins.

    Raises:
        ConfigError: If the address cannot be bound.
    """
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def told() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    try:
        async with listening(node, host=host, port=port) as url:
            on_ready(url)
            await stop.wait()
            node.draining = True
            on_drain(node.admission.load.total)
            await drain(node, hurry)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def drain(node: Node, hurry: asyncio.Event) -> None:
    """Lets what is in flight end, for as long as the configuration allows or until `hurry` is set."""
    patience = node.config.server.drain_s
    ends: asyncio.Future[Any] = asyncio.gather(_quiet(node), node.runs.aclose(patience))
    hurried: asyncio.Future[Any] = asyncio.ensure_future(hurry.wait())
    try:
        await asyncio.wait({ends, hurried}, timeout=patience + 1.0, return_when=asyncio.FIRST_COMPLETED)
    finally:
        hurried.cancel()
        if not ends.done():
            log.warning("%d requests are cut off", node.admission.load.total)
            ends.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ends
        else:
            ends.result()


async def _quiet(node: Node) -> None:
    """Waits until everything that was let in is answered: also what was still on its way in."""
    await node.admission.idle()
    while node.bodies.held:
        await asyncio.sleep(LOOK_AGAIN_S)
        await node.admission.idle()
