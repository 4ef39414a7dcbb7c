"""What a sentence does: it asks, requests, says how to answer, or tells."""

from __future__ import annotations

import re
from enum import Enum

from graphs.rules.lexicon import AUX, DIRECTIVES, TASKS, WH, vocabulary
from graphs.rules.openers import CONDITION, begins_request, first_words, strip_leads, strip_polite
from graphs.rules.text import words

_SPOKEN_VERB = re.compile(r"(?:tell|show|give|teach|find|look|help)\b", re.IGNORECASE)
_SYMBOL = re.compile(r"\S+\s*[=({\[:;]")
_ANSWERING = vocabulary("explain give provide state tell write")
_ABOUT_ANSWER = re.compile(
    r"(?:your|the (?:final )?(?:answer|response|output)\b|why\b|yes or no|step by step|\bin (?:one|two|three|a|\d+)\b"
    r" (?:word|sentence|line|paragraph)|(?:a|an|the) (?:short|brief|detailed|full|concise|long|final|single|one)\b"
    r".{0,20}(?:answer|explanation|response))",
    re.IGNORECASE,
)
_HOW_MUCH = vocabulary("many much long far old")

MAX_DIRECTIVE_CHARS = 120
"""A longer "give a short explanation of …" asks for something of its own."""


class Kind(Enum):
    """What a sentence does."""

    QUESTION = "question"
    REQUEST = "request"
    DIRECTIVE = "directive"
    STATEMENT = "statement"


def kind_of(masked: str) -> Kind:
    """What a sentence does, by how it begins and ends."""
    body = strip_leads(masked).body
    marked = masked.rstrip("\"”’') \n").endswith(("?", "？"))
    rest = strip_polite(body)
    if rest is not body:
        first = first_words(rest)[0]
        if first in DIRECTIVES:
            return Kind.QUESTION if marked and len(rest.split()) > 3 else Kind.DIRECTIVE
        if first in WH or first in TASKS or _SPOKEN_VERB.match(rest):
            return Kind.REQUEST
        return Kind.QUESTION if marked else Kind.STATEMENT
    if not first_words(body)[0] and body.isascii():
        return Kind.STATEMENT
    return Kind.QUESTION if marked else _unmarked(body)


def _unmarked(body: str) -> Kind:
    """What a sentence does that has no question mark."""
    first, second = first_words(body)
    about = len(body) <= MAX_DIRECTIVE_CHARS and _ABOUT_ANSWER.search(body) is not None
    if first in DIRECTIVES or (first in _ANSWERING and about):
        return Kind.DIRECTIVE if second else Kind.STATEMENT
    if begins_request(body) and _SYMBOL.match(body) is None:
        return Kind.REQUEST
    if first in WH and (second in AUX or (first == "how" and second in _HOW_MUCH)):
        return Kind.QUESTION
    if first in ("who", "what", "which", "whose", "why") and not body.rstrip().endswith((".", "!", ":")):
        return Kind.QUESTION
    if CONDITION.match(body) is not None and (comma := body.find(", ")) > 0:
        rest = body[comma + 2 :]
        first, second = first_words(rest)
        if begins_request(rest):
            return Kind.REQUEST
        if first in WH and second in AUX:
            return Kind.QUESTION
    return Kind.STATEMENT


def is_fragment(masked: str) -> bool:
    """Whether something with a question mark lacks all that makes a question: "Bearno's or Patxi's?", "Why?"."""
    body = strip_leads(masked).body
    found = [w[0].lower() for w in words(body)]
    if not body.isascii() and not any(w.isascii() for w in found):
        return False
    if len(found) <= 2:
        return len(found) < 2 or found[0] not in WH
    return not set(found) & (WH | AUX | TASKS)
