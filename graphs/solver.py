"""What solves a subtask: the part in which graphs differ. And how the steps of a solution are kept."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from agora.types import Attempt, Subtask
from graphs.spend import Spend

OnStart = Callable[[int, str, str], None]
"""Told (number of the attempt from 1, expert, why)."""

OnEnd = Callable[[int, Attempt, bool], None]
"""Told (number of the attempt, the attempt, whether it was the last)."""


class Steps(Protocol):
    """Keeps each step of a solution, so that a run that is resumed in the middle of a subtask pays nobody twice."""

    async def __call__(self, name: str, body: Callable[[], Awaitable[Attempt]]) -> Attempt:
        """Takes one step, or takes it from the record of an earlier leg. Steps must be taken one after the other.

        Args:
            name: What kind of step this is; checked against the record.
            body: Takes it, when the run's turn has come. Not called if the step is on record.

        Raises:
            StoreError: If the record is of another step.
        """


async def at_once(name: str, body: Callable[[], Awaitable[Attempt]]) -> Attempt:
    """Takes a step without keeping it; see `Steps`."""
    return await body()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One subtask to solve, and within what.

    Attributes:
        subtask: What to solve.
        question: The text to ask, inputs filled in.
        spend: The run's spending.
        deadline: Event-loop time at which to stop, or None.
        on_start: Told that somebody is asked now.
        on_end: Told of every attempt, those on record included.
        steps: Keeps the steps, where there are `Solver.most_steps`. Somebody may then only be asked in a step: there
            the run's turn is waited for, which a solution kept as a whole has before it begins.
        asker: Whose question it is: answers are shared among the questions of one asker only. None where nobody is
            told apart.
    """

    subtask: Subtask
    question: str
    spend: Spend
    deadline: float | None
    on_start: OnStart
    on_end: OnEnd
    steps: Steps = at_once
    asker: str | None = None


class Solver(Protocol):
    """Those who can be asked, and how they are chosen."""

    @property
    def most_steps(self) -> int:
        """Steps of one solution that are kept, at most; 0 if a solution is kept as a whole."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of every result should know."""

    async def solve(self, job: Job) -> tuple[Attempt, ...]:
        """Asks for one subtask until there is an answer. Never raises an `AgoraError`: failures are values.

        Args:
            job: The subtask, and within what to solve it.

        Returns:
            All attempts, at least one; the last one's outcome counts.
        """


@runtime_checkable
class Weighing(Protocol):
    """A solver that weighs an answer's being right against its cost."""

    def weighing(self, trade_off: float) -> Solver:
        """The same solver with another trade-off.

        Args:
            trade_off: Money that an answer's being right is worth.
        """
