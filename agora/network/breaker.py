"""Breakers: a path that fails is left alone for a while, and then tried with one token before it is used again.

States and their changes are those of M. Nygard, "Release It!" (2007), chapter 5; that a half-open breaker lets exactly
one probe through, and that the time it stays open grows exponentially with jitter, is against the herd that would else
come back all at once (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from agora.errors import InvalidRequest

STEADY: Final = 4.0
"""A path that breaks again within so many times the time its breaker was open has not come back for good (it flaps):
the next time goes on growing where the last one ended. Four lets one that flaps every second be left alone for 30 s
after six of its turns, and forgives one that has worked for a few minutes."""

MAX_WHY_CHARS: Final = 300
"""Characters kept of what went wrong: a sentence with a host and the words of the operating system. More of it may be a
server's whole page, and it is repeated in every error while the breaker is open."""


class BreakerState(StrEnum):
    """How a breaker is."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerRules:
    """When a breaker opens, and for how long.

    Attributes:
        consecutive: Failures in a row that open it. Two may be a lost connection and its like; the third is no chance.
        window: Requests that the failure rate is taken over: the last ones, soon enough replaced once it works again.
        rate: Failure rate that opens it: asking somebody else at once is quicker from there on.
        least: Requests in the window below which there is no rate: of fewer, half may fail by chance on a path that
            loses a fifth.
        first_open_s: Seconds that it stays open at first: some round trips of a mobile network, one hand-over.
        growth: By what that time is multiplied each time a probe fails.
        longest_open_s: Longest time that it stays open. A probe costs one token; a path that is back is not left out
            for longer.
        jitter: Share by which the time varies, so that many that broke together do not come back together.

    Raises:
        InvalidRequest: If a value is out of range.
    """

    consecutive: int = 3
    window: int = 20
    rate: float = 0.5
    least: int = 10
    first_open_s: float = 0.5
    growth: float = 2.0
    longest_open_s: float = 30.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        for name in ("consecutive", "window", "least"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} of a breaker is {getattr(self, name)}; it must be ≥ 1")
        if not 0 < self.rate <= 1:
            raise InvalidRequest(f"rate of a breaker is {self.rate}; allowed: above 0, at most 1")
        if not 0 <= self.jitter < 1:
            raise InvalidRequest(f"jitter of a breaker is {self.jitter}; allowed: 0 up to, not including, 1")
        for name, least in (("first_open_s", 1e-3), ("growth", 1.0), ("longest_open_s", self.first_open_s)):
            if not (getattr(self, name) >= least and math.isfinite(getattr(self, name))):
                raise InvalidRequest(f"{name} of a breaker is {getattr(self, name)}; it must be a number ≥ {least:g}")


class Breaker:
    """Counts how a path does, and says whether it may be used.

    It asks nobody: whoever owns it sends the probe when one is `due`, and tells how that went.

    Args:
        clock: Seconds on a clock that does not go back; one that does, stands still or leaps does no lasting harm.
        rules: When it opens.
        rng: Where the jitter comes from.

    Attributes:
        why: What went wrong last; empty while nothing has.
        opened: How often it opened.
    """

    def __init__(
        self, *, clock: Callable[[], float], rules: BreakerRules | None = None, rng: random.Random | None = None
    ) -> None:
        self._clock = clock
        self._rules = rules or BreakerRules()
        self._rng = rng or random.Random()
        self._state = BreakerState.CLOSED
        self._recent: deque[bool] = deque(maxlen=self._rules.window)
        self._in_a_row = 0
        self._open_s = self._rules.first_open_s
        self._until = 0.0
        self._since: float | None = None
        self._closed_at = -math.inf
        self._was_open_s = 0.0
        self.why = ""
        self.opened = 0

    @property
    def state(self) -> BreakerState:
        """How it is now."""
        return self._state

    @property
    def closed(self) -> bool:
        """Whether the path may be used."""
        return self._state is BreakerState.CLOSED

    @property
    def due(self) -> bool:
        """Whether it is time for a probe and none is on its way."""
        return self._state is BreakerState.OPEN and self.due_in_s <= 0

    @property
    def due_in_s(self) -> float:
        """Seconds until a probe is due; 0 if one is, or is on its way, or none is needed."""
        if self._state is not BreakerState.OPEN:
            return 0.0
        left = self._until - self._clock()
        # More than it ever waits: the clock went back, and the path must not be given up for as long.
        return max(0.0, left) if left <= self._rules.longest_open_s * (1 + self._rules.jitter) else 0.0

    @property
    def open_s(self) -> float:
        """Seconds that it was not closed, since the start."""
        return self._was_open_s + (0.0 if self._since is None else max(0.0, self._clock() - self._since))

    def succeeded(self) -> None:
        """A request on the path came to something. One begun before it opened closes it too: the path works."""
        self._recent.append(True)
        self._in_a_row = 0
        if self._state is not BreakerState.CLOSED:
            self._close()

    def failed(self, why: str) -> None:
        """A request on the path failed through the path's or the server's fault."""
        self.why = why[:MAX_WHY_CHARS]
        if self._state is not BreakerState.CLOSED:
            return  # Sent before it opened: no news.
        self._recent.append(False)
        self._in_a_row += 1
        failures = len(self._recent) - sum(self._recent)
        many = len(self._recent) >= self._rules.least and failures >= self._rules.rate * len(self._recent)
        if self._in_a_row >= self._rules.consecutive or many:
            self._open()

    def begin_probe(self) -> None:
        """The one probe is sent now.

        Raises:
            InvalidRequest: If none is due.
        """
        if not self.due:
            raise InvalidRequest(f"no probe is due: the breaker is {self._state}, for {self.due_in_s:.3g} s more")
        self._state = BreakerState.HALF_OPEN

    def end_probe(self, ok: bool, why: str = "") -> None:
        """How the probe went; after one that failed the path is left alone for longer than before."""
        if self._state is not BreakerState.HALF_OPEN:
            return  # A request that was still under way has closed it in the meantime.
        if ok:
            self._close()
            return
        self.why = why[:MAX_WHY_CHARS] or self.why
        self._open_s = min(self._rules.longest_open_s, self._open_s * self._rules.growth)
        self._wait()

    def give_up_probe(self) -> None:
        """The probe was broken off before it could tell anything: another one may be sent at once."""
        if self._state is BreakerState.HALF_OPEN:
            self._state, self._until = BreakerState.OPEN, self._clock()

    def _open(self) -> None:
        if self._clock() - self._closed_at < STEADY * self._open_s:
            self._open_s = min(self._rules.longest_open_s, self._open_s * self._rules.growth)
        else:
            self._open_s = self._rules.first_open_s
        self._since = self._clock()
        self.opened += 1
        self._wait()

    def _wait(self) -> None:
        self._state = BreakerState.OPEN
        jitter = self._rng.uniform(1 - self._rules.jitter, 1 + self._rules.jitter)
        self._until = self._clock() + self._open_s * jitter

    def _close(self) -> None:
        self._was_open_s = self.open_s
        self._since = None
        self._closed_at = self._clock()
        self._state = BreakerState.CLOSED
        self._recent.clear()
        self._in_a_row = 0
