"""What is played: paired 4G and 5G traces, a stream of jobs on each, and what the radios are like besides."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Final

from agora.network.jobs import Job
from agora.network.path import Link, Path, Technology
from agora.network.trace_files import Recording, read_multipath

FILE: Final = FilePath("net-lumos5g") / "multipath.csv.gz"
"""The paired traces, in the data folder."""

RTT_S: Final[Mapping[Technology, float]] = {Technology.NR: 0.050, Technology.LTE: 0.087}
"""Median round-trip times of the speed tests published with the traces (net-speedtest-5g): mmWave and LTE."""

RTT_SIGMA: Final = 0.25
"""Spread of ln(round-trip time): the speed tests' quartiles are 36–70 ms and 69–99 ms."""

PRICES: Final[Mapping[Technology, float]] = {Technology.LTE: 95 / 75_000, Technology.NR: 105 / 75_000}
"""Dollars per MB. The traces are of Verizon in Minneapolis, whose Above Unlimited plan (95 dollars a month) held 75 GB
at full speed and whose 5G cost 10 dollars a month more (announced 13 March 2019)."""

PRIOR_MBPS: Final[Mapping[Technology, float]] = {Technology.NR: 400.0, Technology.LTE: 45.0}
"""What the links are configured to have: round numbers near the medians of the traces that were looked at first."""

SIZES: Final[Mapping[str, int]] = {"photo": 1_000_000, "lidar": 2_000_000, "surround": 5_000_000}
"""Bytes that a job sends: a 2-megapixel photograph, one turn of a 64-beam lidar (KITTI: 1.9 MB), photographs of six
cameras around a vehicle. Each is as likely as the others."""

SIZE_SIGMA: Final = 0.2
"""Spread of ln(bytes) within a kind."""

ANSWER_BYTES: Final = 2_000
PROMPT_TOKENS: Final = 300
COMPLETION_TOKENS: Final = 20
SERVER_S: Final = 0.3
"""Median seconds that the expert computes: a small vision model's short answer on one GPU."""

SERVER_SIGMA: Final = 0.2
"""Spread of ln(that)."""

FIRST_SHARE: Final = 0.5
"""Share of that until the first token."""

FIRST_TOKEN_BYTES: Final = 200
"""Bytes of a streamed event with one token."""

DEADLINE_S: Final = 1.5
"""Seconds in which an answer is of use: about what a driver needs to see a danger and to act."""

GIVE_UP_S: Final = 10.0
"""Seconds after which whoever asked has gone; such a job counts as late, and as having taken so long."""

GAPS_S: Final = (2.0, 4.0)
"""Seconds from one job to the next: uniform between these, so that jobs meet on one link only when it is slow."""

TUNED_ON: Final = (
    *("5g_trace_100_walkingmultipath", "5g_trace_103_drivingmultipath", "5g_trace_114_walkingmultipath"),
    *("5g_trace_13_walkingmultipath", "5g_trace_24_drivingmultipath", "5g_trace_36_walkingmultipath"),
    *("5g_trace_54_walkingmultipath", "5g_trace_58_drivingmultipath", "5g_trace_61_walkingmultipath"),
    *("5g_trace_72_drivingmultipath", "5g_trace_75_walkingmultipath", "5g_trace_88_drivingmultipath"),
    *("5g_trace_90_walkingmultipath", "5g_trace_98_drivingmultipath", "5g_trace_27_walkingmultipath"),
    *("5g_trace_47_walkingmultipath", "5g_trace_106_walkingmultipath", "5g_trace_110_drivingmultipath"),
    *("5g_trace_111_walkingmultipath", "5g_trace_113_walkingmultipath"),
)
"""Traces that constants were looked at with; no figure is made of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One job of the stream, and what chance has in store for it whichever way it takes.

    Attributes:
        at: When it comes up, seconds.
        kind: Which of `SIZES`.
        job: Its bytes, tokens and deadline.
        server_s: Seconds that the expert will compute.
        rtt_s: Round-trip time that it will meet, by technology.
    """

    at: float
    kind: str
    job: Job
    server_s: float
    rtt_s: Mapping[Technology, float]


def recordings(data: FilePath, *, tuning: bool = False) -> list[Recording]:
    """The traces that figures are made of; with `tuning` those that they are not made of.

    Raises:
        InvalidRequest: If the data is missing or damaged.
    """
    return [r for r in read_multipath(data / FILE) if (r.name in TUNED_ON) == tuning]


def stream(recording: Recording, seed: int, *, deadline_s: float = DEADLINE_S) -> list[Asked]:
    """The jobs that come up while a trace plays; the same for every policy."""
    rng = random.Random(f"{seed}/{recording.name}")
    trace = recording.traces[Technology.NR]
    found: list[Asked] = []
    at = trace.start_s + rng.uniform(0.0, GAPS_S[1])
    while at < trace.end_s - GIVE_UP_S:
        kind = rng.choice(list(SIZES))
        size = round(SIZES[kind] * rng.lognormvariate(0.0, SIZE_SIGMA))
        job = Job(
            up_bytes=size,
            down_bytes=ANSWER_BYTES,
            prompt_tokens=PROMPT_TOKENS,
            completion_tokens=COMPLETION_TOKENS,
            deadline_s=deadline_s,
        )
        server = SERVER_S * rng.lognormvariate(0.0, SERVER_SIGMA)
        rtts = {tech: rtt * rng.lognormvariate(0.0, RTT_SIGMA) for tech, rtt in RTT_S.items()}
        found.append(Asked(at=at, kind=kind, job=job, server_s=server, rtt_s=rtts))
        at += rng.uniform(*GAPS_S)
    return found


def paths(prices: Mapping[Technology, float]) -> dict[Technology, Path]:
    """The two ways from the device to the expert's machine, as they would be configured."""
    found = {}
    for tech in (Technology.LTE, Technology.NR):
        link = Link(
            name=tech.value,
            source="here",
            target="edge",
            technology=tech,
            up_mbps=PRIOR_MBPS[tech],
            down_mbps=PRIOR_MBPS[tech],
            rtt_s=RTT_S[tech],
            price_per_mb=prices[tech],
        )
        found[tech] = Path(name=tech.value, links=(link,), target="edge")
    return found


def setup() -> dict[str, Any]:
    """What is assumed, for the result."""
    return {
        "traces": "each trace's Mbit/s bounds a radio's transfers, up and down alike (what was recorded came down)",
        "job_mb": {kind: size / 1e6 for kind, size in SIZES.items()},
        "job_sigma": SIZE_SIGMA,
        "answer_bytes": ANSWER_BYTES,
        "gap_s": list(GAPS_S),
        "deadline_s": DEADLINE_S,
        "give_up_s": GIVE_UP_S,
        "server_s": {"median": SERVER_S, "sigma": SERVER_SIGMA, "to_first_token": FIRST_SHARE},
        "rtt_s": {tech.value: rtt for tech, rtt in RTT_S.items()},
        "rtt_sigma": RTT_SIGMA,
        "dollars_per_mb": {tech.value: price for tech, price in PRICES.items()},
        "configured_mbps": {tech.value: mbps for tech, mbps in PRIOR_MBPS.items()},
        "tuned_on": f"{len(TUNED_ON)} of the traces, by name, which no figure is made of",
    }
