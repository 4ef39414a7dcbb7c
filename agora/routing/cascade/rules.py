"""Rules that turn what is believed into whom to ask next: the kinds of policies, in a registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from agora.routing.cascade.beliefs import Forecast, supersets

Choices = NDArray[np.int_]
Open = NDArray[np.bool_]

TAKE: Final = -1
"""Choice of a rule that asks nobody further."""


class Rule(Protocol):
    """Chooses for many questions of which the same models have been asked."""

    kind: ClassVar[str]

    def choose(self, subset: int, forecast: Forecast, open_: Open) -> Choices:
        """Whom to ask next.

        Args:
            subset: Who has been asked, as a bit mask.
            forecast: What is believed of n questions.
            open_: Who may be asked, shape (n, m).

        Returns:
            A model for each question, or `TAKE`; shape (n,).
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """Always the same model; where it may not be asked, the one after it, else the one before.

    Attributes:
        model: Its position.
    """

    kind: ClassVar[str] = "single"
    model: int

    def choose(self, subset: int, forecast: Forecast, open_: Open) -> Choices:
        """Asks once."""
        n, m = open_.shape
        if subset:
            return np.full(n, TAKE)
        order = [*range(self.model, m), *reversed(range(self.model))]
        return _first(open_, order)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Asks one model: the one with the most quality − cost / worth.

    Attributes:
        worth: Money that an answer's being right is worth.
    """

    kind: ClassVar[str] = "routing"
    worth: float

    def choose(self, subset: int, forecast: Forecast, open_: Open) -> Choices:
        """Asks once."""
        if subset:
            return np.full(len(open_), TAKE)
        return _highest(forecast.quality - forecast.cost / self.worth, open_)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cascade:
    """Asks one model after another until an answer is trusted enough.

    Attributes:
        chain: The models, in the order they are asked.
        threshold: Probability of being right from which an answer is taken.
    """

    kind: ClassVar[str] = "cascade"
    chain: tuple[int, ...]
    threshold: float

    def choose(self, subset: int, forecast: Forecast, open_: Open) -> Choices:
        """Asks the next of the chain, or takes."""
        following = _first(open_, [j for j in self.chain if not subset >> j & 1])
        if not subset:
            return following
        return np.where(np.round(forecast.held, 9) >= self.threshold, TAKE, following)


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeRouting:
    """Chooses the set of models with the most E[quality of its best answer] − cost / worth, and asks its cheapest.

    Source: Dekoninck et al. (2024), "A Unified Approach to Routing and Cascading for LLMs", arXiv 2410.10347. There
    the best answer of a set is the expected maximum of independent normal variables; here a set's quality is learned
    as one, for answers of models are all but independent.

    Attributes:
        worth: Money that an answer's being right is worth: 1/λ.
    """

    kind: ClassVar[str] = "cascade_routing"
    worth: float

    def choose(self, subset: int, forecast: Forecast, open_: Open) -> Choices:
        """Asks the cheapest of the best set, or takes if nothing is better than what is there."""
        m = open_.shape[1]
        above = supersets(subset, m)
        if not above:
            return np.full(len(open_), TAKE)
        added = np.array([[bool((s & ~subset) >> j & 1) for j in range(m)] for s in above])
        values = forecast.reach - forecast.cost @ added.T / self.worth
        values = np.where((~open_).astype(float) @ added.T > 0, -np.inf, values)
        best = np.round(values, 9).argmax(axis=1)
        cheapest = np.where(added[best] & open_, forecast.cost, np.inf).argmin(axis=1)
        highest = np.take_along_axis(values, best[:, None], axis=1)[:, 0]
        enough = forecast.held >= highest if subset else np.isneginf(highest)
        return np.where(enough | np.isneginf(highest), TAKE, cheapest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """Optimal stopping: asks whom backward induction over the subsets says, as long as that is worth more than to stop.

    Attributes:
        level: Which of the worths that the induction was made for.
    """

    kind: ClassVar[str] = "stopping"
    level: int

    def choose(self, subset: int, forecast: Forecast, open_: Open) -> Choices:
        """Asks for whom the value of going on is highest."""
        onward = forecast.onward[:, :, self.level]
        chosen = _highest(onward, open_)
        if not subset:
            return chosen
        highest = np.where(open_, onward, -np.inf).max(axis=1)
        return np.where(highest > forecast.held, chosen, TAKE)


RULES: Final[Mapping[str, type[Rule]]] = {
    rule.kind: rule for rule in (Single, Routing, Cascade, CascadeRouting, Stopping)
}
"""Kinds of policies by name."""


def rule_from(kind: str, values: Mapping[str, Any]) -> Rule:
    """A rule as it was stored.

    Raises:
        KeyError: If there is no such kind.
        TypeError: If the values are not its own.
    """
    return RULES[kind](**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _first(open_: Open, order: list[int]) -> Choices:
    """The first of `order` that may be asked, else `TAKE`."""
    chosen = np.full(len(open_), TAKE)
    for j in reversed(order):
        chosen[open_[:, j]] = j
    return chosen


def _highest(values: NDArray[np.float64], open_: Open) -> Choices:
    """The open model of the highest value, the cheapest among equals, else `TAKE`."""
    chosen = np.where(open_, np.round(values, 9), -np.inf).argmax(axis=1)
    return np.where(open_.any(axis=1), chosen, TAKE)
