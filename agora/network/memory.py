"""What is remembered of a path and of a server, and what each observation changes in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from agora.network.availability import Availability
from agora.network.bandwidth import Bandwidth
from agora.network.ewma import Histogram, Mean, PeakEwma, Slope
from agora.network.jobs import MOST, Observation, ServerLoad
from agora.network.path import Path

RTT_S: Final = 0.05
"""Round-trip time of a link of which nothing is known: medians of 4G and 5G speed tests are 50 to 87 ms, wired links
have far less."""

MBPS: Final = 20.0
"""Bandwidth of a link of which nothing is known: the lower quarter of 4G."""

PREFILL_TPS: Final = 1000.0
"""Prompt tokens a second of a server of which nothing is known: a small model without a GPU; soon learned."""

DECODE_TPS: Final = 30.0
"""Generated tokens a second of a server of which nothing is known: a fast reader's pace, what servers are sized for."""

PRIOR_TRANSFER_S: Final = 0.1
"""Seconds of transfer that a configured bandwidth stands for: a single real one outweighs it. On recorded 4G and 5G 0.2
did as well, 0.05 a little worse."""

PRIOR_OUTCOMES: Final = 4.0
"""Outcomes that a configured availability stands for: a handful, so that what is seen on the day soon rules, and one
lost packet on a new path does not. Not tuned."""

PRIOR_ENTRIES: Final = 4.0
"""Entries of the prior in a distribution of actual over expected time: as few as `PRIOR_OUTCOMES`, for its reason. By
`PROVEN` real entries it is outvoted."""

SIGMA: Final = 0.4
"""Standard deviation of ln(actual/expected time) before anything is seen: a factor 1.5 either way. A
wide guess only keeps the first deadlines careful. Not tuned."""

FEW_TOKENS: Final = 4
"""Answers of fewer tokens do not tell a pace of decoding: of one to three gaps between tokens, a single packet that
held several makes it any number."""

PREFILL_RIDGE: Final = 4 * 200.0**2
"""How firmly the prior pace of reading prompts stands: like four prompts that differ by 200 tokens, which is by how
much short questions do; prompts of some thousand tokens outweigh it at once."""

SLOWEST_MBPS: Final = 1e-3
"""Bandwidth below which none is told for a link that is not configured to be dead: a modem of 1962."""

NEWS: Final = 0.25
"""What earlier observations are still worth once a link's configured values have changed: most of it was of another
place, but the server behind it is the same. Not tuned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """In how many seconds what was seen loses its weight (falls to 1/e).

    Attributes:
        latency_s: Peaks of latency; 10 s is Finagle's own.
        bandwidth_s: Transfers; on recorded 4G and 5G, 6 s did a little better than 10 s or 20 s.
        availability_s: Successes and failures.
        server_s: Paces of prefill and decode, which change with the model and not with the place.
        errors_s: How far off expectations were.
    """

    latency_s: float = 10.0
    bandwidth_s: float = 6.0
    availability_s: float = 60.0
    server_s: float = 300.0
    errors_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an expected time is made of, in seconds."""

    rtt_s: float
    up_s: float
    queue_s: float
    prefill_s: float
    decode_s: float
    down_s: float

    @property
    def first_token_s(self) -> float:
        """Until the first token comes."""
        return self.rtt_s + self.up_s + self.queue_s + self.prefill_s

    @property
    def total_s(self) -> float:
        """Until the last byte comes: tokens travel while others are generated."""
        return self.first_token_s + max(self.decode_s, self.down_s)


class PathMemory:
    """What was learned of one way to one server."""

    def __init__(self, memory: Memory) -> None:
        self.rtt = Mean(memory.latency_s, prior_weight=1.0)
        self.up = Bandwidth(memory.bandwidth_s, PRIOR_TRANSFER_S)
        self.down = Bandwidth(memory.bandwidth_s, PRIOR_TRANSFER_S)
        self.waiting = PeakEwma(memory.latency_s)
        self.availability = Availability(memory.availability_s, PRIOR_OUTCOMES)
        self.errors = Histogram(memory.errors_s, sigma=SIGMA, prior_weight=PRIOR_ENTRIES)
        self.first_errors = Histogram(memory.errors_s, sigma=SIGMA, prior_weight=PRIOR_ENTRIES)
        self._configured: tuple[tuple[float | None, float | None, float | None], ...] | None = None
        self._rtt_s: float | None = None
        self._up_mbps: float | None = None
        self._down_mbps: float | None = None
        self._local = False

    def configured(self, path: Path) -> None:
        """Takes the links' configured values as priors; a change of them is news, beside which what was seen fades."""
        values = tuple((link.up_mbps, link.down_mbps, link.rtt_s) for link in path.links)
        if values == self._configured:
            return
        if self._configured is not None:
            for learned in (self.rtt, self.up, self.down):
                learned.fade(NEWS)
        self._configured = values
        self._local = not path.links
        self._rtt_s = _all(_sum, (link.rtt_s for link in path.links), RTT_S)
        # A relay reads a request before it passes it on, so the ways up add up; an answer streams through.
        self._up_mbps = _all(_in_turn, (link.up_mbps for link in path.links), MBPS)
        self._down_mbps = _all(min, (link.down_mbps for link in path.links), MBPS)

    @property
    def dead(self) -> bool:
        """Whether a link is configured to have no bandwidth one way: then no observation can make it work."""
        return self._up_mbps == 0 or self._down_mbps == 0

    def rtt_s(self, now: float) -> float:
        """Round-trip time now."""
        if self._local:
            return 0.0
        seen = self.rtt.read(now, self._rtt_s)
        return RTT_S if seen is None else seen

    def up_s(self, size: int, now: float) -> float:
        """Seconds that so many bytes take up; infinite where a link is dead."""
        return self._transfer(self.up.mbps(now, self._up_mbps), size)

    def down_s(self, size: int, now: float) -> float:
        """Seconds that so many bytes take down."""
        return self._transfer(self.down.mbps(now, self._down_mbps), size)

    def _transfer(self, mbps: float | None, size: int) -> float:
        if self._local:
            return 0.0
        if self.dead:
            return math.inf
        # A transfer that moved nothing is no proof that the link is dead for good: it is slow beyond use.
        return size * 8e-6 / max(MBPS if mbps is None else mbps, SLOWEST_MBPS)

    def observe_transfers(self, seen: Observation, expected: Parts) -> None:
        """Bandwidth: from the seconds of sending and receiving, or what of the times must have been that."""
        if self._local:
            return
        rtt = expected.rtt_s
        up_s = seen.up_s
        if up_s is None and seen.first_token_s is not None and math.isfinite(expected.up_s) and expected.up_s >= rtt:
            up_s = max(seen.first_token_s - rtt - expected.queue_s - expected.prefill_s, 0.0)
        # An answer came, so bytes went both ways: that there are none means that nobody counted them.
        if up_s is not None and (seen.up_bytes or not seen.ok):
            self.up.observe(seen.up_bytes, up_s, seen.at, rtt_s=rtt, prior=self._up_mbps)
        down_s = seen.down_s
        if down_s is None and seen.first_token_s is not None and seen.completion_tokens < FEW_TOKENS:
            down_s = max(seen.total_s - seen.first_token_s, 0.0)
        if down_s is not None and (seen.down_bytes or not seen.ok):
            self.down.observe(seen.down_bytes, down_s, seen.at, rtt_s=rtt, prior=self._down_mbps)

    def observe_errors(self, seen: Observation, expected: Parts) -> None:
        """How far off the expectation was. What was broken off took at least so long: that counts where it was late."""
        if 0 < expected.total_s < math.inf and (seen.ok or seen.total_s > expected.total_s):
            self.errors.observe(seen.total_s / expected.total_s, seen.at)
        first = seen.total_s if seen.first_token_s is None else seen.first_token_s
        if 0 < expected.first_token_s < math.inf and (seen.ok or first > expected.first_token_s):
            self.first_errors.observe(first / expected.first_token_s, seen.at)

    def observe_waiting(self, seen: Observation, expected: Parts) -> None:
        """What is left of the time to the first token when all that is known of is taken off: the wait in a queue."""
        known = expected.rtt_s + (expected.up_s if seen.up_s is None else seen.up_s) + expected.prefill_s
        first = seen.first_token_s
        if first is None:
            first = seen.total_s - (0.0 if seen.cancelled else expected.decode_s + expected.down_s)
        left = first - known
        if not math.isfinite(left) or (not seen.ok and left <= self.waiting.read(seen.at)):
            return
        if seen.up_s is None and expected.up_s >= expected.rtt_s:
            return  # A slow transfer looks the same, and the bandwidth has been told of it.
        self.waiting.observe(max(left, 0.0), seen.at)
        if left < 0 and seen.rtt_s is None and not self._local:
            # All of it was quicker than the round trip alone was thought to be.
            self.rtt.observe(max(expected.rtt_s + left, 0.0), seen.at)


class ServerMemory:
    """What was learned of one server, whichever way it is reached: seconds per token."""

    def __init__(self, memory: Memory) -> None:
        self._prefill = Slope(memory.server_s, PREFILL_RIDGE)
        self._at_most = Mean(memory.server_s, prior_weight=0.0)
        self._decode = Mean(memory.server_s, prior_weight=0.5)
        self._service = Mean(memory.server_s, prior_weight=0.0)

    def prefill(self, now: float, load: ServerLoad | None) -> float:
        """Seconds per prompt token; the server's own word counts most."""
        if load is not None and load.prefill_tps:
            return min(1 / load.prefill_tps, MOST)
        pace, at_most = self._prefill.read(now, 1 / PREFILL_TPS), self._at_most.read(now, None)
        # Prompts of one length tell no slope, but each was read in no more than the time to its first token.
        return pace if at_most is None else min(pace, at_most)

    def decode(self, now: float, load: ServerLoad | None) -> float:
        """Seconds per generated token."""
        if load is not None and load.decode_tps:
            return min(1 / load.decode_tps, MOST)
        return self._decode.read(now, 1 / DECODE_TPS) or 0.0

    def queue(self, now: float, load: ServerLoad | None) -> float:
        """Seconds in the server's queue, by Little's law: those that wait are taken at the pace at which those that run
        end."""
        if load is None or not load.waiting:
            return 0.0
        return load.waiting * (self._service.read(now, None) or 0.0) / max(load.running, 1)

    def observe(self, seen: Observation, expected: Parts) -> None:
        """Learns from an answer."""
        first = seen.first_token_s
        up = expected.up_s if seen.up_s is None else seen.up_s
        on_the_way = expected.rtt_s + up
        if not math.isfinite(on_the_way):
            return
        self._service.observe(max(seen.total_s - on_the_way, 0.0), seen.at)
        if first is None:
            return
        if seen.prompt_tokens:
            read = max(first - on_the_way, 0.0)
            self._prefill.observe(seen.prompt_tokens, read, seen.at)
            self._at_most.observe(read / seen.prompt_tokens, seen.at, weight=seen.prompt_tokens)
        if seen.completion_tokens >= FEW_TOKENS:
            pace = max(seen.total_s - first, 0.0) / (seen.completion_tokens - 1)
            self._decode.observe(pace, seen.at)


def _all(together: Callable[[list[float]], float], values: Iterable[float | None], unknown: float) -> float | None:
    """Joins what is configured of each link; None if nothing is of any."""
    known = list(values)
    if all(v is None for v in known):
        return None
    return together([unknown if v is None else v for v in known])


def _sum(values: list[float]) -> float:
    return sum(values)


def _in_turn(mbps: list[float]) -> float:
    """Bandwidth of links that each pass all on before the next begins: times add up."""
    return 0.0 if min(mbps) == 0 else 1 / sum(1 / m for m in mbps)
