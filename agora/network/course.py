"""One request over several paths: what was tried, what it used, and how long it may still take."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from agora.errors import AgoraError, BackendTimeout, Overloaded, Unavailable
from agora.network.blame import read_nothing
from agora.network.copies import Copy
from agora.network.jobs import Job
from agora.network.wanted import wanted_at
from agora.network.ways import Way
from agora.protocols import GenerateRequest
from agora.types import Usage

CHARS_PER_TOKEN: Final = 4
"""For requests whose tokens nobody has counted yet: OpenAI's rule of thumb for English text."""

REQUEST_BYTES: Final = 700
"""Bytes of a request besides its text: the HTTP head and the fields of the body, as this library sends them."""

TOKEN_BYTES: Final = 250
"""Bytes of one streamed token: an event of OpenAI's or vLLM's API, 210 to 280 bytes with its name, id and model."""


class Course:
    """What is kept of one request while it is worked on.

    Args:
        request: What is asked.
        owner: What to call the paths together, in errors.
        typical_tokens: Tokens that answers have had of late; None while none came.

    Attributes:
        request: What is asked.
        tried: Why each way that was tried did not do, by its name.
        errors: What they failed with.
        lost: What was used by copies that did not bring the answer.
        notes: What the reader should know.
        copies: Copies that were sent.
    """

    def __init__(self, request: GenerateRequest, *, owner: str, typical_tokens: float | None = None) -> None:
        self._clock = asyncio.get_running_loop().time
        self._owner = owner
        self._typical = typical_tokens
        self.request = request
        self.began = self._clock()
        self.until = math.inf if request.timeout_s is None else self.began + request.timeout_s
        self.tried: dict[str, str] = {}
        self.errors: list[Exception] = []
        self.lost = Usage()
        self.notes: list[str] = []
        self.copies = 0
        text = request.prompt if request.prompt is not None else "".join(m.content for m in request.messages)
        self.prompt_tokens = math.ceil(len(text) / CHARS_PER_TOKEN)
        self.up_bytes = REQUEST_BYTES + len(text.encode("utf-8", "replace"))

    @property
    def left_s(self) -> float | None:
        """Seconds left; None for no limit."""
        return None if self.until == math.inf else max(0.0, self.until - self._clock())

    @property
    def job(self) -> Job:
        """What a copy sent now has to do."""
        tokens = self.request.max_tokens
        if self._typical is not None:
            tokens = min(tokens, math.ceil(self._typical))
        return Job(
            up_bytes=self.up_bytes,
            down_bytes=TOKEN_BYTES * tokens,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=tokens,
            deadline_s=self._wanted_s(),
        )

    def _wanted_s(self) -> float | None:
        """Seconds in which the answer is wanted, by its time or sooner; one that is overdue is as urgent as can be."""
        wanted = min(self.until, wanted_at())
        return None if wanted == math.inf else max(0.0, wanted - self._clock())

    def as_now(self, request: GenerateRequest) -> GenerateRequest:
        """A request with the time that is left for it."""
        left = self.left_s
        return request if left is None else replace(request, timeout_s=max(left, 1e-3))

    def gave_up(self, way: Way, error: Exception) -> None:
        """A way did not do."""
        self.tried[way.name] = error.message if isinstance(error, AgoraError) else f"{type(error).__name__}: {error}"
        self.errors.append(error)

    def lose(self, way: Way, copy: Copy) -> None:
        """Counts what a copy used that did not bring the answer: its prompt, if it was read, and what it generated."""
        if copy.first_at is None and read_nothing(copy.error):
            return
        money = self.fare(way, copy)
        self.lost += Usage(prompt_tokens=self.prompt_tokens, completion_tokens=copy.tokens, cost=money, calls=1)

    def fare(self, way: Way, copy: Copy) -> float:
        """Money that the links take for a copy's bytes."""
        return (self.up_bytes + TOKEN_BYTES * copy.pieces) / 1e6 * way.path.price_per_mb

    def late(self) -> BackendTimeout:
        """The error of a request whose time is up."""
        why = "".join(f"; {name}: {said}" for name, said in self.tried.items())
        return BackendTimeout(f"no complete reply within {self.request.timeout_s:.3g} s{why}", backend=self._owner)

    def failure(self, reasons: str) -> Exception:
        """The error that stands for all of them once no way is left."""
        if self.errors and all(isinstance(e, Overloaded) for e in self.errors):
            waits = [e.retry_after_s for e in self.errors if isinstance(e, Overloaded) and e.retry_after_s is not None]
            return Overloaded(
                f"every path is full: {reasons}", backend=self._owner, retry_after_s=min(waits) if waits else None
            )
        if self.errors and all(isinstance(e, AgoraError) and not e.transient for e in self.errors):
            return self.errors[-1]
        return Unavailable(
            f"no path can be used: {reasons}", backend=self._owner, hint="see whether the machines and the links are up"
        )


Make = Callable[[Way], GenerateRequest]
"""What is asked on a way."""
