"""The load: requests over kept-alive connections, in a closed loop or at a fixed rate, every reply checked.

Raw asyncio, so that one core carries the load and the upstream together. A reply that is not 200, not whole, or not the
answer that was expected is an error, and an error is never counted as an answer.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Self
from urllib.parse import urlsplit

from agora.errors import AgoraError

PATIENCE_S: Final = 120.0
"""Seconds that a request may take: LiteLLM's proxy, slowest of those compared, needs < 1 s with 32 at once."""

IDLE_S: Final = 2.0
"""Seconds after which an idle connection is not used again: servers close them after 5 (uvicorn) to 75 (aiohttp)."""

MAX_REPLY: Final = 2**20
"""Bytes of the longest reply taken: the expected one has < 4 KB."""


class LoadFailed(AgoraError):
    """A server under load did not answer as it should: what was measured means nothing."""

    code = "load_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, ready to be written, and how to tell a right reply.

    Attributes:
        data: The bytes, head and body.
        first: What the body contains as soon as the first token has arrived.
        last: What it contains once the whole answer has.
    """

    data: bytes
    first: bytes
    last: tuple[bytes, ...]

    @classmethod
    def post(
        cls, url: str, path: str, body: Mapping[str, Any], *, first: str, last: Sequence[str], key: str | None = None
    ) -> Self:
        """A request with a JSON body."""
        content = json.dumps(body).encode()
        head = [
            f"POST {path} HTTP/1.1",
            f"Host: {urlsplit(url).netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
        ]
        if key is not None:
            head.append(f"Authorization: Bearer {key}")
        data = "\r\n".join([*head, "", ""]).encode() + content
        return cls(data=data, first=first.encode(), last=tuple(m.encode() for m in last))


@dataclass(slots=True)
class Window:
    """What came of one stretch of load.

    Attributes:
        answered: Requests answered rightly.
        errors: How many went wrong, by what went wrong.
        seconds: From the first request to the last reply.
        first_token_s: Seconds to the first token, one for each request answered.
        whole_s: Seconds to the end of the reply, likewise.
    """

    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    first_token_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)

    def check(self, who: str) -> Self:
        """This window, if everything in it went well.

        Raises:
            LoadFailed: If not: errors are cheaper than answers, and would make the server look fast.
        """
        if self.errors:
            some = "; ".join(f"{n} x {what}" for what, n in self.errors.most_common(3))
            asked = self.answered + self.errors.total()
            raise LoadFailed(f"{who}: {self.errors.total()} of {asked} requests went wrong: {some}")
        if not self.answered:
            raise LoadFailed(f"{who}: no request was answered")
        return self


class Connection(asyncio.Protocol):
    """One kept-alive HTTP/1.1 connection; one request on it at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._clock = asyncio.get_running_loop().time
        self._request: Request | None = None
        self._done: asyncio.Future[str | None] | None = None
        self._buffer = bytearray()
        self._head_end = -1
        self._length: int | None = None
        self._chunk_at = 0
        self._body = bytearray()
        self._status = 0
        self.began = self.first_at = 0.0
        self.ended = self._clock()

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connects.

        Raises:
            LoadFailed: If nobody listens.
        """
        at = urlsplit(url)
        assert at.hostname is not None
        assert at.port is not None
        try:
            _, made = await asyncio.get_running_loop().create_connection(cls, at.hostname, at.port)
        except OSError as e:
            raise LoadFailed(f"cannot connect to {url}: {e}") from None
        return made

    @property
    def open_(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None

    @property
    def idle_s(self) -> float:
        """Seconds since its last reply, or since it was opened."""
        return self._clock() - self.ended

    def json(self) -> Any:
        """The body of the last reply."""
        return json.loads(self._body)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def send(self, request: Request) -> asyncio.Future[str | None]:
        """Sends; the future's result is None for a right reply, else what is wrong with it."""
        self._done = asyncio.get_running_loop().create_future()
        if self._transport is None:
            self._done.set_result("the connection is closed")
            return self._done
        self._request = request
        self._buffer.clear()
        self._body.clear()
        self._head_end = -1
        self.first_at = 0.0
        self.began = self._clock()
        self._transport.write(request.data)
        return self._done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._finish(f"the connection was lost before the end of the reply ({exc or 'closed'})")

    def data_received(self, data: bytes) -> None:
        if self._request is None:
            self._finish("bytes came that belong to no request")
            self.close()
            return
        self._buffer += data
        try:
            whole = self._read()
        except (ValueError, IndexError):
            self._finish(f"a reply that is no HTTP: {bytes(self._buffer[:80])!r}")
            self.close()
            return
        if not self.first_at and self._request.first in self._body:
            self.first_at = self._clock()
        if whole:
            self._judge()

    def _read(self) -> bool:
        """Takes in what has come; whether the reply is whole."""
        if len(self._buffer) > MAX_REPLY:
            raise ValueError
        if self._head_end < 0:
            at = self._buffer.find(b"\r\n\r\n")
            if at < 0:
                return False
            head = bytes(self._buffer[:at]).lower()
            if not head.startswith(b"http/1.1 "):
                raise ValueError
            self._status = int(head[9:12])
            self._head_end = self._chunk_at = at + 4
            self._length = None
            if (at := head.find(b"\r\ncontent-length:")) >= 0:
                self._length = int(head[at + 17 :].partition(b"\r\n")[0])
            elif b"\r\ntransfer-encoding: chunked" not in head:
                raise ValueError
        if self._length is not None:
            self._body[:] = self._buffer[self._head_end :]
            if len(self._body) > self._length:
                raise ValueError
            return len(self._body) == self._length
        return self._chunks()

    def _chunks(self) -> bool:
        while (line_end := self._buffer.find(b"\r\n", self._chunk_at)) >= 0:
            size = int(self._buffer[self._chunk_at : line_end].partition(b";")[0], 16)
            end = line_end + 2 + size + 2
            if len(self._buffer) < end:
                return False
            if self._buffer[end - 2 : end] != b"\r\n":
                raise ValueError
            if size == 0:
                if len(self._buffer) != end:
                    raise ValueError
                return True
            self._body += self._buffer[line_end + 2 : end - 2]
            self._chunk_at = end
        return False

    def _judge(self) -> None:
        assert self._request is not None
        if self._status != 200:
            self._finish(f"status {self._status}: {bytes(self._body[:200])!r}")
        elif missing := [m for m in (self._request.first, *self._request.last) if m not in self._body]:
            self._finish(f"a reply without {missing[0]!r}: {bytes(self._body[-200:])!r}")
        else:
            self._finish(None)

    def _finish(self, wrong: str | None) -> None:
        self.ended = self._clock()
        self._request = None
        if self._done is not None and not self._done.done():
            self._done.set_result(wrong)


class Load:
    """Connections to one server.

    async with Load(url) as load:
        window = await load.closed(request, connections=32, seconds=2.0)
    """

    def __init__(self, url: str, *, patience_s: float = PATIENCE_S) -> None:
        self._url = url
        self._patience_s = patience_s
        self._idle: list[Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for connection in self._idle:
            connection.close()
        # One turn of the loop, in which the sockets are really closed.
        await asyncio.sleep(0)

    async def connect(self, connections: int) -> None:
        """Has so many connections ready: opening them is not what is measured."""
        while len(self._idle) < connections:
            self._idle.append(await Connection.open(self._url))

    async def closed(self, request: Request, *, connections: int, seconds: float) -> Window:
        """A closed loop: each connection sends its next request when the last is answered.

        No request is begun after `seconds`, and the window ends when all have been answered: it is drained.
        """
        await self.connect(connections)
        window = Window()
        clock = asyncio.get_running_loop().time
        taken, self._idle = self._idle[:connections], self._idle[connections:]
        with _undisturbed():
            began = clock()

            async def loop(connection: Connection) -> None:
                while clock() < began + seconds and connection.open_:
                    await self._ask(connection, request, window)

            await self._all([asyncio.ensure_future(loop(c)) for c in taken], seconds, window)
            window.seconds = clock() - began
        self._idle += [c for c in taken if c.open_]
        return window

    async def at_rate(self, request: Request, *, per_second: float, seconds: float, start: float = 0.0) -> Window:
        """An open loop: requests begin at fixed times, whether or not earlier ones have been answered.

        The first at `start`, in the loop's time, so that two loads can alternate; at once if that is over.
        """
        window = Window()
        clock = asyncio.get_running_loop().time

        async def once() -> None:
            try:
                connection = self._fresh() or await Connection.open(self._url)
            except LoadFailed as e:
                window.errors[e.message] += 1
                return
            await self._ask(connection, request, window)
            if connection.open_:
                self._idle.append(connection)

        asked = []
        with _undisturbed():
            began = max(start, clock())
            for n in range(round(per_second * seconds)):
                await asyncio.sleep(max(0.0, began + n / per_second - clock()))
                asked.append(asyncio.ensure_future(once()))
            await self._all(asked, 0.0, window)
            window.seconds = clock() - began
        return window

    def _fresh(self) -> Connection | None:
        """The connection used last, unless it has been idle for so long that the server may be closing it."""
        while self._idle:
            connection = self._idle.pop()
            if connection.open_ and connection.idle_s < IDLE_S:
                return connection
            connection.close()
        return None

    async def _all(self, tasks: Sequence[asyncio.Future[None]], seconds: float, window: Window) -> None:
        """Waits until every request has been answered; one timer for all, since one for each would cost too much."""
        try:
            _, late = await asyncio.wait(tasks, timeout=seconds + self._patience_s)
            if late:
                window.errors[f"no whole reply within {self._patience_s:g} s"] += len(late)
        finally:
            for task in tasks:
                task.cancel()
            # What a task raised that is no matter of the server's is a mistake here: not to be swallowed.
            for end in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(end, Exception):
                    raise end

    async def _ask(self, connection: Connection, request: Request, window: Window) -> None:
        try:
            wrong = await connection.send(request)
        except asyncio.CancelledError:
            connection.close()
            raise
        if wrong is not None:
            window.errors[wrong] += 1
            return
        window.answered += 1
        window.first_token_s.append(connection.first_at - connection.began)
        window.whole_s.append(connection.ended - connection.began)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection: its pauses would be taken for the server's."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
