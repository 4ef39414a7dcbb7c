"""Planning a question that may not go everywhere: only with a planner that can be told so."""

from __future__ import annotations

from dataclasses import replace

from agora.types import Budget, Tier, label_of
from graphs.plan import BoundedPlanner, Plan, Planner
from graphs.rules import RulePlanner


async def plan_within(
    planner: Planner, question: str, *, reach: Tier, timeout_s: float | None = None, budget: Budget | None = None
) -> Plan:
    """Makes a plan without showing the question to anybody above `reach`.

    A planner that cannot be told how far the question may go is not asked where that is bounded: the rules plan then,
    and a note says so.

    Args:
        planner: Makes the task graph.
        question: What to plan.
        reach: The highest tier whose machines may see the question.
        timeout_s: As for `Planner.plan`.
        budget: As for `Planner.plan`.

    Returns:
        The plan, its subtasks labelled with how far they may go.

    Raises:
        AgoraError: If the planner fails.
    """
    if reach is Tier.CLOUD:
        plan = await planner.plan(question, timeout_s=timeout_s, budget=budget)
    elif isinstance(planner, BoundedPlanner):
        plan = await planner.plan_within(question, reach=reach, timeout_s=timeout_s, budget=budget)
    else:
        plan = await RulePlanner().plan(question)
        note = (
            f"planner {planner.name!r} cannot be told that the question may go no further than {label_of(reach)}; "
            f"planned by {plan.planner}"
        )
        plan = replace(plan, notes=(note, *plan.notes))
    graph = plan.graph.bounded(reach)
    return plan if graph is plan.graph else replace(plan, graph=graph)
