"""The planner that needs no model: it splits a question by how it is written."""

from __future__ import annotations

from typing import Final

from agora.errors import InvalidRequest
from agora.types import MAX_SUBTASKS, Budget, Tier, checked_question
from graphs.plan import Plan
from graphs.rules.asks import Ask, Asked, read
from graphs.rules.quantity import figures
from graphs.rules.steps import Step, fits, literal, to_graph
from graphs.rules.story import is_story
from graphs.rules.weave import TAKERS, take_apart, weave

NAME: Final = "rules"


class RulePlanner:
    """Splits a question into parts by rules: fast, deterministic, no model.

    It finds several questions in one text (sentences, lists, "and", "then"), words that stand for an earlier answer
    ("its", "the result"), comparisons, figures of several things, and nested questions. The rules are for English; what
    they do not understand stays one subtask with the whole question.

    Args:
        max_subtasks: Most subtasks in a plan. What is too much is left in the last one, and `notes` say so.

    Raises:
        InvalidRequest: If `max_subtasks` is not between 1 and `MAX_SUBTASKS`.
    """

    name = NAME
    asks_nobody = True

    def __init__(self, *, max_subtasks: int = MAX_SUBTASKS) -> None:
        if not 1 <= max_subtasks <= MAX_SUBTASKS:
            raise InvalidRequest(f"max_subtasks is {max_subtasks}; allowed: 1 to {MAX_SUBTASKS}")
        self._max = max_subtasks

    async def plan(self, question: str, *, timeout_s: float | None = None, budget: Budget | None = None) -> Plan:
        """Makes the plan. That takes a millisecond or less: there is nothing to wait for, and no limit to keep.

        Raises:
            InvalidRequest: If the question cannot be asked.
        """
        return self.split(question)

    async def plan_within(
        self, question: str, *, reach: Tier, timeout_s: float | None = None, budget: Budget | None = None
    ) -> Plan:
        """`plan`, which shows the question to nobody."""
        return self.split(question)

    def split(self, question: str) -> Plan:
        """`plan`, without an event loop.

        Raises:
            InvalidRequest: If the question cannot be asked.
        """
        checked_question(question)
        asked = read(question, limit=self._max + 1)
        notes: tuple[str, ...] = ()
        if len(asked.asks) > self._max > 1:
            asked = _merged(asked, self._max)
            notes = (f"the question has more than {self._max} parts; the last subtask has the rest",)
        if len(asked.asks) < 2 or self._max == 1 or is_story(asked):
            steps = self._one(question, asked)
        else:
            steps = weave(asked, most=self._max)
        if not fits(steps):
            steps = [Step(question)]
            notes = ("the question has several parts but is too long to repeat what they share; it stays whole",)
        return Plan(graph=to_graph(steps), planner=self.name, notes=notes)

    def _one(self, question: str, asked: Asked) -> list[Step]:
        """The steps of a text that asks one thing: what a rule takes it apart into, else the text as it is."""
        # With sentences around the question, only figures: those sentences may say what the question is about.
        steps = None
        if len(asked.asks) == 1:
            steps = take_apart(literal(question), (figures,) if asked.context else TAKERS)
        return steps if steps is not None and len(steps) <= self._max else [Step(question)]


def _merged(asked: Asked, most: int) -> Asked:
    rest = asked.asks[most - 1 :]
    last = Ask(
        " ".join(a.text for a in rest),
        context=tuple(c for a in rest for c in a.context),
        after=rest[0].after,
        last=rest[0].last,
    )
    return Asked((*asked.asks[: most - 1], last), asked.context)
