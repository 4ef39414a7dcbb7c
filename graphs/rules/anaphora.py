"""Words that stand for the answer to something asked before: "… and what is *its* population?"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from graphs.rules.grades import grade_of
from graphs.rules.lexicon import AUX, EXPLETIVE, NEUTRAL, OPENERS, PERSONAL, PERSONS, PLURAL, TASKS, WH, vocabulary
from graphs.rules.openers import strip_leads, strip_polite
from graphs.rules.text import HIDDEN, QUOTED, first_word, mask, names

MAX_LOOK_CHARS: Final = 2_000
"""A pronoun further into a part than this has found its noun in the part itself."""

_RESULT = re.compile(
    r"\b(?:the|these|those|this|that|your|both|all) (?:(?:two|three|four|five|\d+|above|previous|first|last|resulting|"
    r"combined|final) )?"
    r"(?P<noun>results?|answers?|outputs?|findings|outcomes?|values?|figures?|numbers?|sums?|lists?|translations?|"
    r"summary|summaries|draft|poem|plan|proposal|response)\b",
    re.IGNORECASE,
)
_FIGURE = re.compile(
    r"\bthe (?:ratio|difference|sum|total|average|mean|product|quotient|comparison)\b"
    r"(?!\s+(?:of|between|in|for|from|that)\b)",
    re.IGNORECASE,
)
_PRONOUN = re.compile(
    r"\b(?P<one>it|its|he|him|his|she|her|this|that)\b"
    r"|\b(?P<many>they|them|their|these|those|each of them|both of them|both|the two|the three|each other)\b"
    r"|\b(?P<former>the former|the latter|the other one|the first one|the second one)\b"
    r"|\b(?P<there>there)\b(?=\s*[?.!,;]|\s*$)",
    re.IGNORECASE,
)
_BARE_AFTER = re.compile(
    r"\s*(?:[.,;:?!]|$|(?:is|are|was|were|do|does|did|mean|means|compare|affect|change|help|with|to|in|into|for|from|by|"
    r"as|and|or|on|using|against|about)\b)",
    re.IGNORECASE,
)
_AFTER_AUX = vocabulary("does do did is was will would can could should")
_AFTER_VERB = vocabulary(
    "on from with of to for in by after about like using translate do why explain convert multiply divide summarise "
    "summarize into"
)
_NOUN_AFTER = re.compile(r"\s+[a-z]+")
_IN_FRONT = re.compile(
    r"\b(?:the|a|an|my|your|our|some|any|another)\s+(?!following\b|same\b|two\b|other\b|most\b|best\b)(?P<noun>[a-z]+)",
    re.IGNORECASE,
)
_OF_WHICH = re.compile(r"\b(?:the|a|an)\s+(?:\w+\s+){1,3}(?:about|of|on|for|from|with|to)\s+$", re.IGNORECASE)
_OBJECT = re.compile(r"\b(?:the|a|an) [^,;]{1,60}? (?:of|in|for|about|between|on|from) [^\s]", re.IGNORECASE)
_COMPARES = re.compile(r"\b(?:more|most|less|least|fewer|first|earlier|later|better|best|worse|worst)\b", re.IGNORECASE)
_WHICH_IS = re.compile(
    r"(?:which|who|what)(?: one)?(?: of (?:them|these|those|the (?:two|three|four)))? "
    r"(?:is|was|are|were|has|have|had|came|lived|costs?|comes|wins|would|will)\s+(?P<rest>\S+(?:\s+\S+){0,2})\s*$",
    re.IGNORECASE,
)
_EACH = re.compile(r"(?P<verb>\w+)\s+each\b(?! of the following)", re.IGNORECASE)
_NO_OBJECT = re.compile(
    r"(?:translate|summari[sz]e|rewrite|rephrase|paraphrase|convert|transform|explain)"
    r"(?:\s+(?:to|into|in|as|for|with)\b[^,;]{0,60})?[.?!]?$",
    re.IGNORECASE,
)
_THAT = re.compile(
    r"\s+(?:that|this|these|those|it|them|the above|which)\b(?!\s+(?:the|a|an|my|our|i|we|you)\b)", re.IGNORECASE
)
_SET_AGAINST = re.compile(r"^(?:compare|contrast|rank|combine|add|sum|average|reconcile)\b", re.IGNORECASE)
_DEFINES = re.compile(
    r"(?:what|who) (?:is|are|was|were) (?P<article>(?:a|an|the) )?(?P<thing>[^\s,?.]+(?: [^\s,?.]+){0,3})[?.]?$",
    re.IGNORECASE,
)
_TELL = re.compile(
    r"(?:define|describe|explain)(?P<what> what)? (?P<thing>[^,?.]{2,40}?)(?(what) (?:is|are|means?))"
    r"(?: (?:to|for|in|with|briefly|as) [^,?.]{1,80})?[?.]?$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Reference:
    """A place in a part that stands for earlier answers.

    Attributes:
        at: Where a mark for the answers can be put in: after the words that stand for them.
        many: It stands for all of the answers so far, not only the one before.
        word: What stands for them, in lower case.
        compares: It sets answers side by side, so that one alone will not do.
    """

    at: int
    many: bool
    word: str
    compares: bool = False


def find_reference(text: str, *, sheltered: bool, after: bool = False) -> Reference | None:
    """What in a part stands for an answer to an earlier one, if anything does.

    Args:
        text: The part.
        sheltered: Sentences before it name things that its pronouns may stand for; only "the result", "that" after
            "based on", and the like refer to an answer then.
        after: It begins with "then": a request without an object of its own works on what came before.
    """
    look = mask(text[:MAX_LOOK_CHARS])
    opener = _opener(look)
    if opener is not None:
        return opener
    body = strip_leads(look).body
    if (m := _EACH.match(body)) is not None and m["verb"].lower() in TASKS and ":" not in body:
        return Reference(len(look) - len(body) + m.end(), False, "each")
    if (m := _RESULT.search(look)) is not None and not _introduced(look, m.start()):
        many = m["noun"].lower().endswith("s") or m[0].lower().startswith("both")
        return Reference(m.end(), many, m[0].lower())
    if (m := _FIGURE.search(look)) is not None and not names(look, look):
        return Reference(m.end(), True, m[0].lower(), compares=True)
    if not sheltered:
        for m in _PRONOUN.finditer(look):
            found = _pronoun(look, m)
            if found is not None:
                return found
    if _elliptical(look):
        return Reference(_before_mark(look), True, "", compares=True)
    if after and not _has_object(look):
        return Reference(_before_mark(look), False, "")
    return None


def _has_object(look: str) -> bool:
    """Whether a request says itself what it is about: "find the population of Germany", not "translate to French"."""
    return first_word(strip_leads(look).body) in WH | AUX or _OBJECT.search(look) is not None


def _opener(look: str) -> Reference | None:
    body = strip_polite(strip_leads(look).body)
    lowered = body.lower()
    for opener in OPENERS:
        if lowered.startswith(opener):
            at = len(look) - len(body) + len(opener)
            m = _THAT.match(look, at)
            if m is not None:
                return Reference(m.end(), m[0].strip().lower() in ("these", "those", "them"), m[0].strip().lower())
            if opener.endswith(("that", "this", "there")) and look[at:].lstrip().startswith(","):
                return Reference(at, False, opener)
    return None


def _pronoun(look: str, m: re.Match[str]) -> Reference | None:
    word = m[0].lower()
    before, following = look[: m.start()], look[m.end() :]
    if HIDDEN in before or QUOTED in before:
        return None
    if word in ("this", "that", "these", "those"):
        if word == "that" and not _stands_alone(before, following):
            return None
        if word != "that" and _BARE_AFTER.match(following) is None and _NOUN_AFTER.match(following) is None:
            return None
        if _BARE_AFTER.match(following) is None and _names_itself(following):
            return None
    if word == "it" and _expletive(before, following):
        return None
    if word == "both" and re.search(r"\band\b", look) is not None:
        return None
    if word != "both" and _introduced(look, m.start(), word):
        return None
    many = m.lastgroup in ("many", "former")
    compares = many and _SET_AGAINST.match(strip_polite(strip_leads(look).body)) is not None
    return Reference(m.end(), many, word, compares=compares)


def _stands_alone(before: str, following: str) -> bool:
    """Whether "that" is a pronoun: "based on that", "what does that mean", not "the city that …"."""
    last = before.rstrip().rsplit(" ", 1)[-1].lower()
    if last in _AFTER_AUX:
        return True
    return last in _AFTER_VERB and (_BARE_AFTER.match(following) is not None or last in ("in", "of", "from"))


def _names_itself(following: str) -> bool:
    """ "this text: …", "these numbers: 1, 2, 3": what is meant stands right behind."""
    return re.match(r"[^.?!\n]{0,80}:", following) is not None


def _expletive(before: str, following: str) -> bool:
    """Whether "it" stands for nothing: "is it possible", "how long does it take to"."""
    if re.match(r"\s+(?:takes?|took|rains?|rained|snows?|snowed)\b", following) is not None:
        return True
    last = before.rstrip().rsplit(" ", 1)[-1].lower()
    return last in ("is", "was", "be", "would", "will", "make", "makes", "isn't") and first_word(following) in EXPLETIVE


def _introduced(look: str, at: int, word: str = "") -> bool:
    """Whether the part itself names something before `at` that the pronoun there may stand for."""
    # "a haiku about it": not the haiku.
    before = _OF_WHICH.sub("", look[:at])
    nouns = {m["noun"].lower() for m in _IN_FRONT.finditer(before)}
    if word in NEUTRAL:
        nouns -= PERSONS
    elif word in PERSONAL:
        nouns &= PERSONS
    elif word == "there":
        nouns = set()
    elif word in PLURAL:
        nouns = {n for n in nouns if n.endswith("s")}
    if nouns:
        return True
    body = before.lstrip()
    return any(n.start > 0 or first_word(body) not in WH for n in names(body, body))


def _elliptical(look: str) -> bool:
    """Whether it compares without saying what: "Which is larger?", "Compare."."""
    body = strip_polite(strip_leads(look).body).strip()
    if _NO_OBJECT.match(body) is not None:
        return True
    if " or " in body or " than " in body or QUOTED in body:
        return False
    if names(body, body):
        return False
    if _SET_AGAINST.match(body) is not None:
        return len(body.split()) <= 2
    m = _WHICH_IS.match(body)
    return m is not None and (_COMPARES.search(m["rest"]) is not None or grade_of(m["rest"]) is not None)


def _before_mark(look: str) -> int:
    return len(look.rstrip(" .?!\n"))


def named_thing(text: str) -> str | None:
    """What a part is plainly about, so that a pronoun after it stands for *that* and not for the part's answer.

    "Where was Marie Curie born?" is about Marie Curie; "What is TCP?" about TCP; "Who wrote Hamlet?" may be followed
    by questions about the writer or the play, so it is about nothing plainly.
    """
    masked = mask(text)
    if m := _DEFINES.match(masked) or _TELL.match(masked):
        thing = text[m.start("thing") : m.end("thing")]
        described = re.search(
            r"\b(?:of|in|for|that|who|which|what|how|why|between|your|my|\w+est|best|most|first|last)\b", thing
        )
        definite = (m.groupdict().get("article") or "").lower() == "the "
        if described is None and (not definite or names(f"of {thing}", f"of {mask(thing)}")):
            return thing
        return None
    if first_word(masked) not in ("where", "when", "why", "how", "is", "was", "did", "does", "has", "had", "can"):
        return None
    found = names(text, masked)
    return found[0].text if len({n.key for n in found}) == 1 else None


def substitute(text: str, reference: Reference, thing: str) -> str | None:
    """The part with its pronoun replaced by what it plainly stands for; None if that cannot be said well."""
    if reference.word not in PERSONAL | NEUTRAL:
        return None
    start = reference.at - len(reference.word)
    following = text[reference.at :]
    possessive = reference.word in ("its", "his") or (
        reference.word == "her"
        and re.match(r"\s+(?!to\b|in\b|at\b|and\b|from\b|for\b|on\b)[a-z]", following) is not None
    )
    said = (f"{thing}'" if thing.endswith("s") else f"{thing}'s") if possessive else thing
    return f"{text[:start]}{said}{following}"
