"""By when an answer is wanted, where that is sooner than the time after which nobody waits for it any more.

The time-out of a request ends it. A wish only guides the choice of a path: a subtask with much behind it takes a fast
one where one that nobody waits for may take the cheap one, and neither is broken off for being later than hoped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

_WANTED: Final[ContextVar[float]] = ContextVar("agora_wanted_by", default=math.inf)


@contextmanager
def wanted_by(when: float) -> Iterator[None]:
    """Everything asked in this block, and in tasks begun in it, is wanted by that time.

    Args:
        when: Event-loop time; what an outer block says counts where it is sooner.
    """
    token = _WANTED.set(min(when, _WANTED.get()))
    try:
        yield
    finally:
        _WANTED.reset(token)


def wanted_at() -> float:
    """Event-loop time by which what is asked here is wanted; infinite for no wish."""
    return _WANTED.get()
