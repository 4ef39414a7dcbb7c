"""The same asked of several things: "What are the capitals of A, B and C?", "How tall are A and B?"."""

from __future__ import annotations

import re
from typing import Final

from graphs.rules.lexicon import GRADES, MEASURES, ROLES, SINGULAR_AUX
from graphs.rules.steps import Step
from graphs.rules.text import QUOTED, Name, mask, names
from graphs.rules.things import with_answers

MAX_THINGS: Final = 32
"""Things one question may list; a longer list is data."""

_NOUN = r"(?:the )?(?P<noun>[a-z][a-z' -]{1,60}?) (?P<prep>of|in|for) (?P<things>[^?]+?)\s*[?.]?$"
_WHAT = re.compile(rf"(?P<wh>what|who)(?:'s| is| are| was| were) {_NOUN}", re.IGNORECASE)
_FIND = re.compile(rf"(?:please\s+)?(?:find|give|tell|list|look up|state|name)(?: me)? {_NOUN}", re.IGNORECASE)
_HOW = re.compile(r"how (?P<grade>[a-z]+) (?P<be>are|is|were|was) (?P<things>[^?]+?)\s*\??$", re.IGNORECASE)
_JOINT = re.compile(r"\s*,\s*(?:and\s+|&\s+)?|\s+and\s+|\s+&\s+", re.IGNORECASE)
_ARTICLED = re.compile(r"(?:a|an|the)\s+\S+(?:\s+\S+){0,3}$")
_ONE_ANSWER = re.compile(
    r"\b(?:difference|relationship|relation|connection|between|ratio|sum|total|combined|comparison|similarities|"
    r"differences|war|border|product|average|mean|median|factor|multiple|number|combination|union|intersection|name)s?\b",
    re.IGNORECASE,
)


def each_of(question: str) -> list[Step] | None:
    """The steps of a question that asks the same of every thing in a list.

    Args:
        question: One question, whole.

    Returns:
        One question for each thing, then the whole question with their answers. None if the things belong together
        ("the war of A and B"), or if it is not sure where each begins and ends.
    """
    masked = mask(question)
    m = _WHAT.match(masked) or _FIND.match(masked)
    if m is not None and _ONE_ANSWER.search(m["noun"]) is None:
        noun, prep = m["noun"], m["prep"]
        one = _singular(noun)
        wh = (m.groupdict().get("wh") or "what").capitalize()
        return _each(question, masked, m, f"{wh} {'is' if one else 'are'} the {one or noun} {prep}")
    m = _HOW.match(masked)
    if m is not None and m["grade"].lower() in GRADES:
        be = m["be"].lower()
        return _each(question, masked, m, f"How {m['grade'].lower()} {SINGULAR_AUX.get(be, be)}")
    return None


def _each(question: str, masked: str, m: re.Match[str], ask: str) -> list[Step] | None:
    things = _listed(question, masked, m)
    if things is None:
        return None
    return [*(Step(f"{ask} {t.text}?") for t in things), with_answers(question, things)]


def _listed(question: str, masked: str, m: re.Match[str]) -> tuple[Name, ...] | None:
    """The things of a list that ends with "and": names, titles, nouns with an article; or three and more short ones."""
    start, end = m.start("things"), m.end("things")
    joints = list(_JOINT.finditer(masked, start, end))
    if not joints or not joints[-1][0].strip(" ,"):
        return None
    things: list[Name] = []
    at = start
    # "the capital of France and the capital of Peru": the noun may be said again.
    again = re.compile(rf"the {re.escape(m['noun'])} {m['prep']} ", re.IGNORECASE) if "noun" in m.groupdict() else None
    for stop, following in [*((j.start(), j.end()) for j in joints), (end, end)]:
        if again is not None and (said := again.match(masked, at, stop)) is not None:
            at = said.end()
        shown = masked[at:stop]
        short = len(joints) >= 2 and shown[:1].isalpha() and len(shown.split()) <= 2
        if not shown.strip() or not (short or _is_thing(shown)):
            return None
        things.append(Name(at, stop, question[at:stop]))
        at = following
    if not 2 <= len(things) <= MAX_THINGS or len({t.key for t in things}) != len(things):
        return None
    return tuple(things)


def _is_thing(shown: str) -> bool:
    if shown.strip()[0] in ('"', "“", "«", QUOTED):
        return True
    # Something before it, or its first word would count as the beginning of a sentence.
    found = names(f"of {shown}", f"of {shown}")
    if len(found) == 1 and found[0].start <= 3 and found[0].end >= len(shown.rstrip()) + 3:
        return True
    return _ARTICLED.match(shown) is not None and " of " not in shown


def _singular(noun: str) -> str | None:
    """The singular of a noun that every thing has one of: "populations" → "population"; None for other nouns."""
    *before, last = noun.split()
    for one in (last, last.removesuffix("s"), f"{last[:-3]}y" if last.endswith("ies") else last):
        if one.lower() in MEASURES | ROLES or "-".join([*before, one]).lower() in MEASURES:
            return " ".join([*before, one])
    return None
