"""From a text to what it asks: its questions and requests, and the sentences they share."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from graphs.rules.clauses import split_clauses
from graphs.rules.kinds import Kind, is_fragment, kind_of
from graphs.rules.lexicon import DISTRIBUTED
from graphs.rules.openers import first_words, strip_leads, strip_polite
from graphs.rules.text import BLANK_LINE, Span, list_items, mask, sentences, trimmed

MAX_SENTENCE_CHARS: Final = 2_000
"""A longer sentence is not taken apart: nobody asks that way, and what a rule may cost stays small."""

_ANSWER_THESE = re.compile(
    r"\b(?:answer|do|complete|address|respond to|perform|tackle|work through|go through)\b.{0,60}"
    r"\b(?:following|these|below|questions|tasks|steps)\b",
    re.IGNORECASE,
)
_POINTS = re.compile(
    r"\b(?:the following|below|given|this (?:question|text|sentence|passage|paragraph|article|review|email|message|"
    r"code|statement|word|phrase|list|query|story|conversation|dialogue|problem))\b",
    re.IGNORECASE,
)
_EACH = re.compile(
    r"\b(?:(?:each|every one|all|any) of (?:the following|these|those)|each|the following)\b", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One thing that is asked.

    Attributes:
        text: The user's words for it.
        context: What only this one needs besides its words, e.g. "Answer in one line.".
        after: It says that it comes after the one before it ("then …").
        last: It says that it comes after everything before it ("finally …").
    """

    text: str
    context: tuple[str, ...] = ()
    after: bool = False
    last: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """What a text asks, in order, and the sentences that all of it shares."""

    asks: tuple[Ask, ...]
    context: tuple[str, ...] = ()


def read(text: str, *, limit: int) -> Asked:
    """What a text asks.

    Args:
        text: Any question.
        limit: Most asks to find; what follows the last one stays with it.
    """
    masked = mask(text)
    found = list_items(text, masked)
    if found is None:
        return _read_prose(text, masked, limit)
    before, items, after = found
    if len(items) > limit:
        items = [*items[: limit - 1], Span(items[limit - 1].start, items[-1].end)]

    def prose(span: Span) -> Asked:
        return _read_prose(span.of(text), span.of(masked), limit)

    lead, asking = before.of(text), [prose(i) for i in items]
    intro = prose(before)
    if all(a.asks for a in asking) and (not intro.asks or _ANSWER_THESE.search(lead) is not None):
        asks = [_item(i.of(text), a) for i, a in zip(items, asking, strict=True)]
        context = (lead,) if lead else ()
    elif len(intro.asks) == 1 and _distributes(lead) and not any(a.asks for a in asking):
        asks = [Ask(f"{lead.rstrip(' :.')}: {i.of(text)}") for i in items]
        context = ()
    else:
        # A list of data: options, ingredients, steps of one request.
        return Asked((Ask(text),))
    tail = prose(after)
    return Asked((*asks, *tail.asks), (*context, *tail.context))


def _item(text: str, asked: Asked) -> Ask:
    """An item of a list is one ask, however many sentences it has."""
    opened = strip_leads(text)
    return Ask(opened.body if len(asked.asks) == 1 else text, after=opened.after, last=opened.last)


def _distributes(lead: str) -> bool:
    """Whether a request means every item on its own: "Define each of these terms:"."""
    first = first_words(strip_polite(strip_leads(lead).body))[0]
    return first in DISTRIBUTED and _EACH.search(lead) is not None and lead.rstrip().endswith((":", "."))


def _read_prose(text: str, masked: str, limit: int) -> Asked:
    """The asks of running text; sentences that are none become context."""
    if _brings_material(masked):
        return Asked((Ask(text),))
    asks: list[Ask] = []
    context: list[str] = []
    pending: list[str] = []  # how to answer what was asked last, or everything
    for s in sentences(text, masked, limit=4 * limit):
        said, shown = s.of(text), s.of(masked)
        kind = kind_of(shown)
        if kind is Kind.STATEMENT:
            context.append(said)
        elif kind is Kind.DIRECTIVE:
            pending.append(said)
        elif asks and (len(asks) >= limit or (kind is Kind.QUESTION and is_fragment(shown))):
            asks[-1] = replace(asks[-1], text=f"{asks[-1].text} {said}")
        else:
            if asks:
                # "Is it so? Explain why. What about …": the instruction belongs to the question before it.
                asks[-1] = replace(asks[-1], context=(*asks[-1].context, *pending))
            else:
                context.extend(pending)
            pending = []
            asks.extend(_clauses(said, shown, limit - len(asks)))
    return Asked(tuple(asks), (*context, *pending))


def _brings_material(masked: str) -> bool:
    """Whether a request comes first and what it works on after it: "Classify this review. (blank line) I loved it."."""
    first, *rest = [p for p in BLANK_LINE.split(masked) if p.strip()] or [""]
    if not rest:
        return False
    spoken = [s.of(first) for s in sentences(first, first, limit=8)]
    kinds = {kind_of(s) for s in spoken}
    if kinds <= {Kind.STATEMENT}:
        return False
    last = spoken[-1].rstrip()
    if (last.endswith(":") or _POINTS.search(first) is not None) and _ANSWER_THESE.search(last) is None:
        return True
    # "Write a poem. (blank line) Then translate it." goes on requesting; anything else is what the request works on.
    return Kind.REQUEST in kinds and any(kind_of(p) is not Kind.REQUEST and strip_leads(p).body == p for p in rest)


def _clauses(text: str, masked: str, limit: int) -> list[Ask]:
    """The asks within one sentence."""
    clauses = split_clauses(text, masked) if len(text) <= MAX_SENTENCE_CHARS else [("", Span(0, len(text)))]
    if len(clauses) > limit:
        borrowed, rest = clauses[limit - 1]
        clauses = [*clauses[: limit - 1], (borrowed, Span(rest.start, clauses[-1][1].end))]
    asks = []
    for borrowed, s in clauses:
        opened = strip_leads(trimmed(text, s.start, s.end).of(text))
        asks.append(Ask(f"{borrowed}{opened.body}", after=opened.after, last=opened.last))
    return asks
