"""What is lost when a node of the square is killed at work?

Three `agora serve` processes with the same five experts (scripted answers after a fixed delay), all neighbours of one
another. Questions of two or three subtasks are asked of two of them, many at a time. The third is killed (SIGKILL)
while it holds at least 20 subtasks, later started again, and must be used again. A request has failed if it brings no
answer, or one with a part missing.

    python -m benchmarks.square [--quick] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import numpy as np
from rich.progress import Progress, TaskID
from rich.table import Table

from agora.errors import AgoraError, InvalidRequest
from benchmarks.common import facts, parser, run, show
from benchmarks.gateway_parts.fleet import Fleet, Server
from experts.ready import ready_experts

REQUESTS: Final = 2000
QUICK_REQUESTS: Final = 600
NODES: Final = ("a", "b", "c")
VICTIM: Final = "c"
IN_FLIGHT: Final = 48
"""Requests at once on each node that is asked: with 2–3 subtasks each and three nodes, some 70 subtasks on each."""
HELD: Final = 20
"""Subtasks that the third node must hold when it is killed."""
LATENCY_S: Final = 0.4
"""Seconds of one scripted answer: what a small model takes for a sentence, and long beside the processors' share."""
REFRESH_S: Final = 1.0
REQUEST_S: Final = 60.0
WAIT_S: Final = 120.0
"""Seconds for anything that is waited for: it takes a few, and ten times that on a machine with much else to do."""
AFTER: Final = 100
"""Requests that must follow once the killed node is back."""
LOOK_EVERY_S: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """One request that came to its end.

    Attributes:
        began: When it was sent, on the monotonic clock.
        ended: When its answer was there.
        experts: For each subtask, who was asked, in order.
        failure: What went wrong; empty if nothing did.
    """

    began: float
    ended: float
    experts: tuple[tuple[str, ...], ...] = ()
    failure: str = ""

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def asked_twice(self) -> int:
        return sum(len(many) > 1 for many in self.experts)

    def used(self, node: str) -> int:
        """Subtasks that were answered on a neighbour."""
        return sum(many[-1].startswith(f"{node}.") for many in self.experts if many)


@dataclass(slots=True, kw_only=True)
class Story:
    """What happened, on the monotonic clock."""

    done: list[Done] = field(default_factory=list)
    held: int = 0
    sent: int = 0
    killed: float = 0.0
    noticed: float = 0.0
    restarted: float = 0.0
    back: float = 0.0


def questions() -> list[str]:
    """The sample queries of the ready experts, two subtasks each; every other one with a third of its field."""
    ready = list(ready_experts().values())
    samples = [(n, s) for n, r in enumerate(ready) for s in r.samples]
    # Those of one question only.
    more = [itertools.cycle([e for e in r.card.examples if "," not in e]) for r in ready]
    return [s if i % 2 else f"{s} {next(more[n])}" for i, (n, s) in enumerate(samples)]


def config(name: str, ports: dict[str, int], *, limits: Sequence[str] = ()) -> str:
    """The configuration of one node, as its owner would write it; `limits` are further lines of `[server]`."""
    lines = [
        "[server]",
        f'name = "{name}"',
        f"port = {ports[name]}",
        *limits,
        "[nodes.scripted]",
        'kind = "fake"',
        f"latency_s = {LATENCY_S}",
        'tier = "edge"',
    ]
    for expert in ready_experts():
        lines += [f"[experts.{expert}]", 'node = "scripted"', f'ready = "{expert}"']
    for other, port in ports.items():
        if other != name:
            lines += [f"[neighbours.{other}]", f'url = "http://127.0.0.1:{port}"', f"refresh_s = {REFRESH_S}"]
    # No model, so routing by words: equal cards match equally well, and the load decides.
    lines += ["[graph]", 'router = "keywords"', "[store]", f'path = "{name}.sqlite"', ""]
    return "\n".join(lines)


def free_ports(names: Sequence[str]) -> dict[str, int]:
    """A free port for each; all are held until the last one is found."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name in names:
            s = stack.enter_context(socket.socket())
            s.bind(("127.0.0.1", 0))
            found[name] = int(s.getsockname()[1])
        return found


async def until(holds: Callable[[], Awaitable[bool]], otherwise: str, *, seconds: float = WAIT_S) -> None:
    """Waits until something holds.

    Raises:
        AgoraError: If it does not in time; `otherwise` says what that means.
    """
    end = time.monotonic() + seconds
    while not await holds():
        if time.monotonic() > end:
            raise AgoraError(f"after {seconds:g} s {otherwise}")
        await asyncio.sleep(LOOK_EVERY_S)


class Square:
    """The three nodes, and a client that asks them.

    Args:
        fleet: Where the processes are started.
        folder: Where configurations and run stores go.
        limits: Further lines of every node's `[server]`.
    """

    def __init__(self, fleet: Fleet, folder: Path, *, limits: Sequence[str] = ()) -> None:
        self._limits = limits
        self._fleet = fleet
        self._folder = folder
        self._ports = free_ports(NODES)
        self._servers: dict[str, Server] = {}
        self._http: aiohttp.ClientSession | None = None

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        """All nodes run and know each other, and can be asked."""
        for name in NODES:
            if name not in self._servers:
                self.start(name)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as self._http:
            for server in self._servers.values():
                await server.listening()
            await self.until_known(NODES)
            yield

    def start(self, name: str) -> None:
        file = self._folder / f"{name}.toml"
        file.write_text(config(name, self._ports, limits=self._limits))
        agora = [sys.executable, "-c", "from agora.cli import main; main()"]
        command = [*agora, "serve", "--config", str(file), "--log", os.devnull]
        self._servers[name] = self._fleet.start(name, command, url=self.url(name))

    def kill(self, name: str) -> None:
        self.signal(name, signal.SIGKILL)
        self._servers[name].process.wait()

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self._servers[name].pid, number)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._ports[name]}"

    async def get(self, name: str, path: str) -> Any:
        assert self._http is not None
        async with self._http.get(f"{self.url(name)}{path}", timeout=aiohttp.ClientTimeout(total=10)) as reply:
            reply.raise_for_status()
            return await reply.json()

    async def held(self, name: str) -> int:
        """Subtasks that a node's own experts are busy with, as its card tells."""
        card = await self.get(name, "/v1/agora/card")
        own = {e["engine"] for e in card["experts"] if e["hops"] == 0}
        return sum(card["loads"][e]["running"] + card["loads"][e]["waiting"] for e in own)

    async def sent(self, name: str, other: str) -> int:
        """Subtasks that a node has sent to another one and waits for."""
        states = (await self.get(name, "/v1/agora/neighbours"))["data"]
        return sum(int(s["asked"]) for s in states if s["name"] == other)

    async def knows(self, name: str, other: str) -> bool:
        """Whether a node holds another one's experts."""
        states = (await self.get(name, "/v1/agora/neighbours"))["data"]
        return any(s["name"] == other and s["up"] and s["experts"] for s in states)

    async def until_known(self, names: Sequence[str], *, seconds: float = WAIT_S) -> None:
        """Waits until each of the nodes knows each of the others.

        Raises:
            AgoraError: If that takes too long.
        """
        pairs = [(a, b) for a in NODES for b in NODES if a != b and b in names]

        async def known() -> bool:
            return all([await self.knows(a, b) for a, b in pairs])

        await until(known, f"not all nodes know {', '.join(names)}", seconds=seconds)

    async def ask(self, name: str, question: str) -> Done:
        """One request, to its end."""
        assert self._http is not None
        began = time.monotonic()
        body = {"model": "agora", "messages": [{"role": "user", "content": question}]}
        try:
            async with self._http.post(
                f"{self.url(name)}/v1/chat/completions", json=body, timeout=aiohttp.ClientTimeout(total=REQUEST_S)
            ) as reply:
                status, said = reply.status, await reply.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as e:
            return Done(began=began, ended=time.monotonic(), failure=f"{type(e).__name__}: {e}")
        ended = time.monotonic()
        if status != 200:
            return Done(began=began, ended=ended, failure=f"HTTP {status}: {said.get('error', {}).get('message')}")
        about = said["agora"]
        experts = tuple(tuple(s["experts"]) for s in about["subtasks"])
        text = said["choices"][0]["message"]["content"]
        failure = "" if text else "an empty answer"
        if about["missing"]:
            failure = f"missing: {text.rpartition('Missing from this answer:')[2].strip()}; asked: {experts}"
        return Done(began=began, ended=ended, experts=experts, failure=failure)


async def tell(square: Square, requests: int, progress: Progress, bar: TaskID) -> Story:
    """Asks without a pause while one node is killed and started again."""
    story = Story()
    asked = itertools.cycle(questions())
    sent = 0

    def enough() -> bool:
        after = sum(d.began > story.back for d in story.done) if story.back else 0
        return sent >= requests and after >= AFTER

    async def client(name: str) -> None:
        nonlocal sent
        while not enough():
            sent += 1
            story.done.append(await square.ask(name, next(asked)))
            progress.update(bar, completed=min(len(story.done), requests))

    clients = [client(name) for name in NODES if name != VICTIM for _ in range(IN_FLIGHT)]
    fate = asyncio.create_task(_fate(square, story, requests))
    try:
        await asyncio.gather(fate, *clients)
    finally:
        fate.cancel()
    return story


async def _fate(square: Square, story: Story, requests: int) -> None:
    """What happens to the third node: killed a quarter of the way, started again half-way."""
    survivors = [n for n in NODES if n != VICTIM]

    async def holds_enough() -> bool:
        if len(story.done) < requests // 4:
            return False
        story.sent = sum([await square.sent(n, VICTIM) for n in survivors])
        story.held = await square.held(VICTIM)
        return story.held >= HELD

    async def gone() -> bool:
        return not any([await square.knows(n, VICTIM) for n in survivors])

    async def half_way() -> bool:
        return len(story.done) >= requests // 2

    async def back() -> bool:
        return all([await square.knows(n, VICTIM) for n in survivors])

    await until(holds_enough, f"the third node still holds fewer than {HELD} subtasks")
    story.killed = time.monotonic()
    square.kill(VICTIM)
    await until(gone, "the survivors still count on the killed node")
    story.noticed = time.monotonic()
    await until(half_way, "not half of the requests were answered")
    story.restarted = time.monotonic()
    square.start(VICTIM)
    await until(back, "the restarted node is not back")
    story.back = time.monotonic()


def judge(story: Story) -> dict[str, Any]:
    """The figures of a story."""
    before = [d for d in story.done if d.ended <= story.killed]
    during = [d for d in story.done if d.began <= story.killed < d.ended]
    without = [d for d in story.done if story.killed < d.began and d.ended <= story.restarted]
    after = [d for d in story.done if d.began > story.back]
    hurt = [d for d in story.done if d.asked_twice]
    failures = [d.failure for d in story.done if d.failure]
    spent = max(d.ended for d in story.done) - min(d.began for d in story.done)
    return {
        "failed_requests": len(failures),
        "in_flight_at_kill": story.held,
        "sent_to_it_at_kill": story.sent,
        "asked_twice": sum(d.asked_twice for d in story.done),
        "requests": len(story.done),
        "subtasks": sum(len(d.experts) for d in story.done),
        "requests_hurt": len(hurt),
        "failures": sorted(set(failures))[:5],
        "noticed_s": story.noticed - story.killed,
        "recovered_s": max((d.ended for d in hurt), default=story.killed) - story.killed,
        "restarted_to_back_s": story.back - story.restarted,
        "subtasks_on_the_node_before": sum(d.used(VICTIM) for d in before),
        "subtasks_on_the_node_after": sum(d.used(VICTIM) for d in after),
        "latency_s": {
            "before": _quantiles(before),
            "at_the_kill": _quantiles(during),
            "two_nodes": _quantiles(without),
            "after": _quantiles(after),
        },
        "requests_per_second": len(story.done) / spent,
    }


def _quantiles(done: Sequence[Done]) -> dict[str, float] | None:
    if not done:
        return None
    p50, p95 = np.quantile([d.seconds for d in done], [0.5, 0.95])
    return {"p50": float(p50), "p95": float(p95), "requests": len(done)}


async def measure(requests: int, progress: Progress) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, Fleet(Path(name)) as fleet:
        square = Square(fleet, Path(name))
        async with square.up():
            bar = progress.add_task("requests", total=requests)
            return judge(await tell(square, requests, progress, bar))


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        title=f"{result['requests']} requests on two of three nodes, the third killed with "
        f"{result['in_flight_at_kill']} subtasks in work"
    )
    for column in ("", "before", "at the kill", "two nodes", "three again"):
        shown.add_column(column, justify="right" if column else "left")
    spans = [result["latency_s"][k] for k in ("before", "at_the_kill", "two_nodes", "after")]
    for quantile in ("p50", "p95"):
        shown.add_row(f"latency {quantile}", *(f"{s[quantile]:.2f} s" if s else "-" for s in spans))
    shown.add_row("requests", *(str(s["requests"]) if s else "-" for s in spans))
    on_it = (result["subtasks_on_the_node_before"], result["subtasks_on_the_node_after"])
    shown.add_row("subtasks on the third", str(on_it[0]), "", "", str(on_it[1]))
    shown.caption = (
        f"failed: {result['failed_requests']} · asked twice: {result['asked_twice']} subtasks of "
        f"{result['requests_hurt']} requests · noticed after {result['noticed_s'] * 1000:.0f} ms · "
        f"all answered after {result['recovered_s']:.2f} s"
    )
    return shown


def main() -> None:
    options = parser(__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--requests", type=int, help=f"requests (default: {REQUESTS}; quick: {QUICK_REQUESTS})")
    args: argparse.Namespace = options.parse_args()
    requests = args.requests or (QUICK_REQUESTS if args.quick else REQUESTS)
    if requests < 4 * IN_FLIGHT:
        raise InvalidRequest(f"--requests is {requests}; it must be ≥ {4 * IN_FLIGHT}")
    with Progress(transient=True, disable=args.json) as progress:
        result = asyncio.run(measure(requests, progress))
    result |= {
        "nodes": len(NODES),
        "in_flight": IN_FLIGHT * (len(NODES) - 1),
        "expert_latency_s": LATENCY_S,
        "seed": args.seed,
        "quick": args.quick,
        "facts": facts(),
    }
    show(result, args.json, table(result))


if __name__ == "__main__":
    run(main)
