"""From the parts of a question to steps: each part's own, and what ties it to the parts before it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

from graphs.rules.anaphora import Reference, find_reference, named_thing, substitute
from graphs.rules.asks import Ask, Asked
from graphs.rules.bridge import bridge
from graphs.rules.choice import choose
from graphs.rules.lexicon import AUX, WH
from graphs.rules.pairs import side_by_side
from graphs.rules.parallel import each_of
from graphs.rules.quantity import figures
from graphs.rules.steps import Step, literal, mark
from graphs.rules.text import first_word, mask, names

Taker = Callable[[str], list[Step] | None]

TAKERS: Final[tuple[Taker, ...]] = (figures, choose, side_by_side, each_of, bridge)
"""What takes one question apart; the first that can, does. Each gives the steps in order, the last one its answer."""

MAX_QUESTION_CHARS: Final = 800
"""A longer question, or one of several lines, is a text: it is not taken apart. Twice the longest of the published
benchmarks; the rules below may take time quadratic in it."""

_ASKS_LATER = re.compile(r", (?:what|which|who|when|where|why|how)\b", re.IGNORECASE)


def take_apart(text: str, takers: Sequence[Taker] = TAKERS) -> list[Step] | None:
    """The steps of one question; None if none of the rules knows how."""
    text = text.strip()
    if len(text) > MAX_QUESTION_CHARS or "\n" in text:
        return None
    return next((steps for take in takers if (steps := take(text)) is not None), None)


def weave(asked: Asked, *, most: int) -> list[Step]:
    """The steps of a text with several parts.

    Args:
        asked: The parts, and what they share. There are at most `most` of them.
        most: Most steps; parts are taken apart only while there is room.
    """
    loom = _Loom(asked, most)
    for ask in asked.asks:
        loom.add(ask)
    return loom.steps


class _Loom:
    """The steps so far, and what a later part may refer to."""

    def __init__(self, asked: Asked, most: int) -> None:
        self.steps: list[Step] = []
        self._context = literal("\n\n".join(asked.context))
        # Pronouns may stand for what the shared sentences name.
        self._sheltered = bool(self._context) and bool(names(self._context, mask(self._context)))
        self._room = most - len(asked.asks)  # for more than one step a part
        self._answers: list[int] = []  # the step that answers each part
        self._unused: list[int] = []  # answers that no later part has used
        self._anchor: int | None = None  # what a singular pronoun stands for: the answer of this step …
        self._about: str | None = None  # … or this, if the part was plainly about it

    def add(self, ask: Ask) -> None:
        """Adds the steps of the next part."""
        text = _sentence(literal(ask.text))
        reference = None
        if self._answers:
            reference = find_reference(text, sheltered=self._sheltered, after=ask.after or ask.last)
        if reference is not None and not reference.many and self._about is not None:
            said = substitute(text, reference, self._about)
            text, reference = (text, reference) if said is None else (said, None)
        if reference is None:
            self._stands_alone(text, ask)
        else:
            self._refers(text, ask, reference)
        self._answers.append(len(self.steps) - 1)
        self._unused.append(self._answers[-1])

    def _stands_alone(self, text: str, ask: Ask) -> None:
        own = None if self._context or ask.context else take_apart(text)
        if own is None or len(own) - 1 > self._room:
            own = [Step(self._with_context(text, ask))]
        self._room -= len(own) - 1
        self.steps += [s.shifted(len(self.steps)) for s in own]
        self._anchor = len(self.steps) - 1
        # Only the part right before counts: what an earlier one was about is further away than this one's answer.
        self._about = named_thing(text)

    def _refers(self, text: str, ask: Ask, reference: Reference) -> None:
        assert self._anchor is not None
        needed = [self._anchor]
        if reference.many or (ask.last and not reference.word):
            # "Compare them" with one answer left over means that one and what went into it.
            one_is_too_few = reference.compares and len(self._unused) < 2
            needed = self._answers if one_is_too_few else self._unused
        marks = "; ".join(mark(i) for i in needed)
        said = f"{text[: reference.at]} ({marks}){text[reference.at :]}"
        self._unused = [i for i in self._unused if i not in needed]
        self.steps.append(Step(self._with_context(said, ask)))
        if reference.many or ask.after or reference.word in ("this", "that", ""):
            # What comes next refers to this result, not to what it was made of.
            self._anchor = len(self.steps) - 1
            self._about = None

    def _with_context(self, text: str, ask: Ask) -> str:
        return "\n\n".join(filter(None, [self._context, text, *map(literal, ask.context)]))


def _sentence(text: str) -> str:
    """A part as a sentence of its own."""
    text = text.strip().rstrip(",;")
    if text[:1].isascii() and len(text) > 1:
        text = text[0].upper() + text[1:]
    if text[-1:].isalnum() or text[-1:] in "\"”'’)":
        text += "?" if first_word(text) in WH | AUX or _ASKS_LATER.search(text) is not None else "."
    return text
