"""What each tier makes of the questions by itself: its answers, graded, and what they took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agora.types import Answer
from benchmarks.tiers_parts.experts import Tiers
from benchmarks.tiers_parts.questions import Question
from benchmarks.tiers_parts.recording import Taken

Step = Callable[[Question, bool], None]
"""Told (question, whether its answer was on disk)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One answer.

    Attributes:
        question: What was asked.
        right: Whether the answer is.
        text: The answer.
        cost: Money.
        seconds: From the question to the answer.
        cpu_seconds: Processor time of it.
        asked: Who was asked, in order; the last one's answer need not be the one that was taken.
        taken: Whose answer this is.
    """

    question: Question
    right: bool
    text: str
    cost: float
    seconds: float
    cpu_seconds: float
    asked: tuple[str, ...]
    taken: str


async def ask_alone(
    tiers: Tiers, tier: str, questions: Sequence[Question], *, step: Step | None = None
) -> list[Judged]:
    """Asks one tier all questions, one after another.

    Raises:
        BackendError: If an answer cannot be had.
    """
    expert, backend = tiers.expert(tier), tiers.backends[tier]
    judged = []
    for question in questions:
        already = len(backend.taken)
        answer = await expert.ask(question.text)
        (taken,) = backend.taken[already:]
        judged.append(_judged(question, answer, [taken], tier))
        if step is not None:
            step(question, taken.recorded)
    return judged


def _judged(question: Question, answer: Answer, taken: Sequence[Taken], tier: str) -> Judged:
    return Judged(
        question=question,
        right=question.grade(answer.text),
        text=answer.text,
        cost=answer.usage.cost,
        seconds=sum(t.seconds for t in taken),
        cpu_seconds=sum(t.cpu_seconds for t in taken),
        asked=(tier,),
        taken=tier,
    )
