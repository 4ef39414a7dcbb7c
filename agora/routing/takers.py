"""Who can take a subtask at all: modality, context length and the label on its data decide.

Here, and here alone, is decided how far a text may go: `beyond` says so of one expert. `takers` uses it when experts
are chosen, and whoever asks one uses it once more right before the text leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from agora.errors import NoExpert, OutOfReach
from agora.square import Expert, Square
from agora.types import ExpertCard, Subtask, Tier, label_of

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
        OutOfReach: If the plan names an expert that the subtask's label forbids to ask, or nobody can take it and
            somebody could but for the label.
        NoExpert: If nobody can.
    """
    able: list[Expert] = []
    excluded: list[tuple[str, str]] = []
    if subtask.expert is not None:
        named = square.get(subtask.expert)
        if named is None:
            excluded.append((subtask.expert, "named by the plan, but not here"))
        elif (reason := beyond(named.card, subtask.reach)) is not None:
            # Somebody else's answer is not what the plan wants; and the plan contradicts itself, which its author
            # should hear.
            raise OutOfReach(
                f"subtask {subtask.id!r} names expert {named.name!r}, which may not see it: {reason}",
                hint="name one within reach, or let the data go further",
            )
    label = False
    for expert in square:
        reason = next(filter(None, (check(expert, subtask, question) for check in _CHECKS)), None)
        if reason is None and (reason := beyond(expert.card, subtask.reach)) is not None:
            label = True
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
    message = f"nobody can take subtask {subtask.id!r}: {reasons}"
    if label:
        raise OutOfReach(message, hint="add an expert within reach, or let the data go further")
    raise NoExpert(message, hint="add an expert that can, or change the subtask")


def beyond(card: ExpertCard, reach: Tier) -> str | None:
    """Why an expert may not see a text, or None if it may.

    Args:
        card: The expert's card; its tier counts, which for one on another node covers the way there as far as it is
            known.
        reach: The highest tier whose machines may see the text.
    """
    if reach is Tier.CLOUD or card.tier.height <= reach.height:
        return None
    return f"it is on a machine of tier {card.tier}, and the data may go no further than {label_of(reach)}"


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
