"""How long things take, as far as is known: what was said beforehand, corrected by what is observed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Final, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

PRIOR: Final = 3.0
"""Observations that what was said beforehand counts for. With tasks whose lengths vary by a factor of e^0.5, three of
them tell a machine's own factor to about e^0.3, which is how far those are apart that are thought to be alike."""

MEMORY: Final = 0.9
"""What an observation counts for at each further one: the last ten or so make the estimate, so that a machine that
became slow is seen within a few tasks."""

MOST_LOG: Final = math.log(1e3)
"""An observation that is a thousand times off tells that something else was wrong: it counts as that much and no
more."""


class Factors(Generic[Key]):
    """How many times as long as expected things take, by who does them.

    A geometric mean of the observed ratios, the latest counting most, drawn towards 1 while there are few: durations
    are products of many causes, and an arithmetic mean would follow the longest one.
    """

    def __init__(self) -> None:
        self._sums: dict[Key, tuple[float, float]] = {}

    def saw(self, who: Key, expected: float, observed: float) -> None:
        """Takes note of one. What is not positive tells nothing and is left out."""
        if not (expected > 0 and observed > 0 and math.isfinite(expected) and math.isfinite(observed)):
            return
        ratio = min(max(math.log(observed / expected), -MOST_LOG), MOST_LOG)
        total, count = self._sums.get(who, (0.0, 0.0))
        self._sums[who] = MEMORY * total + ratio, MEMORY * count + 1.0

    def of(self, who: Key) -> float:
        """The factor; 1 for whom nothing is known of."""
        total, count = self._sums.get(who, (0.0, 0.0))
        return math.exp(total / (count + PRIOR))


class Pace(Generic[Key]):
    """Seconds per token of those who answer, learned from their answers.

    Args:
        usual_s: Seconds per token of those of whom nothing is known yet, nor of any other.
    """

    def __init__(self, usual_s: float) -> None:
        self._usual_s = usual_s
        self._seen: dict[Key, tuple[float, float]] = {}

    def saw(self, who: Key, tokens: float, seconds: float) -> None:
        """Takes note of an answer of that many tokens."""
        if not (tokens > 0 and seconds > 0 and math.isfinite(tokens) and math.isfinite(seconds)):
            return
        old_tokens, old_seconds = self._seen.get(who, (0.0, 0.0))
        self._seen[who] = MEMORY * old_tokens + tokens, MEMORY * old_seconds + seconds

    def of(self, who: Key) -> float:
        """Seconds per token; of somebody who has not answered yet the median of those who have."""
        if (seen := self._seen.get(who)) is not None:
            return seen[1] / seen[0]
        return self.usual()

    def usual(self, among: Iterable[Key] | None = None) -> float:
        """The median of those who have answered; among some of them, if any of these has."""
        keys = self._seen.keys() if among is None else [k for k in among if k in self._seen] or self._seen.keys()
        known = sorted(s / t for t, s in (self._seen[k] for k in keys))
        return known[len(known) // 2] if known else self._usual_s
