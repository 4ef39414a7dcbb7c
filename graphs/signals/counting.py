"""The signals of an answer that calibrators and policies go by."""

from __future__ import annotations

from agora.routing.cascade.answer_features import answer_signals
from agora.routing.signals import finite
from agora.types import Answer


def signals_of(question: str, answer: Answer) -> dict[str, float]:
    """The signals that calibrators and policies go by: those that came with the answer, and what its text shows.

    Calibration and use must both take them from here: a signal that only one of them sees is worth nothing.

    Args:
        question: What the expert was asked.
        answer: What it answered, with the signals that were asked for (`graphs.signals.gather`).
    """
    return finite({**answer_signals(question, answer.text), **answer.signals})
