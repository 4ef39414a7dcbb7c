"""Which of several: "Which is taller, A or B?", "Who was born first out of A and B?", "Did A or B come out first?"."""

from __future__ import annotations

import re
from typing import Final

from graphs.rules.grades import verb_question
from graphs.rules.lexicon import PERSONS, SINGULAR_AUX
from graphs.rules.steps import Step
from graphs.rules.text import Name, first_word, mask, names
from graphs.rules.things import AND, LISTED, OR, Compared, listed, names_around, steps_of

MIN_CLAUSE_WORDS: Final = 3
"""Words after "which" that can be a noun and a verb."""

_ASKS = re.compile(r"(?:which|who|what|whose|(?:in|on|at|of|from|to) (?:which|what|whose))\b", re.IGNORECASE)
_BETWEEN = re.compile(
    r"(?:(?:in |out of |of )?between |out of |of |among |from )(?P<things>[^?]+?),?\s+"
    r"(?P<head>(?:which|who|what|whose)\b[^?]*)\??$",
    re.IGNORECASE,
)
_OUT_OF = re.compile(
    r"(?P<head>(?:which|who|what)\b[^?,]*?),?\s+(?:out of|between|among|from among)\s+(?P<things>[^?]+)\??$",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(r"[,:;?]\s+|\s+[-–—]+\s+")
_VERB_AFTER = re.compile(r"\s+(?:is|are|was|were|has|have|had|came|did|does|held|won)\b", re.IGNORECASE)
_HEAD = re.compile(
    r"(?:(?:in|on|at|of|from|to) )?(?P<wh>which|who|what|whose)\b(?: (?:one|of (?:the|these|those) [^,]*?|of them))?"
    r"\s*(?P<vp>.*)$",
    re.IGNORECASE,
)
_COMPARES = re.compile(
    r"\b(?:more|most|less|least|fewer|fewest|first|last|earlier|earliest|later|latest|sooner|recently|better|best|worse|"
    r"worst|[a-z]{3,}er|[a-z]{3,}est)\b",
    re.IGNORECASE,
)
_OPINION = re.compile(r"\b(?:should|better|best|prefer|recommend|worth|would you|do you|do i|can i)\b(?! known)", re.I)
_RELATES = re.compile(
    r"\b(?:difference|similarity|similarities|differences|relationship|relation|connection|ratio|ratios|distance|link|"
    r"correlation|trade-?offs?|war|border|treaty|agreement|match|game|fight)\b",
    re.IGNORECASE,
)
_FINITE = re.compile(r"\b(?:is|are|was|were|has|have|had|does|do|did|can|could|will|would)\b", re.IGNORECASE)
_VERB = re.compile(
    r"\b(?:came|comes|won|wins|lives|began|ran|runs|sold|"
    r"made|makes|held|holds|took|takes|got|gets|contains?|covers?|belongs?|costs?|weighs?|[a-z]+ed)\b",
    re.IGNORECASE,
)


def choose(question: str) -> list[Step] | None:
    """The steps of a choice: what decides it is asked of each alternative, then the whole question with the answers.

    Args:
        question: One question, whole.

    Returns:
        None if it is no choice, if it asks for an opinion, or if it is not sure what is compared.
    """
    masked = mask(question)
    for rule in (_between, _out_of, _behind_comma, _by_names, _yes_no):
        found = rule(question, masked)
        if found is not None:
            return steps_of(question, found)
    return None


def _between(question: str, masked: str) -> Compared | None:
    """ "Between A and B, which N VP?"."""
    m = _BETWEEN.match(masked)
    if m is None or _RELATES.search(m["things"]) is not None:
        return None
    things = listed(question, masked, m.start("things"), m.end("things"), joint=LISTED)
    return None if things is None else _decided_by(question[m.start("head") : m.end("head")], things, question)


def _out_of(question: str, masked: str) -> Compared | None:
    """ "Who VP out of A and B?"."""
    m = _OUT_OF.match(masked)
    if m is None or _RELATES.search(masked) is not None or _COMPARES.search(m["head"]) is None:
        return None
    joint = OR if OR.search(m["things"]) else LISTED
    things = listed(question, masked, m.start("things"), m.end("things"), joint=joint)
    return None if things is None else _decided_by(question[: m.end("head")], things, question)


def _behind_comma(question: str, masked: str) -> Compared | None:
    """ "Which N VP, A or B?" and "Which N, A or B, VP?"."""
    if _ASKS.match(masked) is None:
        return None
    end = len(masked.rstrip(" ?.!"))
    for separator in _SEPARATOR.finditer(masked, 0, end):
        ors = list(OR.finditer(masked, separator.end(), end))
        if not ors:
            return _mistyped(question, masked, separator.start(), separator.end(), end)
        comma = masked.find(", ", ors[-1].end(), end)
        stop = comma if comma >= 0 else end
        short = len(masked[: separator.start()].split()) <= 4
        if comma < 0 and short:
            stop = _end_of_last(question, masked, ors[-1].end(), end)
        things = listed(question, masked, separator.end(), stop, joint=OR)
        if things is not None:
            return _decided_by(question[: separator.start()], things, question, said=question[stop:end].strip(" ,"))
    return None


def _end_of_last(question: str, masked: str, start: int, end: int) -> int:
    """Where the last alternative of "Which band, A or B gained fame?" ends: before a verb, or where its name does."""
    verb = _VERB_AFTER.search(masked, start, end)
    if verb is not None:
        return verb.start()
    return next((n.end for n in names(question, masked) if n.start == start), end)


def _mistyped(question: str, masked: str, head: int, start: int, end: int) -> Compared | None:
    """ "Who is younger, A and B?", where "or" is meant: two names, and a comparison before them."""
    joint = AND.search(masked, start, end)
    if joint is None or _COMPARES.search(masked, 0, head) is None or _RELATES.search(masked) is not None:
        return None
    pair = names_around(question, masked, joint)
    if pair is None or pair[0].start != start or pair[1].end != end:
        return None
    return _decided_by(question[:head], pair, question)


def _by_names(question: str, masked: str) -> Compared | None:
    """ "Who is older Annie Morton or Terry Richardson": no comma, but names on both sides of "or"."""
    ors = list(OR.finditer(masked))
    if _ASKS.match(masked) is None or len(ors) != 1 or _COMPARES.search(masked[: ors[0].start()]) is None:
        return None
    pair = names_around(question, masked, ors[0])
    if pair is None or masked[pair[1].end :].strip(" ?.!"):
        return None
    return _decided_by(question[: pair[0].start], pair, question)


def _yes_no(question: str, masked: str) -> Compared | None:
    """ "Was A or B born first?", "Did A or B come out first?", "Is A or B larger?"."""
    m = re.match(r"(?P<aux>is|are|was|were|did|does|do|has|have|had)\s+", masked, re.IGNORECASE)
    ors = list(OR.finditer(masked))
    if m is None or len(ors) != 1:
        return None
    pair = names_around(question, masked, ors[0])
    if pair is None or len(masked[m.end() : pair[0].start].split()) > 3:
        return None
    rest = question[pair[1].end :].strip(" ?.!")
    if not rest or _COMPARES.search(rest) is None:
        return None
    aux = m["aux"].lower()
    said = f"{SINGULAR_AUX.get(aux, aux)} {rest}"
    return Compared(pair, lambda thing: verb_question(thing, said, person=False, question=question))


def _decided_by(head: str, things: tuple[Name, ...], question: str, *, said: str = "") -> Compared | None:
    """What decides between alternatives, from the words of "which N VP"; the VP may stand elsewhere (`said`)."""
    m = _HEAD.match(head.strip(" ,:;-–—?"))
    if m is None or _OPINION.search(f"{head} {said}") is not None:
        return None
    # "Which animated film was …": what looks like a verb is one only if there is none that is sure.
    verb = _FINITE.search(m["vp"]) or _VERB.search(m["vp"])
    noun = m["vp"] if verb is None else m["vp"][: verb.start()]
    said = said or (m["vp"] if m["wh"].lower() == "who" else m["vp"][len(noun) :]).strip()
    if not said:
        # "Which rock band chose its name from a hat": there is a verb somewhere, unless it is only "Which colour".
        asked = f"to answer: {question}"
        known = len(noun.split()) >= MIN_CLAUSE_WORDS
        return Compared(things, lambda thing: f"What should be known about {thing} {asked}") if known else None
    person = m["wh"].lower() == "who" or first_word(noun[noun.rstrip().rfind(" ") + 1 :]) in PERSONS
    return Compared(things, lambda thing: verb_question(thing, said, person=person, question=question))
