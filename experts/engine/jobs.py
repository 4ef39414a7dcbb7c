"""What the event loop and the worker thread hand each other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from agora.errors import AgoraError, Unavailable
from agora.protocols import FinishReason, TokenLogprob

TREE_TOKENS: Final = 1024
"""Tokens of continuations scored side by side; more are scored in turns, so that memory stays bounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Something generated; the last piece of a request, and only it, has `finish_reason`.

    Attributes:
        text: New text.
        logprobs: Of the new tokens, if asked for.
        finish_reason: Why the generation ended.
        tokens: Tokens generated so far.
        first_token_at: When the first token was there, on `time.perf_counter`.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    tokens: int = 0
    first_token_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Marks:
    """The summed log-probability of each continuation."""

    logprobs: tuple[float, ...]


Event: TypeAlias = Piece | Marks | AgoraError


class Mailbox:
    """Where a request's events arrive on the event loop it came from."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """Called on the loop."""
        self._events.put_nowait(event)

    async def next(self) -> Event:
        """The next event.

        Raises:
            AgoraError: If the event is one.
        """
        event = await self._events.get()
        if isinstance(event, AgoraError):
            raise event
        return event


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One request for the batch.

    Attributes:
        name: The backend's, for errors.
        mailbox: Where events go.
        prompt: Tokens to read; at least one.
        adapter: The engine's name of the adapter, or None.
        urgent: Whether it goes before all others and needs no free row: a health probe.
        started: Whether it has a row; set by the worker.
        cancelled: Whether nobody waits any more; set by the loop, read by the worker before every step.
    """

    name: str
    mailbox: Mailbox
    prompt: list[int]
    adapter: str | None = None
    urgent: bool = False
    started: bool = False
    cancelled: bool = False

    @property
    def most_tokens(self) -> int:
        """Tokens of memory that the request may come to need."""
        raise NotImplementedError


@dataclass(slots=True, eq=False, kw_only=True)
class GenerateJob(Job):
    """A generation.

    Attributes:
        limit: Most tokens to generate.
        temperature: 0 for greedy.
        top_p: Nucleus mass.
        seed: For the sample, or None.
        stop: Strings that end it.
        logprobs: Alternatives to tell per token, or None for no log-probabilities.
        streaming: Whether pieces are wanted as they come, or one at the end.
    """

    limit: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    streaming: bool = False

    @property
    def most_tokens(self) -> int:
        """Prompt and answer."""
        return len(self.prompt) + self.limit


@dataclass(slots=True, eq=False, kw_only=True)
class ScoreJob(Job):
    """Continuations to score after the prompt; each has at least one token."""

    continuations: list[list[int]]

    @property
    def most_tokens(self) -> int:
        """The prompt, and as many continuations side by side as are scored in one turn."""
        longest = max(len(c) for c in self.continuations)
        return len(self.prompt) + min(sum(len(c) for c in self.continuations), TREE_TOKENS + longest)


class Outbox:
    """Collects the events of a step, so that each event loop is woken once for all of them."""

    def __init__(self) -> None:
        self._mail: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, Event]]] = {}

    def post(self, job: Job, event: Event) -> None:
        """Keeps an event for the next `flush`; nobody reads a cancelled job's."""
        if not job.cancelled:
            self._mail.setdefault(job.mailbox.loop, []).append((job.mailbox, event))

    def flush(self) -> None:
        """Hands everything over."""
        mail, self._mail = self._mail, {}
        for loop, letters in mail.items():
            try:
                loop.call_soon_threadsafe(_deliver, letters)
            except RuntimeError:
                # The loop is closed: those who waited on it are gone.
                continue


def _deliver(letters: list[tuple[Mailbox, Event]]) -> None:
    for mailbox, event in letters:
        mailbox.put(event)


def closed(name: str) -> Unavailable:
    """The error of every request that meets a closed backend."""
    return Unavailable("the backend is closed", backend=name, hint="open it again")
