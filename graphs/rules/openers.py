"""How sentences begin: "And then …", "Could you please …", "If …, ", "Find …"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from graphs.rules.lexicon import LAST, LEADS, SEQUENCE, TASKS, WH, vocabulary
from graphs.rules.text import words

CONDITION: Final = re.compile(
    r"(?:if|given|when|assuming|suppose|supposing|in|on|at|for|of|with|from|considering|using|according to|among|"
    r"regarding|as|because|since|after|before|based on)\b",
    re.IGNORECASE,
)
"""What begins a clause that stands before the question proper: "If it rains, what should I do?"."""

CUES: Final = "|".join(sorted({*SEQUENCE, *LAST, "also", "after that"}, key=len, reverse=True))
"""Openers that say where in the order a request comes, as alternatives of a regular expression."""

_POLITE = re.compile(
    r"(?:please|kindly|(?:can|could|would|will) you(?: please| kindly)?|i(?:'d| would) (?:like|love|want)(?: you)? to"
    r"(?: know)?|i (?:want|need)(?: you)? to(?: know)?|i(?: am|'m) wondering|i wonder|let me know|help me(?: to)?|"
    r"do you know|we need to(?: know)?)[ ,]+",
    re.IGNORECASE,
)
_LEAD = re.compile(
    rf"(?:{'|'.join(sorted({*LEADS, *SEQUENCE, *LAST, 'after that'}, key=len, reverse=True))})\b[, ]+", re.IGNORECASE
)
_AFTER_NOUN = vocabulary("of is are was were and or has had by from")


@dataclass(frozen=True, slots=True)
class Opened:
    """A text without its openers.

    Attributes:
        body: What is left.
        after: The openers said "after the one before".
        last: The openers said "after everything before".
    """

    body: str
    after: bool = False
    last: bool = False


def strip_leads(text: str) -> Opened:
    """Takes openers such as "and then" off, three at most."""
    after = last = False
    for _ in range(3):
        m = _LEAD.match(text)
        if m is None or m.end() == len(text):
            break
        said = m[0].strip(" ,").lower()
        after = after or said in SEQUENCE or said == "after that"
        last = last or said in LAST
        text = text[m.end() :]
    return Opened(text, after, last)


def strip_polite(text: str) -> str:
    """Takes "could you please" off."""
    m = _POLITE.match(text)
    return text if m is None else text[m.end() :]


def first_words(text: str) -> tuple[str, str]:
    """The first two words in lower case, empty where there are none."""
    found = [w[0].lower() for _, w in zip(range(2), words(text), strict=False)]
    first, second, *_ = (*found, "", "")
    return first, second


def begins_request(text: str) -> bool:
    """Whether it begins with a verb that asks for something: "Find the …", not "Plan of the …"."""
    first, second = first_words(text)
    if first == "say":
        return second in WH
    return first in TASKS and bool(second) and second not in _AFTER_NOUN
