"""One copy of a request, sent on one path: its chunks, and when its first token came."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final, cast

from agora.errors import BackendTimeout, BadReply, Unavailable
from agora.protocols import Backend, Chunk, GenerateRequest

AHEAD: Final = 64
"""Chunks read ahead of whoever takes them. More would let a slow reader's answer pile up here instead of holding back
the server; with fewer the two would wait for each other at every token."""


class Copy:
    """Sends a request and keeps what comes. All of the backend's work is done in one task of its own.

    Args:
        backend: Who is asked.
        request: What is asked.
        until: Event-loop time after which nobody waits for the answer; infinite for no limit.

    Attributes:
        sent_at: When it was sent, on the event loop's clock.
        first_at: When its first token (or its end, if it has none) came; None while none has.
        ready: Done once the first token has come, or the copy has failed.
        pieces: Chunks with text so far.
        tokens: Tokens so far: each of those chunks holds at least one, and log-probabilities count them.
        error: What it failed with, once it has.
    """

    def __init__(self, backend: Backend, request: GenerateRequest, *, until: float) -> None:
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        self._backend = backend
        self._request = request
        self._until = until
        self._chunks: deque[Chunk] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._ended = False
        self.ready: asyncio.Future[None] = loop.create_future()
        self.sent_at = loop.time()
        self.first_at: float | None = None
        self.pieces = 0
        self.tokens = 0
        self.error: Exception | None = None
        self._task = loop.create_task(self._pump())

    @property
    def age_s(self) -> float:
        """Seconds since it was sent."""
        return self._clock() - self.sent_at

    @property
    def first_s(self) -> float | None:
        """Seconds to its first token, once it came."""
        return None if self.first_at is None else self.first_at - self.sent_at

    async def next(self, patience_s: float | None = None) -> Chunk | None:
        """The next chunk; None after the last one.

        Args:
            patience_s: Seconds to wait for it; None for as long as the request may take.

        Raises:
            BackendTimeout: If none comes in that time.
            Exception: What the backend failed with.
        """
        if not self._chunks and not self._ended:
            try:
                async with asyncio.timeout(patience_s):
                    await self._news.wait()
            except TimeoutError:
                raise BackendTimeout(
                    f"no further token within {patience_s:.3g} s", backend=self._backend.name
                ) from None
        if self._chunks:
            chunk = self._chunks.popleft()
            if not self._chunks and not self._ended:
                self._news.clear()
            self._room.set()
            return chunk
        if self.error is not None:
            raise self.error
        return None

    async def stop(self) -> None:
        """Breaks it off and waits until the backend has let go of it; safe to call twice."""
        self._task.cancel()
        # Not awaited directly: its cancellation is not ours.
        await asyncio.wait([self._task])

    async def _pump(self) -> None:
        try:
            await self._read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody broke it off here: the backend's own work was cancelled, e.g. since it was closed.
            self.error = Unavailable("the question was dropped", backend=self._backend.name)
        except Exception as e:
            # Whatever it is, whoever takes the chunks is to know.
            self.error = e
        finally:
            self._ended = True
            self._news.set()
            if not self.ready.done():
                self.ready.set_result(None)

    async def _read(self) -> None:
        ended = False
        try:
            async with asyncio.timeout_at(None if self._until == math.inf else self._until):
                # Backends write their streams as generators, which closing makes them free the work at once.
                stream = cast(AsyncGenerator[Chunk, None], self._backend.stream(self._request))
                async with aclosing(stream) as chunks:
                    async for chunk in chunks:
                        ended = chunk.finish_reason is not None
                        await self._keep(chunk)
        except TimeoutError:
            raise BackendTimeout("no complete reply within timeout_s", backend=self._backend.name) from None
        if not ended:
            raise BadReply("the stream broke off before its end", backend=self._backend.name)

    async def _keep(self, chunk: Chunk) -> None:
        self.pieces += bool(chunk.text)
        self.tokens += len(chunk.logprobs) or bool(chunk.text)
        if self.first_at is None:
            self.first_at = self._clock()
            self.ready.set_result(None)
        if len(self._chunks) >= AHEAD:
            self._room.clear()
            await self._room.wait()
        self._chunks.append(chunk)
        self._news.set()
