"""When a second copy of a request is sent on another path: late ones only, a bounded share, and not when all are late.

After J. Dean and L. A. Barroso, "The Tail at Scale" (CACM 2013): a copy is sent once a request is later than 95 % of
its kind, which costs about 5 % more requests and cuts the tail. Where everything is slow at once a copy only adds to
the load that made it so; so before one is sent it is looked at how requests on the other paths do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from agora.network.bucket import ShareBucket

SHARE: Final = 0.05
"""Most extra requests, as a share of all: what "later than 95 % of its kind" comes to by itself."""

CORRELATED: Final = 0.5
"""Share of late ones among the requests on other paths from which on everything is taken to be slow. It is 0.05 when
nothing is wrong, and near 1 when something is wrong everywhere: half lies far from both, so its exact place hardly
matters."""

ALIKE: Final = 4.0
"""A request that is so many times as late as others is not slow for their reason: when everything slows down the paths
do so within a factor of a few, and one that hangs gets later without end."""

KEPT: Final = 1024
"""First tokens remembered: those of ten seconds at a hundred requests a second. A request waits for less than that
before it is late."""


@dataclass(eq=False, slots=True, kw_only=True)
class Sent:
    """A copy that is under way, as far as its first token is concerned.

    Attributes:
        path: Name of its path.
        at: When it was sent.
        late_after_s: Seconds after which it is late: the learned 95th percentile; None while too little is known.
    """

    path: str
    at: float
    late_after_s: float | None


@dataclass(frozen=True, slots=True)
class _First:
    """A first token that came, and after how many times the time after which it was late."""

    path: str
    at: float
    times: float


class Hedging:
    """Keeps count of what is under way on all paths to the same help.

    Args:
        clock: Seconds on a clock that never goes back.
        share: Most extra requests, as a share of all; 0 for none.
    """

    def __init__(self, *, clock: Callable[[], float], share: float = SHARE) -> None:
        self._clock = clock
        self._open: set[Sent] = set()
        self._firsts: deque[_First] = deque(maxlen=KEPT)
        self.bucket = ShareBucket(share)

    def sent(self, path: str, late_after_s: float | None) -> Sent:
        """A copy is sent on that path."""
        sent = Sent(path=path, at=self._clock(), late_after_s=late_after_s)
        self._open.add(sent)
        return sent

    def first_token(self, sent: Sent) -> None:
        """Its first token came."""
        self._open.discard(sent)
        if sent.late_after_s is not None:
            now = self._clock()
            self._firsts.append(_First(sent.path, now, _times(sent, now)))

    def gone(self, sent: Sent) -> None:
        """It failed or was broken off, which says nothing of how slow its path is. Safe to call after `first_token`."""
        self._open.discard(sent)

    def late_in_s(self, sent: Sent) -> float | None:
        """Seconds until a copy is late, not above 0 if it is; None if that is not known."""
        return None if sent.late_after_s is None else sent.at + sent.late_after_s - self._clock()

    def correlated(self, sent: Sent, *, leaving: bool = False) -> bool:
        """Whether other paths are as slow as that of a late copy.

        Judged by what happened on the other paths since the copy was sent: first tokens that came, in time or late
        (each by the percentile of its own path when it was sent), and requests still without one that are late by now.
        Late is who is late alike: a quarter (`ALIKE`) as many times over the percentile as the copy in question, or
        more. Requests that are not that late yet say nothing, and where nothing can be said the answer is no.

        Args:
            sent: The late copy.
            leaving: Whether it is about to be given up for another path, rather than joined by a second copy. Then a
                request that waits on another path is late by the percentile of the copy in question too, where that is
                the shorter: a path that had slow times before is within its own percentile in the next one, and
                whoever goes there waits all the same.
        """
        if sent.late_after_s is None:
            return False
        now = self._clock()
        late = in_time = 0
        alike = max(1.0, _times(sent, now) / ALIKE)
        for first in reversed(self._firsts):
            if first.at < sent.at:
                break
            if first.path != sent.path:
                late += first.times > alike
                in_time += first.times <= alike
        for other in self._open:
            if other.path != sent.path and other.late_after_s is not None:
                usual = min(other.late_after_s, sent.late_after_s) if leaving else other.late_after_s
                late += (now - other.at) / max(usual, 1e-9) > alike
        return late > 0 and late >= CORRELATED * (late + in_time)


def _times(sent: Sent, now: float) -> float:
    """How many times the time after which it is late has passed; 0 where that is not known."""
    return (now - sent.at) / max(sent.late_after_s, 1e-9) if sent.late_after_s is not None else 0.0
