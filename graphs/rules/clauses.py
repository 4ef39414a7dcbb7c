"""Questions and requests joined in one sentence: "What is X and how does Y work?", "Find A, then translate it"."""

from __future__ import annotations

import re
from typing import Final

from graphs.rules.lexicon import AUX, PRONOUNS, WH, vocabulary
from graphs.rules.openers import CONDITION, CUES, begins_request, first_words, strip_leads, strip_polite
from graphs.rules.text import Span, words

MIN_WORDS: Final = 2
"""Words a clause has at least: a lone verb ("compare and contrast") is no request."""

_JOINT = re.compile(
    r"(?P<strong>\s*;\s*(?:and\s+|or\s+)?"
    rf"|,?\s+and\s+(?=(?:{CUES})\b)"
    rf"|,\s*(?=(?:{CUES})\b)"
    r"|\s+(?=then\s))"
    r"|(?P<weak>,?\s+and\s+|,?\s+but\s+)"
    r"|(?P<comma>,\s+)"
)
_COMMA = re.compile(r",\s+")
_SUBJECT = re.compile(
    r"(?:it|its|he|she|they|his|her|their|this|that|these|those|there|the|a|an|any|all|some|my|your|our|you|i|we)\b"
    r"|[A-Z\x01\"“]"
)
_PREPOSITION = re.compile(r"\A(?:in|on|at|to|for|from|by|with|of|about|under|during)\s+", re.IGNORECASE)
_SAYS_OF_WHAT = re.compile(
    r"\b(?:the|a|an|it|its|them|they|their|this|that|these|those|him|his|her|my|our|your|each|both)\b"
    r"|\s[A-Z0-9\x01\"“]|^\S+\s+(?:to|into)\b"
)
_CONTINUES = re.compile(r"\b(?:and|then)\b")
_RELATIVE = vocabulary("who which whose whom where when")
_INNER = re.compile(r"\b(?:who|whom|which|that|whose|where|when|if|whether)\b", re.IGNORECASE)
_INNER_VERB = re.compile(r"\b(?:(?:how to|to|by) [a-z]+|that|which|who|can|will|would|should)\b", re.IGNORECASE)
_EMBEDS = vocabulary("explain describe tell show state discuss outline determine find identify teach")


def split_clauses(text: str, masked: str) -> list[tuple[str, Span]]:
    """Where the clauses of a sentence are that ask something each.

    Args:
        text: One sentence.
        masked: The same, quotations and brackets hidden.

    Returns:
        The clauses, each with what it needs before it: a shared condition, or the verb of "explain what … and how …".
        One clause if the sentence asks one thing, or if that is not sure.
    """
    if masked.count("\n") > 1:
        # Lines: a list, a poem, a table.
        return [("", Span(0, len(text)))]
    begin = _after_condition(masked)
    clauses: list[tuple[str, Span]] = []
    borrowed, start = "", 0
    for joint in _JOINT.finditer(masked, begin):
        left, right = masked[max(start, begin) : joint.start()], strip_leads(masked[joint.end() :]).body
        found = _borrowed(left, right, joint.lastgroup or "", asked=bool(clauses))
        if found is None:
            continue
        clauses.append((borrowed, Span(start, joint.start())))
        borrowed, start = text[:begin] + found, joint.end()
    return [*clauses, (borrowed, Span(start, len(text)))]


def _after_condition(masked: str) -> int:
    """Where the question begins behind "If …, ": 0 if there is no such condition."""
    if CONDITION.match(masked) is None:
        return 0
    maybe = 0
    for comma in _COMMA.finditer(masked):
        rest = strip_leads(masked[comma.end() :]).body
        if not (_opens(rest) or _requests(rest)):
            continue
        first, second = first_words(rest)
        if first not in _RELATIVE:
            return comma.end()
        if second not in AUX:
            # ", which one is it?" asks; ", which cost $9 each, how many …" goes on with the condition.
            maybe = comma.end()
    return maybe


def _borrowed(left: str, right: str, joint: str, *, asked: bool) -> str | None:
    """What the right side needs from the left one to ask on its own, mostly nothing; None if they ask one thing."""
    if len(left.split()) < MIN_WORDS or len(right.split()) < MIN_WORDS:
        return None
    requests = _requests(left)
    if not (requests or asked or _opens(left)):
        return None
    if _requests(right):
        return "" if _is_another_request(left, right, joint, requests=requests) else None
    verb = _embedding(left) if requests else None
    if verb is not None and first_words(right)[0] in WH and not _inverted(right):
        # "Explain what X is and how it works".
        return verb if joint != "comma" else None
    return "" if _opens(right) and _is_another_question(left, right, joint) else None


def _is_another_request(left: str, right: str, joint: str, *, requests: bool) -> bool:
    if joint == "strong":
        return True
    if _SAYS_OF_WHAT.search(right) is None:
        # "Summarise the article and list three key points": of what, only the left side says.
        return False
    if joint == "comma":
        # A comma joins what an "and" or "then" joins too: "Find A, compute B, and report C".
        return requests and _CONTINUES.search(right) is not None
    # "Explain how to cook and serve rice": the second verb may belong to "to".
    return not requests or _INNER_VERB.search(left) is None


def _is_another_question(left: str, right: str, joint: str) -> bool:
    first, second = first_words(right)
    if joint == "strong":
        return True
    if joint == "comma":
        # "How long, in minutes, did it take?" is one question.
        return first in ("what", "how", "why") and _inverted(right) and _opens(left)
    if first in AUX:
        # "Which team plays there and has X?", "… a card that is red and has a number" go on with what they have.
        if second in ("a", "an", "any", "some", "all"):
            return first_words(left)[0] in AUX
        return second in ("it", "he", "she", "they", "there") or _inverted(left)
    if first in _RELATIVE and (first in ("when", "where") or not _inverted(right)):
        # "… the university whose campus is here and whose branches …" goes on with its own relative clause.
        own = next(words(left), None)
        return own is not None and _INNER.search(left, own.end()) is None
    return True


def _inverted(text: str) -> bool:
    """Whether an auxiliary stands near the question word, as in a question and not in a relative clause."""
    text = _PREPOSITION.sub("", text)
    found = [w[0].lower() for _, w in zip(range(8), words(text), strict=False)]
    first, second, *rest = (*found, "", "")
    if first in AUX:
        return _SUBJECT.match(text[len(first) :].lstrip()) is not None
    if first not in WH:
        return False
    if second in AUX:
        return bool(rest and rest[0])
    if first == "how" and second not in PRONOUNS | {"the", "a", "an"}:
        return any(w in AUX for w in rest)
    return first in ("what", "which", "whose") and any(w in AUX for w in rest[:3])


def _opens(text: str) -> bool:
    """Whether a question begins here."""
    text = _PREPOSITION.sub("", text)
    first, second = first_words(text)
    if first in AUX:
        return _inverted(text)
    if first in ("who", "what", "which"):
        return bool(second) and second not in ("and", "or")
    return first in WH and (_inverted(text) or second in AUX)


def _requests(text: str) -> bool:
    return begins_request(strip_polite(text))


def _embedding(left: str) -> str | None:
    """The verb of "Explain what X is", to be said again before "how it works"."""
    body = strip_polite(left)
    found = [w for _, w in zip(range(4), words(body), strict=False)]
    if not found or found[0][0].lower() not in _EMBEDS:
        return None
    wh = next((w for w in found[1:] if w[0].lower() in WH), None)
    at = len(left) - len(body)
    return None if wh is None else left[at : at + wh.start()]
