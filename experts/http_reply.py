"""One HTTP reply of a language-model server: read in bounded pieces, within the time that is given."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Final, NoReturn

import aiohttp

from agora.errors import BackendTimeout, BadReply, Unavailable

DRAIN_S: Final = 0.05
"""Seconds to wait for the end of a body after its last event. It comes in the same packet; where it does not, opening
a new connection is cheaper than waiting."""

_UNBOUNDED: Final = nullcontext()


class Patience:
    """How long one request may take, on the running loop's clock.

    Args:
        backend: The backend's name, for errors.
        total_s: Seconds for everything.
        first_token_s: Seconds from each try to the first token of a stream.
    """

    def __init__(self, backend: str, *, total_s: float, first_token_s: float) -> None:
        self._backend = backend
        self._clock = asyncio.get_running_loop().time
        self._total_s, self._first_token_s = total_s, first_token_s
        self.began = self._clock()
        self.until = self.began + total_s
        self._first_until = math.inf
        self._bounded = False

    def begin_try(self, *, streamed: bool) -> None:
        """Starts the time for the first token, which only a stream shows; other replies come whole."""
        self._first_until = self._clock() + self._first_token_s if streamed else math.inf

    def wait(self, *, first: bool) -> AbstractAsyncContextManager[object]:
        """Bounds a block: by the time for the first token too, if that is what the block waits for."""
        first = first and self._first_until < self.until
        if self._bounded and not first:
            return _UNBOUNDED
        return self._until(self._first_until, "first token", self._first_token_s) if first else self._whole()

    def bound(self) -> asyncio.Timeout:
        """A time-out for a whole request, in place of one for each of its steps; what it raises, `late` puts right."""
        self._bounded = True
        return asyncio.timeout_at(self.until)

    def late(self) -> BackendTimeout:
        """What is told when the time of the whole request was up."""
        return BackendTimeout(f"no complete reply within {self._total_s:g} s", backend=self._backend)

    def _whole(self) -> AbstractAsyncContextManager[None]:
        return self._until(self.until, "complete reply", self._total_s)

    @asynccontextmanager
    async def _until(self, when: float, what: str, seconds: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(when):
                yield
        except TimeoutError:
            raise BackendTimeout(f"no {what} within {seconds:g} s", backend=self._backend) from None


class Reply:
    """A successful reply whose body is still to be read, in bounded pieces.

    Leaving the `async with` block gives the connection back if the body was read to its end, and closes it if not:
    that is how the server learns that nobody wants the rest.
    """

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        patience: Patience,
        *,
        backend: str,
        limit: int,
        closing: asyncio.Event,
    ) -> None:
        self._response = response
        self._closing = closing
        self._patience = patience
        self._backend = backend
        self._limit = limit
        self._size = 0
        self._ended = False

    @property
    def content_type(self) -> str:
        """The media type, in lower case; empty if the server names none."""
        said = self._response.headers.get("Content-Type")
        if said == "application/json" or said is None:
            # The usual words need no parsing.
            return said or ""
        return self._response.content_type.lower()

    async def __aenter__(self) -> Reply:
        length = self._response.content_length
        if length is not None and length > self._limit:
            self._response.close()
            self._too_big()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._ended:
            self._response.release()
        else:
            self._response.close()

    async def read(self, *, first: bool = False) -> bytes:
        """The next piece of the body; empty at its end.

        Args:
            first: Whether the first token is still being waited for.

        Raises:
            BackendTimeout: If the time is up.
            BadReply: If the body is cut, or larger than allowed.
        """
        try:
            async with self._patience.wait(first=first):
                piece = await self._response.content.readany()
        except (aiohttp.ClientError, OSError):
            if self._closing.is_set():
                raise Unavailable("the backend was closed", backend=self._backend) from None
            raise BadReply(
                f"the connection broke after {self._size:,} bytes of the reply",
                backend=self._backend,
            ) from None
        self._size += len(piece)
        if self._size > self._limit:
            self._too_big()
        self._ended = not piece
        return piece

    async def whole(self) -> bytes:
        """The rest of the body."""
        pieces = []
        while piece := await self.read():
            pieces.append(piece)
        return b"".join(pieces)

    async def drain(self) -> None:
        """Reads the end of the body if it is there already, so that the connection can be used again."""
        try:
            async with asyncio.timeout(DRAIN_S):
                self._ended = not await self._response.content.readany()
        except (TimeoutError, aiohttp.ClientError, OSError):
            self._ended = False

    def _too_big(self) -> NoReturn:
        raise BadReply(f"the reply is larger than {self._limit:,} bytes", backend=self._backend)
