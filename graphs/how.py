"""What goes into a graph, and what all its runs share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

from agora.types import Budget
from graphs.departure import Departure
from graphs.places import Fifo, Scheduler
from graphs.plan import Planner
from graphs.solver import Solver
from graphs.synthesise import Synthesiser


class Ask(TypedDict, total=False):
    """What goes into the graph. All but `question` may be left out; keys of a larger state are ignored.

    What was said before the question is told to whoever is asked for a part of it; only the question is planned over.
    `reach` says how far up question and what was said before may go, and with them every part of it: `local`, `edge` or
    `cloud` (see `agora.types.reach`).
    """

    question: str
    said_before: str
    budget: dict[str, Any]
    reach: str


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """What all runs of one graph share.

    Attributes:
        crew: Who can be asked, and how they are chosen.
        planner: Makes the task graph.
        synthesiser: Makes one answer of the parts.
        budget: What a run may spend, unless its input says otherwise.
        max_parallel: Subtasks asked at the same time.
        scheduler: Which of the subtasks that wait for that are asked first.
        departure: What is done to a text before it leaves this machine's tier, whoever asks.
    """

    crew: Solver
    planner: Planner
    synthesiser: Synthesiser
    budget: Budget
    max_parallel: int
    scheduler: Scheduler = field(default_factory=Fifo)
    departure: Departure | None = None
