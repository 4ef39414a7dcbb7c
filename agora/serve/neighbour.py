"""What is known of one neighbour, and how patient a node is with it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass
from typing import Final

from agora.config import NeighbourConfig
from agora.serve.look import Looks
from agora.serve.node_card import MAX_EXPERTS, Node
from agora.serve.offers import Offer
from agora.types import Tier
from experts.neighbour import Engine, Line

log = logging.getLogger(__name__)

FAILURES: Final = 2
"""Failures in a row after which a neighbour is down: one may be a lost packet or a restart of something between."""

RECHECK_S: Final = 0.5
"""Seconds from a first failure to the look that decides: over within a burst of lost packets, soon enough for those
who wait on a node that hangs."""

BACKOFF_CAP_S: Final = 30.0
"""Longest time between two looks at a neighbour that is down, unless `refresh_s` is longer. It costs one refused
connection; a node that is up again is not left out for longer."""

JITTER: Final = 0.1
"""Share by which the time between looks varies, so that nodes started together do not look together for ever."""

MAX_REASONS: Final = 32
"""Most different reasons logged of one neighbour until it is started anew: they hold what it says itself."""

JOINS_AT_ONCE: Final = 2 * MAX_EXPERTS
"""Most experts of one neighbour that join in a burst: a full card, and once more after a restart."""

JOINS_PER_MINUTE: Final = 64
"""Most that join in a minute after that. Whoever joins is embedded anew by those who route, 17 texts at most; so one
whose experts change with every look costs three seconds of a processor a minute, and not all there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighbourState:
    """How a neighbour is.

    Attributes:
        name: Its name in the configuration.
        node: Its id, if it ever told one.
        node_name: What it calls itself.
        version: Its version of agora.
        up: Whether its experts can be asked.
        since: When it came up or went down: wall-clock seconds since the epoch.
        error: What went wrong last; None while all is well.
        rtt_s: Seconds that the last look took.
        experts: Names, here, of its experts that are in the square.
        asked: Requests sent to it and not answered yet.
    """

    name: str
    node: str | None
    node_name: str | None
    version: str | None
    up: bool
    since: float
    error: str | None
    rtt_s: float | None
    experts: tuple[str, ...]
    asked: int


class KnownNeighbour:
    """What is known of one neighbour, and how it comes to be known."""

    def __init__(self, name: str, config: NeighbourConfig, lookout: Looks, line: Line, wake: asyncio.Event) -> None:
        self.name = name
        self.config = config
        self.lookout = lookout
        self.line = line
        self.wake = wake
        self.node: Node | None = None
        self.revision: str | None = None
        self.offers: tuple[Offer, ...] = ()
        self.tier: Tier | None = None
        self.engines: dict[str, Engine] = {}
        self.lies: set[str] = set()
        self.up = False
        self.since = time.time()
        self.failures = 0
        self.suspected = False
        self.error: str | None = None
        self.rtt_s: float | None = None
        self.told: set[str] = set()
        self.looked = asyncio.Event()
        self._joins = float(JOINS_AT_ONCE)
        self._joins_at = 0.0

    def engine(self, label: str) -> Engine:
        """What generates there under that label."""
        return self.engines.setdefault(label, Engine())

    def delay_s(self, rng: random.Random) -> float:
        """Seconds to the next look."""
        refresh = self.config.refresh_s
        if self.failures == 0:
            seconds = refresh
        elif self.failures < FAILURES:
            seconds = min(refresh, RECHECK_S)
        else:
            # The exponent is bounded: 2.0 ** 1024 would overflow.
            seconds = min(refresh * 2.0 ** min(self.failures - FAILURES, 32), max(refresh, BACKOFF_CAP_S))
        return seconds * rng.uniform(1 - JITTER, 1 + JITTER)

    def may_join(self) -> bool:
        """Counts one more of its experts that joins; False if there have been too many lately."""
        now = asyncio.get_running_loop().time()
        self._joins = min(JOINS_AT_ONCE, self._joins + (now - self._joins_at) * JOINS_PER_MINUTE / 60)
        self._joins_at = now
        if self._joins < 1:
            return False
        self._joins -= 1
        return True

    def say_once(self, reason: str) -> None:
        """Logs a reason, unless it has been logged already."""
        if reason not in self.told and len(self.told) < MAX_REASONS:
            self.told.add(reason)
            log.warning("neighbour %s %s", self.name, reason)

    def state(self, experts: tuple[str, ...]) -> NeighbourState:
        """How it is; `experts` are those of it that are in the square."""
        return NeighbourState(
            name=self.name,
            node=self.node.id if self.node else None,
            node_name=self.node.name if self.node else None,
            version=self.node.version if self.node else None,
            up=self.up,
            since=self.since,
            error=self.error,
            rtt_s=self.rtt_s,
            experts=experts,
            asked=sum(engine.asked for engine in self.engines.values()),
        )
