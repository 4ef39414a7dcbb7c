"""Routing by words: a question goes to the expert whose card shares its rarest words. Needs no model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

from agora.routing.order import Weights, by_match, by_name
from agora.routing.router import Ranking
from agora.routing.takers import takers
from agora.square import Square
from agora.types import ExpertCard, Subtask

ANY_MATCH: Final = 1e-9
"""One word in common is a match: BM25 scores of different questions cannot be compared, so there is no higher bar."""

K1: Final = 1.2
"""BM25: how fast repetitions of a word stop counting. The usual value; 0.5 and 2 are within 0.003 of it on mag_titles
dev."""

B: Final = 0.75
"""BM25: how much long cards are held back. The usual value; 0 was worse by 0.005 on mag_titles dev."""

MAX_WORDS: Final = 2_000
"""Words of a question that count: past the context of most small models, and keeps the cost of a huge one bounded."""

_STOP_WORDS = """
a about after all also an and any are as at be because been before between both but by can could did do does during
each for from give had has have he her his how i if in into is it its just many may me might more most much must my
name no not of on one only or other our out over say she should since so some such than that the their them then
there these they this those through to too two under up us use used using very was we were what when where which
while who whom whose why will with without would you your
"""
STOP_WORDS: Final = frozenset(_STOP_WORDS.split())
"""Words that say nothing about a field. Leaving them out makes no difference to the order (0.353 against 0.354 on
mag_titles dev); with them a question about anything would match by its 'is' and 'of'."""

_WORD = re.compile(r"\w+")


class KeywordRouter:
    """Ranks by BM25 over the words of card (description, examples, keywords) and question, then load and price.

    The similarity is BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009, eq. 3.15, with the
    idf that never turns negative) divided by the most that the question's known words could reach, so in [0, 1].

    Args:
        weights: What load and price cost; see `agora.routing.order`.
        note: Added to every explanation, e.g. why this router is used.
    """

    def __init__(self, *, weights: Weights | None = None, note: str = "") -> None:
        self._weights = weights or Weights()
        self._note = note
        self._indices: WeakKeyDictionary[Square, _Index] = WeakKeyDictionary()

    async def rank(self, subtask: Subtask, question: str, square: Square) -> Ranking:
        """Ranks the experts for one subtask.

        Raises:
            NoExpert: If nobody can take it.
        """
        able, excluded = takers(subtask, question, square)
        named = subtask.expert
        if named is not None and any(e.name == named for e in able):
            return by_name(able, named, excluded=excluded, weights=self._weights)
        index = self._indices.get(square)
        if index is None or index.version != square.version:
            index = _Index.of(square)
            self._indices[square] = index
        return by_match(
            able,
            index.similarities(question),
            excluded=excluded,
            close_match=ANY_MATCH,
            weights=self._weights,
            basis="keyword match",
            note=self._note,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    """Words of everyone who was in the square at `version`.

    Attributes:
        version: Of the square.
        weights: By expert, by word: idf · tf·(K1+1) / (tf + K1·(1 − B + B·length/mean length)).
        idf: By word: ln(1 + (N − n + ½) / (n + ½)) for n of N cards that have it.
    """

    version: int
    weights: Mapping[str, Mapping[str, float]]
    idf: Mapping[str, float]

    @classmethod
    def of(cls, square: Square) -> _Index:
        cards = {e.name: Counter(_words(_text(e.card))) for e in square}
        in_cards = Counter(word for counts in cards.values() for word in counts)
        idf = {word: math.log(1 + (len(cards) - n + 0.5) / (n + 0.5)) for word, n in in_cards.items()}
        mean_length = sum(c.total() for c in cards.values()) / len(cards)
        weights = {}
        for name, counts in cards.items():
            damping = K1 * (1 - B + B * counts.total() / mean_length) if mean_length else K1
            weights[name] = {word: idf[word] * n * (K1 + 1) / (n + damping) for word, n in counts.items()}
        return cls(version=square.version, weights=weights, idf=idf)

    def similarities(self, question: str) -> dict[str, float]:
        known = [word for word in dict.fromkeys(_words(question)) if word in self.idf]
        most = sum(self.idf[word] for word in known) * (K1 + 1)
        return {
            name: sum(words.get(word, 0.0) for word in known) / most if known else 0.0
            for name, words in self.weights.items()
        }


def _text(card: ExpertCard) -> str:
    return " ".join((card.description, *card.examples, *card.keywords))


def _words(text: str) -> list[str]:
    found = (m.group() for m in _WORD.finditer(text.casefold()))
    return [word for word, _ in zip((w for w in found if w not in STOP_WORDS), range(MAX_WORDS), strict=False)]
