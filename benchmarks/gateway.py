"""What does a request cost that goes through the gateway, beside a bare proxy, a StateGraph and LiteLLM's proxy?

Closed loop against an upstream that answers at once; the server measured on one core, load and upstream on another. Its
processor time is read when nothing is in flight. The servers take turns, round after round, because a machine is rarely
alone with a benchmark. Every reply is checked, and one wrong reply ends the run.

    python -m benchmarks.gateway [--quick] [--json] [--without litellm]
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, Final

import numpy as np
from rich.progress import Progress, TaskID
from rich.table import Table

from agora.errors import InvalidRequest
from benchmarks.common import facts, parser, run, show
from benchmarks.gateway_parts import usage
from benchmarks.gateway_parts.contenders import (
    CONTENDERS,
    EXPERT,
    LITELLM,
    PACED_EXPERT,
    SERVERS,
    Running,
    has_litellm,
    litellm_version,
    request,
)
from benchmarks.gateway_parts.fleet import Fleet
from benchmarks.gateway_parts.load import Connection, Load, LoadFailed, Request, Window
from benchmarks.gateway_parts.mock import MODEL, PACED

CONNECTIONS: Final = 32
"""Requests in flight in the closed loop: a busy small team, and enough to hide the round trip of each."""

RATE: Final = 50.0
"""Requests per second of the open loop."""

HEAD_START_S: Final = 0.5
"""Seconds until two loads that alternate begin: each has done its preparations by then, which take < 0.2 s."""

PEERS: Final = Path(__file__).parents[1] / ".venv-peers"

GOALS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "agora_over_litellm": "≥ 20",
        "agora_over_bare": "≥ 0.6",
        "graph_over_stategraph": "≥ 1.3",
        "added_p50_ms": "≤ 2.5",
        "added_p99_ms": "≤ 7",
        "added_stream_p50_ms": "≤ 2.5",
        "added_stream_p99_ms": "≤ 7",
        "memory_growth_mb": "≤ 5",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long everything takes.

    Attributes:
        rounds: Turns of each server.
        stream_rounds: Turns of each server that can stream, in the first rounds.
        seconds: Length of one window.
        stream_seconds: Length of one window of streams.
        warm_seconds: Length of the windows before the first that counts.
        rate_seconds: Length of each of the two open loops.
        connections: Requests in flight.
    """

    rounds: int
    stream_rounds: int
    seconds: float
    stream_seconds: float
    warm_seconds: float
    rate_seconds: float
    connections: int = CONNECTIONS


FULL: Final = Plan(rounds=7, stream_rounds=3, seconds=3.0, stream_seconds=1.5, warm_seconds=3.0, rate_seconds=30.0)
QUICK: Final = Plan(rounds=3, stream_rounds=1, seconds=0.7, stream_seconds=0.4, warm_seconds=0.3, rate_seconds=4.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """MiB of agora's server, warm and at the end."""

    warm: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The servers, ready, and what measuring them needs."""

    plan: Plan
    mock: str
    running: Mapping[str, Running]
    urls: Mapping[str, str]
    progress: Progress
    bar: TaskID

    def names(self, *, streams: bool = False) -> list[str]:
        return [n for n, c in CONTENDERS.items() if c.server in self.running and (c.streams or not streams)]

    def request(self, name: str, *, stream: bool = False) -> Request:
        of = CONTENDERS[name]
        return request(self.urls[of.server], of.model, key=self.running[of.server].key, stream=stream)

    async def window(self, name: str, *, seconds: float, stream: bool = False) -> tuple[Window, float]:
        """One closed loop, and the processor seconds that the server used for it.

        Raises:
            LoadFailed: If a reply was wrong, or some that the upstream never wrote were given.
        """
        pid = self.running[CONTENDERS[name].server].server.pid
        async with Load(self.urls[CONTENDERS[name].server]) as load:
            await load.connect(self.plan.connections)
            before_upstream = await answered(self.mock)
            await usage.idle(pid)
            before = usage.cpu_seconds(pid)
            window = await load.closed(
                self.request(name, stream=stream), connections=self.plan.connections, seconds=seconds
            )
            await usage.idle(pid)
            used = usage.cpu_seconds(pid) - before
            window.check(name)
            asked = await answered(self.mock) - before_upstream
            if asked < window.answered:
                window.errors["answered without asking the upstream"] = window.answered - asked
                window.check(name)
            if used <= 0:
                raise LoadFailed(f"{name} used no processor time that can be told", hint="a longer window: --seconds")
        return window, used


async def answered(mock: str) -> int:
    """How many requests the upstream has answered."""
    connection = await Connection.open(mock)
    data = b"GET /answered HTTP/1.1\r\nHost: mock\r\n\r\n"
    wrong = await connection.send(Request(data=data, first=b"answered", last=(b"}",)))
    connection.close()
    assert wrong is None, wrong
    return int(connection.json()["answered"])


async def throughput(bench: Bench) -> dict[str, Any]:
    """Requests, and streams, per processor second of each server, by turns."""
    plan = bench.plan
    told: dict[str, Any] = {"requests": {}, "streams": {}, "busy": {}}
    for n in range(plan.rounds):
        for stream, seconds in ((False, plan.seconds), (True, plan.stream_seconds)):
            if stream and n >= plan.stream_rounds:
                continue
            names = bench.names(streams=stream)
            # Each round begins with another one: who follows whom is not always the same.
            for name in names[n % len(names) :] + names[: n % len(names)]:
                window, used = await bench.window(name, seconds=seconds, stream=stream)
                told["streams" if stream else "requests"].setdefault(name, []).append(window.answered / used)
                if not stream:
                    told["busy"].setdefault(name, []).append(used / window.seconds)
                bench.progress.advance(bench.bar, seconds)
    return told


async def added(bench: Bench, *, stream: bool) -> dict[str, list[float]]:
    """Latencies straight to the upstream and through agora, in the same seconds, the requests alternating."""
    agora, seconds = bench.running["agora"], bench.plan.rate_seconds
    direct = request(bench.mock, PACED if stream else MODEL, stream=stream)
    through = request(bench.urls["agora"], PACED_EXPERT if stream else EXPERT, key=agora.key, stream=stream)
    async with Load(bench.mock) as to_mock, Load(bench.urls["agora"]) as to_agora:
        for load in (to_mock, to_agora):
            await load.connect(4)
        # Both loads collect garbage before they start.
        begin = asyncio.get_running_loop().time() + HEAD_START_S
        straight, by_agora = await asyncio.gather(
            to_mock.at_rate(direct, per_second=RATE, seconds=seconds, start=begin),
            to_agora.at_rate(through, per_second=RATE, seconds=seconds, start=begin + 0.5 / RATE),
        )
    straight.check("the upstream")
    by_agora.check("agora_expert")
    bench.progress.advance(bench.bar, seconds)
    return {
        "direct_first": straight.first_token_s,
        "direct": straight.whole_s,
        "first": by_agora.first_token_s,
        "whole": by_agora.whole_s,
    }


def latencies(whole: Mapping[str, Sequence[float]], streamed: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Milliseconds that agora adds: a percentile with it, less that without it."""

    def more(of: Mapping[str, Sequence[float]], which: str, than: str, percent: int) -> float:
        return float(np.percentile(of[which], percent) - np.percentile(of[than], percent)) * 1000

    return {
        "added_p50_ms": more(whole, "whole", "direct", 50),
        "added_p99_ms": more(whole, "whole", "direct", 99),
        "added_stream_p50_ms": more(streamed, "first", "direct_first", 50),
        "added_stream_p99_ms": more(streamed, "first", "direct_first", 99),
        "added_stream_whole_p50_ms": more(streamed, "whole", "direct", 50),
        "added_stream_whole_p99_ms": more(streamed, "whole", "direct", 99),
        "direct_p50_ms": float(np.percentile(whole["direct"], 50)) * 1000,
        "direct_p99_ms": float(np.percentile(whole["direct"], 99)) * 1000,
    }


def over(rates: Mapping[str, Sequence[float]], one: str, other: str) -> float | None:
    """How many times as much one does as the other: the median over the rounds, in each of which both had a turn."""
    if one not in rates or other not in rates:
        return None
    return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))


async def start(
    fleet: Fleet, folder: Path, args: argparse.Namespace, cores: usage.Cores | None
) -> tuple[str, dict[str, Running], dict[str, str]]:
    """Starts everything at once, on all cores; once each listens, it gets the core that is its own."""
    upstream = fleet.start("mock", [sys.executable, "-m", "benchmarks.gateway_parts.mock"])
    mock = await upstream.listening()
    running: dict[str, Running] = {}
    for name, starter in SERVERS.items():
        if name not in args.without and not (name == LITELLM and not has_litellm(args.peers)):
            running[name] = starter(fleet, folder, mock, args.peers)
    found = await asyncio.gather(*(r.server.listening() for r in running.values()))
    if cores is not None:
        for at in running.values():
            usage.pin(at.server.pid, cores.servers)
        usage.pin(upstream.pid, cores.load)
    return mock, running, dict(zip(running, found, strict=True))


async def measure(fleet: Fleet, folder: Path, args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    plan: Plan = args.plan
    bar = progress.add_task("starting the servers", total=None)
    cores = usage.cores()
    mock, running, urls = await start(fleet, folder, args, cores)
    bench = Bench(plan=plan, mock=mock, running=running, urls=urls, progress=progress, bar=bar)
    with usage.on_core(cores.load if cores else None):
        memory, added_ms, told = await _measured(bench)
    return result(args, bench, told, added_ms, memory, cores_apart=cores is not None)


async def _measured(bench: Bench) -> tuple[Memory, dict[str, float], dict[str, Any]]:
    plan, names, streaming = bench.plan, bench.names(), bench.names(streams=True)
    bench.progress.update(bench.bar, description="warming up")
    for name in names:
        await bench.window(name, seconds=plan.warm_seconds)
    for name in streaming:
        await bench.window(name, seconds=plan.warm_seconds / 2, stream=True)
    pid = bench.running["agora"].server.pid
    warm = usage.memory_mb(pid)
    stream_rounds = min(plan.rounds, plan.stream_rounds)
    total = plan.rounds * len(names) * plan.seconds + stream_rounds * len(streaming) * plan.stream_seconds
    total += 2 * plan.rate_seconds
    bench.progress.update(bench.bar, description="measuring", total=total)
    whole = await added(bench, stream=False)
    streamed = await added(bench, stream=True)
    told = await throughput(bench)
    await usage.idle(pid)
    return Memory(warm=warm, end=usage.memory_mb(pid)), latencies(whole, streamed), told


def result(
    args: argparse.Namespace,
    bench: Bench,
    told: Mapping[str, Any],
    added_ms: Mapping[str, float],
    memory: Memory,
    *,
    cores_apart: bool,
) -> dict[str, Any]:
    rates = told["requests"]
    medians = {name: statistics.median(r) for name, r in rates.items()}
    notes = {}
    if LITELLM not in bench.running:
        left_out = LITELLM in args.without
        notes[LITELLM] = "left out by --without" if left_out else f"not installed in {args.peers.name}: make peers"
    return {
        **{name: medians.get(name) for name in CONTENDERS},
        "agora_over_litellm": over(rates, "agora_expert", "litellm"),
        "agora_over_bare": over(rates, "agora_expert", "bare_proxy"),
        "graph_over_stategraph": over(rates, "agora_graph", "stategraph_proxy"),
        **added_ms,
        "memory_growth_mb": memory.end - memory.warm,
        "memory_mb": memory.end,
        "streams": {name: statistics.median(r) for name, r in told["streams"].items()},
        "best": {name: max(r) for name, r in rates.items()},
        "rounds": rates,
        "server_busy": {name: statistics.median(b) for name, b in told["busy"].items()},
        "connections": bench.plan.connections,
        "seconds": bench.plan.seconds,
        "requests_per_second_open_loop": RATE,
        "cores_apart": cores_apart,
        "litellm_version": litellm_version(args.peers) if LITELLM in bench.running else None,
        "notes": notes,
        "quick": args.quick,
        "facts": facts(),
    }


def table(result: Mapping[str, Any]) -> Table:
    shown = Table(title=f"{result['connections']} connections, an upstream that answers at once")
    for column in ("requests per CPU-second", "median", "best", "streams", "core used"):
        shown.add_column(column, justify="left" if column.startswith("requests") else "right")
    for name in CONTENDERS:
        if result[name] is None:
            shown.add_row(name, "–", "–", "–", result["notes"].get(name, ""))
            continue
        streams = result["streams"].get(name)
        busy = f"{result['server_busy'][name]:.0%}"
        shown.add_row(
            name, f"{result[name]:,.0f}", f"{result['best'][name]:,.0f}", f"{streams:,.0f}" if streams else "–", busy
        )
    shown.add_section()
    for key, goal in GOALS.items():
        value = result[key]
        shown.add_row(key, "–" if value is None else f"{value:.2f}", "", "", f"goal {goal}")
    return shown


def _plan(args: argparse.Namespace) -> Plan:
    plan = QUICK if args.quick else FULL
    given = {"rounds": args.rounds, "connections": args.connections}
    if args.seconds is not None:
        share = args.seconds / plan.seconds
        given |= {f: getattr(plan, f) * share for f in ("seconds", "stream_seconds", "warm_seconds", "rate_seconds")}
    for what, value in (("--rounds", args.rounds), ("--connections", args.connections), ("--seconds", args.seconds)):
        if value is not None and not 0 < value <= 10_000:
            raise InvalidRequest(f"{what} is {value}; it must be above 0 and at most 10,000")
    return replace(plan, **{k: v for k, v in given.items() if v is not None})


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument(
        "--rounds", type=int, help=f"turns of each server (default: {FULL.rounds}; quick: {QUICK.rounds})"
    )
    options.add_argument("--seconds", type=float, help="length of a turn; the other windows keep their share of it")
    options.add_argument("--connections", type=int, help=f"requests in flight (default: {CONNECTIONS})")
    options.add_argument("--without", action="append", default=[], choices=[LITELLM], help="leave this server out")
    options.add_argument("--peers", type=Path, default=PEERS, metavar="DIR", help="environment of `make peers`")
    args = options.parse_args(arguments)
    args.plan = _plan(args)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="agora-gateway-") as name,
            Fleet(Path(name)) as fleet,
            Progress(transient=True, disable=args.json) as progress,
        ):
            told = asyncio.run(measure(fleet, Path(name), args, progress))
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    show(told, args.json, table(told))


if __name__ == "__main__":
    run(main)
