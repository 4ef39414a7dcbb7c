"""What shortening a text gives, and doing so beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from agora.types import Usage
from graphs.spend import Spend

T = TypeVar("T")

THREAD_CHARS: Final = 8_000
"""Characters above which a text is worked on beside the event loop: choosing from that many takes some 10 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortened:
    """A text made shorter.

    Attributes:
        text: What is left.
        notes: What the reader should know, e.g. which share was left out.
        usage: What that cost; counted in the run's spending already.
    """

    text: str
    notes: tuple[str, ...] = ()
    usage: Usage = field(default_factory=Usage)


class Shortener(Protocol):
    """Makes a text shorter, and leaves what is asked in it as it is."""

    async def shorten(self, text: str, *, spend: Spend, deadline: float | None) -> Shortened:
        """Makes a text shorter where that is needed. Never raises an `AgoraError`.

        Args:
            text: What is about to leave.
            spend: The run's spending; pays for what an expert of the end tier helps with.
            deadline: Event-loop time at which to stop, or None.
        """


async def beside(chars: int, work: Callable[[], T]) -> T:
    """Does work on a text of that many characters, in a thread if it may take long."""
    return work() if chars <= THREAD_CHARS else await asyncio.to_thread(work)
