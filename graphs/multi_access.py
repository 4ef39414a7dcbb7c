"""Multi-access collaboration: subtasks go to experts over whichever of several paths is best for them now.

The paths are below the graph: an expert's backend is an `agora.network.multipath.MultipathBackend` wherever there are
several (`experts.paths` opens them from a configuration), in every graph. What this graph adds is that its subtasks
compete for them in an order: those with the longest way to the end behind them are asked first, and each is wanted by
the time from which on it would hold up the run (`agora.scheduling`), which its choice of a path takes into account.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.pregel import Pregel

from agora.errors import InvalidRequest
from agora.network.wanted import wanted_by
from agora.routing.keywords import KeywordRouter
from agora.routing.router import Router
from agora.square import Square
from agora.types import Attempt, Budget, Subtask, TaskGraph
from graphs.crew import MAX_ATTEMPTS, Crew
from graphs.entry import MAX_PARALLEL, checked_limits, compiled
from graphs.how import How
from graphs.places import SCHEDULERS, Heft, Scheduler
from graphs.plan import Planner
from graphs.rules import RulePlanner
from graphs.solver import Job, Solver
from graphs.synthesise import SectionsSynthesiser, Synthesiser

Ends = tuple[float, Mapping[str, float]]

_ENDS: Final[ContextVar[Ends | None]] = ContextVar("agora_latest_ends", default=None)
"""Of the run that is going on here: when it was planned, on the event loop's clock, and by which share of the time that
was left then each subtask should have ended."""


def multi_access(
    square: Square,
    *,
    planner: Planner | None = None,
    router: Router | None = None,
    synthesiser: Synthesiser | None = None,
    budget: Budget | None = None,
    scheduler: str | Scheduler = "heft",
    max_parallel: int = MAX_PARALLEL,
    max_attempts: int = MAX_ATTEMPTS,
    checkpointer: BaseCheckpointSaver[Any] | None = None,
) -> Pregel[Any, Any, Any, Any]:
    """Builds the graph: plan, solve every subtask once its inputs are there and its turn has come, make one answer.

    Args:
        square: Who can be asked; those whose backend is a `MultipathBackend` over several paths.
        planner: Makes the task graph; by rules if None.
        router: Ranks experts for a subtask; by keywords if None.
        synthesiser: Makes one answer of the parts; puts them one under the other if None.
        budget: What a run may spend, unless its input says otherwise.
        scheduler: Who of those that wait for a place is next: `heft`, whoever has the longest way to the end behind it;
            `fifo`, whoever has waited longest; or a scheduler of one's own.
        max_parallel: Subtasks of one run asked at the same time.
        max_attempts: Experts asked for one subtask before it is given up; of each, every path is tried.
        checkpointer: Where finished subtasks are kept, so that a killed run can be resumed.

    Returns:
        A compiled LangGraph graph. Input `Ask`, output `Answered`; `stream_mode="custom"` yields the typed events of
        `agora.events`. Each answer tells the path it came by, and in its notes which ones could not be used.

    Raises:
        InvalidRequest: If a limit is not a positive number, or there is no such scheduler. When run: if the question
            cannot be asked.
        AgoraError: When run: if planning fails. Failing subtasks do not raise; the result says what is missing.
    """
    checked_limits(max_parallel=max_parallel, max_attempts=max_attempts)
    crew = Crew(square=square, router=router or KeywordRouter(), max_attempts=max_attempts)
    chosen = _scheduler(scheduler, square)
    timed = isinstance(chosen, Heft)
    how = How(
        crew=TimedCrew(crew) if timed else crew,
        planner=planner or RulePlanner(),
        synthesiser=synthesiser or SectionsSynthesiser(),
        budget=budget or Budget(),
        max_parallel=max_parallel,
        scheduler=Timed(chosen) if isinstance(chosen, Heft) else chosen,
    )
    return compiled(how, name="multi_access", checkpointer=checkpointer)


class Timed:
    """A scheduler that also works out by when each subtask of a run should have ended.

    Args:
        heft: Knows how long they take.
    """

    def __init__(self, heft: Heft) -> None:
        self._heft = heft

    def urgencies(self, graph: TaskGraph) -> Mapping[str, float]:
        """As those of HEFT. Asked in the run's own task: what is worked out here its subtasks inherit."""
        shares = self._heft.sub_deadlines(graph, 1.0) if len(graph) > 1 else {}
        _ENDS.set((asyncio.get_running_loop().time(), shares))
        return self._heft.urgencies(graph)

    def saw(self, attempt: Attempt) -> None:
        """Told of everyone who was asked."""
        self._heft.saw(attempt)


class TimedCrew:
    """Asks as another crew does, and says by when the answer is wanted.

    Args:
        crew: Who asks.
    """

    def __init__(self, crew: Solver) -> None:
        self._crew = crew

    @property
    def most_steps(self) -> int:
        """As the other's."""
        return self._crew.most_steps

    @property
    def notes(self) -> tuple[str, ...]:
        """As the other's."""
        return self._crew.notes

    async def solve(self, job: Job) -> tuple[Attempt, ...]:
        """As the other's."""
        with wanted_by(latest_end(job.subtask, job.deadline)):
            return await self._crew.solve(job)


def latest_end(subtask: Subtask, deadline: float | None) -> float:
    """Event-loop time from which on a subtask would hold up its run; infinite for a run without a deadline."""
    ends = _ENDS.get()
    if deadline is None:
        return float("inf")
    if ends is None:
        return deadline
    began, shares = ends
    return began + shares.get(subtask.id, 1.0) * max(0.0, deadline - began)


def _scheduler(scheduler: str | Scheduler, square: Square) -> Scheduler:
    if not isinstance(scheduler, str):
        return scheduler
    if scheduler not in SCHEDULERS:
        raise InvalidRequest(f"scheduler is {scheduler!r}; allowed: {', '.join(SCHEDULERS)}")
    return SCHEDULERS[scheduler](square)
