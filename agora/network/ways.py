"""The ways to the same help: which of them may be used now, what is seen on them, and which one to take."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from agora.errors import InvalidRequest, Unavailable
from agora.network.breaker import Breaker, BreakerRules
from agora.network.choice import Chooser
from agora.network.estimates import Estimates, Expectation
from agora.network.jobs import Job, Observation, ServerLoad
from agora.network.path import Path
from agora.network.topology import Topology
from agora.protocols import Backend

log = logging.getLogger(__name__)

PROBE_S: Final = 10.0
"""Seconds that a probe may take: one token of the slowest model of the catalogue on a loaded CPU, ten times over. A
path that needs longer is of no use to who is asking."""

PAST_S: Final = 1e-3
"""Seconds waited beyond a moment, so that the clock, whatever its resolution, has passed it."""

WAIT_S: Final = 1.0
"""Seconds that a request waits for probes when no path may be used: one hand-over between cells. Whoever asks has other
experts, and is told soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A path, and what answers at its end.

    Attributes:
        path: The path; its name is unique among the ways to the same help.
        backend: What is asked: it sends on this path.
        price_per_mtok: Money per million tokens that the server takes.
        load: What the server tells of itself, if it does.
    """

    path: Path
    backend: Backend
    price_per_mtok: float = 0.0
    load: Callable[[], ServerLoad | None] | None = None

    @property
    def name(self) -> str:
        """The path's name."""
        return self.path.name


@dataclass(frozen=True, slots=True, kw_only=True)
class PathState:
    """How a path is, for metrics and for people.

    Attributes:
        name: Its name.
        target: The machine that answers.
        breaker: `closed`, `open` or `half_open`.
        why: What went wrong last; empty while nothing has.
        opened: How often the breaker opened.
        open_s: Seconds that it was not closed.
        running: Requests of this process under way on it.
        seconds: Seconds that a short request is expected to take; None if it has no bandwidth or its link is gone.
    """

    name: str
    target: str
    breaker: str
    why: str
    opened: int
    open_s: float
    running: int
    seconds: float | None


class NoWay(Exception):
    """No path may be used now. Raised between the parts of this package only."""


class Ways:
    """Keeps a breaker for each way, probes those that are due, and takes in what is seen.

    Args:
        ways: The ways, at least one, with different names.
        owner: What to call them all in errors.
        estimates: What is learned.
        chooser: How one is chosen.
        topology: The links as they are now; None if they never change.
        rules: When breakers open.
        clock: Seconds on a clock that never goes back.
        rng: Where chance comes from.

    Raises:
        InvalidRequest: If there is none, or two have the same name.
    """

    def __init__(
        self,
        ways: Sequence[Way],
        *,
        owner: str,
        estimates: Estimates,
        chooser: Chooser,
        topology: Topology | None,
        rules: BreakerRules | None,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        if not ways:
            raise InvalidRequest(f"{owner} has no path to it", hint="give at least one")
        names = [w.name for w in ways]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise InvalidRequest(f"two paths to {owner} are called {twice[0]!r}", hint="give each a name of its own")
        self._owner = owner
        self._estimates = estimates
        self._chooser = chooser
        self._topology = topology
        self._clock = clock
        self._rng = rng
        self._ways = {w.name: w for w in ways}
        self._breakers = {w.name: Breaker(clock=clock, rules=rules, rng=rng) for w in ways}
        self._running = dict.fromkeys(self._ways, 0)
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._paths: dict[str, Path | None] = {w.name: w.path for w in ways}
        self._seen_version: int | None = None

    @property
    def all(self) -> tuple[Way, ...]:
        """All ways, usable or not."""
        return tuple(self._ways.values())

    def breaker(self, way: Way) -> Breaker:
        """The breaker of a way."""
        return self._breakers[way.name]

    def expect(self, way: Way, job: Job) -> Expectation:
        """What a job on a way is expected to take."""
        load = None if way.load is None else way.load()
        return self._estimates.expect(self._path(way) or way.path, job, running=self._running[way.name], load=load)

    def usable(self, without: Collection[str] = ()) -> list[Way]:
        """Ways that may be used now; their links are there, with bandwidth, and their breakers closed."""
        return [
            w for n, w in self._ways.items() if n not in without and self._breakers[n].closed and not self._broken(w)
        ]

    async def choose(
        self, job: Job, *, without: Mapping[str, object], until: float, fits: Callable[[Way], bool]
    ) -> Way:
        """Chooses the way to take.

        Args:
            job: What is to be done.
            without: Names of ways that were tried already.
            until: Event-loop time to which the request has.
            fits: Whether a way can do what is wanted.

        Raises:
            NoWay: If none may be used, and none came back in `WAIT_S`.
        """
        give_up = min(until, self._clock() + WAIT_S)
        while True:
            self.tend()
            if candidates := [w for w in self.usable(without) if fits(w)]:
                return self._chosen(candidates, job)
            waiting = {n for n, w in self._ways.items() if n not in without and fits(w) and not self._broken(w)}
            if not await self._came_back(waiting, give_up):
                raise NoWay(self.reasons(without))

    def other(self, job: Job, *, without: Collection[str], fits: Callable[[Way], bool]) -> Way | None:
        """The best way besides some, if one may be used now."""
        candidates = [w for w in self.usable(without) if fits(w)]
        return self._chosen(candidates, job) if candidates else None

    def started(self, way: Way) -> None:
        """A request is sent on a way."""
        self._running[way.name] += 1

    def ended(self, way: Way, seen: Observation | None) -> None:
        """A request on a way is over.

        Args:
            way: Which.
            seen: What was seen of it; None if nothing is to be learned from it.
        """
        self._running[way.name] -= 1
        if seen is None:
            return
        self._estimates.observe(replace(seen, path=self._path(way) or way.path))
        if seen.ok:
            self.breaker(way).succeeded()

    def failed(self, way: Way, why: str) -> None:
        """A request failed by the fault of the way or of what is at its end."""
        breaker = self.breaker(way)
        was_closed = breaker.closed
        breaker.failed(why)
        if was_closed and not breaker.closed:
            log.warning("%s: path %s is left alone for %.1f s: %s", self._owner, way.name, breaker.due_in_s, why)
            self._chooser.forget(self._owner)

    def reasons(self, tried: Mapping[str, object]) -> str:
        """Why each way cannot be used, in words."""
        said = []
        for name, way in self._ways.items():
            breaker = self._breakers[name]
            if name in tried:
                said.append(f"{name}: {tried[name]}")
            elif (broken := self._broken(way)) is not None:
                said.append(f"{name}: {broken}")
            elif not breaker.closed:
                when = f"tried again in {breaker.due_in_s:.1f} s" if breaker.due_in_s > 0 else "being tried now"
                said.append(f"{name}: {breaker.why or 'it failed'} ({when})")
            else:
                said.append(f"{name}: it cannot do what is asked")
        return "; ".join(said)

    def unusable(self, tried: Mapping[str, object]) -> tuple[str, ...]:
        """Notes on the ways that could not be used for a request."""
        found = []
        for name, way in self._ways.items():
            why = (
                tried.get(name) or self._broken(way) or (None if self._breakers[name].closed else "its breaker is open")
            )
            if why is not None:
                found.append(f"path {name} could not be used: {why}")
        return tuple(found)

    def states(self) -> tuple[PathState, ...]:
        """How each way is."""
        found = []
        for name, way in self._ways.items():
            breaker, broken = self._breakers[name], self._broken(way)
            found.append(
                PathState(
                    name=name,
                    target=way.path.target,
                    breaker=breaker.state.value,
                    why=broken or breaker.why,
                    opened=breaker.opened,
                    open_s=breaker.open_s,
                    running=self._running[name],
                    seconds=None if broken else self.expect(way, Job()).seconds,
                )
            )
        return tuple(found)

    async def aclose(self) -> None:
        """Ends the probes."""
        probes = tuple(self._probes.values())
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    def _chosen(self, candidates: Sequence[Way], job: Job) -> Way:
        if len(candidates) == 1:
            return candidates[0]
        expected = []
        for way in candidates:
            path = self._path(way) or way.path
            expected.append((path, self.expect(way, job)))
        tokens = job.prompt_tokens + job.completion_tokens
        fees = {w.name: w.price_per_mtok * tokens / 1e6 for w in candidates}
        try:
            choice = self._chooser.choose(
                expected, job, running=self._running, fees=fees, rng=self._rng, key=self._owner
            )
        except Unavailable as e:
            # Each has bandwidth as far as is known; what was learned says it has none. One of them it must be.
            log.info("%s: %s", self._owner, e)
            return candidates[0]
        return self._ways[choice.path.name]

    def _broken(self, way: Way) -> str | None:
        """Why the links of a way do not lead there now, if they do not."""
        path = self._path(way)
        if path is None:
            return "one of its links is gone"
        if dead := [link.name for link in path.links if link.up_mbps == 0 or link.down_mbps == 0]:
            return f"link {dead[0]} has no bandwidth"
        return None

    def _path(self, way: Way) -> Path | None:
        """A way's path with its links as they are now; None if they no longer lead there."""
        if self._topology is None:
            return way.path
        if self._topology.version != self._seen_version:
            self._paths = {n: _now(w.path, self._topology) for n, w in self._ways.items()}
            self._seen_version = self._topology.version
        return self._paths[way.name]

    def tend(self) -> None:
        """Begins the probes that are due."""
        for name, breaker in self._breakers.items():
            if breaker.due and name not in self._probes and self._broken(self._ways[name]) is None:
                breaker.begin_probe()
                # In a context of its own: the probe is not part of the request that it happens beside.
                probe = asyncio.get_running_loop().create_task(
                    self._probe(self._ways[name], breaker), context=contextvars.Context()
                )
                self._probes[name] = probe
                probe.add_done_callback(lambda _, name=name: self._probes.pop(name, None))  # type: ignore[misc]

    async def _probe(self, way: Way, breaker: Breaker) -> None:
        """Has one token generated."""
        try:
            async with asyncio.timeout(PROBE_S):
                health = await way.backend.health()
        except TimeoutError:
            breaker.end_probe(False, f"no token within {PROBE_S:g} s")
        except asyncio.CancelledError:
            breaker.give_up_probe()
            raise
        except Exception as e:
            # A third-party backend may raise anything; it is not well then.
            breaker.end_probe(False, f"{type(e).__name__}: {e}")
        else:
            breaker.end_probe(health.ok, health.detail)
            if health.ok:
                # What was learned before it broke, and while it did, is over: it is tried like a new one.
                self._estimates.forget(self._path(way) or way.path)
                log.info("%s: path %s is back", self._owner, way.name)

    async def _came_back(self, names: Collection[str], give_up: float) -> bool:
        """Waits for a probe of one of these to end, or to be due; False if that takes too long."""
        now = self._clock()
        running = [self._probes[n] for n in names if n in self._probes]
        due = [self._breakers[n].due_in_s for n in names if n not in self._probes and not self._breakers[n].closed]
        if any(self._breakers[n].closed for n in names):
            return True
        if now >= give_up or not (running or due):
            return False
        if running:
            await asyncio.wait(
                running, timeout=min([give_up - now, *due]) + PAST_S, return_when=asyncio.FIRST_COMPLETED
            )
            return True
        if now + min(due) > give_up:
            return False
        await asyncio.sleep(min(due) + PAST_S)
        return True


def _now(path: Path, topology: Topology) -> Path | None:
    there = {link.name: link for link in topology.links}
    links = tuple(there[link.name] for link in path.links if link.name in there)
    if [(a.name, a.source, a.target) for a in links] != [(b.name, b.source, b.target) for b in path.links]:
        return None
    return replace(path, links=links)
