"""The order of those who can take a subtask: match first, then load, then price.

    score = similarity − LOAD_PENALTY · log2(1 + load) − PRICE_PENALTY · price / (price + PRICE_SCALE)

One request more on an idle expert costs as much similarity as is anyway a toss-up, and each doubling of the load as
much again; the whole range of prices costs half of that. So a near tie is decided by load, then by price, while a clear
match waits its turn: 0.1 more similarity outweighs 31 requests. Equal scores go to the smaller load, then to the lower
price, then to whoever came first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from agora.errors import InvalidRequest
from agora.routing.router import Candidate, Ranking
from agora.square import Expert

LOAD_PENALTY: Final = 0.02
"""Similarity that the first request on an expert costs, and every doubling after. Routing 4,279 paper titles to seven
fields by embeddings (mag_titles dev, cards of 8 titles and a sentence, 20 draws), the best of two experts less than
0.02 apart was right 0.35–0.39 of the time and the second 0.31–0.34: hardly worth waiting for. From 0.03 on it pays."""

PRICE_PENALTY: Final = 0.01
"""Similarity that the highest price costs. Half the load's: below 0.01 the same titles were right 0.35–0.38 against
0.33–0.34, and of two idle near-equals the cheaper one should answer, but not with a queue before it."""

PRICE_SCALE: Final = 1.0
"""Price per million tokens that costs half of `PRICE_PENALTY`. About what hosted models of middling size ask in US
dollars; an expert of one's own (price 0) pays nothing."""

DIGITS: Final = 4
"""Decimals of similarity that count. Vectors of one text differ in the sixth with what else is in the batch, and such
noise must not decide between replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What load and price cost, in similarity; see the module's formula.

    Raises:
        InvalidRequest: If one is negative or not finite, or `price_scale` is 0.
    """

    load_penalty: float = LOAD_PENALTY
    price_penalty: float = PRICE_PENALTY
    price_scale: float = PRICE_SCALE

    def __post_init__(self) -> None:
        for name in ("load_penalty", "price_penalty", "price_scale"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise InvalidRequest(f"{name} is {value}; it must be a number ≥ 0")
        if self.price_scale == 0:
            raise InvalidRequest("price_scale is 0; it must be above 0")

    def candidate(self, expert: Expert, similarity: float) -> Candidate:
        """`expert` as it stands now."""
        load = expert.backend.load.total
        price = expert.card.price_per_mtok
        seen = round(float(similarity), DIGITS)
        cost = self.load_penalty * math.log2(1 + load) + self.price_penalty * price / (price + self.price_scale)
        return Candidate(expert=expert.name, similarity=seen, load=load, price=price, score=seen - cost)


def is_generalist(expert: Expert) -> bool:
    """Whether its card claims no field: a description alone, neither examples nor keywords."""
    return not expert.card.examples and not expert.card.keywords


def by_match(
    experts: Sequence[Expert],
    similarities: Mapping[str, float],
    *,
    excluded: tuple[tuple[str, str], ...],
    close_match: float,
    weights: Weights,
    basis: str = "match",
    note: str = "",
) -> Ranking:
    """Ranks by how well they match.

    Where nobody reaches `close_match`, generalists go first: of several experts in other fields, the one that
    claims no field is the likeliest to help.

    Args:
        experts: Those who can take the subtask, at least one, in the order they came.
        similarities: By name.
        excluded: Those who cannot, with reasons.
        close_match: Similarity from which on a match is one.
        weights: What load and price cost.
        basis: What similarity measures, in words.
        note: What else the reader should know.
    """
    candidates = [weights.candidate(e, similarities[e.name]) for e in experts]
    close = max(c.similarity for c in candidates) >= close_match
    generalists = frozenset(e.name for e in experts if is_generalist(e))
    # sorted() is stable: equal keys keep the order in which they came to the square
    ordered = sorted(candidates, key=lambda c: (not close and c.expert not in generalists, *_key(c)))
    return Ranking(
        candidates=tuple(ordered), excluded=excluded, close=close, generalists=generalists, basis=basis, note=note
    )


def by_name(
    experts: Sequence[Expert], named: str, *, excluded: tuple[tuple[str, str], ...], weights: Weights
) -> Ranking:
    """Ranks the named expert first and the others by load and price; nothing is matched, so it costs next to nothing.

    Args:
        experts: Those who can take the subtask, the named one among them.
        named: Whom the plan names.
        excluded: Those who cannot, with reasons.
        weights: What load and price cost.
    """
    ordered = sorted((weights.candidate(e, 0.0) for e in experts), key=lambda c: (c.expert != named, *_key(c)))
    return Ranking(candidates=tuple(ordered), excluded=excluded, named=named)


def _key(candidate: Candidate) -> tuple[float, int, float]:
    return -round(candidate.score, DIGITS + 2), candidate.load, candidate.price
