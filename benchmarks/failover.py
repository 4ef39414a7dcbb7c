"""What is lost when one of three machines that answer the same is killed at work?

Three `agora serve` processes have the same expert (scripted: it says again what it is asked, word by word). A gateway,
a fourth process, reaches the expert by three links, one to each, with graph "multi_access". Questions come without a
pause, in turn as a whole answer, a stream, and a run of the graph. The node that holds the most is killed (SIGKILL)
while it holds at least 20 requests, and started again later. A request has failed if its answer is not word for word
what it must be: not there, cut, doubled or garbled.

`breaker_open_s`: seconds from the kill until the gateway's breaker for the node was open, so that nothing more was sent
there. `p99_before_ms`: requests that had ended at the kill. `p99_during_ms`: those under way at the kill, and those
that began in the `DURING_S` after it.

    python -m benchmarks.failover [--quick] [--json] [--plot FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import numpy as np
import orjson
from rich.progress import Progress, TaskID
from rich.table import Table

from agora.errors import AgoraError, InvalidRequest
from benchmarks.common import facts, parser, run, show
from benchmarks.failover_parts.client import FORMS, Client, Done
from benchmarks.gateway_parts.fleet import Fleet, Server
from benchmarks.square import free_ports, until

REQUESTS: Final = 3000
QUICK_REQUESTS: Final = 900
NODES: Final = ("a", "b", "c")
GATEWAY: Final = "gateway"
EXPERT: Final = "fox"
IN_FLIGHT: Final = 90
"""Requests at once: thirty on each node."""
HELD: Final = 25
"""Requests that the node must hold when it is killed: a few more than 20, since some end while it is looked at."""
LATENCY_S: Final = 0.3
"""Seconds to an answer's first word: what a small model takes to read a question."""
PER_TOKEN_S: Final = 0.02
"""Seconds for each further word: 50 tokens a second; so most of what is under way is in the middle of its answer."""
DURING_S: Final = 2.0
"""Seconds after the kill whose requests count as hit by it."""
AFTER: Final = 100
"""Requests that must follow once the killed node is used again."""


@dataclass(slots=True, kw_only=True)
class Story:
    """What happened, on the monotonic clock."""

    done: list[Done] = field(default_factory=list)
    victim: str = ""
    held: int = 0
    killed: float = 0.0
    opened: float = 0.0
    restarted: float = 0.0
    closed: float = 0.0


def node_config(name: str, ports: dict[str, int]) -> str:
    """One of the three machines, as its owner would write it."""
    return f"""
[server]
name = "{name}"
port = {ports[name]}
[nodes.scripted]
kind = "fake"
latency_s = {LATENCY_S}
seconds_per_token = {PER_TOKEN_S}
tier = "edge"
[experts.{EXPERT}]
node = "scripted"
description = "Says again what it is asked."
[graph]
router = "keywords"
[store]
path = "{name}.sqlite"
"""


def gateway_config(ports: dict[str, int]) -> str:
    """The gateway, as its owner would write it."""
    first, *others = NODES
    lines = [
        "[server]",
        f'name = "{GATEWAY}"',
        f"port = {ports[GATEWAY]}",
        f"[experts.{EXPERT}]",
        f'node = "{first}"',
        f"also = {others}",
        'description = "Says again what it is asked."',
    ]
    for name in NODES:
        lines += [
            f"[nodes.{name}]",
            'kind = "openai"',
            f'url = "http://127.0.0.1:{ports[name]}/v1"',
            f'model = "{EXPERT}"',
            f"[links.to-{name}]",
            f'target = "{name}"',
            'technology = "ethernet"',
        ]
    lines += [
        "[graph]",
        'name = "multi_access"',
        'router = "keywords"',
        'planner = "static"',
        "[[graph.subtasks]]",
        'id = "all"',
        'question = "{question}"',
        "[store]",
        f'path = "{GATEWAY}.sqlite"',
        "",
    ]
    return "\n".join(lines)


class Machines:
    """The three nodes and the gateway.

    Args:
        fleet: Where the processes are started.
        folder: Where configurations and run stores go.
    """

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self._fleet = fleet
        self._folder = folder
        self._ports = free_ports((*NODES, GATEWAY))
        self._servers: dict[str, Server] = {}

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[Client]:
        """All run; gives a client of the gateway."""
        for name in NODES:
            (self._folder / f"{name}.toml").write_text(node_config(name, self._ports))
        (self._folder / f"{GATEWAY}.toml").write_text(gateway_config(self._ports))
        for name in (*NODES, GATEWAY):
            self.start(name)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as self._http:
            for server in self._servers.values():
                await server.listening()
            yield Client(self._http, self.url(GATEWAY), EXPERT)

    def start(self, name: str) -> None:
        agora = [sys.executable, "-c", "from agora.cli import main; main()"]
        command = [*agora, "serve", "--config", str(self._folder / f"{name}.toml"), "--log", os.devnull]
        self._servers[name] = self._fleet.start(name, command, url=self.url(name))

    async def listening(self, name: str) -> None:
        await self._servers[name].listening()

    def kill(self, name: str) -> None:
        os.kill(self._servers[name].pid, signal.SIGKILL)
        self._servers[name].process.wait()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._ports[name]}"

    async def held(self, name: str) -> int:
        """Requests that a node's own expert is busy with, as its card tells."""
        async with self._http.get(f"{self.url(name)}/v1/agora/card", timeout=aiohttp.ClientTimeout(total=10)) as reply:
            reply.raise_for_status()
            loads = orjson.loads(await reply.read())["loads"]
        return sum(int(v["running"]) + int(v["waiting"]) for v in loads.values())


async def usable(client: Client, node: str) -> bool:
    """Whether the gateway's breaker for a node is closed, as its metrics tell.

    Raises:
        AgoraError: If they do not tell of it.
    """
    for line in (await client.get("/metrics")).splitlines():
        if line.startswith("agora_path_usable{") and f'path="{node}.' in line:
            return float(line.rpartition(" ")[2]) == 1
    raise AgoraError(f"the gateway's metrics tell nothing of the path to {node}")


async def hedges(client: Client) -> tuple[float, float]:
    """Second copies that were sent, and requests."""
    found = {"agora_path_hedged_total": 0.0, "agora_path_asked_total": 0.0}
    for line in (await client.get("/metrics")).splitlines():
        name = line.partition("{")[0]
        if name in found:
            found[name] += float(line.rpartition(" ")[2])
    return found["agora_path_hedged_total"], found["agora_path_asked_total"]


async def tell(machines: Machines, client: Client, requests: int, progress: Progress, bar: TaskID) -> Story:
    """Asks without a pause while one node is killed and started again."""
    story = Story()
    sent = 0

    def enough() -> bool:
        after = sum(d.began > story.closed for d in story.done) if story.closed else 0
        return sent >= requests and after >= AFTER

    async def ask(first: float) -> None:
        nonlocal sent
        # Not all at once: else they would go on in step, and the kill would find them all at the same word.
        await asyncio.sleep(first)
        while not enough():
            sent += 1
            story.done.append(await client.ask(sent, FORMS[sent % len(FORMS)]))
            progress.update(bar, completed=min(len(story.done), requests))

    fate = asyncio.create_task(_fate(machines, client, story, requests))
    try:
        await asyncio.gather(fate, *(ask(n / IN_FLIGHT) for n in range(IN_FLIGHT)))
    finally:
        fate.cancel()
    return story


async def _fate(machines: Machines, client: Client, story: Story, requests: int) -> None:
    """What happens to one node: killed a third of the way, started again at two thirds."""

    async def holds_enough() -> bool:
        if len(story.done) < requests // 3:
            return False
        held = {name: await machines.held(name) for name in NODES}
        story.victim = max(held, key=lambda n: held[n])
        story.held = held[story.victim]
        return story.held >= HELD

    async def opened() -> bool:
        return not await usable(client, story.victim)

    async def two_thirds() -> bool:
        return len(story.done) >= 2 * requests // 3

    async def closed() -> bool:
        return await usable(client, story.victim)

    await until(holds_enough, f"no node holds {HELD} requests")
    story.killed = time.monotonic()
    machines.kill(story.victim)
    await until(opened, "the gateway still counts on the killed node")
    story.opened = time.monotonic()
    await until(two_thirds, "not two thirds of the requests were answered")
    story.restarted = time.monotonic()
    machines.start(story.victim)
    await machines.listening(story.victim)
    await until(closed, "the restarted node is not used again")
    story.closed = time.monotonic()


def judge(story: Story) -> dict[str, Any]:
    """The figures of a story."""
    before = [d for d in story.done if d.ended <= story.killed]
    during = [d for d in story.done if d.ended > story.killed and d.began <= story.killed + DURING_S]
    after = [d for d in story.done if d.began > story.closed]
    failures = [d.failure for d in story.done if d.failure]
    spent = max(d.ended for d in story.done) - min(d.began for d in story.done)
    return {
        "failed_requests": len(failures),
        "in_flight_at_kill": story.held,
        "breaker_open_s": story.opened - story.killed,
        "p99_before_ms": _ms(before, 0.99),
        "p99_during_ms": _ms(during, 0.99),
        "p50_before_ms": _ms(before, 0.5),
        "p50_during_ms": _ms(during, 0.5),
        "p99_after_ms": _ms(after, 0.99),
        "requests": len(story.done),
        "requests_by_form": {form: sum(d.form == form for d in story.done) for form in FORMS},
        "under_way_at_kill": sum(d.began <= story.killed < d.ended for d in story.done),
        "streams_resumed": sum(d.resumed for d in story.done if d.form == "stream"),
        "restart_to_closed_s": story.closed - story.restarted,
        "failures": sorted(set(failures))[:5],
        "requests_per_second": len(story.done) / spent,
    }


def _ms(done: Sequence[Done], quantile: float) -> float | None:
    return float(np.quantile([d.seconds for d in done], quantile)) * 1000 if done else None


async def measure(requests: int, progress: Progress) -> tuple[dict[str, Any], Story]:
    with tempfile.TemporaryDirectory() as name, Fleet(Path(name)) as fleet:
        machines = Machines(fleet, Path(name))
        async with machines.up() as client:
            story = await tell(machines, client, requests, progress, progress.add_task("requests", total=requests))
            extra, asked = await hedges(client)
            return judge(story) | {"hedged": extra, "extra_requests": extra / asked if asked else 0.0}, story


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        title=f"{result['requests']} requests over three paths, one machine killed with "
        f"{result['in_flight_at_kill']} requests in work"
    )
    for column in ("", "before", "at the kill", "back again"):
        shown.add_column(column, justify="right" if column else "left")

    def cell(key: str) -> str:
        value = result.get(key)
        return "-" if value is None else f"{value:,.0f} ms"

    shown.add_row("latency p50", cell("p50_before_ms"), cell("p50_during_ms"), "-")
    shown.add_row("latency p99", cell("p99_before_ms"), cell("p99_during_ms"), cell("p99_after_ms"))
    shown.caption = (
        f"failed: {result['failed_requests']} · streams that went on elsewhere: {result['streams_resumed']} · breaker "
        f"open after {result['breaker_open_s'] * 1000:.0f} ms · used again {result['restart_to_closed_s']:.1f} s after "
        f"its restart"
    )
    return shown


def plot(story: Story, file: Path) -> None:
    """Draws each request's time over the moment it began.

    Raises:
        InvalidRequest: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InvalidRequest("--plot needs matplotlib", hint="pip install 'agora-llm[plots]'") from None
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    start = min(d.began for d in story.done)
    for form in FORMS:
        chosen = [d for d in story.done if d.form == form]
        axes.plot([d.began - start for d in chosen], [d.seconds for d in chosen], ".", markersize=3, label=form)
    for when, said in ((story.killed, "killed"), (story.restarted, "started again"), (story.closed, "used again")):
        axes.axvline(when - start, color="black", linewidth=0.8, linestyle="--")
        axes.annotate(said, (when - start, 1.0), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right")
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("seconds of a request")
    axes.set_ylim(bottom=0)
    axes.set_title("One of three machines is killed at work")
    axes.legend(loc="upper left")
    figure.savefig(file, dpi=150)


def main() -> None:
    options = parser(__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--requests", type=int, help=f"requests (default: {REQUESTS}; quick: {QUICK_REQUESTS})")
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw every request's time (extra 'plots')")
    args: argparse.Namespace = options.parse_args()
    requests = args.requests or (QUICK_REQUESTS if args.quick else REQUESTS)
    if requests < 5 * IN_FLIGHT:
        raise InvalidRequest(f"--requests is {requests}; it must be ≥ {5 * IN_FLIGHT}")
    with Progress(transient=True, disable=args.json) as progress:
        result, story = asyncio.run(measure(requests, progress))
    result |= {
        "nodes": len(NODES),
        "in_flight": IN_FLIGHT,
        "first_word_s": LATENCY_S,
        "per_word_s": PER_TOKEN_S,
        "seed": args.seed,
        "quick": args.quick,
        "facts": facts(),
    }
    if args.plot is not None:
        plot(story, args.plot)
    show(result, args.json, table(result))


if __name__ == "__main__":
    run(main)
