"""What a run tells of itself while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Doing:
    """What is being done before training starts, or after it has ended."""

    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """Something that the user should know, and that stops nothing."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """Training starts.

    Attributes:
        clients: Names of those that take part.
        resumed: Whether it goes on from a checkpoint.
        publications: Versions after which it ends; None if something else ends it.
        jobs: Jobs after which it ends; None if something else ends it.
        seconds: Virtual seconds after which it ends; None if something else ends it.
        rows: Versions made before, as in the record.
    """

    clients: tuple[str, ...]
    resumed: bool
    publications: int | None
    jobs: int | None
    seconds: float | None
    rows: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """A training step of a client.

    Attributes:
        client: Whose job.
        model: Which model.
        step: Its number, from 1.
        steps: Of the job in all.
        loss: On the step's rows.
    """

    client: str
    model: str
    step: int
    steps: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A version was made; `row` is what the record has of it."""

    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A version was judged; `row` is what `evaluations.jsonl` has of it."""

    row: Mapping[str, Any] = field(default_factory=dict)


Told = Doing | Noted | Begun | Stepped | Made | Judged

Progress = Callable[[Told], None]
"""Takes what a run tells, on the thread that trains."""


def silent(told: Told) -> None:
    """Tells nobody."""
