"""Nested questions: what a description stands for is asked first, then what is asked about it.

"When was the director of Jaws born?" · "What position was held by the woman who portrayed Corliss Archer?" · "The arena
where the Maineiacs played can seat how many people?"
"""

from __future__ import annotations

import re

from graphs.rules.lexicon import AUX, PERSONS, ROLES, VAGUE, WH
from graphs.rules.steps import Step, mark
from graphs.rules.text import QUOTED, Span, mask, names, trimmed, words

_RELATIVE = (
    r"(?:,?\s+(?:who|that|which|whose|where|whom|(?:in|on|at|for|by|to|from|of) (?:which|whom))|"
    r"\s+(?:directed|written|founded|created|composed|designed|painted|invented|developed|published|produced|built|"
    r"owned|hosted|recorded|formed|discovered|born|located|based|starring|featuring|containing|named|called|known|"
    r"playing|portrayed|played|sung|performed|released|established|bought|won|led|headed|used))\b"
)
_DESCRIPTION = re.compile(rf"\bthe (?P<noun>(?:[^\s,?]+ ){{0,4}}?[^\s,?]+){_RELATIVE}", re.IGNORECASE)
_ROLE = re.compile(
    r"\bthe (?:(?:current|former|first|last|original|present|late|second|lead|main|co-) ?){0,2}"
    rf"(?P<noun>{'|'.join(sorted(ROLES))}) (?:of|for|behind) ",
    re.IGNORECASE,
)
_POSSESSED = re.compile(rf"(?:'s|’s|s'|s’) (?P<noun>{'|'.join(sorted(ROLES))})\b", re.IGNORECASE)
_TRAILING = re.compile(
    r",?\s+(?:(?:was|is|were|are|has|have|had|did|does|do)\s+)?"
    r"(?:born|located|based|founded|held|released|set|situated|published|established|built|made|formed|played|"
    r"die|died|live|lived|come from|hail from|from|known for|best known for|grow up|attend|study|work|called|"
    r"play for|played for|founded in|born in|located in|based in|known as|win|have)$",
    re.IGNORECASE,
)
_AFTER_QUOTE = re.compile(r"(?<=[\"”])\s+[a-z]+$")
_IDENTITY = re.compile(
    r"^(?:(?:what|who|which)\s+(?:is|was|are|were|'s)|what's|who's|name|tell me|find|identify|give me)"
    r"(?:\s+(?:the )?(?:full |real |first |last )?names?\s+(?:of|for))?$",
    re.IGNORECASE,
)
_NO_NOUN = WH | AUX | {"and", "or", "to", "for", "in", "on", "at", "by", "with", "from", "as", "that"}
_RELATIVE_NEXT = re.compile(
    r"\s+(?:(?:in|on|at|for|by|to|from|of) )?(?:who|that|which|whose|where|whom)\b", re.IGNORECASE
)
_JOINED = re.compile(r"\b(?:and|or)$", re.IGNORECASE)
_ASKS_INSIDE = re.compile(r"\b(?:what|which|who|whom|whose|when|where|how (?:many|much|long|old))\b", re.IGNORECASE)
_YEAR = re.compile(r"\b1\d\d\d\b|\b20\d\d\b")


def bridge(text: str) -> list[Step] | None:
    """The two steps of a nested question: what the description stands for, then the question about that.

    Args:
        text: One question, whole.

    Returns:
        None if nothing is nested, or if it is not sure where the description ends.
    """
    span = trimmed(text, 0, len(text))
    question = text[span.start : span.end]
    masked = mask(question)
    end = len(masked.rstrip(" ?.!"))
    if _ASKS_INSIDE.search(masked) is None:
        return None
    for rule in (_at_front, _at_end, _role, _possessed):
        found = rule(question, masked, end)
        if found is not None:
            inner, asked = found
            before, after = question[: inner.start], question[inner.end :]
            return [Step(asked), Step(f"{before}{mark(0)}{after}".replace(f"the {mark(0)}", mark(0)))]
    return None


def _at_end(question: str, masked: str, end: int) -> tuple[Span, str] | None:
    """ "What position was held by the woman who portrayed Corliss Archer in Kiss and Tell?"."""
    if not _begins_question(masked):
        return None
    for m in _DESCRIPTION.finditer(masked, 0, end):
        noun = m["noun"].split()
        if noun[-1].lower() in VAGUE | {"of"} or not noun[-1][0].islower() or any(w.lower() in _NO_NOUN for w in noun):
            continue
        if noun[-1].endswith("ed") or _RELATIVE_NEXT.match(masked, m.end()) is not None:
            # "the movie released that starred X": the description is torn apart.
            continue
        if not _asks_about(masked[: m.start()]):
            continue
        stop = _without_trailing(masked, m.end(), end)
        if stop <= m.end() or not _anchored(question, masked, m.end("noun"), stop):
            continue
        return Span(m.start(), stop), _identify(question[m.start() : stop], noun)
    return None


def _role(question: str, masked: str, end: int) -> tuple[Span, str] | None:
    """ "What is the population of the capital of France?", "When was the director of Jaws born?"."""
    if not _begins_question(masked):
        return None
    found = [m for m in _ROLE.finditer(masked, 0, end) if _asks_about(masked[: m.start()])]
    if not found:
        return None
    m = found[-1]
    stop = _without_trailing(masked, m.end(), end)
    if stop <= m.end() or " and " in masked[m.end() : stop]:
        return None
    definite = masked[m.end() : m.end() + 4].lower() == "the "
    if not definite and not _anchored(question, masked, m.end("noun"), stop):
        return None
    return Span(m.start(), stop), _identify(question[m.start() : stop], m["noun"].split())


def _possessed(question: str, masked: str, end: int) -> tuple[Span, str] | None:
    """ "When was Linus Torvalds' wife born?"."""
    if not _begins_question(masked):
        return None
    m = _POSSESSED.search(masked, 0, end)
    if m is None:
        return None
    owner = next((n for n in names(question, masked) if n.end == m.start() or n.end == m.start() + 1), None)
    if owner is None or not _asks_about(masked[: owner.start]):
        return None
    if not masked[m.end() : end].strip() and _IDENTITY.match(masked[: owner.start].strip()) is not None:
        return None
    return Span(owner.start, m.end()), _identify(question[owner.start : m.end()], m["noun"].split())


def _at_front(question: str, masked: str, end: int) -> tuple[Span, str] | None:
    """ "The arena where the Lewiston Maineiacs played their home games can seat how many people?"."""
    if re.match(r"(?:the|this)\s", masked, re.IGNORECASE) is None:
        return None
    asks = list(_ASKS_INSIDE.finditer(masked, 0, end))
    relative = _DESCRIPTION.match(masked) or _ROLE.match(masked)
    if not asks or relative is None or asks[-1].start() <= relative.end():
        return None
    verbs = [w for w in words(masked[: asks[-1].start()]) if w[0].lower() in AUX and w.start() > relative.end()]
    if not verbs:
        return None
    stop = len(masked[: verbs[-1].start()].rstrip(" ,"))
    noun = relative["noun"].split()
    if noun[-1].lower() in VAGUE or not _anchored(question, masked, relative.end("noun"), stop):
        return None
    return Span(0, stop), _identify(question[0].lower() + question[1:stop], noun)


def _begins_question(masked: str) -> bool:
    found = [w[0].lower() for _, w in zip(range(2), words(masked), strict=False)]
    return bool(found) and (found[0] in WH or (len(found) > 1 and found[1] in WH))


def _asks_about(before: str) -> bool:
    """Whether the question asks for more than who or what the description stands for."""
    before = before.strip()
    return (
        bool(before)
        and _IDENTITY.match(before) is None
        and _JOINED.search(before) is None
        and (
            any(w[0].lower() in AUX for w in words(before))
            or re.match(r"how (?:many|much)\b", before, re.I) is not None
        )
    )


def _without_trailing(masked: str, start: int, end: int) -> int:
    m = _TRAILING.search(masked, start, end) or _AFTER_QUOTE.search(masked, start, end)
    return m.start() if m is not None else end


def _anchored(question: str, masked: str, start: int, stop: int) -> bool:
    """Whether the description names something that it can be looked up by: a name, a title, or a year."""
    if QUOTED in masked[start:stop] or _YEAR.search(masked, start, stop) is not None:
        return True
    return any(n.start < stop and n.end > start for n in names(question, masked))


def _identify(description: str, noun: list[str]) -> str:
    head = noun[-1].lower()
    return f"{'Who' if head in PERSONS else 'What'} is {description}?"
