"""What a vLLM server tells about itself at `/metrics`, in Prometheus' text format.

The names are those of vLLM 0.32; older ones are known where they differ. A server with several engines (data parallel)
tells each of them apart; what is read here is their sum, or for the cache the fullest one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

RUNNING: Final = "vllm:num_requests_running"
WAITING: Final = "vllm:num_requests_waiting"
CACHE_USE: Final = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
PREFIX_HITS: Final = ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total")
PREFIX_QUERIES: Final = ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total")
PROMPT_TOKENS: Final = "vllm:prompt_tokens_total"
GENERATION_TOKENS: Final = "vllm:generation_tokens_total"
FIRST_TOKEN: Final = "vllm:time_to_first_token_seconds"

_WANTED: Final = (
    *(RUNNING, WAITING, *CACHE_USE, *PREFIX_HITS, *PREFIX_QUERIES, PROMPT_TOKENS, GENERATION_TOKENS),
    *(f"{FIRST_TOKEN}_{part}" for part in ("bucket", "sum", "count")),
)

Sample = tuple[Mapping[str, str], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """A histogram of durations, in seconds.

    Attributes:
        count: Durations seen since the server started.
        total: Their sum.
        bounds: Pairs of an upper bound and the durations up to it, ascending; the last bound is infinity.
    """

    count: float
    total: float
    bounds: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    @property
    def mean(self) -> float | None:
        """Their mean; None before the first."""
        return self.total / self.count if self.count > 0 else None

    def quantile(self, q: float) -> float | None:
        """Estimates a quantile as Prometheus' `histogram_quantile` does: linear within the bucket that holds it.

        Args:
            q: From 0 to 1.

        Returns:
            Seconds; None before the first duration. What lies in the last bucket is told as its lower bound.
        """
        if not self.bounds or self.bounds[-1][1] <= 0:
            return None
        rank = q * self.bounds[-1][1]
        below, seen = 0.0, 0.0
        for bound, upto in self.bounds:
            if upto >= rank and upto > seen:
                return below if math.isinf(bound) else below + (bound - below) * max(rank - seen, 0.0) / (upto - seen)
            below, seen = bound, upto
        return below


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmMetrics:
    """A vLLM server's view of itself; None for what it does not tell.

    Attributes:
        running: Requests being computed.
        waiting: Requests in its queue.
        cache_use: Part of the KV cache in use, 0 to 1.
        first_token: Seconds from a request's arrival to its first token, since the server started.
        prompt_tokens: Tokens read since it started.
        generation_tokens: Tokens generated since it started.
        prefix_hit_rate: Part of the prompt tokens looked up that the prefix cache had, 0 to 1; None before the first.
    """

    running: int | None = None
    waiting: int | None = None
    cache_use: float | None = None
    first_token: Seconds | None = None
    prompt_tokens: int | None = None
    generation_tokens: int | None = None
    prefix_hit_rate: float | None = None


def read_metrics(text: str) -> VllmMetrics:
    """Reads the text of `/metrics`.

    Raises:
        ValueError: If a line about what is wanted is not in the format.
    """
    samples = _samples(text)
    hits, queries = _total(samples, *PREFIX_HITS), _total(samples, *PREFIX_QUERIES)
    use = next((max(v for _, v in samples[name]) for name in CACHE_USE if name in samples), None)
    return VllmMetrics(
        running=_count(_total(samples, RUNNING)),
        waiting=_count(_total(samples, WAITING)),
        cache_use=None if use is None else min(max(use, 0.0), 1.0),
        first_token=_seconds(samples, FIRST_TOKEN),
        prompt_tokens=_count(_total(samples, PROMPT_TOKENS)),
        generation_tokens=_count(_total(samples, GENERATION_TOKENS)),
        prefix_hit_rate=min(hits / queries, 1.0) if hits is not None and queries else None,
    )


def _samples(text: str) -> dict[str, list[Sample]]:
    """The samples that are wanted, by name. The others, nine in ten, are not even parsed."""
    kept = "".join(f"{line}\n" for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] in _WANTED)
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(kept):
        for sample in family.samples:
            if math.isnan(sample.value):
                continue  # Prometheus' word for "not known".
            if sample.value < 0:
                raise ValueError(f"{sample.name} is {sample.value}")
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def _total(samples: Mapping[str, list[Sample]], *names: str) -> float | None:
    """The sum over all engines, by the first of the names that is there."""
    return next((sum(v for _, v in samples[name]) for name in names if name in samples), None)


def _count(value: float | None) -> int | None:
    if value is not None and math.isinf(value):
        raise ValueError("a count is infinite")
    return None if value is None else int(value)


def _seconds(samples: Mapping[str, list[Sample]], name: str) -> Seconds | None:
    count, total = _total(samples, f"{name}_count"), _total(samples, f"{name}_sum")
    if count is None or total is None:
        return None
    buckets: dict[float, float] = {}
    for labels, value in samples.get(f"{name}_bucket", ()):
        bound = float(labels.get("le", "inf"))
        buckets[bound] = buckets.get(bound, 0.0) + value
    return Seconds(count=count, total=total, bounds=tuple(sorted(buckets.items())))
