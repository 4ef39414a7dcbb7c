"""Whose fault an error is: that of the request, of the path, or of nobody; from it follows what is done next."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from agora.errors import (
    AdapterError,
    AgoraError,
    BackendTimeout,
    BadReply,
    DeadlineExceeded,
    LoopDetected,
    OutOfReach,
    Overloaded,
    Rejected,
    Unavailable,
)

OF_THE_PATH: Final = frozenset({401, 402, 403, 404, 405, 407, 421})
"""HTTP statuses by which a server refuses this asker or this address, not what is asked: another path may do."""


class Blame(StrEnum):
    """Whose fault it is."""

    REQUEST = "request"
    """It would fail everywhere: it is told at once."""

    PATH = "path"
    """The path or the server at its end is broken: its breaker counts it, and another path is taken."""

    NOBODY = "nobody"
    """It works, but not for this request now: another path is taken."""


def blame_of(error: Exception) -> Blame:
    """Whose fault an error is. What is no error of agora's comes from a broken backend, and is the path's."""
    if isinstance(error, Unavailable | BackendTimeout | BadReply):
        return Blame.PATH
    # Out of reach is what lies behind one path; another one may lead to a machine that may see it.
    if isinstance(error, Overloaded | AdapterError | LoopDetected | OutOfReach):
        return Blame.NOBODY
    if isinstance(error, Rejected):
        return Blame.NOBODY if error.status in OF_THE_PATH else Blame.REQUEST
    if isinstance(error, DeadlineExceeded):
        return Blame.REQUEST
    return Blame.REQUEST if isinstance(error, AgoraError) and not error.transient else Blame.PATH


def read_nothing(error: Exception | None) -> bool:
    """Whether no part of the prompt was read, so that nothing was used."""
    return isinstance(error, Unavailable | Overloaded | Rejected | AdapterError | LoopDetected | OutOfReach)
