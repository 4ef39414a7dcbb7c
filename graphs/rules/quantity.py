"""Figures about several things: each is asked for, then one answer is made of them.

"What is the total population of France, Spain and Italy?" · "If A's height grew by 10% and B's by 20%, which would be
taller?"
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Final

from graphs.rules.grades import grade_of
from graphs.rules.lexicon import AGGREGATES, GRADES, MEASURES
from graphs.rules.steps import Step, mark
from graphs.rules.text import Name, mask, names

MAX_THINGS: Final = 32
"""Things one question may name; the widest of the published parallel benchmarks has 8."""

_MEASURE = re.compile(
    rf"\b(?P<one>{'|'.join(sorted((m.replace('-', '[ -]') for m in MEASURES), key=len, reverse=True))})s?\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"(?<![\w.])[$€£]?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?!\d|st\b|nd\b|rd\b|th\b)|\b(?:two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|"
    r"thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|dozen|half|twice|third|quarter)\b",
    re.IGNORECASE,
)
_RELATIVE = re.compile(r"\s*(?:%|percent\b|per cent\b|times\b|-?fold\b|x\b)", re.IGNORECASE)
_YEAR_BEFORE = re.compile(r"\b(?:in|of|since|by|until|from|to|year)\s+$", re.IGNORECASE)
_COUNTED = re.compile(r"\b(?:these|those|all|both)\s+$", re.IGNORECASE)
_THE = re.compile(r"\bthe\s+$", re.IGNORECASE)
_TOGETHER = re.compile(r"\b(?:and|or|to|than|versus|vs|while|then|but)\b|[,;&/]", re.IGNORECASE)


def figures(text: str) -> list[Step] | None:
    """The steps of a question that makes one figure, or one choice, of the same figure of several things.

    Args:
        text: One question with all that is said around it.

    Returns:
        One question for each thing, then the whole text with their answers. None if the text gives figures itself (a
        story problem), or if it is not sure which figure of what is needed.
    """
    masked = mask(text)
    if not _aggregates(masked):
        return None
    things = _distinct(names(text, masked))
    if not 2 <= len(things) <= MAX_THINGS or _gives_figures(masked, things):
        return None
    if not any(_TOGETHER.search(masked, a.end, b.start) for a, b in pairwise(sorted(things, key=lambda n: n.start))):
        return None
    measure = _measure(masked)
    if measure is None:
        return None
    known = "; ".join(f"{measure} of {t.text}: {mark(n)}" for n, t in enumerate(things))
    asked = [Step(f"What is the {measure} of {_lowered(t.text)}?") for t in things]
    return [*asked, Step(f"{text.rstrip()} ({known})")]


def _aggregates(masked: str) -> bool:
    return any(w in AGGREGATES for w in re.findall(r"[a-z]+", masked.lower())) or grade_of(masked) is not None


def _distinct(found: list[Name]) -> list[Name]:
    kept: dict[str, Name] = {}
    for n in found:
        kept.setdefault(n.key, n)
    return list(kept.values())


def _lowered(name: str) -> str:
    return f"the {name[4:]}" if name[:4].lower() == "the " else name


def _gives_figures(masked: str, things: list[Name]) -> bool:
    """Whether the text states a figure of its own: then it is to be worked with, not looked up."""
    for m in _NUMBER.finditer(masked):
        if _RELATIVE.match(masked, m.end()) is not None or any(t.start <= m.start() < t.end for t in things):
            continue
        before = masked[max(0, m.start() - 12) : m.start()]
        if _COUNTED.search(before) is not None or (m[0].isalpha() and _THE.search(before) is not None):
            # "these three towers", "the two countries": how many things there are.
            continue
        if m[0].isdigit() and 1000 <= int(m[0][:5]) <= 2100 and _YEAR_BEFORE.search(before) is not None:
            continue
        return True
    return False


def _measure(masked: str) -> str | None:
    """The one figure that is asked about: the noun for it, or in a what-if what its adjective measures."""
    said = {m["one"].lower().replace("-", " ") for m in _MEASURE.finditer(masked)}
    longest = {s for s in said if not any(s != o and s in o for o in said)}
    if longest:
        return longest.pop() if len(longest) == 1 else None
    if not any(_RELATIVE.match(masked, m.end()) for m in _NUMBER.finditer(masked)):
        # "the deepest point of the Arctic Ocean" does not ask how deep the Eiffel Tower is.
        return None
    graded = {GRADES[g] for w in re.findall(r"[a-z]+", masked.lower()) if (g := _grade(w)) is not None}
    graded.discard("")
    if graded & {"length", "height"}:
        graded.discard("length or height")
    return graded.pop() if len(graded) == 1 else None


def _grade(word: str) -> str | None:
    return word if word in GRADES and word not in ("hard", "light", "old", "new", "close") else grade_of(word)
