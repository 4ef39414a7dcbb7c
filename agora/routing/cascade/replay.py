"""Plays a rule over a whole table of outcomes at once: what it would have asked, taken, paid and waited for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agora.routing.cascade.beliefs import Belief, Forecast, members, subsets
from agora.routing.cascade.evidence import Evidence
from agora.routing.cascade.reading import Reader
from agora.routing.cascade.rules import TAKE, Open, Rule

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What a rule made of n questions.

    Attributes:
        taken: Whose answer was taken, shape (n,).
        asked: Who was asked, as bit masks, shape (n,).
        cost: Money of all that were asked, shape (n,).
        seconds: Time of all that were asked, one after another, shape (n,).
    """

    taken: NDArray[np.int_]
    asked: NDArray[np.int_]
    cost: Floats
    seconds: Floats

    def quality(self, recorded: Floats) -> Floats:
        """How right the taken answers were, shape (n,)."""
        result: Floats = np.take_along_axis(recorded, self.taken[:, None], axis=1)[:, 0]
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A table made ready for any number of rules.

    Attributes:
        evidence: Of n questions.
        forecasts: What is believed of each question, by who would have been asked.
        open: Who may be asked, by who was, shape (n, m).
    """

    evidence: Evidence
    forecasts: Mapping[int, Forecast]
    open: Mapping[int, Open]


def board_of(
    evidence: Evidence,
    reader: Reader,
    beliefs: Mapping[int, Belief],
    *,
    mean_cost: Floats,
    worths: int,
    deadline: float | None,
) -> Board:
    """Looks at each question as it would stand after every subset of models had been asked."""
    reading = reader.read(evidence, range(len(mean_cost)))
    forecasts = {s: belief.forecast(evidence, reading, mean_cost, worths) for s, belief in beliefs.items()}
    return board_from(evidence, forecasts, deadline)


def board_from(evidence: Evidence, forecasts: Mapping[int, Forecast], deadline: float | None) -> Board:
    """A board of forecasts that are already there."""
    spent = {s: evidence.seconds[:, members(s)].sum(axis=1) for s in forecasts}
    open_ = {s: opened(s, f, left=None if deadline is None else deadline - spent[s]) for s, f in forecasts.items()}
    return Board(evidence=evidence, forecasts=forecasts, open=open_)


def opened(subset: int, forecast: Forecast, *, left: Floats | None) -> Open:
    """Who may be asked: those not asked yet who will likely be in time; to begin with, the quickest if nobody would.

    Args:
        subset: Who has been asked.
        forecast: Of n questions.
        left: Seconds left, shape (n,); None for any.
    """
    open_ = np.ones(forecast.quality.shape, dtype=bool)
    open_[:, members(subset)] = False
    if left is None:
        return open_
    in_time = open_ & (forecast.seconds <= left[:, None])
    if not subset:
        nobody = ~in_time.any(axis=1)
        in_time[nobody, forecast.seconds[nobody].argmin(axis=1)] = True
    return in_time


def play(rule: Rule, board: Board) -> Played:
    """Plays a rule over all questions."""
    n, m = board.evidence.cost.shape
    asked, taken = np.zeros(n, dtype=np.int64), np.full(n, TAKE)
    going = np.ones(n, dtype=bool)
    for subset in subsets(m):
        here = np.flatnonzero(going & (asked == subset))
        if not len(here):
            continue
        forecast = board.forecasts[subset]
        choices = rule.choose(subset, forecast, board.open[subset])[here]
        done = here[choices == TAKE]
        taken[done], going[done] = forecast.best[done], False
        on = choices != TAKE
        asked[here[on]] |= 1 << choices[on]
    was = (asked[:, None] >> np.arange(m)) & 1
    return Played(
        taken=taken,
        asked=asked,
        cost=(board.evidence.cost * was).sum(axis=1),
        seconds=(board.evidence.seconds * was).sum(axis=1),
    )
