"""Squares of several nodes over real connections: small gateways in one process, then whole ones in three."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from agora.config import NeighbourConfig
from agora.errors import AgoraError, Unavailable
from agora.protocols import Capabilities
from agora.routing import KeywordRouter
from agora.serve import card
from agora.serve.errors import ApiError, error_response
from agora.serve.neighbours import Neighbours
from agora.square import Expert, Square
from agora.types import Answer, ExpertCard, Subtask, TaskGraph
from benchmarks.gateway_parts.fleet import Fleet
from benchmarks.square import NODES, questions
from benchmarks.square import Square as Processes
from experts.fake import FakeBackend
from experts.neighbour import NeighbourBackend
from experts.passage import Passage, new_node_id, passing
from graphs.horizontal import horizontal
from graphs.plan import StaticPlanner
from graphs.run import run as run_graph

REFRESH_S = 0.05


@dataclass
class SmallNode:
    """A gateway with nothing but named experts, and its neighbours."""

    name: str
    port: int
    backend: FakeBackend
    square: Square
    neighbours: Neighbours
    id: str
    max_hops: int
    seen: list[Passage | None] = field(default_factory=list)
    forgets: bool = False
    server: TestServer | None = None

    async def up(self) -> None:
        app = web.Application()
        app[card.NEIGHBOURS] = self.neighbours
        app.add_routes([*card.routes(), web.post("/v1/chat/completions", self._chat)])
        self.server = TestServer(app, host="127.0.0.1", port=self.port, handler_cancellation=True)
        await self.server.start_server(shutdown_timeout=0)

    async def _chat(self, request: web.Request) -> web.Response:
        try:
            passage = Passage.read(request.headers, node=self.id, max_hops=self.max_hops)
            self.seen.append(passage)
            body = await request.json()
            expert = self.square.get(body["model"])
            if expert is None or self.forgets:
                raise ApiError(404, f"model {body['model']!r} is not served here", code="model_not_found")
            with passing(passage or Passage.begin(node=self.id, max_hops=self.max_hops)):
                answer = await expert.ask(body["messages"][-1]["content"])
        except AgoraError as e:
            return error_response(e)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": f"{self.name}: {answer.text}"},
            "finish_reason": answer.finish_reason,
        }
        return web.json_response({"id": "1", "model": body["model"], "choices": [choice]})

    async def down(self) -> None:
        """Ends as a process that is killed does: its connections break."""
        if self.server is not None:
            runner = self.server.runner
            assert runner is not None
            assert runner.server is not None
            for connection in list(runner.server.connections):  # type: ignore[attr-defined]
                if connection.transport is not None:
                    connection.transport.abort()
            await self.server.close()
            self.server = None


@asynccontextmanager
async def square_of(
    links: Mapping[str, tuple[str, ...]],
    *,
    max_hops: int = 3,
    latency: float = 0.0,
    experts: tuple[str, ...] = ("law",),
) -> AsyncIterator[dict[str, SmallNode]]:
    """Nodes by name, each with the experts `experts`, and the neighbours that `links` says."""
    ports = {name: unused_port() for name in links}
    nodes: dict[str, SmallNode] = {}
    async with AsyncExitStack() as stack:
        for name, others in links.items():
            backend = FakeBackend("said", name=name, latency=latency, capabilities=Capabilities())
            cards = [ExpertCard(name=e, description=f"Knows {e}.", keywords=(e,)) for e in experts]
            square = Square([Expert(card=c, backend=backend) for c in cards])
            node_id = new_node_id()
            configs = {o: NeighbourConfig(url=f"http://127.0.0.1:{ports[o]}", refresh_s=REFRESH_S) for o in others}
            neighbours = Neighbours(square, configs, node_id=node_id, node_name=name, max_hops=max_hops)
            node = SmallNode(name, ports[name], backend, square, neighbours, node_id, max_hops)
            stack.push_async_callback(square.aclose)
            stack.push_async_callback(neighbours.aclose)
            nodes[name] = node
        for node in nodes.values():
            await node.up()
            stack.push_async_callback(node.down)
        for node in nodes.values():
            await node.neighbours.start()
        yield nodes


async def until(holds: Any, *, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


def names(node: SmallNode) -> set[str]:
    return {e.name for e in node.square}


def expert(node: SmallNode, name: str) -> Expert:
    found = node.square.get(name)
    assert found is not None
    return found


async def test_nodes_find_each_other_and_answer_for_each_other() -> None:
    async with square_of({"a": ("b",), "b": ("a",)}) as nodes:
        a, b = nodes["a"], nodes["b"]
        await until(lambda: names(a) == {"law", "b.law"} and names(b) == {"law", "a.law"})
        answer = await expert(a, "b.law").ask("may I?")
        assert answer.text == "b: said"
        (passage,) = b.seen
        assert passage is not None
        assert passage.path == (a.id, b.id)
        assert passage.hops == 2


async def test_a_chain_is_passed_to_its_end_and_no_further_than_the_limit() -> None:
    async with square_of({"a": ("b",), "b": ("c",), "c": ("d",), "d": ()}, max_hops=2) as nodes:
        a = nodes["a"]
        await until(lambda: names(a) == {"law", "b.law", "b.c.law"} and "c.d.law" in names(nodes["b"]))
        assert (await expert(a, "b.c.law").ask("may I?")).text == "b: c: said"
        passage = nodes["c"].seen[-1]
        assert passage is not None
        assert passage.path == (a.id, nodes["b"].id, nodes["c"].id)
        assert passage.hops == 0
        await asyncio.sleep(5 * REFRESH_S)
        assert names(a) == {"law", "b.law", "b.c.law"}


async def test_a_ring_of_nodes_comes_to_rest() -> None:
    ring = {"a": ("b",), "b": ("c",), "c": ("a",)}
    async with square_of(ring, max_hops=8) as nodes:
        await until(lambda: all(len(n.square) == 3 for n in nodes.values()))
        await asyncio.sleep(5 * REFRESH_S)
        versions = [n.square.version for n in nodes.values()]
        await asyncio.sleep(10 * REFRESH_S)
        assert [n.square.version for n in nodes.values()] == versions
        assert names(nodes["a"]) == {"law", "b.law", "b.c.law"}


async def test_when_the_end_of_a_chain_dies_nobody_counts_up() -> None:
    async with square_of({"a": ("b",), "b": ("a", "c"), "c": ("b",)}, max_hops=8) as nodes:
        await until(lambda: "b.c.law" in names(nodes["a"]))
        await nodes["c"].down()
        await until(lambda: names(nodes["a"]) == {"law", "b.law"} and names(nodes["b"]) == {"law", "a.law"})


async def test_a_request_that_is_sent_in_a_circle_is_refused_where_it_began() -> None:
    async with square_of({"a": ("b",), "b": ("a",)}) as nodes:
        a, b = nodes["a"], nodes["b"]
        await until(lambda: "b.law" in names(a) and "a.law" in names(b))
        # Such an expert is never told of; a neighbour that makes one up gets us to send the request to it.
        lying = expert(a, "b.law").backend
        assert isinstance(lying, NeighbourBackend)
        forged = NeighbourBackend(f"http://127.0.0.1:{b.port}", "a.law", name="forged", line=lying._line, way=(b.id,))
        try:
            with pytest.raises(AgoraError, match=r"it has passed|come back"):
                await Expert(card=ExpertCard(name="x", description="x"), backend=forged).ask("may I?")
        finally:
            await forged.aclose()
        assert len(b.seen) == 1
        assert a.seen == []


async def test_an_expert_that_is_only_on_the_card_is_dropped_when_asked() -> None:
    async with square_of({"a": ("b",), "b": ()}, experts=("law", "tax")) as nodes:
        a, b = nodes["a"], nodes["b"]
        await until(lambda: "b.law" in names(a))
        b.forgets = True
        with pytest.raises(Unavailable):
            await expert(a, "b.law").ask("may I?")
        assert names(a) == {"law", "tax", "b.tax"}


async def test_who_is_started_again_is_found_again() -> None:
    async with square_of({"a": ("b",), "b": ()}) as nodes:
        a, b = nodes["a"], nodes["b"]
        await until(lambda: "b.law" in names(a))
        await b.down()
        await until(lambda: names(a) == {"law"})
        (state,) = a.neighbours.state()
        assert not state.up
        await b.up()
        await until(lambda: "b.law" in names(a))
        assert (await expert(a, "b.law").ask("may I?")).text == "b: said"


async def test_the_routes_tell_the_card_and_the_neighbours() -> None:
    async with square_of({"a": ("b",), "b": ()}) as nodes:
        a = nodes["a"]
        await until(lambda: "b.law" in names(a))
        assert a.server is not None
        session = a.server.make_url
        async with aiohttp.ClientSession() as http:
            async with http.get(session(card.CARD_PATH)) as reply:
                assert reply.headers["Cache-Control"] == "no-store"
                told = orjson.loads(await reply.read())
            assert [e["name"] for e in told["experts"]] == ["law", "b.law"]
            assert told["experts"][1]["origin"] == nodes["b"].id
            async with http.get(session(card.CARD_PATH), params={"known": told["revision"]}) as reply:
                assert orjson.loads(await reply.read())["experts"] is None
            async with http.get(session(card.NEIGHBOURS_PATH)) as reply:
                (state,) = orjson.loads(await reply.read())["data"]
        assert state["up"]
        assert state["experts"] == ["b.law"]
        assert state["rtt_s"] > 0


async def test_a_run_goes_on_when_the_node_dies_that_holds_its_subtasks() -> None:
    """Three nodes with equal experts; the runs are on the first, the third one dies under its work."""
    every = ("a", "b", "c")
    links = {n: tuple(o for o in every if o != n) for n in every}
    async with square_of(links, latency=0.3, experts=("law", "tax", "art")) as nodes:
        a, c = nodes["a"], nodes["c"]
        await until(lambda: len(a.square) == 9)
        plan = TaskGraph(tuple(Subtask(id=f"t{n}", question=f"what of {e}?") for n, e in enumerate(("law", "tax"))))
        graph = horizontal(a.square, planner=StaticPlanner(plan), router=KeywordRouter())
        passage = Passage.begin(node=a.id, max_hops=3, request_id="req-1", timeout_s=30)
        with passing(passage):
            runs = [asyncio.create_task(run_graph(graph, "law and tax")) for _ in range(30)]
        await until(lambda: c.backend.load.total >= 10)
        held = c.backend.load.total
        await c.down()
        results = await asyncio.gather(*runs)
        assert all(r.complete for r in results)
        attempts = [many for r in results for many in r.attempts.values()]
        again = [many for many in attempts if len(many) > 1]
        assert len(again) >= held
        for many in again:
            assert isinstance(many[-1].outcome, Answer)
            # The second one asked is on another machine, and an expert of the same field.
            assert not many[1].expert.startswith("c.")  # type: ignore[union-attr]
            assert many[1].expert.rpartition(".")[2] == many[0].expert.rpartition(".")[2]  # type: ignore[union-attr]
            assert len(many) == 2
        # Near ties were decided by load: everybody had a like share of the work.
        first = [many[0].expert.rpartition(".")[0] or "a" for many in attempts]  # type: ignore[union-attr]
        assert min(first.count(n) for n in every) >= 60 / 3 / 2
        assert all(p is not None and p.path[0] == a.id and p.request_id == "req-1" for p in nodes["b"].seen)
        await until(lambda: names(a) == {f"{p}{e}" for p in ("", "b.") for e in ("law", "tax", "art")})


# --- three whole nodes, each a process of its own


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    folder = tmp_path_factory.mktemp("square")
    with Fleet(folder) as fleet:
        yield Processes(fleet, folder)


async def post(
    processes: Processes, node: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    url = f"{processes.url(node)}/v1/chat/completions"
    async with aiohttp.ClientSession() as http, http.post(url, json=body, headers=headers or {}) as reply:
        return reply.status, await reply.read()


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "What is a bond?"}], **more}


async def test_any_node_can_be_asked_for_any_expert(processes: Processes) -> None:
    async with processes.up():
        for node, other in (("a", "b"), ("b", "c"), ("c", "a")):
            done = await processes.ask(node, questions()[1])
            assert done.failure == ""
            assert len(done.experts) == 2
            status, data = await post(processes, node, chat(f"{other}.finance"))
            said = orjson.loads(data)
            assert status == 200, said
            assert said["choices"][0]["message"]["content"] == "What is a bond?"
            status, data = await post(processes, node, chat(f"{other}.finance", stream=True))
            pieces = [line[6:] for line in data.decode().split("\n") if line.startswith("data: ")]
            assert pieces[-1] == "[DONE]"
            text = "".join(
                c["delta"].get("content") or "" for p in pieces[:-1] for c in orjson.loads(p).get("choices", ())
            )
            assert text == "What is a bond?"


async def test_loops_and_forged_passages_are_refused(processes: Processes) -> None:
    async with processes.up():
        own = (await processes.get("a", card.CARD_PATH))["node"]["id"]
        for headers, model, status, code in (
            ({"Agora-Hops": "1", "Agora-Path": own}, "finance", 508, "loop_detected"),
            ({"Agora-Hops": "0", "Agora-Path": new_node_id()}, "b.finance", 508, "too_many_hops"),
            ({"Agora-Hops": "many", "Agora-Path": new_node_id()}, "finance", 400, "invalid_request"),
            ({"Agora-Hops": "1"}, "finance", 400, "invalid_request"),
            ({"Agora-Hops": "0", "Agora-Path": new_node_id(), "Agora-Timeout": "0.05"}, "finance", 504, "timeout"),
        ):
            found, data = await post(processes, "a", chat(model), headers)
            assert (found, orjson.loads(data)["error"]["code"]) == (status, code)
        assert (await post(processes, "a", chat("finance")))[0] == 200


async def test_a_killed_node_costs_no_answer_and_is_used_again(processes: Processes) -> None:
    async with processes.up():
        asked = itertools.cycle(questions())
        tasks = [asyncio.create_task(processes.ask(n, next(asked))) for _ in range(20) for n in ("a", "b")]
        async with asyncio.timeout(30):
            while await processes.held("c") < 5:
                await asyncio.sleep(0.01)
        processes.kill("c")
        done = await asyncio.gather(*tasks)
        assert [d.failure for d in done if d.failure] == []
        again = [many for d in done for many in d.experts if len(many) > 1]
        assert len(again) >= 5
        assert all(not many[-1].startswith("c.") for many in again)
        for node in ("a", "b"):
            assert not await processes.knows(node, "c")
            assert (await processes.ask(node, questions()[0])).failure == ""
        processes.start("c")
        await processes.until_known(("c",))
        done = await asyncio.gather(*(processes.ask("a", next(asked)) for _ in range(20)))
        assert [d.failure for d in done if d.failure] == []
        assert sum(d.used("c") for d in done) > 0


@pytest.mark.slow
async def test_a_node_that_hangs_costs_time_and_no_answer(processes: Processes) -> None:
    async with processes.up():
        asked = itertools.cycle(questions())
        tasks = [asyncio.create_task(processes.ask(n, next(asked))) for _ in range(10) for n in ("a", "b")]
        async with asyncio.timeout(30):
            while await processes.held("c") < 3:
                await asyncio.sleep(0.01)
        processes.signal("c", signal.SIGSTOP)
        try:
            done = await asyncio.gather(*tasks)
        finally:
            processes.signal("c", signal.SIGCONT)
        assert [d.failure for d in done if d.failure] == []
        assert max(d.seconds for d in done) < 30
        await processes.until_known(("c",))


@pytest.mark.slow
async def test_nodes_full_of_graphs_do_not_wait_for_each_other_for_ever(tmp_path: Path) -> None:
    """Every run holds a place here while its subtasks need places elsewhere, where other runs hold them."""
    with Fleet(tmp_path) as fleet:
        processes = Processes(fleet, tmp_path, limits=("max_running = 8", "request_timeout_s = 20"))
        async with processes.up():
            asked = itertools.cycle(questions())
            done = await asyncio.gather(*(processes.ask(n, next(asked)) for _ in range(40) for n in NODES))
    assert [d.failure for d in done if d.failure] == []
