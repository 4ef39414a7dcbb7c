"""What a planner is and makes: from a question to a task graph.

A plan's subtasks are called `t1`, `t2`, … and refer to the answer of an input as `#t1`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, Protocol, runtime_checkable

from agora.errors import InvalidPlan, InvalidRequest
from agora.types import Budget, Subtask, TaskGraph, Tier, Usage, checked_question

QUESTION: Final = "{question}"
"""What stands for the query in the subtasks of a `StaticPlanner`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A task graph, and how it came about.

    Attributes:
        graph: What to solve.
        planner: Registry name of the planner that made it. After a fall-back, the one fallen back to.
        notes: What the reader should know, e.g. that the plan is not the one asked for and why.
        usage: What planning cost.
    """

    graph: TaskGraph
    planner: str
    notes: tuple[str, ...] = ()
    usage: Usage = field(default_factory=Usage)


class Planner(Protocol):
    """Turns a question into a task graph. One that shows the question to nobody may say so: `asks_nobody = True`."""

    @property
    def name(self) -> str:
        """Its name in `PLANNERS`."""

    async def plan(self, question: str, *, timeout_s: float | None = None, budget: Budget | None = None) -> Plan:
        """Makes the plan.

        Args:
            question: The user's query.
            timeout_s: Seconds it may take, or None for as long as it needs.
            budget: Money and tokens it may spend, or None for no limit.

        Raises:
            InvalidRequest: If the question cannot be asked (empty, too long, not Unicode).
            InvalidPlan: If a plan given by the caller is not valid.
        """


@runtime_checkable
class BoundedPlanner(Planner, Protocol):
    """A planner that can be told how far up the question may go. Others are not asked where that is bounded."""

    async def plan_within(
        self, question: str, *, reach: Tier, timeout_s: float | None = None, budget: Budget | None = None
    ) -> Plan:
        """As `plan`, showing the question to nobody above `reach`."""


class StaticPlanner:
    """A fixed plan, whatever the question.

    `{question}` in a subtask's question stands for the query:

        >>> import asyncio
        >>> planner = StaticPlanner([
        ...     Subtask(id="t1", question="Which facts matter to answer this? {question}"),
        ...     Subtask(id="t2", question="{question} Known: #t1", inputs=("t1",)),
        ... ])
        >>> [s.question for s in asyncio.run(planner.plan("Is tea healthy?")).graph]
        ['Which facts matter to answer this? Is tea healthy?', 'Is tea healthy? Known: #t1']

    Args:
        plan: A task graph, its subtasks, or a function that makes either of a question. What a function returns is
            taken as it is: it has seen the question.

    Raises:
        InvalidPlan: If the subtasks do not make a valid graph.
    """

    name = "static"
    asks_nobody = True

    def __init__(self, plan: TaskGraph | Sequence[Subtask] | Callable[[str], TaskGraph | Sequence[Subtask]]) -> None:
        self._make = plan if callable(plan) else None
        self._graph = None if callable(plan) else _graph(plan)

    async def plan(self, question: str, *, timeout_s: float | None = None, budget: Budget | None = None) -> Plan:
        """The fixed plan with the query filled in; takes no time worth limiting.

        Raises:
            InvalidRequest: If the question cannot be asked.
            InvalidPlan: If the function given returned no valid graph, or a subtask with the query is too long.
        """
        checked_question(question)
        if self._make is not None:
            return Plan(graph=_graph(self._make(question)), planner=self.name)
        assert self._graph is not None
        return Plan(graph=TaskGraph(tuple(_filled(s, question) for s in self._graph.subtasks)), planner=self.name)

    async def plan_within(
        self, question: str, *, reach: Tier, timeout_s: float | None = None, budget: Budget | None = None
    ) -> Plan:
        """`plan`, which shows the question to nobody."""
        return await self.plan(question)


class WholePlanner:
    """Leaves every question whole: one subtask, in the user's words."""

    name = "none"
    asks_nobody = True

    async def plan(self, question: str, *, timeout_s: float | None = None, budget: Budget | None = None) -> Plan:
        """The one subtask; takes no time worth limiting.

        Raises:
            InvalidRequest: If the question cannot be asked.
        """
        return Plan(graph=TaskGraph((Subtask(id="t1", question=checked_question(question)),)), planner=self.name)

    async def plan_within(
        self, question: str, *, reach: Tier, timeout_s: float | None = None, budget: Budget | None = None
    ) -> Plan:
        """`plan`, which shows the question to nobody."""
        return await self.plan(question)


def _graph(plan: object) -> TaskGraph:
    if isinstance(plan, TaskGraph):
        return plan
    if isinstance(plan, Sequence) and all(isinstance(s, Subtask) for s in plan):
        return TaskGraph(tuple(plan))
    raise InvalidPlan(
        f"a static plan is a TaskGraph or a sequence of Subtask, got {type(plan).__name__}",
        hint="give either, or a function that makes one of a question",
    )


def _filled(subtask: Subtask, question: str) -> Subtask:
    if QUESTION not in subtask.question:
        return subtask
    # In the user's words "#t1" is text, not a reference: it must not be replaced by an answer.
    for i in subtask.inputs:
        question = question.replace(f"#{i}", f"# {i}")
    return replace(subtask, question=subtask.question.replace(QUESTION, question))


def _rules(**options: Any) -> Planner:
    # Imported here: the planners stand on this module.
    from graphs.rules import RulePlanner

    return RulePlanner(**options)


def _llm(*args: Any, **options: Any) -> Planner:
    from graphs.llm_planner import LLMPlanner

    return LLMPlanner(*args, **options)


PLANNERS: Final[Mapping[str, Callable[..., Planner]]] = MappingProxyType(
    {"static": StaticPlanner, "none": WholePlanner, "rules": _rules, "llm": _llm}
)
"""Name → what makes such a planner; it takes the arguments of the class."""


def make_planner(name: str, *args: Any, **options: Any) -> Planner:
    """Makes a planner by its name.

    Args:
        name: A key of `PLANNERS`.
        *args: Arguments of the planner's class.
        **options: Keyword arguments of the planner's class.

    Raises:
        InvalidRequest: If there is no planner of that name.
    """
    if name not in PLANNERS:
        raise InvalidRequest(f"there is no planner {name!r}; allowed: {', '.join(PLANNERS)}")
    return PLANNERS[name](*args, **options)
