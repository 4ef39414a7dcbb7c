"""`/v1/runs` over HTTP, as a client sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient, TestServer

from agora.config import ServerConfig
from agora.errors import AgoraError
from agora.events import event_from_dict
from agora.serve.errors import error_response
from agora.serve.limits import Bodies
from agora.serve.node import NODE, Node
from agora.serve.runs import Runs
from agora.serve.runs_api import RUNS, routes
from agora.serve.runs_schema import EventList, RunList, RunView
from agora.square import Expert, Square
from agora.types import ExpertCard, RunResult
from experts.fake import FakeBackend, Reply
from graphs.horizontal import horizontal
from graphs.store import RunStore

Client = TestClient[web.Request, web.Application]


@web.middleware
async def told(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except AgoraError as e:
        return error_response(e)
    return response


@asynccontextmanager
async def served(path: Path, backend: FakeBackend, **more: Any) -> AsyncIterator[tuple[Client, Runs]]:
    async with RunStore.open(path) as store:
        expert = Expert(card=ExpertCard(name="one", description="does things"), backend=backend)
        graph = horizontal(Square([expert]), checkpointer=store.checkpointer)
        runs = Runs(store, {"horizontal": graph, "agora": graph}, default_graph="horizontal", **more)
        await runs.start()
        app = web.Application(middlewares=[told])
        app[RUNS] = runs
        config = SimpleNamespace(server=ServerConfig(max_body_bytes=200_000))
        app[NODE] = cast(Node, SimpleNamespace(config=config, bodies=Bodies()))
        app.add_routes(routes())
        async with TestClient(TestServer(app, host="127.0.0.1"), timeout=None) as client:
            try:
                yield client, runs
            finally:
                await runs.aclose()


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend("done", latency=0.005)


@pytest.fixture
async def client(tmp_path: Path, backend: FakeBackend) -> AsyncIterator[Client]:
    async with served(tmp_path / "runs.sqlite", backend) as (opened, _):
        yield opened


async def error_of(reply: ClientResponse, status: int) -> dict[str, Any]:
    body = await reply.json()
    assert reply.status == status, body
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


async def begun(client: Client, **more: Any) -> dict[str, Any]:
    reply = await client.post("/v1/runs", json={"question": "What is a bond?", **more})
    assert reply.status == 202, await reply.text()
    run = await reply.json()
    assert reply.headers["Location"] == f"/v1/runs/{run['id']}"
    RunView.model_validate_json(await reply.read())
    return dict(run)


async def ended(client: Client, run_id: str) -> list[tuple[int, str, dict[str, Any]]]:
    """Every event of a run, by its stream."""
    async with client.get(f"/v1/runs/{run_id}/events") as reply:
        assert reply.status == 200
        return parsed(await reply.text())


def parsed(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            events.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return events


async def test_a_run_from_its_question_to_its_answer(client: Client) -> None:
    run = await begun(client, metadata={"who": "me"}, budget={"deadline_s": 30, "tokens": 5000}, id="mine")
    assert (run["id"], run["object"], run["status"], run["graph"]) == ("mine", "run", "running", "horizontal")
    assert run["budget"] == {"deadline_s": 30, "cost": None, "tokens": 5000}
    events = await ended(client, "mine")
    assert [n for n, _, _ in events] == list(range(1, len(events) + 1))
    assert [name for _, name, _ in events] == ["RunStarted", "Planned", "AttemptStarted", "AttemptEnded", "RunFinished"]
    assert all(type(event_from_dict(data)).__name__ == name for _, name, data in events)
    reply = await client.get("/v1/runs/mine")
    run = RunView.model_validate_json(await reply.read()).model_dump()
    assert (run["status"], run["metadata"], run["error"], run["queued"]) == ("done", {"who": "me"}, None, False)
    assert RunResult.from_dict(run["result"]).text == "done"
    assert run["finished_at"] > run["created_at"]


async def test_input_is_another_word_for_question_and_a_graph_may_have_two_names(client: Client) -> None:
    reply = await client.post("/v1/runs", json={"input": "What is a bond?", "graph": "agora"})
    assert reply.status == 202
    run = await reply.json()
    assert (run["question"], run["graph"]) == ("What is a bond?", "horizontal")


async def test_the_same_id_is_the_same_run_and_another_question_is_a_conflict(
    client: Client, backend: FakeBackend
) -> None:
    first = await begun(client, id="mine")
    await ended(client, "mine")
    again = await begun(client, id="mine")
    assert (again["status"], again["created_at"]) == ("done", first["created_at"])
    assert len(backend.requests) == 1
    error = await error_of(await client.post("/v1/runs", json={"question": "Why?", "id": "mine"}), 409)
    assert (error["param"], error["code"]) == ("id", "id_taken")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"question": "a", "input": "b"}, None),
        ({"question": ""}, "question"),
        ({"question": "  "}, "question"),
        ({"input": "a\0b"}, "input"),
        ({"question": 7}, "question"),
        ({"question": "x" * 100_001}, "question"),
        ({"question": "a", "id": "../etc"}, "id"),
        ({"question": "a", "id": "x" * 129}, "id"),
        ({"question": "a", "graph": "vertical"}, "graph"),
        ({"question": "a", "graph": 1}, "graph"),
        ({"question": "a", "budget": {"tokens": 0}}, "budget.tokens"),
        ({"question": "a", "budget": {"tokens": "many"}}, "budget.tokens"),
        ({"question": "a", "budget": {"time": 1}}, "budget.time"),
        ({"question": "a", "metadata": {"a": 1}}, "metadata.a"),
        ({"question": "a", "metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"question": "a", "metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"question": "a", "metdata": {}}, "metdata"),
    ],
)
async def test_a_body_that_is_wrong_is_told_by_its_field(client: Client, body: Any, param: str | None) -> None:
    error = await error_of(await client.post("/v1/runs", json=body), 400)
    assert error["param"] == param
    assert (await (await client.get("/v1/runs")).json())["data"] == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"question": NaN}', b'{"question": "\\ud800"}'])
async def test_a_body_that_is_no_object_is_one_clear_error(client: Client, body: bytes) -> None:
    reply = await client.post("/v1/runs", data=body, headers={"Content-Type": "application/json"})
    assert (await error_of(reply, 400))["type"] == "invalid_request_error"


async def test_runs_are_listed_page_by_page(client: Client) -> None:
    ids = [(await begun(client))["id"] for _ in range(5)]
    for i in ids:
        await ended(client, i)
    stopped = await begun(client)
    await client.post(f"/v1/runs/{stopped['id']}/cancel")
    paged: list[str] = []
    more = True
    while more:
        query = {"limit": "2", "status": "done", **({"before": paged[-1]} if paged else {})}
        reply = await client.get("/v1/runs", params=query)
        page = RunList.model_validate_json(await reply.read())
        assert all(r.result is None for r in page.data)
        paged += [r.id for r in page.data]
        more = page.has_more
    assert paged == ids[::-1]
    everything = await (await client.get("/v1/runs")).json()
    assert [r["id"] for r in everything["data"]] == [stopped["id"], *paged]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=ten", "limit"),
        ("limit=1&limit=2", "limit"),
        ("status=sleeping", "status"),
        ("before=a%20b", "before"),
        ("after=r1", "after"),
    ],
)
async def test_a_query_that_is_wrong_is_told_by_its_name(client: Client, query: str, param: str) -> None:
    assert (await error_of(await client.get(f"/v1/runs?{query}"), 400))["param"] == param


async def test_a_page_after_a_run_that_is_not_there_is_not_found(client: Client) -> None:
    error = await error_of(await client.get("/v1/runs?before=nobody"), 404)
    assert (error["param"], error["code"]) == ("before", "run_not_found")


@pytest.mark.parametrize(
    ("method", "what"), [("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("POST", "/resume")]
)
async def test_a_run_that_is_not_there_or_cannot_be(client: Client, method: str, what: str) -> None:
    error = await error_of(await client.request(method, f"/v1/runs/nobody{what}"), 404)
    assert (error["code"], error["type"]) == ("run_not_found", "not_found_error")
    assert (await error_of(await client.request(method, f"/v1/runs/a%20b{what}"), 400))["param"] == "id"


async def test_a_cancelled_run_frees_its_expert(tmp_path: Path) -> None:
    backend = FakeBackend("late", latency=60)
    async with served(tmp_path / "runs.sqlite", backend) as (client, _):
        run = await begun(client)
        watching = asyncio.create_task(ended(client, run["id"]))
        async with asyncio.timeout(10):
            while backend.load.running != 1:
                await asyncio.sleep(0.002)
        reply = await client.post(f"/v1/runs/{run['id']}/cancel")
        assert (reply.status, (await reply.json())["status"]) == (200, "cancelled")
        assert backend.load.total == 0
        events = await watching
        assert (events[-1][1], events[-1][2]["code"]) == ("RunFailed", "cancelled")
        again = await client.post(f"/v1/runs/{run['id']}/cancel")
        assert (again.status, (await again.json())["status"]) == (200, "cancelled")
        await error_of(await client.post(f"/v1/runs/{run['id']}/resume"), 409)


async def test_a_run_over_the_limit_is_told_to_come_later(tmp_path: Path) -> None:
    backend = FakeBackend("late", latency=60)
    async with served(tmp_path / "runs.sqlite", backend, max_runs=1, max_waiting=1) as (client, _):
        first, second = await begun(client), await begun(client)
        assert (await (await client.get(f"/v1/runs/{second['id']}")).json())["queued"]
        assert not (await (await client.get(f"/v1/runs/{first['id']}")).json())["queued"]
        reply = await client.post("/v1/runs", json={"question": "a"})
        assert (await error_of(reply, 429))["type"] == "rate_limit_error"
        assert int(reply.headers["Retry-After"]) >= 1


async def test_a_stream_goes_on_where_it_was_cut_off_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    backend = FakeBackend(lambda r: Reply("done", latency=0.0 if len(backend.requests) == 1 else 60))
    seen: list[tuple[int, str, dict[str, Any]]] = []
    async with served(path, backend) as (client, runs):
        run = await begun(client, question="What is a bond? Explain photosynthesis to a school class.")
        async with client.get(f"/v1/runs/{run['id']}/events") as reply:
            assert await reply.content.readline() == b"retry: 2000\n"
            text = ""
            while "AttemptEnded" not in text or not text.endswith("\n\n"):
                text += (await reply.content.readline()).decode()
            seen += parsed(text)
        await runs.aclose()
    backend = FakeBackend("done")
    async with served(path, backend) as (client, _):
        events = f"/v1/runs/{run['id']}/events"
        # A browser asks under the URL that it had, and says what it has seen.
        async with client.get(f"{events}?after=0", headers={"Last-Event-ID": str(seen[-1][0])}) as reply:
            seen += parsed(await reply.text())
        assert seen == await ended(client, run["id"])
        assert [n for n, _, _ in seen] == list(range(1, len(seen) + 1))
        assert seen[-1][1] == "RunFinished"
        assert len(backend.requests) == 1
        # Nothing more will come: the browser is told not to ask again.
        assert (await client.get(events, headers={"Last-Event-ID": str(seen[-1][0])})).status == 204
        assert len(parsed(await (await client.get(f"{events}?after={seen[-2][0]}")).text())) == 1


async def test_events_so_far_are_listed_as_json(client: Client) -> None:
    run = await begun(client)
    streamed = await ended(client, run["id"])
    asked = {"Accept": "application/json"}
    reply = await client.get(f"/v1/runs/{run['id']}/events", headers=asked)
    assert reply.content_type == "application/json"
    listed = EventList.model_validate_json(await reply.read())
    assert [(e.seq, e.type, e.data) for e in listed.data] == streamed
    assert not listed.has_more
    reply = await client.get(f"/v1/runs/{run['id']}/events?after=1&limit=2", headers=asked)
    listed = EventList.model_validate_json(await reply.read())
    assert [e.seq for e in listed.data] == [2, 3]
    assert listed.has_more


@pytest.mark.parametrize("given", ["abc", "-1", "1.5", "9" * 19, "٣"])
async def test_a_wrong_last_event_id_is_refused(client: Client, given: str) -> None:
    run = await begun(client)
    error = await error_of(await client.get(f"/v1/runs/{run['id']}/events", headers={"Last-Event-ID": given}), 400)
    assert error["param"] == "Last-Event-ID"
    assert (await error_of(await client.get(f"/v1/runs/{run['id']}/events", params={"after": given}), 400))[
        "param"
    ] == "after"


async def test_a_client_that_leaves_a_stream_does_not_stop_the_run(tmp_path: Path) -> None:
    backend = FakeBackend("done", latency=0.2)
    async with served(tmp_path / "runs.sqlite", backend) as (client, _):
        run = await begun(client)
        for _ in range(10):
            reply = await client.get(f"/v1/runs/{run['id']}/events")
            reply.close()
        assert (await ended(client, run["id"]))[-1][1] == "RunFinished"


async def test_an_interrupted_run_is_gone_on_with_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    async with RunStore.open(path) as store:
        await store.create("by-hand", "What is a bond?", graph="horizontal", config_path=None)
        await store.interrupt("by-hand")
    async with served(path, FakeBackend("done")) as (client, _):
        # Nothing is told, and the stream ends: a browser comes again until somebody goes on with it.
        assert await ended(client, "by-hand") == []
        reply = await client.post("/v1/runs/by-hand/resume")
        assert (reply.status, reply.headers["Location"]) == (202, "/v1/runs/by-hand")
        assert (await reply.json())["status"] == "running"
        assert (await ended(client, "by-hand"))[-1][1] == "RunFinished"
        await error_of(await client.post("/v1/runs/by-hand/resume"), 409)
