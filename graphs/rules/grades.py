"""What decides a comparison: "is taller" → "how tall", "was released first" → "when was it released"."""

from __future__ import annotations

import re

from graphs.rules.lexicon import GRADES, IRREGULAR_GRADES, OPPOSITES, ORDINALS, SINGULAR_AUX, vocabulary

_BE = vocabulary("is are was were")
_HAVE = vocabulary("has have had")
_BASE = {"lived": "live", "lasted": "last", "reigned": "reign", "served": "serve"}
_MORE = re.compile(
    r"\b(?:more|most|fewer|fewest|less|least|the highest number of|a higher number of)\s+", re.IGNORECASE
)
_GRADED = re.compile(r"\b(?:more|most|less|least|fewer|better|best|worse|worst)\b", re.IGNORECASE)
_TIMED = re.compile(
    r"(?P<verb>.+?)\s+(?:(?:the )?(?:first|last|earliest|latest)|earlier|later|sooner|more recently|most recently)"
    r"(?P<rest>(?:\s+.*)?)$",
    re.IGNORECASE,
)
_PHRASE = re.compile(r"\s+(?:of|in|on|for|than|to|from|with|by|at)\b")
_PLURALS = vocabulary("children people men women feet teeth mice species series")


def grade_of(text: str) -> str | None:
    """The adjective behind the first comparative or superlative: "the tallest" → "tall"."""
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in IRREGULAR_GRADES:
            return IRREGULAR_GRADES[word]
        for ending in ("er", "est"):
            if not word.endswith(ending):
                continue
            stem = word.removesuffix(ending)
            for base in (stem, f"{stem}e", stem[:-1], f"{stem[:-1]}y" if stem.endswith("i") else stem):
                if base in GRADES:
                    return base
    return None


def how_many(counted: str) -> str:
    """ "How many" or "How much", by the noun that is counted."""
    head = _PHRASE.split(counted, maxsplit=1)[0].split()
    return "How many" if head and (head[-1].endswith("s") or head[-1].lower() in _PLURALS) else "How much"


def verb_question(thing: str, said: str, *, person: bool, question: str) -> str:
    """What to ask about one thing to tell whether it is the one.

    Args:
        thing: What to ask about.
        said: What the comparison says of the right one, verb first: "was released first", "has more members",
            "is a poet".
        person: Whether it is somebody.
        question: The whole comparison, quoted where nothing better is known.
    """
    verb, _, rest = said.partition(" ")
    verb, rest = verb.lower(), rest.strip()
    known = _timed(thing, said, verb) or _amount(thing, verb, rest) or _graded(thing, verb, rest, person=person)
    if known is not None:
        return known
    if grade_of(said) is not None or _GRADED.search(said) is not None:
        return f"What should be known about {thing} to answer: {question}"
    if verb in _BE and rest:
        return f"{SINGULAR_AUX.get(verb, verb).capitalize()} {thing} {rest}?"
    return f"Is it true that {thing} {said}?"


def _graded(thing: str, verb: str, rest: str, *, person: bool) -> str | None:
    """ "is taller" → "How tall is A?", "lived longer" → "How long did A live?"."""
    adjective = grade_of(rest)
    if adjective is None:
        return None
    if verb in _BE and len(rest.removeprefix("the ").split()) <= 2:
        asked = "tall" if person and adjective == "short" else OPPOSITES.get(adjective, adjective)
        if asked == "old" and person:
            return f"When was {thing} born?"
        return f"How {asked} {SINGULAR_AUX.get(verb, verb)} {thing}?"
    if adjective == "long" and verb in _BASE:
        return f"How long did {thing} {_BASE[verb]}?"
    return None


def _timed(thing: str, said: str, verb: str) -> str | None:
    """ "was released first" → "When was A released?"."""
    m = _TIMED.match(said)
    if m is None or (m["rest"].strip() and m["rest"].split()[0].lower() not in ("in", "on", "by", "at", "as", "for")):
        return None
    before, rest = m["verb"].split(), m["rest"].rstrip()
    if before[-1].lower() in ORDINALS:
        return None
    aux = SINGULAR_AUX.get(verb, verb)
    if verb in _BE and len(before) == 1:
        return f"When was {thing}{rest}?"
    if verb in _BE or verb in ("did", "does", "do"):
        return f"When {aux} {thing} {' '.join(before[1:])}{rest}?"
    return f"When was it that {thing} {' '.join(before)}{rest}?"


def _amount(thing: str, verb: str, rest: str) -> str | None:
    """ "has more members" → "How many members does A have?", "has won more medals" → "How many medals has A won?"."""
    m = _MORE.search(rest)
    if m is None or verb not in _HAVE or not (counted := rest[m.end() :].strip()):
        return None
    how = "How many" if "number" in m[0] else how_many(counted)
    before = rest[: m.start()].strip()
    if before:
        return f"{how} {counted} {SINGULAR_AUX.get(verb, verb)} {thing} {before}?"
    return f"{how} {counted} {'did' if verb == 'had' else 'does'} {thing} have?"
