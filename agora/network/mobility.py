"""Plays recorded traces onto a topology's links: what a moving machine sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agora.errors import InvalidRequest
from agora.network.topology import Topology
from agora.network.traces import Trace
from agora.protocols import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """The traces of one link.

    Attributes:
        down: Of its bandwidth down; None if that stays.
        up: Of its bandwidth up; None if that stays.
    """

    down: Trace | None = None
    up: Trace | None = None


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
        known = {link.name for link in topology.links}
        if unknown := sorted(set(traces) - known):
            raise InvalidRequest(f"there is no link {unknown[0]!r} to play a trace on", hint=f"links: {sorted(known)}")
        self._topology = topology
        self._traces = dict(traces)
        self._clock = clock

    def apply(self, elapsed_s: float) -> None:
        """Sets all links to what their traces say so many seconds after their begin."""
        here = {link.name for link in self._topology.links}
        for name, played in self._traces.items():
            values = {
                f"{way}_mbps": trace.at(trace.start_s + elapsed_s)
                for way, trace in (("down", played.down), ("up", played.up))
                if trace is not None
            }
            if name in here:
                self._topology.change(name, **values)

    async def play(self, seconds: float) -> None:
        """Plays for so many seconds of the clock; cancel it to stop early. Links keep their last values."""
        began = self._clock.now()
        while (elapsed := self._clock.now() - began) < seconds:
            self.apply(elapsed)
            following = min(self._next_change(elapsed), seconds)
            await self._clock.sleep(max(began + following - self._clock.now(), 0.0))

    def _next_change(self, elapsed_s: float) -> float:
        traces = [t for played in self._traces.values() for t in (played.down, played.up) if t is not None]
        return min((t.next_change(t.start_s + elapsed_s) - t.start_s for t in traces), default=float("inf"))
