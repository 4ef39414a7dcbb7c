"""Connections of the gateway: what cannot be read as HTTP is told in OpenAI's shape too, and nobody is waited for who
does not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import orjson
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from agora.serve.errors import JSON, ApiError, error_body

log = logging.getLogger(__name__)

UNREAD_S: Final = 60.0
"""Seconds for which a client may take nothing of an answer that waits for it; as long as `sse.WRITE_TIMEOUT_S`."""

LOOKS: Final = 4
"""Looks at all connections in that time: a client has at most a quarter more."""


TAKEN_S: Final = 5.0
"""Seconds that clients have at the node's end to take what is answered: the largest reply (16 MB) over 25 Mbit/s."""

STALLED_S: Final = 0.5
"""Seconds without a byte taken after which nobody is waited for at the node's end."""

LOOK_AGAIN_S: Final = 0.02
"""Seconds between two looks at what is left."""


class Connection(web.RequestHandler):
    """One connection.

    aiohttp's own log of what it cannot read holds the bytes: a key sent in a broken header would stand in it.
    """

    __slots__ = ("unread",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unread: tuple[int, float] = (0, 0.0)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """See `web.RequestHandler`."""
        if not isinstance(exc, HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun, in which no error can be told")
        what = (exc.message or "").strip().partition("\n")[0].rstrip(":")[:200] or "it cannot be read"
        log.info("a request from %s is not HTTP: %s", request.remote, type(exc).__name__)
        error = ApiError(status, f"the request is not valid HTTP: {what}", code="invalid_http")
        response = web.Response(status=status, body=orjson.dumps(error_body(error)), content_type=JSON)
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """See `web.RequestHandler`; a client's broken body is no error of this server's."""
        if isinstance(kw.get("exc_info"), web.RequestPayloadError | HttpProcessingError):
            self.log_debug(*args, **kw)
        else:
            super().log_exception(*args, **kw)


@asynccontextmanager
async def reading(server: web.Server) -> AsyncIterator[None]:
    """Cuts off, for the length of a block, clients that take nothing of what waits for them for `UNREAD_S`.

    A whole answer is handed to the system at once, after the request has given its place back: nothing else bounds
    for how long it is held.

    Args:
        server: Whose connections, of the kind `Connection`.
    """
    watch = asyncio.ensure_future(_watch(server))
    try:
        yield
    finally:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch


async def _watch(server: web.Server) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        await asyncio.sleep(UNREAD_S / LOOKS)
        now = clock()
        for connection in server.connections:
            transport = connection.transport
            if transport is None or not isinstance(connection, Connection):
                continue
            size = transport.get_write_buffer_size()
            if not size or size != connection.unread[0]:
                connection.unread = (size, now)
            elif now - connection.unread[1] >= UNREAD_S:
                log.info("a client does not read its answer, of which %d bytes are left: it is cut off", size)
                transport.abort()


async def taken(server: web.Server) -> None:
    """Waits until what was answered is on its way, as long as clients go on taking it."""
    clock = asyncio.get_running_loop().time
    until, still, last = clock() + TAKEN_S, clock() + STALLED_S, -1
    while clock() < min(until, still):
        transports = [c.transport for c in server.connections if c.transport is not None]
        left = sum(t.get_write_buffer_size() for t in transports)
        if not left:
            return
        if left != last:
            still, last = clock() + STALLED_S, left
        await asyncio.sleep(LOOK_AGAIN_S)
