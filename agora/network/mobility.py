"""Plays recorded traces onto a topology's links: what a moving machine sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from agora.errors import InvalidRequest
from agora.network.path import Link
from agora.network.topology import Topology
from agora.network.traces import Trace
from agora.protocols import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """The traces of one link.

    Attributes:
        down: Of its bandwidth down; None if that stays.
        up: Of its bandwidth up; None if that stays.
        loop: Whether a trace begins again at its end, or else its last value stays.
        speed: How many times as fast they are played.

    Raises:
        InvalidRequest: If the speed is no number above 0.
    """

    down: Trace | None = None
    up: Trace | None = None
    loop: bool = True
    speed: float = 1.0

    def __post_init__(self) -> None:
        if not (self.speed > 0 and math.isfinite(self.speed)):
            raise InvalidRequest(f"the speed of a trace is {self.speed}; it must be a number > 0")

    def values(self, elapsed_s: float) -> dict[str, float]:
        """What the link is like so many seconds after the begin, in the words of `Topology.change`."""
        both = (("down", self.down), ("up", self.up))
        return {f"{way}_mbps": self._at(trace, elapsed_s) for way, trace in both if trace is not None}

    def next_change(self, elapsed_s: float) -> float:
        """Seconds after the begin at which a value begins next, after so many; infinite if none does any more."""
        changes = [self._change(t, elapsed_s) for t in (self.down, self.up) if t is not None]
        return min(changes, default=math.inf)

    def _at(self, trace: Trace, elapsed_s: float) -> float:
        if self._over(trace, elapsed_s):
            return trace.mbps[-1]
        return trace.at(trace.start_s + elapsed_s * self.speed)

    def _change(self, trace: Trace, elapsed_s: float) -> float:
        if self._over(trace, elapsed_s):
            return math.inf
        change = (trace.next_change(trace.start_s + elapsed_s * self.speed) - trace.start_s) / self.speed
        # Dividing may round it back to where it is.
        return change if change > elapsed_s else math.nextafter(elapsed_s, math.inf)

    def _over(self, trace: Trace, elapsed_s: float) -> bool:
        return not self.loop and elapsed_s * self.speed >= trace.end_s - trace.start_s


class Player:
    """Changes links as their traces say. A link that is taken out while it plays is left out until it is back.

    Args:
        topology: Whose links change.
        traces: By the links' names.
        clock: Tells the time; a trace's first value begins when the player does.

    Raises:
        InvalidRequest: If there is no link of a name.
    """

    def __init__(self, topology: Topology, traces: Mapping[str, Played], clock: Clock) -> None:
        _check(topology, traces)
        self._topology = topology
        self._traces = dict(traces)
        self._clock = clock

    def apply(self, elapsed_s: float) -> None:
        """Sets all links to what their traces say so many seconds after their begin."""
        _apply(self._topology, self._traces, elapsed_s)

    async def play(self, seconds: float) -> None:
        """Plays for so many seconds of the clock; cancel it to stop early. Links keep their last values."""
        began = self._clock.now()
        while (elapsed := self._clock.now() - began) < seconds:
            self.apply(elapsed)
            following = min(_next_change(self._traces, elapsed), seconds)
            await self._clock.sleep(max(began + following - self._clock.now(), 0.0))


class PlayedTopology(Topology):
    """A topology whose links are, whenever it is looked at, what their traces say by then. Nothing runs in between.

    Args:
        links: The links there are.
        traces: By the links' names; they begin now.
        clock: Seconds on a clock that never goes back.

    Raises:
        InvalidRequest: If two links have one name, or there is no link of a trace's name.
    """

    def __init__(self, links: Iterable[Link], traces: Mapping[str, Played], clock: Callable[[], float]) -> None:
        super().__init__(links)
        self._traces: Mapping[str, Played] = {}
        self._clock = clock
        self._began = clock()
        self._due = math.inf
        _check(self, traces)
        self._traces = dict(traces)
        self._due = 0.0

    @property
    def version(self) -> int:
        """Rises with every change, those of the traces among them."""
        self._catch_up()
        return super().version

    @property
    def links(self) -> tuple[Link, ...]:
        """All links as they are now, in the order they came."""
        self._catch_up()
        return super().links

    def link(self, name: str) -> Link:
        """The link of that name, as it is now.

        Raises:
            InvalidRequest: If there is none.
        """
        self._catch_up()
        return super().link(name)

    def _catch_up(self) -> None:
        elapsed = self._clock() - self._began
        if elapsed >= self._due:
            self._due = math.inf  # Setting the links looks at them.
            _apply(self, self._traces, elapsed)
            self._due = _next_change(self._traces, elapsed)


def _check(topology: Topology, traces: Mapping[str, Played]) -> None:
    known = {link.name for link in topology.links}
    if unknown := sorted(set(traces) - known):
        raise InvalidRequest(f"there is no link {unknown[0]!r} to play a trace on", hint=f"links: {sorted(known)}")


def _apply(topology: Topology, traces: Mapping[str, Played], elapsed_s: float) -> None:
    here = {link.name for link in topology.links}
    for name, played in traces.items():
        if name in here:
            topology.change(name, **played.values(elapsed_s))


def _next_change(traces: Mapping[str, Played], elapsed_s: float) -> float:
    return min((played.next_change(elapsed_s) for played in traces.values()), default=math.inf)
