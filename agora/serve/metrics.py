"""What a node tells of itself in Prometheus' text format."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from agora.errors import BackendError
from agora.scheduling.scaling import Targets
from agora.serve.limits import Admission
from agora.serve.path_metrics import PathMetrics, behind
from agora.square import Square
from agora.types import Usage
from experts.replicas import ReplicaSet, all_of
from experts.replicas_signal import Signal, Watch
from experts.vllm_client import VllmClient
from experts.vllm_metrics import VllmMetrics

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Bounds of the histogram of answer times: from a gateway's own few milliseconds to the longest request allowed."""

ENGINE_TIMEOUT_S: Final = 2.0
"""Seconds that a vLLM server has to tell its metrics: Prometheus itself waits for 10 by default."""

ENGINE_GAUGES: Final[tuple[tuple[str, str, Callable[[VllmMetrics], float | None]], ...]] = (
    ("agora_vllm_running", "Requests that a vLLM server computes.", lambda m: m.running),
    ("agora_vllm_waiting", "Requests in a vLLM server's queue.", lambda m: m.waiting),
    ("agora_vllm_cache_use", "Part of a vLLM server's KV cache in use, 0 to 1.", lambda m: m.cache_use),
    (
        "agora_vllm_first_token_seconds",
        "Mean time to the first token since a vLLM server started.",
        lambda m: None if m.first_token is None else m.first_token.mean,
    ),
)
"""What is told of a vLLM server: name, description, and where it stands in what the server tells."""

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


SIGNAL_GAUGES: Final[tuple[tuple[str, str, Callable[[Signal], float | None]], ...]] = (
    ("agora_wanted_replicas", "Replicas of a node's server that are wanted.", lambda s: s.wanted),
    ("agora_scaling_requests", "Requests running and waiting on all replicas of a node.", lambda s: s.requests),
    (
        "agora_scaling_first_token_seconds",
        "90th percentile of the last minute's times to the first token from a node's replicas.",
        lambda s: s.ttft_s,
    ),
)
"""What an autoscaler is told of a node: name, description, and where it stands in the signal. `agora_wanted_replicas`
is the number itself, so KEDA's or the HorizontalPodAutoscaler's target is 1 per replica; the others are what it is made
of."""


class Metrics:
    """Counters of one node, kept in a registry of its own.

    Args:
        square: Whose backends' load is told.
        admission: Whose places are told.
        targets: By the name of a node of servers that others start and stop: what is aimed at. How many are wanted is
            told; it is looked at whenever the metrics are asked for, so an autoscaler sees it as often as it asks.
        clock: Seconds on a clock that does not go back.
    """

    def __init__(
        self,
        square: Square,
        admission: Admission,
        *,
        targets: Mapping[str, Targets] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._watches = {node: Watch(aimed_at) for node, aimed_at in (targets or {}).items()}
        self._clock = clock
        self._square = square
        # What was counted. What the event loop owns, and is only looked at, is told apart.
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "agora_requests",
            "Requests answered, by route, model and status.",
            ["route", "model", "status"],
            registry=None,
        )
        self._seconds = Histogram(
            "agora_request_seconds",
            "Seconds from a request's head to its answer's last byte.",
            ["route"],
            buckets=SECONDS,
            registry=None,
        )
        self._first = Histogram(
            "agora_first_token_seconds",
            "Seconds from a streamed request's head to its first token.",
            ["model"],
            buckets=SECONDS,
            registry=None,
        )
        self._tokens = Counter("agora_tokens", "Tokens read and generated.", ["model", "kind"], registry=None)
        for metric in (self._requests, self._seconds, self._first, self._tokens):
            self.registry.register(metric)
        self._now = CollectorRegistry()
        self._now.register(_Now(square, admission))
        self._now.register(PathMetrics(square))
        # A look-up by labels costs more than counting: the few there are, are kept.
        self._request_children: dict[tuple[str, str, int], Counter] = {}
        self._seconds_children: dict[str, Histogram] = {}
        self._first_children: dict[str, Histogram] = {}
        self._token_children: dict[str, tuple[Counter, Counter]] = {}

    def request(self, route: str, model: str, status: int, seconds: float) -> None:
        """Counts a request that came to its end. `model` is a name that is served, or `-`."""
        key = (route, model, status)
        counter = self._request_children.get(key)
        if counter is None:
            counter = self._request_children[key] = self._requests.labels(route, model, str(status))
        counter.inc()
        histogram = self._seconds_children.get(route)
        if histogram is None:
            histogram = self._seconds_children[route] = self._seconds.labels(route)
        histogram.observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        """Counts the time to the first token of a stream."""
        histogram = self._first_children.get(model)
        if histogram is None:
            histogram = self._first_children[model] = self._first.labels(model)
        histogram.observe(seconds)

    def tokens(self, model: str, usage: Usage) -> None:
        """Counts what an answer used."""
        pair = self._token_children.get(model)
        if pair is None:
            pair = self._tokens.labels(model, "prompt"), self._tokens.labels(model, "completion")
            self._token_children[model] = pair
        pair[0].inc(usage.prompt_tokens)
        pair[1].inc(usage.completion_tokens)

    async def text(self) -> bytes:
        """Everything, in Prometheus' text format; what vLLM servers tell of themselves is asked of them now."""
        told = CollectorRegistry()
        servers = await engines(self._square)
        told.register(_Engines(servers))
        told.register(_Signals(self._signals(servers)))
        # Counters may be read from any thread, and writing out those of thousands of experts takes a second.
        counted = await asyncio.to_thread(generate_latest, self.registry)
        return counted + generate_latest(self._now) + generate_latest(told)

    def _signals(self, servers: Mapping[str, VllmMetrics]) -> dict[str, Signal]:
        """How many replicas are wanted, by node: of those started here, and of those that are only watched."""
        signals = {}
        for node, backend in {e.node: e.backend for e in self._square}.items():
            if isinstance(backend, ReplicaSet):
                signals[node] = backend.signal
            elif (watch := self._watches.get(node)) is not None:
                engine = servers.get(node, VllmMetrics())
                # The server knows of requests that others sent it; this process of those that it has not sent yet.
                requests = max((engine.running or 0) + (engine.waiting or 0), backend.load.total)
                signals[node] = watch.look(self._clock(), requests, engine.first_token)
        return signals


async def engines(square: Square) -> dict[str, VllmMetrics]:
    """What the vLLM servers of a square tell of themselves, by node; those that do not answer in time are left out.

    Each of several replicas is told as `node/number`.
    """
    everything = {name: backend for e in square for node, b in behind(e) for name, backend in all_of(b, node)}
    servers = {name: backend for name, backend in everything.items() if isinstance(backend, VllmClient)}

    async def ask(server: VllmClient) -> VllmMetrics | None:
        try:
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                return await server.metrics()
        except (BackendError, TimeoutError):
            # Whoever watches sees that it is missing; the others must not be.
            return None

    told = await asyncio.gather(*map(ask, servers.values()))
    return {name: metrics for name, metrics in zip(servers, told, strict=True) if metrics is not None}


class _Engines(Collector):
    """What vLLM servers told."""

    def __init__(self, told: Mapping[str, VllmMetrics]) -> None:
        self._told = told

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, text, value in ENGINE_GAUGES:
            values = {node: value(m) for node, m in self._told.items()}
            yield _gauge(name, text, ["node"], [((node,), v) for node, v in values.items() if v is not None])


class _Signals(Collector):
    """How many replicas are wanted."""

    def __init__(self, signals: Mapping[str, Signal]) -> None:
        self._signals = signals

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, text, value in SIGNAL_GAUGES:
            values = {node: value(s) for node, s in self._signals.items()}
            yield _gauge(name, text, ["node"], [((node,), v) for node, v in values.items() if v is not None])
        states = {
            (node, state): getattr(s, state)
            for node, s in self._signals.items()
            for state in ("up", "starting", "draining")
        }
        yield _gauge(
            "agora_replicas",
            "Replicas of a node's server that this process has, by state.",
            ["node", "state"],
            [(key, count) for key, count in states.items() if count is not None],
        )


class _Now(Collector):
    """What is only known at the moment it is asked for."""

    def __init__(self, square: Square, admission: Admission) -> None:
        self._square = square
        self._admission = admission

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield _gauge(
            "agora_requests_now",
            "Requests let in and waiting, of the node's own and of neighbours together and of neighbours alone.",
            ["state", "of"],
            [
                (("running", "all"), self._admission.load.running),
                (("waiting", "all"), self._admission.load.waiting),
                (("running", "neighbours"), self._admission.neighbours.running),
                (("waiting", "neighbours"), self._admission.neighbours.waiting),
            ],
        )
        backends = {e.node: e.backend.load for e in self._square}
        yield _gauge(
            "agora_backend_requests",
            "Requests running and waiting on a backend, as far as this node knows.",
            ["node", "state"],
            [
                ((name, state), value)
                for name, load in backends.items()
                for state, value in (("running", load.running), ("waiting", load.waiting))
            ],
        )
        yield _gauge("agora_experts", "Experts that can be asked.", [], [((), len(self._square))])


def _gauge(
    name: str, text: str, labels: list[str], values: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family
