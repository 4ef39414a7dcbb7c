"""The ladder: in which order experts are climbed to, and the plain rules for when no fitted policy says more."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from agora.errors import NoExpert
from agora.routing.cascade.policy import Ask, Decision, Query, Seen, Take
from agora.routing.signals import MEAN_LOGPROB, P_TRUE, SELF_CONSISTENCY, VERBALISED
from agora.square import Expert

ACCEPT: Final = 0.7
"""Confidence at which an answer is taken while nothing is calibrated: the default of `[vertical] accept`."""

ROUGH: Final = (SELF_CONSISTENCY, P_TRUE, VERBALISED, MEAN_LOGPROB)
"""Signals that stand for a confidence while nothing is calibrated, the first that is there. Those that ask again come
before the fluency of the first answer, and what a model only says of itself after what it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """How far an answer is trusted.

    Attributes:
        value: Probability in [0, 1] that it is right.
        source: The signal that it is read from while nothing is calibrated; None if it is calibrated.
    """

    value: float
    source: str | None = None


def rough(signals: Mapping[str, float]) -> Confidence | None:
    """An uncalibrated confidence, or None if no signal tells anything."""
    for name in ROUGH:
        value = signals.get(name, math.nan)
        if name == MEAN_LOGPROB:
            value = math.exp(value) if value <= 0 else math.nan
        if 0 <= value <= 1:
            return Confidence(value=value, source=name)
    return None


def probability(value: float | None) -> float | None:
    """The value if it is a probability, else None: NaN and what is out of range tell nothing."""
    return float(value) if value is not None and 0 <= value <= 1 else None


def rungs(experts: Sequence[Expert]) -> tuple[tuple[Expert, ...], ...]:
    """Experts by tier, then price, the lowest first; those alike in both share a rung, in the order given."""

    def height(expert: Expert) -> tuple[int, float]:
        return expert.card.tier.height, expert.card.price_per_mtok

    # sorted() is stable: who comes first within a rung stays first
    return tuple(tuple(same) for _, same in groupby(sorted(experts, key=height), key=height))


@dataclass(frozen=True, slots=True, kw_only=True)
class UpTheLadder:
    """A plain cascade: the lowest rung first, and up until an answer is trusted.

    Whoever stands on the same rung as one who answered is passed over: asking it would be no climbing. It is asked in
    the place of one that failed.

    Attributes:
        models: Names, the lowest rung first.
        rung: The rung of each.
        accept: Confidence at which an answer is taken.
        confidence: How far an answer is trusted, by the model's name and its signals; None where nothing tells.
    """

    models: tuple[str, ...]
    rung: tuple[int, ...]
    accept: float
    confidence: Callable[[str, Mapping[str, float]], Confidence | None]

    def decide(self, query: Query, seen: Sequence[Seen], *, allowed: Collection[int]) -> Decision:
        """Says what to do next; see `agora.routing.cascade.policy.Policy`. A quality of 0 stands for unknown."""
        highest = max((self.rung[s.model] for s in seen), default=-1)
        above = [m for m in sorted(allowed) if self.rung[m] > highest]
        if not seen:
            if not above:
                raise NoExpert("nobody may be asked")
            return Ask(model=above[0], quality=0.0, why=f"{self.models[above[0]]}, the lowest who can be asked")
        best = max(seen, key=lambda s: self.rung[s.model])
        trust = self.confidence(self.models[best.model], best.signals)
        name = self.models[best.model]
        value = 0.0 if trust is None else trust.value
        if trust is not None and value >= self.accept:
            return Take(model=best.model, quality=value, why=f"{name}'s {value:.2f} is enough, from {self.accept:g} on")
        lacking = f"nothing tells how sure {name} is" if trust is None else f"{name}'s {value:.2f} is not enough"
        if not above:
            return Take(model=best.model, quality=value, why=f"{lacking}, but nobody above can be asked")
        return Ask(model=above[0], quality=0.0, why=f"{lacking}: {self.models[above[0]]}, the next up")


@dataclass(frozen=True, slots=True, kw_only=True)
class AlwaysTop:
    """Asks the highest that may be asked, and takes its answer: what is done where a guarantee is wanted and nothing
    cheaper is certified.

    Attributes:
        models: Names, the lowest rung first.
        confidence: As for `UpTheLadder`.
    """

    models: tuple[str, ...]
    confidence: Callable[[str, Mapping[str, float]], Confidence | None]

    def decide(self, query: Query, seen: Sequence[Seen], *, allowed: Collection[int]) -> Decision:
        """Says what to do next; see `agora.routing.cascade.policy.Policy`. A quality of 0 stands for unknown."""
        if seen:
            best = max(seen, key=lambda s: s.model)
            trust = self.confidence(self.models[best.model], best.signals)
            return Take(model=best.model, quality=0.0 if trust is None else trust.value, why="the top that answered")
        if not allowed:
            raise NoExpert("nobody may be asked")
        return Ask(model=max(allowed), quality=0.0, why="the top tier: nothing cheaper is certified")
