"""Labels over HTTP: how far up a request may go, whoever passes it on."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from agora.errors import InvalidRequest
from agora.serve.node import Node
from agora.serve.node_card import Node as CardNode
from agora.serve.node_card import ToldCapabilities, ToldExpert
from agora.serve.offers import offers_of, standing
from agora.serve.wire import ChatRequest, checked
from agora.square import Expert
from agora.types import Tier
from experts.fake import FakeBackend
from experts.passage import HOPS, PATH, REACH, Passage, bounded, current_reach, new_node_id

EXPERTS = """
[nodes.phone]
kind = "fake"
reply = "from the phone"
tier = "end"

[nodes.big]
kind = "fake"
reply = "from the cloud"
tier = "cloud"

[experts.small]
node = "phone"
description = "little"

[experts.big]
node = "big"
description = "much"
keywords = ["secret", "weather"]

[graph]
router = "keywords"
"""

QUESTION = "What of the secret weather?"


def asked(node: Node, name: str) -> int:
    """How often an expert was asked."""
    expert = node.square.get(name)
    assert isinstance(expert, Expert) and isinstance(expert.backend, FakeBackend)
    return len(expert.backend.requests)


async def test_a_graph_keeps_to_the_label_of_the_request(start: Any) -> None:
    gateway = await start(experts=EXPERTS)
    status, said = await gateway.chat("agora", QUESTION)
    assert (status, said["choices"][0]["message"]["content"]) == (200, "from the cloud")
    for label in ("local", "end", "edge"):
        status, said = await gateway.chat("agora", QUESTION, reach=label)
        assert (status, said["choices"][0]["message"]["content"]) == (200, "from the phone")
    assert asked(gateway.node, "big") == 1


async def test_a_stream_keeps_to_it_too(start: Any) -> None:
    gateway = await start(experts=EXPERTS)
    body = {"model": "agora", "messages": [{"role": "user", "content": QUESTION}], "stream": True, "reach": "local"}
    async with gateway.http.post(f"{gateway.url}/v1/chat/completions", json=body) as reply:
        assert b"from the phone" in await reply.read()
    assert asked(gateway.node, "big") == 0


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
async def test_an_expert_out_of_reach_is_refused_before_it_is_asked(start: Any, path: str) -> None:
    gateway = await start(experts=EXPERTS)
    what: dict[str, Any] = {"prompt": QUESTION} if path == "completions" else {}
    body = {"messages": [{"role": "user", "content": QUESTION}]} if path != "completions" else what
    status, said = await gateway.post(f"/v1/{path}", {"model": "big", **body, "reach": "edge"})
    assert status == 400
    assert said["error"]["code"] == "out_of_reach"
    assert "tier cloud" in said["error"]["message"] and "no further than edge" in said["error"]["message"]
    assert asked(gateway.node, "big") == 0
    status, _ = await gateway.post(f"/v1/{path}", {"model": "small", **body, "reach": "local"})
    assert status == 200


@pytest.mark.parametrize("model", ["agora", "small"])
@pytest.mark.parametrize("label", ["mars", "Local", 3, ["local"], True])
async def test_an_unknown_label_is_refused_with_those_there_are(start: Any, model: str, label: object) -> None:
    gateway = await start(experts=EXPERTS)
    status, said = await gateway.chat(model, QUESTION, reach=label)
    assert status == 400
    assert said["error"]["param"] == "reach"
    assert "allowed: local, edge, cloud" in said["error"]["message"]


async def test_null_is_no_label(start: Any) -> None:
    gateway = await start(experts=EXPERTS)
    assert (await gateway.chat("big", QUESTION, reach=None))[0] == 200


async def test_when_only_those_out_of_reach_could_answer_it_says_so(start: Any) -> None:
    gateway = await start(experts=EXPERTS.replace('tier = "end"', 'tier = "edge"'))
    status, said = await gateway.chat("agora", QUESTION, reach="local")
    assert (status, said["error"]["code"]) == (400, "out_of_reach")


async def test_a_run_keeps_its_label_and_tells_it(start: Any) -> None:
    gateway = await start(experts=EXPERTS)
    status, run = await gateway.post("/v1/runs", {"question": QUESTION, "reach": "end", "id": "r1"})
    assert (status, run["reach"]) == (202, "local")
    while run["status"] == "running":
        await asyncio.sleep(0.01)
        _, run = await gateway.get("/v1/runs/r1")
    assert run["result"]["text"] == "from the phone"
    assert run["result"]["graph"]["subtasks"][0]["reach"] == "local"
    assert asked(gateway.node, "big") == 0
    status, _ = await gateway.post("/v1/runs", {"question": QUESTION, "reach": "local", "id": "r1"})
    assert status == 202, "the same run"
    status, said = await gateway.post("/v1/runs", {"question": QUESTION, "id": "r1"})
    assert status == 409 and "another question, graph or reach" in said["error"]["message"]
    status, said = await gateway.post("/v1/runs", {"question": QUESTION, "reach": "mars"})
    assert (status, said["error"]["param"]) == (400, "reach")


async def test_the_label_that_another_node_sent_counts(start: Any) -> None:
    gateway = await start(experts=EXPERTS)
    headers = {HOPS: "2", PATH: new_node_id(), REACH: "local"}
    body = {"messages": [{"role": "user", "content": QUESTION}]}
    status, said = await gateway.post("/v1/chat/completions", {"model": "big", **body}, **headers)
    assert (status, said["error"]["code"]) == (400, "out_of_reach")
    # The lower of the two holds.
    status, said = await gateway.post("/v1/chat/completions", {"model": "big", **body, "reach": "cloud"}, **headers)
    assert status == 400
    status, _ = await gateway.post("/v1/chat/completions", {"model": "small", **body}, **headers)
    assert status == 200
    status, said = await gateway.post("/v1/chat/completions", {"model": "small", **body}, **{**headers, REACH: "mars"})
    assert status == 400 and "header Agora-Reach is 'mars'" in said["error"]["message"]
    assert asked(gateway.node, "big") == 0


async def test_the_header_counts_whoever_sends_it(start: Any) -> None:
    gateway = await start(experts=EXPERTS)
    body = {"messages": [{"role": "user", "content": QUESTION}]}
    status, said = await gateway.post("/v1/chat/completions", {"model": "big", **body}, **{REACH: "local"})
    assert (status, said["error"]["code"]) == (400, "out_of_reach")
    status, said = await gateway.post("/v1/chat/completions", {"model": "agora", **body}, **{REACH: "edge"})
    assert (status, said["choices"][0]["message"]["content"]) == (200, "from the phone")
    status, run = await gateway.post("/v1/runs", {"question": QUESTION}, **{REACH: "local"})
    assert (status, run["reach"]) == (202, "local")
    for path, what in (("/v1/chat/completions", {"model": "small", **body}), ("/v1/runs", {"question": QUESTION})):
        status, said = await gateway.post(path, what, **{REACH: "mars"})
        assert status == 400 and "header Agora-Reach is 'mars'" in said["error"]["message"], path
    assert asked(gateway.node, "big") == 0


async def test_a_passage_carries_the_lowest_label_and_leaves_out_none_at_all() -> None:
    passage = Passage.begin(node=new_node_id(), max_hops=3)
    assert REACH not in passage.headers()
    with bounded(Tier.EDGE):
        assert passage.headers()[REACH] == "edge"
        with bounded(Tier.CLOUD):
            assert current_reach() is Tier.EDGE, "no block within another one widens it"
        read = Passage.read(passage.headers(), node=new_node_id(), max_hops=3)
        assert read is not None and read.reach is Tier.EDGE
        with bounded(Tier.END):
            assert read.headers()[REACH] == "local"
    assert read.headers()[REACH] == "edge"
    with pytest.raises(InvalidRequest, match="allowed: local, edge, cloud"):
        Passage.read({**passage.headers(), REACH: "far"}, node=new_node_id(), max_hops=3)


def test_the_schema_has_the_field() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "reach": "edge"}
    assert checked(ChatRequest, orjson.loads(orjson.dumps(body))).reach == "edge"


def told(name: str, tier: Tier, *path: str) -> ToldExpert:
    return ToldExpert(
        name=name,
        description="knows",
        tier=tier,
        price_per_mtok=0.0,
        max_tokens=10,
        capabilities=ToldCapabilities(),
        engine="e0",
        path=path,
        origin=path[-1],
        origin_name="n",
        name_there=name,
        hops=len(path) - 1,
    )


def test_an_expert_behind_a_relay_is_as_far_up_as_the_relay_as_far_as_that_is_known() -> None:
    relay, end, silent = new_node_id(), new_node_id(), new_node_id()
    card = [
        told("own", Tier.CLOUD, relay),
        told("gate", Tier.EDGE, relay),
        told("law", Tier.END, relay, end),
        told("tax", Tier.CLOUD, relay, end),
        told("far", Tier.END, relay, silent, end),
    ]
    offers, refused = offers_of("b", card, node=new_node_id(), max_hops=4, wanted=None)
    assert refused == ()
    assert {o.name: o.card.tier for o in offers} == {
        "b.own": Tier.CLOUD,
        "b.gate": Tier.EDGE,
        "b.law": Tier.EDGE,
        "b.tax": Tier.CLOUD,
        "b.far": Tier.EDGE,
    }
    through_silence = [told("law", Tier.END, silent, end)]
    offers, _ = offers_of("c", through_silence, node=new_node_id(), max_hops=4, wanted=None)
    assert [o.card.tier for o in offers] == [Tier.CLOUD], "a relay that tells nothing may be anywhere"


@pytest.mark.parametrize(
    ("configured", "told_tier", "own", "counts"),
    [
        (Tier.END, Tier.CLOUD, [Tier.CLOUD], Tier.END),
        (None, Tier.EDGE, [Tier.CLOUD], Tier.EDGE),
        (None, Tier.CLOUD, [Tier.END], Tier.CLOUD),
        (None, Tier.END, [], Tier.EDGE),
        (None, None, [Tier.CLOUD, Tier.EDGE], Tier.EDGE),
        (None, None, [Tier.END], Tier.EDGE),
        (None, None, [], Tier.CLOUD),
    ],
)
def test_where_a_neighbour_stands(
    configured: Tier | None, told_tier: Tier | None, own: list[Tier], counts: Tier
) -> None:
    here = CardNode(id=new_node_id(), name="n", tier=told_tier)
    card = [told(f"e{i}", tier, here.id) for i, tier in enumerate(own)]
    assert standing([*card, told("far", Tier.END, here.id, new_node_id())], here, configured=configured) is counts


@pytest.mark.parametrize(("stands", "counts"), [(None, Tier.EDGE), (Tier.END, Tier.END), (Tier.CLOUD, Tier.CLOUD)])
def test_what_is_the_end_tier_to_a_neighbour_is_another_machine_to_this_one(stands: Tier | None, counts: Tier) -> None:
    node = new_node_id()
    more: dict[str, Any] = {} if stands is None else {"tier": stands}
    offers, _ = offers_of("b", [told("law", Tier.END, node)], node=new_node_id(), max_hops=4, wanted=None, **more)
    assert [o.card.tier for o in offers] == [counts]
