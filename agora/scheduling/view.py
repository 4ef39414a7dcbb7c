"""What a scheduler sees at a moment, and what it says then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from agora.scheduling.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A task that is done.

    Attributes:
        machine: Where.
        at: When.
        work: Units of work that it turned out to be.
    """

    machine: str
    at: float
    work: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A task that a machine was given: what it needs is on its way, or it waits there for a slot, or it runs.

    Attributes:
        machine: Which machine.
        there_at: When all that it needs is there.
        started: When it got a slot; None if it has none yet.
        done: Units of work done so far; one sees the tokens come.
    """

    machine: str
    there_at: float
    started: float | None = None
    done: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How things stand.

    Attributes:
        problem: What was expected of it all.
        now: Seconds from the start.
        ready: Ids of the tasks whose inputs are done and that nobody was given, in the order that they became so.
        held: Those that a machine was given, by id, in that order.
        ended: Those that are done, by id, in that order.
    """

    problem: Problem
    now: float
    ready: tuple[str, ...]
    held: Mapping[str, Held]
    ended: Mapping[str, Ended]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Who gets what now.

    Attributes:
        give: Pairs of a ready task and the machine that gets it, the most urgent first.
        look_again_at: When to be asked again though nothing happens before; None for not.
    """

    give: tuple[tuple[str, str], ...] = ()
    look_again_at: float | None = None


class Policy(Protocol):
    """Decides, whenever a task has become ready or has ended. Has a memory: one object for one problem."""

    def decide(self, view: View) -> Decision:
        """Says who gets what now."""
