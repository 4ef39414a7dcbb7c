"""The things that a comparison compares, as they stand in the text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from graphs.rules.lexicon import PRONOUNS
from graphs.rules.steps import Step, mark
from graphs.rules.text import Name, Span, names, trimmed

MAX_THINGS: Final = 12
"""More alternatives than this are a list of data, not a comparison."""

MAX_THING_WORDS: Final = 14
"""Words of one alternative; titles of works are long, whole clauses are longer."""

OR: Final = re.compile(r"\s*,?\s+or\s+", re.IGNORECASE)
"""Between alternatives."""

AND: Final = re.compile(r"\s*,?\s+and\s+", re.IGNORECASE)
"""Between things that are taken together."""

LISTED: Final = re.compile(r"\s*,\s*(?:or\s+|and\s+)?|\s+or\s+|\s+and\s+", re.IGNORECASE)
"""Between the things of a list."""

_COMMA = re.compile(r"\s*,\s*")
_BEFORE = re.compile(r"(?:either|both|between|the following|in between)\s+", re.IGNORECASE)
_CLASS = re.compile(r"the [a-z]+s (?=[A-Z\"“])")


@dataclass(frozen=True, slots=True)
class Compared:
    """A comparison found: its things in the order of the text, and what to ask about one of them."""

    things: tuple[Name, ...]
    ask: Callable[[str], str]


def steps_of(question: str, found: Compared) -> list[Step]:
    """One question for each thing, then the whole question with each answer behind its thing."""
    return [*(Step(found.ask(t.text)) for t in found.things), with_answers(question, found.things)]


def with_answers(question: str, things: tuple[Name, ...]) -> Step:
    """The question with a mark behind each thing: the answer of the step of the same place."""
    parts: list[str] = []
    at = 0
    for n, t in enumerate(things):
        parts += [question[at : t.end], f" ({mark(n)})"]
        at = t.end
    return Step("".join([*parts, question[at:]]))


def listed(question: str, masked: str, start: int, end: int, *, joint: re.Pattern[str]) -> tuple[Name, ...] | None:
    """The things in a stretch of text: "A or B", "A, B, or C". None if they are too many, too long, or the same."""
    piece = masked[start:end]
    cuts = list(joint.finditer(piece))
    if not cuts:
        return None
    if joint is OR and len(cuts) == 1 and piece[cuts[0].start() :].lstrip().startswith(","):
        # "A, B, or C". Without the comma before "or", a comma belongs to a title: "Sex, Lies or Videotape".
        cuts = [*_COMMA.finditer(piece[: cuts[0].start()]), cuts[0]]
    edges = [(0, 0), *((m.start(), m.end()) for m in cuts), (len(piece), 0)]
    found: list[Name] = []
    for (_, left), (right, _) in pairwise(edges):
        name = _bare(question, trimmed(question, start + left, start + right))
        if not name.text or len(name.text.split()) > MAX_THING_WORDS:
            return None
        found.append(name)
    distinct = len({n.key for n in found}) == len(found)
    return tuple(found) if 2 <= len(found) <= MAX_THINGS and distinct else None


def _bare(question: str, span: Span) -> Name:
    """A thing without the "either", "both" or "between" before it and the marks around it."""
    m = _BEFORE.match(question, span.start, span.end)
    start = m.end() if m else span.start
    end = start + len(question[start : span.end].rstrip(" ?.,;:!"))
    while start < end and question[start] in ",:;- ":
        start += 1
    return Name(start, end, question[start:end])


def names_around(question: str, masked: str, joint: re.Match[str]) -> tuple[Name, Name] | None:
    """The names that end and begin at a joint."""
    found = names(question, masked)
    left = next((n for n in found if n.end == joint.start()), None)
    right = next((n for n in found if n.start == joint.end()), None)
    return None if left is None or right is None else (left, right)


def pair_before(question: str, masked: str, start: int, end: int) -> tuple[tuple[Name, ...], str] | None:
    """The two things of "A and B VP" where nothing but B itself tells its end; and the VP.

    Returns:
        None unless B is a name, or one plain word.
    """
    found = names(question, masked)
    ands = [a for a in AND.finditer(masked, start, end) if len(masked[start : a.start()].split()) <= MAX_THING_WORDS]
    best = [a for a in ands if any(n.start == a.end() for n in found)]
    if not ands or (len(ands) > 1 and len(best) != 1):
        return None
    joint = best[0] if best else ands[0]
    right = next((n for n in found if n.start == joint.end()), None)
    if right is None:
        word = re.compile(r"[^\s,?]+").match(masked, joint.end(), end)
        if word is None or word[0].lower() in PRONOUNS | {"a", "an", "the"}:
            return None
        right = Name(word.start(), word.end(), question[word.start() : word.end()])
    left = _bare(question, trimmed(question, start, joint.start()))
    if not left.text or not plain(left):
        return None
    said = question[right.end : end].strip(" ?")
    if not said and len(right.text.split()) > 2:
        # "Are both A B and C D American": a capitalised predicate is no part of the name.
        shorter = right.text.rsplit(" ", 1)[0]
        said = right.text[len(shorter) :].strip()
        right = Name(right.start, right.start + len(shorter), shorter)
    return without_class((left, right)), said


def without_class(things: tuple[Name, ...]) -> tuple[Name, ...]:
    """ "the operas Vanessa" → "Vanessa": the class before the first of several names belongs to all of them."""
    first = things[0]
    m = _CLASS.match(first.text)
    if m is None:
        return things
    return (Name(first.start + m.end(), first.end, first.text[m.end() :]), *things[1:])


def plain(thing: Name) -> bool:
    """Whether it can stand for one thing: no pronoun at its front."""
    return thing.text.split()[0].lower() not in PRONOUNS


def is_plural(thing: str) -> bool:
    """Whether a thing is written as several: "eagles", but no name."""
    last = thing.split()[-1]
    return thing[0].islower() and last.endswith("s") and not last.endswith(("ss", "us", "is"))
