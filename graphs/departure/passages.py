"""A text in passages, which of them ask, and how much each of the others matters to what is asked."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from agora.routing.keywords import STOP_WORDS
from graphs.rules.lexicon import AUX, TASKS, WH
from graphs.rules.text import BLANK_LINE, first_word, mask, sentences

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_PASSAGES: Final = 20_000
"""Passages of one text: five characters each in the longest question there can be."""

LONG_PASSAGE: Final = 500
"""Characters above which a passage without a full stop or line break (a log, a table) is cut where a word ends. Three
long sentences; what is chosen or left is then small against any budget."""

ASKING_CHARS: Final = 400
"""Characters of a first or last paragraph (or first sentence) that is kept as what is asked: some five lines, more than
an instruction usually takes. Longer ones are part of what it is asked about."""

GAP: Final = "[…]"
"""What stands where something was left out."""

ASCII_PER_TOKEN: Final = 4.0
"""ASCII characters of one token. English measures 4–4.5 with the catalogue's tokenizers; the low end, so that a text
rather has fewer tokens than a budget allows."""

OTHERS_PER_TOKEN: Final = 1.5
"""Other characters of one token: letters with marks and Cyrillic take one or two to a token, ideographs one."""

QUERY_SHARE: Final = 0.7
"""Share of nearness to the question in what a passage is worth; the rest is nearness to the text as a whole, which
decides where the question says nothing ("Summarise this"). 150 questions of QNLI dev, each below 40 sentences of which
one answers it, condensed to a tenth (a fifth): it was kept 0.07 (0.17) of the time with 0, 0.88 (0.93) with 0.3, 0.93
(0.95) with 0.5, and 0.95 (0.95) with 0.7 to 1."""

NEW_SHARE: Final = 0.7
"""Share of worth, against being unlike what is chosen already (Carbonell and Goldstein 1998, λ). On the same questions
0.93 (0.95) with 0.5, 0.95 (0.96) with 0.9: no great matter where nothing is said twice."""

_WORD = re.compile(r"\w+")
_GAP = re.compile(r"[ \t]")
_OURS = re.compile(r"Known so far:|Q: |Use what is known to answer:")
"""Lines by which `graphs.render` tells what is known: without its question an answer says nothing."""
_BACK_WORDS = "he she it they this that these those his her its their him them such there here"
_BACK = frozenset(_BACK_WORDS.split())
"""Words that point to what was said before."""


def tokens_in(text: str) -> int:
    """About how many tokens a text has for any model; rather too many."""
    plain = sum(map(str.isascii, text))
    return math.ceil(plain / ASCII_PER_TOKEN + (len(text) - plain) / OTHERS_PER_TOKEN)


@dataclass(frozen=True, slots=True)
class Passages:
    """A text taken apart.

    Attributes:
        text: The text.
        spans: Start and end of each passage: a sentence, or a line, or a piece of a long one.
        asking: Indices of those that say what is asked; these are never left out.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    asking: frozenset[int]

    @classmethod
    def of(cls, text: str) -> Passages:
        """Takes a text apart."""
        spans = tuple(_pieces(text))
        return cls(text, spans, frozenset(_asking(text, spans)))

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> str:
        start, end = self.spans[index]
        return self.text[start:end]

    @property
    def question(self) -> str:
        """What is asked."""
        return " ".join(self[i] for i in sorted(self.asking))

    def leans_back(self, index: int) -> bool:
        """Whether a passage begins by pointing to what was said before it."""
        return index > 0 and first_word(self[index]) in _BACK

    def joined(self, kept: Iterable[int]) -> str:
        """The passages that are kept, in their order, with `GAP` where others stood."""
        parts: list[str] = []
        last = -1
        for i in sorted(kept):
            before = self.text[self.spans[i - 1][1] if i else 0 : self.spans[i][0]]
            if i != last + 1:
                between = self.text[self.spans[last][1] if last >= 0 else 0 : self.spans[i][0]]
                line = "\n" in between
                parts.append((f"\n{GAP}" if line else f" {GAP}") if last >= 0 else GAP)
                before = "\n" if line else " "
            parts += (before, self[i])
            last = i
        if 0 <= last < len(self.spans) - 1:
            parts.append(f" {GAP}")
        return "".join(parts).strip()

    def worth(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """How near each passage is to what is asked, and to the whole: cosines of TF-IDF vectors, shape (n,) each."""
        weights = self.weights()
        asked = _sum(weights[i] for i in self.asking)
        whole = _sum(w for i, w in enumerate(weights) if i not in self.asking)
        return _cosines(weights, asked), _cosines(weights, whole)

    def weights(self) -> list[dict[str, float]]:
        """The TF-IDF vector of each passage, by word, of length 1 (or 0 for one without words)."""
        counts = [Counter(_words(self[i])) for i in range(len(self))]
        spread = Counter(w for c in counts for w in c)
        idf = {w: math.log((1 + len(counts)) / (1 + n)) + 1 for w, n in spread.items()}
        return [_unit({w: (1 + math.log(n)) * idf[w] for w, n in c.items()}) for c in counts]


def best_within(passages: Passages, budget: int) -> frozenset[int]:
    """The passages to keep within so many tokens: what is asked, and then whatever adds most.

    Greedy maximal marginal relevance (Carbonell and Goldstein 1998): each next passage is worth something to the
    question and to the whole, and unlike those that are chosen already.
    """
    kept = set(passages.asking)
    gap = tokens_in(GAP) + 1
    left = budget - sum(tokens_in(passages[i]) + 1 for i in kept) - gap
    asked, whole = passages.worth()
    weights = passages.weights()
    worth = QUERY_SHARE * asked + (1 - QUERY_SHARE) * whole
    costs = np.array([tokens_in(passages[i]) + 1 for i in range(len(passages))])
    alike = np.zeros(len(passages))
    open_ = np.ones(len(passages), dtype=bool)
    open_[list(kept)] = False
    by_word: dict[str, tuple[list[int], list[float]]] = {}
    for i, vector in enumerate(weights):
        for word, weight in vector.items():
            where, how_much = by_word.setdefault(word, ([], []))
            where.append(i)
            how_much.append(weight)
    spread = {word: (np.array(where), np.array(how_much)) for word, (where, how_much) in by_word.items()}
    while True:
        # A passage next to a kept one opens no new gap; to count one for each is on the safe side.
        fits = open_ & (costs + gap <= left)
        if not fits.any():
            return frozenset(kept)
        score = np.where(fits, NEW_SHARE * worth - (1 - NEW_SHARE) * alike, -np.inf)
        best = int(score.argmax())
        kept.add(best)
        open_[best] = False
        left -= int(costs[best]) + gap
        near = np.zeros(len(passages))
        for word, weight in weights[best].items():
            where_, others = spread[word]
            near[where_] += weight * others
        np.maximum(alike, near, out=alike)


def share_left_out(before: str, after: str) -> str:
    """How much of a text is gone, in words."""
    return f"{max(0, round(100 * (1 - len(after) / max(1, len(before)))))} % of the text was left out"


def _pieces(text: str) -> Iterable[tuple[int, int]]:
    for sentence in sentences(text, mask(text), limit=MAX_PASSAGES):
        at = sentence.start
        for line in text[sentence.start : sentence.end].splitlines(keepends=True):
            start, end = at, at + len(line.rstrip())
            at += len(line)
            while end - start > LONG_PASSAGE:
                cut = _cut(text, start, start + LONG_PASSAGE)
                yield start, cut
                start = cut
                while start < end and text[start].isspace():
                    start += 1
            if start < end:
                yield start, end


def _cut(text: str, start: int, end: int) -> int:
    """Where a long piece is cut: between words; not within a number in groups, whose half might leave unseen."""
    gaps = [m.start() for m in _GAP.finditer(text, start + 1, end)]
    return next(
        (g for g in reversed(gaps) if not (text[g - 1].isdigit() or text[g + 1].isdigit())), max(gaps, default=end)
    )


def _asking(text: str, spans: Sequence[tuple[int, int]]) -> Iterable[int]:
    if not spans:
        return
    yield len(spans) - 1
    breaks = [m.end() for m in BLANK_LINE.finditer(text, 0, spans[-1][0])]
    if breaks and spans[-1][1] - breaks[-1] <= ASKING_CHARS:
        yield from (i for i, (start, _) in enumerate(spans) if start >= breaks[-1])
    if len(breaks) > 1 and breaks[0] - spans[0][0] <= ASKING_CHARS:
        yield from (i for i, (_, end) in enumerate(spans) if end <= breaks[0])
    start, end = spans[0]
    first = text[start:end]
    if len(first) <= ASKING_CHARS and (first[-1] in ":?？：" or first_word(first) in TASKS | WH | AUX):
        yield 0
    yield from (i for i, (start, _) in enumerate(spans) if _OURS.match(text, start))


def _words(text: str) -> Iterable[str]:
    for word in _WORD.findall(text.lower()):
        if word not in STOP_WORDS:
            yield word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _sum(vectors: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for vector in vectors:
        for word, weight in vector.items():
            total[word] = total.get(word, 0.0) + weight
    return _unit(total)


def _unit(vector: dict[str, float]) -> dict[str, float]:
    length = math.sqrt(sum(w * w for w in vector.values()))
    return {k: w / length for k, w in vector.items()} if length else vector


def _cosines(vectors: Sequence[dict[str, float]], other: dict[str, float]) -> NDArray[np.float64]:
    return np.array([sum(w * other.get(k, 0.0) for k, w in v.items()) for v in vectors])
