"""Asking for a plan, and for one answer of the parts: the two ways besides a crew by which a run's texts leave.

Labels hold here as they do there, and personal data is replaced before and put back after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from agora.types import Answer, Budget, Outcome, TaskGraph, Tier
from experts.passage import bounded
from graphs.departure import Departure
from graphs.plan import Plan, Planner
from graphs.plan_within import plan_within
from graphs.spend import Spend
from graphs.synthesise import Synthesiser

_BETWEEN: Final = "\n\0\1\0\n"
"""What stands between texts that are redacted together: no personal data goes on behind it."""


async def plan_outside(
    planner: Planner,
    question: str,
    *,
    reach: Tier,
    departure: Departure | None,
    spend: Spend,
    timeout_s: float | None = None,
    budget: Budget | None = None,
) -> Plan:
    """`plan_within`, by a planner that does not see what is personal unless it asks nobody.

    Args:
        planner: Makes the task graph.
        question: What to plan.
        reach: The highest tier whose machines may see the question.
        departure: What is done to a text before it leaves this machine's tier.
        spend: The run's spending, by which the run is known.
        timeout_s: As for `Planner.plan`.
        budget: As for `Planner.plan`.

    Raises:
        AgoraError: If the planner fails.
    """
    with bounded(reach):
        if departure is None or getattr(planner, "asks_nobody", False):
            return await plan_within(planner, question, reach=reach, timeout_s=timeout_s, budget=budget)
        redacted = await departure.redact(question, spend=spend)
        plan = await plan_within(planner, redacted.text, reach=reach, timeout_s=timeout_s, budget=budget)
    if not redacted.replaced:
        return plan
    graph = TaskGraph(tuple(replace(s, question=redacted.restore(s.question)) for s in plan.graph.subtasks))
    return replace(plan, graph=graph, notes=tuple(map(redacted.restore, plan.notes)))


async def synthesise_outside(
    synthesiser: Synthesiser,
    question: str,
    graph: TaskGraph,
    outcomes: Mapping[str, Outcome],
    *,
    departure: Departure | None,
    spend: Spend,
    max_tokens: int | None = None,
    timeout_s: float | None = None,
) -> Answer:
    """`Synthesiser.synthesise`, by an expert who does not see what is personal unless it is on the end tier.

    Args:
        synthesiser: Makes one answer of the parts.
        question: The whole question.
        graph: The subtasks.
        outcomes: What came of each.
        departure: What is done to a text before it leaves this machine's tier.
        spend: The run's spending, by which the run is known.
        max_tokens: As for `Synthesiser.synthesise`.
        timeout_s: As for `Synthesiser.synthesise`.
    """
    with bounded(graph.reach):
        expert = synthesiser.asks
        if departure is None or expert is None or expert.card.tier is Tier.END:
            return await synthesiser.synthesise(question, graph, outcomes, max_tokens=max_tokens, timeout_s=timeout_s)
        ids = list(outcomes)
        said = [o.text if isinstance(o, Answer) else o.message for o in outcomes.values()]
        texts = [question, *(s.question for s in graph.subtasks), *said]
        # Together: what one of them tells to be a name is one in all.
        redacted = await departure.redact(_BETWEEN.join(t.replace("\0", " ") for t in texts), spend=spend)
        asked, *others = redacted.text.split(_BETWEEN)
        questions, told = others[: len(graph.subtasks)], others[len(graph.subtasks) :]
        answer = await synthesiser.synthesise(
            asked,
            TaskGraph(tuple(replace(s, question=q) for s, q in zip(graph.subtasks, questions, strict=True))),
            {i: _saying(outcomes[i], text) for i, text in zip(ids, told, strict=True)},
            max_tokens=max_tokens,
            timeout_s=timeout_s,
        )
    notes = tuple(map(redacted.restore, answer.notes))
    if redacted.replaced:
        notes = (f"redacted before {expert.name} put the parts together: {redacted.told}", *notes)
    return replace(answer, text=redacted.restore(answer.text), notes=notes)


def _saying(outcome: Outcome, text: str) -> Outcome:
    return replace(outcome, text=text) if isinstance(outcome, Answer) else replace(outcome, message=text)
