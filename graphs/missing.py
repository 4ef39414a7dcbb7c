"""The end of an answer: what it says of the parts that are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agora.types import Failure, Outcome, Subtask
from graphs.render import plain_question


def with_what_is_missing(
    text: str, by_id: Mapping[str, Subtask], outcomes: Mapping[str, Outcome], missing: Sequence[str]
) -> str:
    """The answer, with every part that has none named below it, and why.

    Args:
        text: The answer of the other parts.
        by_id: The subtasks.
        outcomes: What came of them.
        missing: Ids of those without an answer.
    """
    if not missing:
        return text
    lines = [f"- {plain_question(by_id[i], by_id)} ({_reason(outcomes[i])})" for i in missing]
    if not text:
        return "No part of this could be answered:\n" + "\n".join(lines)
    return f"{text}\n\nMissing from this answer:\n" + "\n".join(lines)


def _reason(outcome: Outcome) -> str:
    return outcome.message if isinstance(outcome, Failure) else ""
