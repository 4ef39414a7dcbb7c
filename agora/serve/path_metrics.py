"""What a node tells of the paths to its experts in Prometheus' text format."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from agora.network.multipath import MultipathBackend
from agora.protocols import Backend
from agora.square import Expert, Square


class PathMetrics(Collector):
    """How the paths are, at the moment it is asked for. Experts that share their paths are told under the first one.

    Args:
        square: Whose experts.
    """

    def __init__(self, square: Square) -> None:
        self._square = square

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Gauges and counters by expert and path."""
        labels = ["expert", "path"]
        usable = GaugeMetricFamily(
            "agora_path_usable", "Whether a path may be used: 1, or 0 while its breaker is open.", labels=labels
        )
        open_s = CounterMetricFamily(
            "agora_path_open_seconds", "Seconds that a path's breaker was not closed.", labels=labels
        )
        opened = CounterMetricFamily("agora_path_opened", "Times that a path's breaker opened.", labels=labels)
        running = GaugeMetricFamily("agora_path_requests", "Requests under way on a path.", labels=labels)
        seconds = GaugeMetricFamily(
            "agora_path_expected_seconds", "Seconds that a short request is expected to take on a path.", labels=labels
        )
        asked = CounterMetricFamily("agora_path_asked", "Requests that had several paths.", labels=["expert"])
        hedged = CounterMetricFamily(
            "agora_path_hedged", "Requests whose first token was late, asked on a second path.", labels=["expert"]
        )
        for expert, backend in self._backends():
            for state in backend.states():
                key = [expert, state.name]
                usable.add_metric(key, float(state.breaker == "closed" and state.seconds is not None))
                open_s.add_metric(key, state.open_s)
                opened.add_metric(key, state.opened)
                running.add_metric(key, state.running)
                if state.seconds is not None and math.isfinite(state.seconds):
                    seconds.add_metric(key, state.seconds)
            extra, requests = backend.hedged
            asked.add_metric([expert], requests)
            hedged.add_metric([expert], extra)
        yield from (usable, open_s, opened, running, seconds, asked, hedged)

    def _backends(self) -> Iterator[tuple[str, MultipathBackend]]:
        seen: set[int] = set()
        for expert in self._square:
            if isinstance(expert.backend, MultipathBackend) and id(expert.backend) not in seen:
                seen.add(id(expert.backend))
                yield expert.name, expert.backend


def behind(expert: Expert) -> Iterator[tuple[str, Backend]]:
    """The backends that an expert is asked on, each with its machine's name."""
    if isinstance(expert.backend, MultipathBackend):
        yield from ((way.path.target, way.backend) for way in expert.backend.ways)
    else:
        yield expert.node, expert.backend
