"""Looking at text: what is quoted, where sentences and list items end, what is a name. All of it in linear time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from graphs.rules.lexicon import AUX, LAST, LEADS, NAME_LINKS, NOT_NAMES, SEQUENCE, TASKS, WH

QUOTED: Final = "\x01"
"""Stands for every character of a quotation: no rule looks in there, but as a whole it may be a title."""

HIDDEN: Final = "\x02"
"""Stands for every character in brackets, code and addresses: no rule looks in there."""

MAX_QUOTE_CHARS: Final = 300
"""A longer stretch between two quotation marks is not taken for a quotation: one of them is stray."""

BLANK_LINE: Final = re.compile(r"\n[ \t]*\n")
"""Between paragraphs."""

_FENCE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
# Each class excludes its own opening mark, so that a run of opening marks costs one step each.
_QUOTES = re.compile(
    rf'"[^"\n]{{1,{MAX_QUOTE_CHARS}}}"'
    rf"|“[^“”]{{1,{MAX_QUOTE_CHARS}}}”"
    rf"|«[^«»]{{1,{MAX_QUOTE_CHARS}}}»"
    rf"|`[^`\n]{{1,{MAX_QUOTE_CHARS}}}`"
    rf"|\([^()]{{3,{MAX_QUOTE_CHARS}}}\)"
    rf"|\[[^\[\]]{{1,{MAX_QUOTE_CHARS}}}\]"
    rf"|(?<!\S)['‘][^'‘’\n]{{1,{MAX_QUOTE_CHARS}}}['’](?![\w])"
    r"|https?://[^\s]{0,2000}[^\s.,;:!?)]"
)
# A mark after a mark never begins a match: a run of them is looked at once.
_END = re.compile(r"(?<![.!?])[.!?]++[\"”’'»)\]]*+(?=\s)|[。？！]+|\n[ \t]*\n")
_WORD = re.compile(r"[^\W_](?:[\w'’&/-]|\.(?=\w))*|\x01+")
_INITIAL = re.compile(r"(?:[A-Z]|[Vv]s?|Mr|Mrs|Ms|Dr|St|Jr|Sr|Mt|Ft)")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"“])(?:[A-Z]|[A-Za-z](?:\.[A-Za-z])+|Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|vs?|etc|approx|No|Nos|Vol|Fig|Eq|Inc|"
    r"Ltd|Co|Corp|Gen|Col|Lt|Sgt|Rev|Hon|Gov|Sen|Rep|Pres|Mt|Ft|cf|ca|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)$"
)
_ITEM = re.compile(
    r"^[ \t]*(?:[-*•–]|\(?\d{1,3}[.):]|\(?[A-Za-z][.)]|(?:Q|Question )\d{1,3}[.:)])[ \t]+(?=\S)", re.MULTILINE
)
_INLINE_ITEM = re.compile(r"(?<!\S)\(?(\d{1,2}|[a-z])[.)]\s+(?=\S)")
_STARTERS = WH | AUX | TASKS | SEQUENCE | LAST | LEADS


def mask(text: str) -> str:
    """A text of the same length in which what is quoted is `QUOTED`, and brackets, code and addresses are `HIDDEN`.

    Marks stay; so does the last character of a quotation if it ends a sentence.
    """
    return _QUOTES.sub(_hidden, _FENCE.sub(lambda m: HIDDEN * len(m[0]), text))


def _hidden(m: re.Match[str]) -> str:
    found = m[0]
    if found.startswith("http") or found[0] == "`":
        return HIDDEN * len(found)
    cover = HIDDEN if found[0] in "([" else QUOTED
    last = found[-2] if found[-2] in ".?!" else cover
    return found[0] + cover * (len(found) - 3) + last + found[-1]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a text: characters `start` to `end`."""

    start: int
    end: int

    def of(self, text: str) -> str:
        """What the text has there."""
        return text[self.start : self.end]


def trimmed(text: str, start: int, end: int) -> Span:
    """The stretch without the white space at its ends."""
    piece = text[start:end]
    left = len(piece) - len(piece.lstrip())
    return Span(start + left, max(start + left, start + len(piece.rstrip())))


def words(text: str) -> Iterator[re.Match[str]]:
    """The words of a masked text, a quotation's content being one word."""
    return _WORD.finditer(text)


def first_word(text: str) -> str:
    """The first word in lower case without its "'s"; empty if there is none."""
    found = _WORD.search(text[:200])
    return _plain(found[0]) if found else ""


def _plain(word: str) -> str:
    word = word.lower().replace("’", "'").rstrip(".")
    return word.removesuffix("'s")


def sentences(text: str, masked: str, *, limit: int) -> list[Span]:
    """Where each sentence is; at most `limit` of them, the last one taking whatever follows."""
    found: list[Span] = []
    start = 0
    for m in _END.finditer(masked):
        if not _ends_sentence(masked, start, m):
            continue
        span = trimmed(text, start, m.end())
        if span.start < span.end:
            if len(found) == limit - 1:
                break
            found.append(span)
        start = m.end()
    rest = trimmed(text, start, len(text))
    if rest.start < rest.end:
        found.append(rest)
    return found


def _ends_sentence(masked: str, start: int, end: re.Match[str]) -> bool:
    mark = end[0]
    if mark[0] in "。？！\n":
        return True
    following = masked[end.end() : end.end() + 60].lstrip()
    starter = first_word(following) in _STARTERS
    if mark[0] == ".":
        before = masked[max(start, end.start() - 12) : end.start()]
        if len(mark) == 1 and _ABBREVIATION.search(before) is not None:
            # "in the U.S. Who …" ends a sentence, "J. P. Morgan" does not.
            return "." in before and starter and following[:1].isupper()
        return starter or not following[:1].islower()
    if mark == "?":
        # A title: "Who is Cletis Tout? was a comedy". Who writes no capitals at all ends sentences without them.
        return not (following[:1].islower() and masked[start:].lstrip()[:1].isupper())
    # "Who Framed Roger Rabbit?" or Yahoo! in the middle of a sentence.
    return starter or not (following[:1].islower() or following[:1] in ",;:")


def list_items(text: str, masked: str) -> tuple[Span, list[Span], Span] | None:
    """A numbered or bulleted list: what comes before it, its items without their marks, and what comes after.

    Items stand on lines of their own, or in one line as `1) … 2) …`, counted from 1 or a.

    Returns:
        None if there are fewer than two items.
    """
    marks = [(m.start(), m.end()) for m in _ITEM.finditer(masked)]
    if len(marks) < 2:
        marks = _inline_marks(masked)
    if len(marks) < 2:
        return None
    items = [
        trimmed(text, end, following)
        for (_, end), (following, _) in zip(marks, [*marks[1:], (len(text), 0)], strict=True)
    ]
    # A blank line after the last item ends the list.
    last = items[-1]
    blank = BLANK_LINE.search(masked, last.start, last.end)
    after = Span(last.end, last.end)
    if blank is not None:
        items[-1] = trimmed(text, last.start, blank.start())
        after = trimmed(text, blank.end(), last.end)
    if any(i.start >= i.end for i in items):
        return None
    return trimmed(text, 0, marks[0][0]), items, after


def _inline_marks(masked: str) -> list[tuple[int, int]]:
    marks: list[tuple[int, int]] = []
    for m in _INLINE_ITEM.finditer(masked):
        n = len(marks)
        expected = {str(n + 1), chr(ord("a") + n) if n < 26 else ""}
        if m[1] in expected:
            marks.append((m.start(), m.end()))
    return marks


@dataclass(frozen=True, slots=True)
class Name:
    """A proper name or quoted title in a text: where it is, and how it is written."""

    start: int
    end: int
    text: str

    @property
    def key(self) -> str:
        """Equal for the same name written with and without its article."""
        return self.text.lower().removeprefix("the ").strip(" \"“”'")


def names(text: str, masked: str) -> list[Name]:
    """Runs of capitalised words, linked by small words as in "Statue of Unity", and quoted titles.

    A word that begins a sentence counts only if it is no common opener. "the" before a name belongs to it, "'s" after
    it does not.
    """
    found: list[Name] = []
    run: list[re.Match[str]] = []
    links: list[re.Match[str]] = []
    last_end = 0
    article: re.Match[str] | None = None
    previous: re.Match[str] | None = None

    def close() -> None:
        nonlocal article
        if run:
            start = article.start() if article is not None else run[0].start()
            end = run[-1].end()
            name = _without_possessive(text[start:end])
            if not _is_number(name):
                found.append(Name(start, start + len(name), name))
        run.clear()
        links.clear()
        article = None

    for w in words(masked):
        gap = masked[last_end : w.start()]
        if run and gap.strip(' "“') and not (gap == ". " and _INITIAL.fullmatch((links or run)[-1][0])):
            close()
        if _namey(w[0], inside=bool(run)):
            if not run and previous is not None and previous[0].lower() == "the" and not gap.strip(' "“'):
                article = previous
            run.extend(links)
            links.clear()
            run.append(w)
            if _has_possessive(w[0]) and not masked[w.end() : w.end() + 2].strip()[:1].isupper():
                close()
        elif (
            run
            and (w[0].lower() in NAME_LINKS or w[0] in ("v", "vs"))
            and len(links) < 2
            and not _has_possessive(run[-1][0])
        ):
            links.append(w)
        else:
            close()
        previous = w
        last_end = w.end()
    close()
    return found


def _namey(word: str, *, inside: bool) -> bool:
    if word[0] == QUOTED:
        return True
    if word[0].isdigit():
        # "Cars 2" has a number, "2 cars" begins with one.
        return inside and word.isdigit()
    if not word[0].isupper():
        return False
    return inside or _plain(word) not in NOT_NAMES


def _has_possessive(word: str) -> bool:
    return word.endswith(("'s", "’s", "s'", "s’"))


def _without_possessive(name: str) -> str:
    name = name.rstrip(".-/&")
    for ending in ("'s", "’s"):
        if name.endswith(ending):
            return name[: -len(ending)]
    return name.rstrip("'’")


def _is_number(name: str) -> bool:
    return all(c.isdigit() or c in " .,-/" for c in name)
