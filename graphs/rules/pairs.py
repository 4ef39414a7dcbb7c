"""Two things side by side: "Are A and B both X?", "… of the same N?", "What do they share?", "Is A taller than B?"."""

from __future__ import annotations

import re

from graphs.rules.grades import grade_of, how_many, verb_question
from graphs.rules.lexicon import NOT_NAMES, PRONOUNS, SINGULAR_AUX
from graphs.rules.steps import Step
from graphs.rules.text import QUOTED, Name, mask, names
from graphs.rules.things import (
    LISTED,
    Compared,
    is_plural,
    listed,
    pair_before,
    plain,
    steps_of,
    without_class,
)

_TOGETHER = re.compile(
    r"(?P<aux>is|are|was|were|do|does|did|have|has|had|can|could|will|would)\s+(?P<first>both\s+)?(?P<rest>[^?]+)\??$",
    re.IGNORECASE,
)
_BOTH = re.compile(r"\s+both\s+", re.IGNORECASE)
_SHARED = re.compile(
    r"(?:what|which)\s+(?P<noun>[^?]{1,60}?)\s+(?:(?:do|does|did)|(?:is|are) (?:shared by|common to))\s+(?:both\s+)?"
    r"(?P<things>[^?]+?)(?P<end>\s+(?:both\s+)?(?:share|have in common|both have|in common))?\s*\??$",
    re.IGNORECASE,
)
_SAME = re.compile(
    r"\b(?P<prep>from|in|of|by|at|on|to|with|for|into)?\s*(?:the|that|a) same\s+"
    r"(?!time\b|way\b|as\b|thing\b)(?P<noun>[^?]+)$",
    re.IGNORECASE,
)
_IN_SITU = re.compile(
    r"(?P<things>[^?]+?)\s+(?P<be>are|were|is|was|have|share)\s+(?P<both>both\s+)?"
    r"(?P<rest>(?:[^?]*?\s)?(?:what|which|whose)\b[^?]*|located within which [^?]*)\??$",
    re.IGNORECASE,
)
_YES_NO = re.compile(r"(?P<aux>is|are|was|were|did|does|do|has|have|had)\s+(?-i:the [a-z]+ (?=[A-Z]))?", re.IGNORECASE)
_THAN = re.compile(r"\bthan\b|\b(?:before|after|prior to|earlier than|later than)\b", re.IGNORECASE)
_GRADED = re.compile(r"\b(?:more|less|fewer|longer|better|worse|[a-z]{3,}er)\b", re.IGNORECASE)
_DOES = re.compile(
    r"(?:more|less|fewer|[a-z]{3,}er|[a-z]+ed|born|made|built|sold|won|been|have|win|live|sell|weigh|cost|earn|score|come|"
    r"produce|publish|write|run|last|reign|serve|play|release|occur|happen|take|die|open|form|begin|start)\b",
    re.IGNORECASE,
)
_CLASS_BEFORE = re.compile(r"\s*(?:the [a-z]+ )?")
_NOUN_PHRASE = re.compile(
    r"(?P<noun>[^,]+?)(?P<rest>\s+(?:of|from|in|about|with|by|for|on|at|to|that|who|which|used)\b.*)?$"
)


def side_by_side(question: str) -> list[Step] | None:
    """The steps of a comparison of two things: one question for each, then the whole question with their answers.

    Args:
        question: One question, whole.

    Returns:
        None if it compares nothing, or if it is not sure what.
    """
    masked = mask(question)
    for rule in (_shared, _together, _what_both_are, _than):
        found = rule(question, masked)
        if found is not None:
            return steps_of(question, found)
    return None


def _shared(question: str, masked: str) -> Compared | None:
    """ "What N do A and B share?", "What N do A and B have in common?"."""
    m = _SHARED.match(masked)
    if m is None or (m["end"] is None and "shared by" not in masked and "common to" not in masked):
        return None
    things = listed(question, masked, m.start("things"), m.end("things"), joint=LISTED)
    if things is None or not all(_thing_like(t, masked) for t in things):
        return None
    noun = question[m.start("noun") : m.end("noun")]
    return Compared(things, lambda thing: f"What {noun} does {thing} have?")


def _together(question: str, masked: str) -> Compared | None:
    """ "Are A and B both X?", "Are both A and B X?", "Do A and B have the same N?"."""
    m = _TOGETHER.match(masked)
    if m is None:
        return None
    start, end = m.start("rest"), m.end("rest")
    same = _SAME.search(masked, start, len(masked.rstrip(" ?")))
    both = _BOTH.search(masked, start, end)
    if both is not None:
        # "A and B both X": the things end where "both" begins.
        things = listed(question, masked, start, both.start(), joint=LISTED)
        found = None if things is None else (without_class(things), question[both.end() : end].strip(" ?"))
    elif m["first"] is not None or same is not None:
        found = pair_before(question, masked, start, end)
    else:
        return None
    if found is None or not found[1] or not all(plain(t) for t in found[0]):
        return None
    things, said = found
    aux = m["aux"].lower()
    if same is not None:
        return _alike(question, things, said, same, aux)
    be = aux in ("is", "are", "was", "were")
    return Compared(
        things,
        lambda thing: (
            f"{_aux_for(aux, thing).capitalize()} {thing} {_of_one(said) if be and not is_plural(thing) else said}?"
        ),
    )


def _alike(question: str, things: tuple[Name, ...], said: str, same: re.Match[str], aux: str) -> Compared | None:
    noun = question[same.start("noun") : same.end("noun")].strip(" ?")
    prep = (same["prep"] or "").lower()
    at = said.lower().find(same[0].strip().lower())
    before = said[:at].strip(" ,") if at > 0 else ""
    if prep == "of" and not before:
        return Compared(things, lambda thing: f"What is the {noun} of {thing}?")
    if not prep:
        return Compared(things, lambda thing: f"What {noun} {_aux_for(aux, thing)} {thing} {before or 'have'}?")
    return Compared(
        things, lambda thing: " ".join(filter(None, ["Which", noun, _aux_for(aux, thing), thing, before, prep])) + "?"
    )


def _what_both_are(question: str, masked: str) -> Compared | None:
    """ "A and B are both what?", "Both A and B are located in which country?"."""
    m = _IN_SITU.match(masked)
    if m is None or (m["both"] is None and not masked.lower().startswith("both ")):
        return None
    things = listed(question, masked, m.start("things"), m.end("things"), joint=LISTED)
    if things is None or not all(_thing_like(t, masked) for t in things):
        return None
    be = {"are": "is", "were": "was", "have": "has", "share": "has"}.get(m["be"].lower(), m["be"].lower())
    rest = question[m.start("rest") : m.end("rest")].strip()
    return Compared(things, lambda thing: f"{thing} {be} {rest}?")


def _than(question: str, masked: str) -> Compared | None:
    """ "Is A taller than B?", "Was A released before B?", "Does A have more N than B?"."""
    m = _YES_NO.match(masked)
    than = list(_THAN.finditer(masked))
    if m is None or len(than) != 1:
        return None
    found = names(question, masked)
    left = next((n for n in found if n.start == m.end()), None)
    right = next((n for n in found if _CLASS_BEFORE.fullmatch(masked, than[0].end(), n.start)), None)
    if left is None or right is None or masked[right.end :].strip(" ?.!"):
        return None
    said = question[left.end : than[0].start()].strip()
    if _DOES.match(said) is None:
        return None
    aux = m["aux"].lower()
    aux = SINGULAR_AUX.get(aux, aux)
    word = than[0][0].lower()
    if word == "than":
        if _GRADED.search(said) is None:
            return None
    else:
        said = f"{said} earlier"
    if aux in ("did", "does"):
        return Compared((left, right), lambda thing: _do_question(aux, thing, said, question))
    return Compared((left, right), lambda thing: verb_question(thing, f"{aux} {said}", person=False, question=question))


def _do_question(aux: str, thing: str, said: str, question: str) -> str:
    timed = re.match(r"(?P<verb>.+?)\s+(?:earlier|later|sooner)$", said)
    if timed is not None:
        return f"When {aux} {thing} {timed['verb']}?"
    more = re.match(r"(?P<verb>\w+)\s+(?:more|fewer|less)\s+(?P<noun>.+)$", said)
    if more is not None:
        return f"{how_many(more['noun'])} {more['noun']} {aux} {thing} {more['verb']}?"
    if grade_of(said) == "long":
        return f"How long {aux} {thing} {said.split()[0]}?"
    return f"What should be known about {thing} to answer: {question}"


def _aux_for(aux: str, thing: str) -> str:
    return aux if is_plural(thing) else SINGULAR_AUX.get(aux, aux)


def _thing_like(thing: Name, masked: str) -> bool:
    """Whether it is a name, a title, or a short noun phrase with an article."""
    shown = masked[thing.start : thing.end].split()
    first = shown[0]
    if first.lower() in PRONOUNS:
        return False
    return (
        first[0] in ('"', "“", QUOTED)
        or first[0].isupper()
        or first[0].isdigit()
        or (first.lower() in ("a", "an", "the") and len(shown) <= 5)
    )


def _of_one(predicate: str) -> str:
    """A plural noun phrase as said of one thing: "American documentaries" → "an American documentary"."""
    head = _NOUN_PHRASE.match(predicate)
    if head is None:
        return predicate
    said = head["noun"].split()
    first, last = said[0].lower(), said[-1]
    if first in NOT_NAMES or first.endswith("ed") or not last.endswith("s") or last.endswith(("ss", "us", "is")):
        return predicate
    if last.endswith("ies"):
        last = last if last in ("species", "series") else f"{last[:-3]}y"
    else:
        last = last[:-2] if last.endswith(("ches", "shes", "sses", "xes")) else last[:-1]
    article = "an" if said[0][0].lower() in "aeiou" else "a"
    return f"{article} {' '.join([*said[:-1], last])}{head['rest'] or ''}"
