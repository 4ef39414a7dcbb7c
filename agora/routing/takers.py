"""Who can take a subtask at all: modality and context length decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from agora.errors import NoExpert
from agora.square import Expert, Square
from agora.types import Subtask

CHARS_PER_TOKEN: Final = 6.5
"""Characters of one token, at most. Of ~2,900 English texts (instructions, abstracts, maths, multitask prompts) 99 %
have fewer under SmolLM2's tokenizer (median 3.9–5.6), so who is left out by this could really not have read it all."""


def takers(subtask: Subtask, question: str, square: Square) -> tuple[tuple[Expert, ...], tuple[tuple[str, str], ...]]:
    """Tells those who can take the subtask from those who cannot.

    Args:
        subtask: What to solve.
        question: Its question with the inputs filled in.
        square: Who is here.

    Returns:
        The experts who can, in the order they came; and (name, reason) of those who cannot, the pinned expert among
        them if it is not here.

    Raises:
        NoExpert: If nobody can.
    """
    able: list[Expert] = []
    excluded: list[tuple[str, str]] = []
    if subtask.expert is not None and square.get(subtask.expert) is None:
        excluded.append((subtask.expert, "named by the plan, but not here"))
    for expert in square:
        reason = next(filter(None, (check(expert, subtask, question) for check in _CHECKS)), None)
        if reason is None:
            able.append(expert)
        else:
            excluded.append((expert.name, reason))
    if able:
        return tuple(able), tuple(excluded)
    if not len(square):
        raise NoExpert(
            f"nobody can take subtask {subtask.id!r}: the square is empty", hint="let at least one expert join"
        )
    reasons = "; ".join(f"{name}: {reason}" for name, reason in excluded)
    raise NoExpert(
        f"nobody can take subtask {subtask.id!r}: {reasons}",
        hint="add an expert that can, or change the subtask",
    )


def _modality(expert: Expert, subtask: Subtask, question: str) -> str | None:
    if subtask.modality in expert.card.modalities:
        return None
    return f"takes {' and '.join(expert.card.modalities)}, not {subtask.modality}"


def _context(expert: Expert, subtask: Subtask, question: str) -> str | None:
    known = (expert.card.context_tokens, expert.backend.capabilities.max_context)
    context = min((n for n in known if n is not None), default=None)
    if context is None:
        return None
    answer = min(n for n in (subtask.max_tokens, expert.card.max_tokens) if n is not None)
    needed = int((len(question) + len(expert.system_prompt or "")) / CHARS_PER_TOKEN) + answer
    if needed <= context:
        return None
    return f"its context of {context:,} tokens is too short for at least {needed:,} of question and answer"


_CHECKS: Final[tuple[Callable[[Expert, Subtask, str], str | None], ...]] = (_modality, _context)
