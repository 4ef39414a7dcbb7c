"""A request on the event loop's side, from being asked to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agora.errors import BackendTimeout
from experts.engine.jobs import Event, Job, Mailbox
from experts.engine.registry import Registered


class Work:
    """One request.

    Attributes:
        adapter: The adapter it uses, or None.
        mailbox: Where its events arrive.
        job: What the worker got, once the prompt is tokenised.
        over: Set when nobody waits for it any more.

    Args:
        backend: The backend's name, for errors.
        adapter: The adapter it uses, or None.
        timeout_s: Seconds it may take from now, or None.
    """

    def __init__(self, backend: str, adapter: Registered | None, timeout_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        self.adapter = adapter
        self.mailbox = Mailbox()
        self.job: Job | None = None
        self.over = asyncio.Event()
        self._backend = backend
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else loop.time() + timeout_s

    async def event(self) -> Event:
        """What comes next.

        Raises:
            AgoraError: What the worker sent instead.
            BackendTimeout: If the time is over.
        """
        async with self.in_time():
            return await self.mailbox.next()

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Raises `BackendTimeout` if the block goes on past the request's deadline."""
        try:
            async with asyncio.timeout_at(self._deadline):
                yield
        except TimeoutError:
            raise BackendTimeout(
                f"no answer within {self._timeout_s:g} s, waiting for a free row included",
                backend=self._backend,
                hint="allow more time, ask for fewer tokens, or ask another backend",
            ) from None
