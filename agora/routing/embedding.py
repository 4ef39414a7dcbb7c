"""Routing by sentence embeddings: a question goes to the expert whose card is nearest in meaning."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import numpy as np

from agora.errors import ModelError
from agora.protocols import Embedder
from agora.routing.order import Weights, by_match, by_name
from agora.routing.router import Ranking
from agora.routing.takers import takers
from agora.square import Square
from agora.types import ExpertCard, Subtask

if TYPE_CHECKING:
    from numpy.typing import NDArray

DESCRIPTION_WEIGHT: Final = 0.6
"""Share of the description in a card's similarity; the rest is that of the examples' centroid. Chosen on paper titles
of seven fields (mag_titles dev, MiniLM, one sentence and 8 titles a card, 40 draws): top-1 0.63 with 0.5 or 0.6,
against 0.59 by description alone, 0.57 by the centroid alone, 0.52 by the nearest text. With cards of 0 to 64 examples
side by side 0.6 to 0.8 are best (0.61), where the 3 nearest examples instead of the centroid get 0.55 (with 0.5):
they favour cards that have many."""

CLOSE_MATCH: Final = 0.12
"""Similarity below which nobody is an expert for the question. Where hits and false alarms differ most (Youden's J)
over the five ready cards with MiniLM: 0.12 is reached by 61 % of 1,247 texts of their fields (mag_titles dev on
medicine and economics; the ready experts' sample queries, of these all) and by 17 % of 883 questions about the world at
large (StrategyQA, HotpotQA, films). AUROC 0.78: a blurred line, so it decides nothing where no generalist is."""

LONG_CHARS: Final = 1000
"""Characters above which a question is compared by its two ends: about the 256 tokens that MiniLM reads."""

END_CHARS: Final = 300
"""Characters of each end. What is asked stands before or after what it is asked about. Paper titles before or after
2,500 characters on other subjects (mag_titles dev, 400): top-1 0.45 and 0.42 by the better of two ends of 300, 0.42 and
0.39 by both joined, 0.36 and 0.16 by the first 1,000. For documents of one subject it makes no difference (0.41)."""


class EmbeddingRouter:
    """Ranks by sentence embeddings, then load and price.

    The similarity of a question q and a card with description d and examples e_i is

        w · cos(q, d) + (1 − w) · cos(q, Σ e_i),    w = DESCRIPTION_WEIGHT,

    cos(q, d) alone for a card without examples; for a question longer than `LONG_CHARS` it is the better of its two
    ends'. How load and price come in is told in `agora.routing.order`. A card is embedded once, into one vector, which
    is kept while the square lives and the card is in it.

    Args:
        embedder: Turns texts into unit vectors.
        close_match: Similarity from which on a match is one; the default suits MiniLM.
        weights: What load and price cost.
    """

    def __init__(self, embedder: Embedder, *, close_match: float = CLOSE_MATCH, weights: Weights | None = None) -> None:
        self._embedder = embedder
        self._close_match = close_match
        self._weights = weights or Weights()
        self._indices: WeakKeyDictionary[Square, _Index] = WeakKeyDictionary()
        # An asyncio lock belongs to one event loop; a router may be used in several, one after another.
        self._locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()

    async def rank(self, subtask: Subtask, question: str, square: Square) -> Ranking:
        """Ranks the experts for one subtask; a pinned one needs no embedding.

        Raises:
            NoExpert: If nobody can take it.
            ModelError: If the embedder returns something that is no embedding.
            AgoraError: Whatever the embedder raises.
        """
        able, excluded = takers(subtask, question, square)
        named = subtask.expert
        if named is not None and any(e.name == named for e in able):
            return by_name(able, named, excluded=excluded, weights=self._weights)
        ends = await self._embed(ends_of(question))
        index = await self._index(square)
        # While texts were embedded, experts may have come and gone: the index is of those who are here now.
        able, excluded = takers(subtask, question, square)
        return by_match(
            able,
            index.similarities(ends),
            excluded=excluded,
            close_match=self._close_match,
            weights=self._weights,
        )

    async def _index(self, square: Square) -> _Index:
        """The profiles of those who are in the square when this returns; at most one caller embeds."""
        async with self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            index = self._indices.get(square)
            while index is None or index.version != square.version:
                version, cards = square.version, [e.card for e in square]
                profiles = dict(zip(index.cards, index.profiles, strict=True)) if index else {}
                profiles |= await self._profiles([c for c in cards if c not in profiles])
                rows = np.stack([profiles[c] for c in cards]) if cards else np.empty((0, 0), dtype=np.float32)
                index = _Index(version=version, cards=tuple(cards), profiles=rows)
                self._indices[square] = index
            return index

    async def _profiles(self, cards: Sequence[ExpertCard]) -> dict[ExpertCard, NDArray[np.float32]]:
        """One vector for each card; every text is embedded once, so that equal texts have equal vectors."""
        texts = list(dict.fromkeys(t for c in cards for t in (c.description, *c.examples)))
        if not texts:
            return {}
        vectors = dict(zip(texts, await self._embed(texts), strict=True))
        profiles = {}
        for card in cards:
            profile = vectors[card.description]
            if card.examples:
                centroid = _unit(np.sum([vectors[e] for e in card.examples], axis=0))
                profile = DESCRIPTION_WEIGHT * profile + (1 - DESCRIPTION_WEIGHT) * centroid
            profiles[card] = profile
        return profiles

    async def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = await self._embedder.embed(texts)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise ModelError(
                f"the embedder returned an array of shape {vectors.shape} for {len(texts)} texts, or numbers that are "
                f"not finite; it must be ({len(texts)}, dim)"
            )
        return vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    """Everyone who was in the square at `version`; `profiles` has shape (len(cards), dim)."""

    version: int
    cards: tuple[ExpertCard, ...]
    profiles: NDArray[np.float32]

    def similarities(self, ends: NDArray[np.float32]) -> dict[str, float]:
        """By expert's name; `ends` has shape (1 or 2, dim)."""
        best = (self.profiles @ ends.T).max(axis=1)
        return {card.name: float(similarity) for card, similarity in zip(self.cards, best, strict=True)}


def ends_of(question: str) -> list[str]:
    """The texts that stand for a question: itself, or its two ends if it is longer than `LONG_CHARS`."""
    text = question.strip()
    return [text] if len(text) <= LONG_CHARS else [text[:END_CHARS], text[-END_CHARS:]]


def _unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    length = np.linalg.norm(vector)
    return np.asarray(vector / length if length > 0 else vector, dtype=np.float32)
