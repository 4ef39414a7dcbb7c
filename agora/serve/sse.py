"""Writing server-sent events: one response that stays open, with a heartbeat, to a client that may go away.

Source: WHATWG HTML Living Standard, section 9.2, "Server-sent events". The reading side is `experts.sse`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from types import TracebackType
from typing import Final

from aiohttp import web

HEARTBEAT_S: Final = 15.0
"""Seconds of silence after which a comment is sent. The standard proposes 15: proxies cut connections that are silent
for longer, the strictest common ones after 20 to 30."""

WRITE_TIMEOUT_S: Final = 60.0
"""Seconds a client may take nothing of what is waiting for it. A network that stalls comes back within TCP's first
retransmissions (30 s or so); who takes longer holds memory here and is cut off, to come again."""

HEADERS: Final[Mapping[str, str]] = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # nginx holds back what it thinks is an ordinary body.
    "X-Accel-Buffering": "no",
}

_NEWLINE: Final = re.compile(rb"\r\n|\r|\n")


def encode(data: bytes | str, *, event: str | None = None, event_id: str | int | None = None) -> bytes:
    """One event as bytes.

    Args:
        data: What it says; every line of it becomes a line `data: …`.
        event: Its type; clients take it for `message` if there is none.
        event_id: What the client sends back as `Last-Event-ID` when it comes again.

    Raises:
        ValueError: If a type or an id holds a line break, or an id a NUL: they would end the field.
    """
    body = data.encode() if isinstance(data, str) else data
    head = b""
    if event_id is not None:
        head += b"id: %b\n" % _field("id", str(event_id))
    if event is not None:
        head += b"event: %b\n" % _field("event", event)
    if b"\n" not in body and b"\r" not in body:
        return b"%bdata: %b\n\n" % (head, body)
    return head + b"".join(b"data: %b\n" % line for line in _NEWLINE.split(body)) + b"\n"


def _field(name: str, value: str) -> bytes:
    if any(c in value for c in "\n\r\x00"):
        raise ValueError(f"an event's {name} must be one line without NUL, got {value!r}")
    return value.encode()


class EventStream:
    """A response of server-sent events, open for as long as the block lasts.

        async with EventStream(request) as out:
            await out.send(orjson.dumps(chunk))
        return out.response

    A client that goes away ends the block quietly (`gone` is then set): what runs in it is stopped by
    `ConnectionResetError`, or by a cancellation while it waits for something else. That is noticed at the next write
    or heartbeat; at once where the server runs with `handler_cancellation=True`. A client that takes nothing for
    `write_timeout_s` is cut off. Any other error leaves the block as it is, and the stream without its proper end.

    Nothing is sent before the first event, so that headers can still be set on `response`, unless `retry_s` is given.

    Args:
        request: The request that is answered.
        headers: Further headers.
        retry_s: Seconds after which a client that lost the connection should come again.
        heartbeat_s: Seconds of silence before a comment is sent; None for none.
        write_timeout_s: Seconds that one write may wait for the client.

    Attributes:
        response: What the handler returns.
        gone: Whether the client went away before the end.
    """

    def __init__(
        self,
        request: web.BaseRequest,
        *,
        headers: Mapping[str, str] | None = None,
        retry_s: float | None = None,
        heartbeat_s: float | None = HEARTBEAT_S,
        write_timeout_s: float = WRITE_TIMEOUT_S,
    ) -> None:
        self.response = web.StreamResponse(headers={**HEADERS, **(headers or {})})
        self.gone = False
        self._request = request
        self._retry_s = retry_s
        self._heartbeat_s = heartbeat_s
        self._write_timeout_s = write_timeout_s
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._writing: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._beat: asyncio.Task[None] | None = None
        self._owner: asyncio.Task[object] | None = None
        self._cancelled = False

    async def __aenter__(self) -> EventStream:
        self._owner = asyncio.current_task()
        try:
            await self.response.prepare(self._request)
            if self._retry_s is not None:
                await self._write(b"retry: %d\n\n" % round(self._retry_s * 1000))
        except ConnectionResetError:
            # Told at the first event: a block can only be left from inside.
            self.gone = True
        self._arm()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self._timer is not None:
            self._timer.cancel()
        if self._beat is not None:
            self._beat.cancel()
        self.gone = self.gone or (error is not None and self._lost)
        if isinstance(error, ConnectionResetError) and self.gone:
            return True
        if self._cancelled and self._owner is not None:
            # As `asyncio.timeout` does it: only the cancellation that came from here is taken back.
            left = self._owner.uncancel()
            if isinstance(error, asyncio.CancelledError):
                return left == 0
        if error is None and not self.gone:
            try:
                await self.response.write_eof()
            except ConnectionResetError:
                self.gone = True
        return False

    async def send(self, data: bytes | str, *, event: str | None = None, event_id: str | int | None = None) -> None:
        """Sends one event; waits while the client is slower than that.

        Raises:
            ConnectionResetError: If the client has gone away, or took nothing for too long.
            ValueError: See `encode`.
        """
        await self._write(encode(data, event=event, event_id=event_id))

    async def send_encoded(self, events: bytes) -> None:
        """Sends events that are already encoded, as one piece.

        Raises:
            ConnectionResetError: As for `send`.
        """
        await self._write(events)

    @property
    def _lost(self) -> bool:
        transport = self._request.transport
        return transport is None or transport.is_closing()

    async def _write(self, piece: bytes) -> None:
        if self.gone:
            raise ConnectionResetError("the client has gone away")
        self._last = self._loop.time()
        self._writing = self._last if self._writing is None else self._writing
        try:
            # In one piece: a heartbeat never falls into an event.
            await self.response.write(piece)
        finally:
            self._writing = None

    def _arm(self) -> None:
        # One timer per stream, looked at when something may be due: one for every write would cost more than the write.
        most = self._write_timeout_s if self._heartbeat_s is None else min(self._heartbeat_s, self._write_timeout_s)
        since = self._last if self._writing is None else self._writing
        self._timer = self._loop.call_at(max(since, self._loop.time() - most * 7 / 8) + most, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        if self._writing is not None:
            if now - self._writing >= self._write_timeout_s and self._request.transport is not None:
                # Wakes the write with an error.
                self._request.transport.abort()
        elif self._lost:
            self._leave()
            return
        elif self._heartbeat_s is not None and now - self._last >= self._heartbeat_s:
            self._beat = self._loop.create_task(self._heartbeat())
        self._arm()

    async def _heartbeat(self) -> None:
        try:
            await self._write(b": \n\n")
        except ConnectionResetError:
            self._leave()

    def _leave(self) -> None:
        self.gone = True
        if self._timer is not None:
            self._timer.cancel()
        if self._owner is not None and not self._cancelled:
            self._cancelled = True
            self._owner.cancel()
