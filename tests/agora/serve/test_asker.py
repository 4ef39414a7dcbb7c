"""What a request brings along for a graph: whose it is, and what a right answer is worth."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agora.serve.keys import new_key
from agora.serve.node import Node
from experts.fake import FakeBackend
from graphs.store import RunStore

EXPERTS = """
[nodes.phone]
kind = "fake"
reply = "from the phone"
tier = "end"
latency_s = 0.15

[experts.small]
node = "phone"
description = "little"

[graph]
name = "vertical"
planner = "none"
router = "keywords"

[vertical]
policy = "policy"
accept = 0.0
cache = true
"""

QUESTION = "What of the weather?"


def asked(node: Node) -> int:
    """How often the expert was asked."""
    (expert,) = node.square
    assert isinstance(expert.backend, FakeBackend)
    return len(expert.backend.requests)


def bearers(folder: Path, *names: str) -> list[dict[str, str]]:
    return [{"Authorization": f"Bearer {new_key(folder / 'keys.json', name)}"} for name in names]


async def chat(gateway: Any, bearer: dict[str, str], **more: Any) -> tuple[bool, Any]:
    """Whether the answer was another call's, and what was said."""
    body = {"model": "agora", "messages": [{"role": "user", "content": QUESTION}], **more}
    status, said = await gateway.post("/v1/chat/completions", body, **bearer)
    assert status == 200, said
    return said["usage"]["total_tokens"] == 0, said


async def test_an_answer_in_flight_or_kept_is_shared_within_one_key_only(start: Any, tmp_path: Path) -> None:
    ann, ben = bearers(tmp_path, "ann", "ben")
    gateway = await start('[server]\nkeys = "keys.json"', experts=EXPERTS)
    many = await asyncio.gather(*(chat(gateway, who) for who in (ann, ben, ann, ben)))
    assert asked(gateway.node) == 2 and sum(shared for shared, _ in many) == 2
    assert (await chat(gateway, ben))[0] and asked(gateway.node) == 2
    (cy,) = bearers(tmp_path, "anybody")
    async with asyncio.timeout(5):
        while (await gateway.get("/v1/models", **cy))[0] != 200:
            await asyncio.sleep(0.1)
    assert not (await chat(gateway, cy))[0] and asked(gateway.node) == 3


async def test_without_keys_everybody_is_one(start: Any) -> None:
    gateway = await start(experts=EXPERTS)
    many = await asyncio.gather(*(chat(gateway, {}) for _ in range(3)))
    assert asked(gateway.node) == 1 and sum(shared for shared, _ in many) == 2


async def test_a_run_is_its_keys_too(start: Any, tmp_path: Path) -> None:
    ann, ben = bearers(tmp_path, "ann", "ben")
    gateway = await start('[server]\nkeys = "keys.json"', experts=EXPERTS)
    await chat(gateway, ann)
    for n, (who, calls) in enumerate(((ann, 1), (ben, 2))):
        status, made = await gateway.post("/v1/runs", {"question": QUESTION, "id": f"r{n}"}, **who)
        assert status == 202, made
        async with asyncio.timeout(5):
            while (view := (await gateway.get(f"/v1/runs/r{n}", **who))[1])["status"] == "running":
                await asyncio.sleep(0.02)
        assert view["status"] == "done" and asked(gateway.node) == calls
        # Whose it is, is nobody else's business.
        assert "asker" not in view
    async with RunStore.open(tmp_path / "runs.sqlite") as store:
        assert [(await store.get(f"r{n}")).asker for n in range(2)] == ["ann", "ben"]


async def test_a_request_may_say_what_a_right_answer_is_worth(start: Any) -> None:
    gateway = await start(experts=EXPERTS)
    _, said = await chat(gateway, {}, trade_off=0.5)
    # Nothing is fitted here, and that is said.
    assert any("what a right answer is worth (0.5) changes nothing" in n for n in said["agora"]["notes"])
    status, view = await gateway.post("/v1/runs", {"question": QUESTION, "trade_off": 0.5})
    assert (status, view["trade_off"]) == (202, 0.5)
    async with asyncio.timeout(5):
        while (view := (await gateway.get(f"/v1/runs/{view['id']}"))[1])["status"] == "running":
            await asyncio.sleep(0.02)
    assert any("changes nothing" in n for n in view["result"]["notes"])


@pytest.mark.parametrize("worth", [0, -1, 1e10, "much", True])
async def test_what_is_no_worth_is_refused(start: Any, worth: Any) -> None:
    gateway = await start(experts=EXPERTS)
    for path, body in (
        ("/v1/chat/completions", {"model": "agora", "messages": [{"role": "user", "content": QUESTION}]}),
        ("/v1/runs", {"question": QUESTION}),
    ):
        status, said = await gateway.post(path, {**body, "trade_off": worth})
        assert (status, said["error"]["param"]) == (400, "trade_off")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_graph_that_weighs_nothing_refuses_it(start: Any, stream: bool) -> None:
    gateway = await start(experts=EXPERTS.replace('"vertical"', '"horizontal"'))
    status, said = await gateway.chat("agora", trade_off=1.0, stream=stream)
    assert (status, said["error"]["param"]) == (400, "trade_off")
    status, said = await gateway.post("/v1/runs", {"question": QUESTION, "trade_off": 1.0})
    assert (status, said["error"]["param"]) == (400, "trade_off")
