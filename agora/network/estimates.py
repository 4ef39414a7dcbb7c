"""How long a job will take on a path, learned from what was seen: rtt + bytes/bandwidth + queue + prefill + decode."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from agora.network.availability import mean
from agora.network.jobs import Job, Observation, ServerLoad
from agora.network.memory import Memory, Parts, PathMemory, ServerMemory
from agora.network.path import Path

AVAILABILITY: Final = 0.95
"""Availability of a link of which nothing is known: low enough that a few failures are believed. What a deadline is
asked to be met with by default (`on_time`), so that a new path is neither ruled out nor preferred for it."""

PROVEN: Final = 10.0
"""Entries from which on a learned quantile of the time to the first token is told. With ten the 95th percentile is
about the largest seen; with fewer it is the prior's, and no request should be called late by that."""

MAX_KEPT: Final = 10_000
"""Ways, and servers, that are remembered; the oldest make room. Machines come and go for as long as a gateway runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What a job on a path is expected to take.

    Attributes:
        seconds: Expected time if it works; infinite on a path with a link that has no bandwidth.
        spread: Standard deviation of ln(actual/expected time).
        on_time: Probability that the answer comes, and within the deadline; None without a deadline.
        first_token_p95_s: Time by which 95 % of such jobs had their first token; None before enough were seen.
        parts: What `seconds` is made of.
        availability: Parameters (α, β) of the Beta distribution of the share of jobs that work.
        seen: How many recent jobs this rests on: 0 for the configured values alone, falling with time.
    """

    seconds: float
    spread: float
    on_time: float | None
    first_token_p95_s: float | None
    parts: Parts
    availability: tuple[float, float]
    seen: float

    @property
    def works(self) -> float:
        """Probability that it works at all."""
        return mean(*self.availability)


class Estimates:
    """Learns from observations and tells what to expect.

    Configured values of links are priors that observations override. What belongs to the way (round trip, bandwidth,
    waiting, availability) is kept by path; how fast a server reads and writes by server, whichever way it is reached.
    Nothing is ever divided by zero or becomes NaN, and a clock that leaps or goes back costs at most what was
    learned.

    Args:
        clock: Tells the time in seconds, the same that observations carry.
        memory: How fast it forgets.
    """

    def __init__(self, clock: Callable[[], float], *, memory: Memory | None = None) -> None:
        self._clock = clock
        self._memory = memory or Memory()
        self._ways: dict[tuple[str, tuple[str, ...]], PathMemory] = {}
        self._servers: dict[str, ServerMemory] = {}

    def expect(self, path: Path, job: Job, *, running: int = 0, load: ServerLoad | None = None) -> Expectation:
        """What the job would take on this path now.

        Args:
            path: The path, with its links as they are configured now.
            job: The job.
            running: Requests of this process that are under way on the path.
            load: What the server says of itself; None if it says nothing.
        """
        now = self._clock()
        return self._expect(self._way(path), path, job, running, load, now)

    def observe(self, seen: Observation) -> None:
        """Learns from a request that ended, well or not."""
        way, server = self._way(seen.path), self._server(seen.path.target)
        job = Job(
            up_bytes=seen.up_bytes,
            down_bytes=seen.down_bytes,
            prompt_tokens=seen.prompt_tokens,
            completion_tokens=seen.completion_tokens,
        )
        # What was expected before this was seen: how far off it was tells how far off the next one may be.
        expected = self._expect(way, seen.path, job, 0, None, seen.at).parts
        if not seen.cancelled:
            way.availability.observe(seen.ok, seen.at)
        if seen.rtt_s is not None:
            way.rtt.observe(seen.rtt_s, seen.at)
        way.observe_transfers(seen, expected)
        if seen.ok or seen.cancelled:
            way.observe_errors(seen, expected)
            way.observe_waiting(seen, expected)
        if seen.ok:
            server.observe(seen, expected)

    def forget(self, path: Path) -> None:
        """Forgets what was seen on a path: it is gone, or not what it was."""
        self._ways.pop(_key(path), None)

    def _way(self, path: Path) -> PathMemory:
        way = self._ways.get(_key(path))
        if way is None:
            if len(self._ways) >= MAX_KEPT:
                del self._ways[next(iter(self._ways))]
            way = self._ways[_key(path)] = PathMemory(self._memory)
        way.configured(path)
        return way

    def _server(self, name: str) -> ServerMemory:
        server = self._servers.get(name)
        if server is None:
            if len(self._servers) >= MAX_KEPT:
                del self._servers[next(iter(self._servers))]
            server = self._servers[name] = ServerMemory(self._memory)
        return server

    def _expect(
        self, way: PathMemory, path: Path, job: Job, running: int, load: ServerLoad | None, now: float
    ) -> Expectation:
        parts = self._parts(way, path, job, running, load, now)
        total, availability = parts.total_s, way.availability.beta(now, _availability(path))
        on_time = None
        if job.deadline_s is not None:
            within = way.errors.below(job.deadline_s / total, now) if total > 0 else 1.0
            on_time = mean(*availability) * within if math.isfinite(total) else 0.0
        p95 = None
        if way.first_errors.weight(now) >= PROVEN:
            p95 = parts.first_token_s * way.first_errors.quantile(0.95, now)
        return Expectation(
            seconds=total,
            spread=way.errors.spread(now),
            on_time=on_time,
            first_token_p95_s=p95,
            parts=parts,
            availability=availability,
            seen=way.errors.weight(now),
        )

    def _parts(self, way: PathMemory, path: Path, job: Job, running: int, load: ServerLoad | None, now: float) -> Parts:
        server = self._server(path.target)
        prefill, decode = (
            job.prompt_tokens * server.prefill(now, load),
            job.completion_tokens * server.decode(now, load),
        )
        up, down = way.up_s(job.up_bytes, now), way.down_s(job.down_bytes, now)
        rtt, queue = way.rtt_s(now), way.waiting.read(now) + server.queue(now, load)
        alone = rtt + up + queue + prefill + max(decode, down)
        if running > 0 and 0 < alone < math.inf:
            # Of the others each is on the air for this share of its time, and then the bandwidth is shared with it.
            up *= 1 + running * up / alone
            down *= 1 + running * down / alone
        return Parts(rtt_s=rtt, up_s=up, queue_s=queue, prefill_s=prefill, decode_s=decode, down_s=down)


def _key(path: Path) -> tuple[str, tuple[str, ...]]:
    return path.target, tuple(link.name for link in path.links)


def _availability(path: Path) -> float:
    """Configured share of the time that all links work."""
    return math.prod(AVAILABILITY if link.availability is None else link.availability for link in path.links)
