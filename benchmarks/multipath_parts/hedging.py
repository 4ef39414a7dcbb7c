"""What second copies bring, and cost: on independent replicas, and where everything slows down at once.

The real `MultipathBackend`, its estimates and its choices, over scripted backends on virtual time. Each case is run
twice on the same arrivals and the same slow answers, with and without second copies.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from agora.network.multipath import MultipathBackend
from agora.network.path import Link, Path, Technology
from agora.network.ways import Way
from agora.protocols import GenerateRequest, Message
from benchmarks.multipath_parts.virtual import run_virtually
from experts.fake import FakeBackend, question_of

REPLICAS: Final = 3
REQUESTS: Final = 10_000
QUICK_REQUESTS: Final = 3_000
PER_SECOND: Final = 50.0
"""Requests that arrive in a second (Poisson)."""
MEDIAN_S: Final = 0.1
SIGMA: Final = 0.3
"""Seconds of an ordinary answer: log-normal, the slowest of a thousand 2.5 times the median."""
SLOW_SHARE: Final = 0.01
SLOW: Final = 50.0
"""Share of answers that are slow, and how many times as long they take."""
SLOW_EVERY_S: Final = 20.0
SLOW_FOR_S: Final = 5.0
"""Where all slow down together: how often, and for how long."""
WARM_UP: Final = 200
"""Requests at the start that do not count: nobody knows yet what is late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run.

    Attributes:
        seconds: Of each request, those of the warm-up left out.
        extra: Second copies.
        requests: All requests.
    """

    seconds: tuple[float, ...]
    extra: int
    requests: int

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.seconds, q))


Slowness = Callable[[int, float, bool], float]
"""How many times as long an answer takes: of request number, time it was asked, whether it is the first copy."""


def hedging(*, quick: bool, seed: int) -> dict[str, Any]:
    """Both cases.

    Returns:
        `hedging` with `p99_cut` (p99 without over p99 with second copies) and `extra_requests` (second copies, as a
        share of the requests); `hedging_correlated` with the same, and `extra_while_slow`: of those that came while all
        were slow.
    """
    requests = QUICK_REQUESTS if quick else REQUESTS
    return {
        "hedging": _case(_independent(requests, seed), requests, seed),
        "hedging_correlated": _case(_together, requests, seed),
    }


def _independent(requests: int, seed: int) -> Slowness:
    """Exactly 1 % of the requests (and one) meet a slow answer first, so that the p99 is among them and not beside
    them by chance; further copies are as likely to be slow as any answer."""
    rng = random.Random(seed)
    counted = range(WARM_UP, requests)
    slow = frozenset(rng.sample(counted, int(SLOW_SHARE * len(counted)) + 1))

    def times(number: int, now: float, first: bool) -> float:
        is_slow = number in slow if first else rng.random() < SLOW_SHARE
        return SLOW if is_slow else 1.0

    return times


def _together(number: int, now: float, first: bool) -> float:
    return SLOW if is_slow_time(now) else 1.0


def is_slow_time(now: float) -> bool:
    """Whether everything is slow just now."""
    return now % SLOW_EVERY_S >= SLOW_EVERY_S - SLOW_FOR_S


def _case(slowness: Slowness, requests: int, seed: int) -> dict[str, Any]:
    plain, _ = run_virtually(_run(slowness, requests, seed, hedge=False))
    hedged, slow_extra = run_virtually(_run(slowness, requests, seed, hedge=True))
    result = {
        "p99_cut": plain.quantile(0.99) / hedged.quantile(0.99),
        "extra_requests": hedged.extra / hedged.requests,
        "extra_while_slow": slow_extra,
        "requests": hedged.requests,
    }
    for name, outcome in (("plain", plain), ("hedged", hedged)):
        result |= {f"{name}_{q}_s": outcome.quantile(x) for q, x in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}
    return result


async def _run(slowness: Slowness, requests: int, seed: int, *, hedge: bool) -> tuple[Outcome, float]:
    """One run, and the second copies sent while all were slow as a share of the requests that came then."""
    arrivals, pace = random.Random(seed + 1), random.Random(seed + 2)
    clock = asyncio.get_running_loop().time
    seen: set[int] = set()
    slow_extra = slow_first = 0

    def latency(request: Any) -> float:
        nonlocal slow_extra, slow_first
        number = int(question_of(request))
        first = number not in seen
        seen.add(number)
        if is_slow_time(clock()):
            slow_first += first
            slow_extra += not first
        return MEDIAN_S * pace.lognormvariate(0.0, SIGMA) * slowness(number, clock(), first)

    backend = MultipathBackend(
        [Way(path=_path(n), backend=FakeBackend("yes", name=f"r{n}", latency=latency)) for n in range(REPLICAS)],
        name="replicas",
        hedge=hedge,
        rng=random.Random(seed + 3),
    )
    seconds: list[float] = [0.0] * requests

    async def ask(number: int) -> None:
        began = clock()
        await backend.generate(GenerateRequest(messages=(Message(role="user", content=str(number)),), max_tokens=4))
        seconds[number] = clock() - began

    async with asyncio.TaskGroup() as group:
        for number in range(requests):
            group.create_task(ask(number))
            await asyncio.sleep(arrivals.expovariate(PER_SECOND))
    extra, asked = backend.hedged
    await backend.aclose()
    outcome = Outcome(seconds=_counted(seconds), extra=extra, requests=asked)
    return outcome, slow_extra / slow_first if slow_first else 0.0


def _counted(seconds: Sequence[float]) -> tuple[float, ...]:
    return tuple(seconds[WARM_UP:])


def _path(number: int) -> Path:
    link = Link(
        name=f"link{number}",
        source="here",
        target=f"replica{number}",
        technology=Technology.ETHERNET,
        up_mbps=1000.0,
        down_mbps=1000.0,
        rtt_s=0.001,
    )
    return Path(name=f"replica{number}", links=(link,), target=link.target)
