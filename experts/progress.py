"""How a long pull says how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress:
    """How far a pull is.

    Attributes:
        phase: What is being done, in words for people.
        done: Bytes done in this phase; may fall when a server makes a download start over.
        total: Bytes of this phase, or None where that is not known (a converter tells no bytes).
    """

    phase: str
    done: int = 0
    total: int | None = None


class ProgressCallback(Protocol):
    """Called from the pulling thread, at least once per phase, and after every block of bytes."""

    def __call__(self, progress: PullProgress, /) -> None:
        """Shows or records the progress; what it raises ends the pull."""


def silent(progress: PullProgress, /) -> None:
    """Shows nothing."""
