"""From `also` and `[links]` to backends over several paths."""

from __future__ import annotations

import asyncio
import json
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port
from hypothesis import given
from hypothesis import strategies as st

from agora.config import Config, parse_config
from agora.errors import ConfigError, LoopDetected, Unavailable
from agora.network.multipath import MultipathBackend
from agora.protocols import GenerateRequest, Message
from agora.routing.takers import beyond
from agora.serve.node import open_node
from agora.serve.server import listening
from agora.square import Square
from agora.types import Tier
from experts.build import expert_cards, follow_tiers, highest_tier, missing_keys, open_square
from experts.fake import FakeBackend
from experts.openai import OpenAIBackend
from experts.passage import Passage, new_node_id, passing
from experts.paths import routes_of, topology_of
from experts.slots import Slots


def config(text: str) -> Config:
    return parse_config(textwrap.dedent(text), file=Path("/somewhere/agora.toml"))


def ask(text: str = "one two three four", **options: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message(role="user", content=text),), **options)


@asynccontextmanager
async def square_of(text: str) -> AsyncIterator[Square]:
    square = await open_square(config(text))
    try:
        yield square
    finally:
        await square.aclose()


TWO_NODES = """
[nodes.edge]
kind = "fake"
reply = "from the edge"
[nodes.cloud]
kind = "fake"
reply = "from the cloud"
[experts.law]
node = "edge"
also = ["cloud"]
description = "law"
[experts.plain]
node = "edge"
description = "plain"
"""


class Server:
    """An OpenAI-compatible server that says from which address it was asked."""

    def __init__(self) -> None:
        self.peers: list[str] = []
        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", self._chat)])
        self.server = TestServer(app, host="127.0.0.1")

    async def _chat(self, request: web.Request) -> web.Response:
        assert request.remote is not None
        self.peers.append(request.remote)
        choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
        return web.json_response({"id": "1", "model": "m", "choices": [choice]})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.server.start_server()
    yield server
    await server.server.close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server.port}/v1"


# -- Which backends there are


async def test_an_expert_without_links_and_also_keeps_its_plain_backend() -> None:
    async with square_of(TWO_NODES) as square:
        plain, law = square.get("plain"), square.get("law")
        assert plain is not None
        assert law is not None
        assert isinstance(plain.backend, FakeBackend)
        assert isinstance(law.backend, MultipathBackend)
        assert [w.name for w in law.backend.ways] == ["edge", "cloud"]
        assert law.backend.ways[0].backend is plain.backend, "what several share is opened once"


async def test_when_a_node_fails_the_other_one_answers_and_the_answer_says_so() -> None:
    text = TWO_NODES.replace('reply = "from the edge"', 'fail = "unavailable"')
    async with square_of(text) as square:
        law = square.get("law")
        assert law is not None
        for _ in range(8):
            answer = await law.ask("who?")
            assert (answer.text, answer.path) == ("from the cloud", "cloud")
        assert any("edge" in note for note in answer.notes)
        # Eight questions cost the broken node three tries and no more: its breaker is open.
        edge = law.backend.ways[0].backend  # type: ignore[attr-defined]
        assert len(edge.requests) <= 3


async def test_links_to_one_server_are_paths_of_their_own_with_their_own_addresses(server: Server) -> None:
    text = f"""
    [nodes.cloud]
    kind = "openai"
    url = "http://127.0.0.1:{unused_port()}/v1"
    model = "m"
    max_running = 3
    [experts.law]
    node = "cloud"
    description = "law"
    [links.wifi]
    target = "cloud"
    technology = "wifi"
    local_address = "127.0.0.2"
    url = "{url(server)}"
    [links.mobile]
    target = "cloud"
    technology = "5g"
    local_address = "127.0.0.3"
    url = "{url(server)}"
    """
    async with square_of(text) as square:
        backend = square.experts[0].backend
        assert isinstance(backend, MultipathBackend)
        assert sorted(w.name for w in backend.ways) == ["5g", "wifi"]
        for way in backend.ways:
            await way.backend.generate(ask())
        assert sorted(server.peers) == ["127.0.0.2", "127.0.0.3"]
        slots = {id(w.backend._slots) for w in backend.ways if isinstance(w.backend, OpenAIBackend)}
        assert len(slots) == 1, "max_running is of the node, however many links lead there"


async def test_a_node_with_links_is_only_reached_by_them(server: Server) -> None:
    text = f"""
    [nodes.cloud]
    kind = "openai"
    url = "{url(server)}"
    model = "m"
    [experts.law]
    node = "cloud"
    description = "law"
    [links.wifi]
    target = "cloud"
    technology = "wifi"
    local_address = "127.0.0.2"
    """
    async with square_of(text) as square:
        answer = await square.experts[0].ask("one?")
        assert (answer.text, answer.path) == ("yes", "wifi")
        assert server.peers == ["127.0.0.2"]


# -- Bad luck, over real sockets


async def hangs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(10)
    await asyncio.sleep(60)


async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(10)
    writer.write(b"\x00\xff not http at all \r\n\r\n" * 20)
    await writer.drain()
    writer.close()


async def trickles(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(10)
    for byte in b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + b": wait\n\n" * 1000:
        writer.write(bytes([byte]))
        await asyncio.sleep(0.01)


async def cuts(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(10)
    delta = {"id": "1", "choices": [{"index": 0, "delta": {"content": "ye"}, "finish_reason": None}]}
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9999\r\n\r\n"
    writer.write(head + b"data: " + json.dumps(delta).encode() + b"\n\n")
    await writer.drain()
    writer.close()


@asynccontextmanager
async def serving(behaves: Any) -> AsyncIterator[int]:
    """A server on loopback that behaves so; gives its port."""
    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        try:
            await behaves(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for task in handlers:
        task.cancel()
    await asyncio.gather(*handlers, return_exceptions=True)
    await asyncio.sleep(0.01)


@pytest.mark.parametrize("behaves", [hangs, garbage, trickles, cuts])
async def test_a_server_that_misbehaves_costs_time_and_no_answer(behaves: Any, server: Server) -> None:
    async with serving(behaves) as port:
        await misbehaved(port, server)


async def misbehaved(port: int, server: Server) -> None:
    text = f"""
    [nodes.bad]
    kind = "openai"
    url = "http://127.0.0.1:{port}/v1"
    model = "m"
    [nodes.good]
    kind = "openai"
    url = "{url(server)}"
    model = "m"
    [experts.law]
    node = "bad"
    also = ["good"]
    description = "law"
    """
    loop = asyncio.get_running_loop()
    async with square_of(text) as square:
        for _ in range(6):
            began = loop.time()
            answer = await square.experts[0].ask("yes?", timeout_s=0.5)
            assert (answer.text, answer.path) == ("yes", "good")
            assert loop.time() - began < 0.5
        backend = square.experts[0].backend
        chunks = [c.text async for c in backend.stream(ask(timeout_s=0.5))]
        assert "".join(chunks) == "yes"


# -- Which ways there are


def test_relays_are_ways_and_only_the_shortest_behind_one_link_counts() -> None:
    ways = """
    [nodes.cloud]
    kind = "openai"
    url = "http://127.0.0.1:9/v1"
    model = "m"
    [neighbours.car]
    url = "http://127.0.0.1:10"
    [neighbours.roadside]
    url = "http://127.0.0.1:11"
    [experts.law]
    node = "cloud"
    description = "law"
    [links.mobile]
    target = "cloud"
    technology = "5g"
    [links.side]
    target = "roadside"
    technology = "v2v"
    [links.back]
    source = "roadside"
    target = "cloud"
    technology = "ethernet"
    [links.by]
    source = "roadside"
    target = "car"
    technology = "wifi"
    [links.round]
    source = "car"
    target = "roadside"
    technology = "wifi"
    [links.slow]
    source = "car"
    target = "cloud"
    technology = "4g"
    """
    found = config(ways)
    routes = routes_of(found, "law", topology_of(found))
    assert [(r.machine, r.link, r.path.relays) for r in routes] == [
        ("cloud", "mobile", ()),
        ("roadside", "side", ("roadside",)),
    ]
    few = config(ways + "[multi_access]\nmax_relays = 0\n")
    assert [r.machine for r in routes_of(few, "law", topology_of(few))] == ["cloud"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("", '[links.w]\ntarget = "edge"\ntechnology = "wifi"\nurl = "http://x/v1"'), r"links\.w\.url.*scripted"),
        (
            ("", '[links.w]\ntarget = "edge"\ntechnology = "wifi"\nlocal_address = "127.0.0.2"'),
            r"links\.w\.local_address.*scripted",
        ),
        (
            ('kind = "fake"\nreply = "from the edge"', 'kind = "openai"\nurl = "http://x/v1"\nmodel = "m"\n'),
            r"links\.w\.local_address = 'wlan0' is no IP address",
        ),
        (
            ("", '[neighbours.n]\nurl = "http://x"\n[links.w]\nsource = "n"\ntarget = "edge"\ntechnology = "wifi"'),
            r"links\.w: no path of links leads from 'here' to 'edge'",
        ),
        (("", '[neighbours.cloud]\nurl = "http://x"'), r"experts\.law: 'cloud' is both a node and a neighbour"),
    ],
)
async def test_what_cannot_be_is_refused_with_its_key(change: tuple[str, str], said: str) -> None:
    old, new = change
    text = TWO_NODES + new if not old else TWO_NODES.replace(old, new, 1)
    if old:
        text += '[links.w]\ntarget = "edge"\ntechnology = "wifi"\nlocal_address = "wlan0"\n'
    with pytest.raises(ConfigError, match=said):
        await open_square(config(text))


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ('kind = "llamacpp"\nsource = "smollm2-135m"', r'also: node \'cloud\' is of kind "llamacpp"'),
        ('kind = "vllm"\nmodel = "smollm2-135m"', r"adapter\.folder is required: node 'cloud'"),
        ('kind = "openai"\nurl = "http://x/v1"\nmodel = "m"', r"also: node 'cloud' does not claim adapters"),
    ],
)
async def test_every_node_of_an_expert_must_be_able_to_have_its_adapter(node: str, said: str) -> None:
    text = TWO_NODES.replace('kind = "fake"\nreply = "from the cloud"', node)
    text = text.replace('also = ["cloud"]', 'also = ["cloud"]\nadapter = { name = "med@v1" }')
    with pytest.raises(ConfigError, match=said):
        await open_square(config(text))


async def test_a_link_to_a_model_in_this_process_is_refused() -> None:
    text = """
    [models.small]
    source = "smollm2-135m"
    [nodes.cloud]
    kind = "local"
    model = "small"
    [experts.law]
    node = "cloud"
    description = "law"
    [links.wifi]
    target = "cloud"
    technology = "wifi"
    """
    with pytest.raises(ConfigError, match=r"links\.wifi\.target.*'cloud' is of kind 'local' on this machine"):
        await open_square(config(text))


def test_keys_of_nodes_and_neighbours_that_are_asked_are_missed() -> None:
    text = """
    [nodes.a]
    kind = "fake"
    [nodes.b]
    kind = "openai"
    url = "http://x/v1"
    model = "m"
    api_key_env = "KEY_B"
    [neighbours.n]
    url = "http://x"
    api_key_env = "KEY_N"
    [neighbours.far]
    url = "http://y"
    api_key_env = "KEY_FAR"
    [experts.law]
    node = "a"
    also = ["b", "n"]
    description = "law"
    """
    assert [m.variable for m in missing_keys(config(text), environment={})] == ["KEY_B", "KEY_N"]


@pytest.mark.parametrize(
    ("more", "tier"),
    [
        ("", Tier.CLOUD),
        (
            '[neighbours.n]\nurl = "http://x"\n[links.w]\nsource = "n"\ntarget = "near"\ntechnology = "wifi"\n',
            Tier.CLOUD,
        ),
    ],
)
def test_an_expert_stands_where_the_highest_of_its_machines_does(more: str, tier: Tier) -> None:
    text = """
    [nodes.near]
    kind = "fake"
    tier = "end"
    [nodes.far]
    kind = "fake"
    tier = "cloud"
    [experts.both]
    node = "near"
    also = ["far"]
    description = "both"
    [experts.alone]
    node = "near"
    description = "alone"
    """
    both, alone = expert_cards(config(textwrap.dedent(text) + more))
    # What may only be seen on the user's own machine must not be asked of it.
    assert both.tier is tier
    assert alone.tier is (tier if more else Tier.END)


TRACED = """
[nodes.cloud]
kind = "fake"
reply = "yes"
[experts.law]
node = "cloud"
description = "law"
[multi_access]
explore = false
hedge = false
[links.wifi]
target = "cloud"
technology = "wifi"
up_mbps = 400.0
down_mbps = 400.0
rtt_ms = 1.0
{keys}
[links.mobile]
target = "cloud"
technology = "4g"
up_mbps = 40.0
down_mbps = 40.0
rtt_ms = 50.0
"""


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("keys", "taken"),
    [
        # Nothing for the first ten seconds, then all there is.
        ('trace = "drive.csv"', ["4g", "4g", "wifi", "4g"]),
        ('trace = "drive.csv"\ntrace_loop = false', ["4g", "4g", "wifi", "wifi"]),
        ('trace = "drive.csv"\ntrace_speed = 2.0', ["4g", "wifi", "wifi", "4g"]),
        ("", ["wifi", "wifi", "wifi", "wifi"]),
    ],
)
async def test_a_link_follows_its_trace(tmp_path: Path, keys: str, taken: list[str]) -> None:
    (tmp_path / "drive.csv").write_text("t_s,mbps\n100,0\n110,400\n115,400\n")
    # 20 s in all: the last value holds as long as the one before it.
    square = await open_square(parse_config(TRACED.format(keys=keys), file=tmp_path / "agora.toml"))
    try:
        seen = []
        for wait in (0.5, 6.5, 8.0, 7.0):  # 0.5, 7, 15 and 22 s after the begin
            await asyncio.sleep(wait)
            seen.append((await square.experts[0].ask("May I?")).path)
        assert seen == taken
    finally:
        await square.aclose()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ('trace = "gone.csv"', r"agora\.toml: links\.wifi\.trace: .*gone\.csv is not there"),
        ('trace = "bad.csv"', r"links\.wifi\.trace: .*bad\.csv has no column 't_s'"),
        ("trace_loop = false", r"links\.wifi.*trace_loop says how a trace is played: it needs trace"),
        ('trace = "bad.csv"\ntrace_speed = 0', r"links\.wifi\.trace_speed = 0.*greater than 0"),
        ('trace = "bad.csv"\ntrace_loop = "yes"', r"links\.wifi\.trace_loop.*must be true or false"),
    ],
)
async def test_a_trace_that_cannot_be_played_is_a_mistake_of_the_file(tmp_path: Path, keys: str, said: str) -> None:
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=said):
        await open_square(parse_config(TRACED.format(keys=keys), file=tmp_path / "agora.toml"))


RELAYED = """
[nodes.near]
kind = "fake"
tier = "end"
[neighbours.n]
url = "http://x"
{tier}
[experts.law]
node = "near"
also = ["n"]
description = "law"
"""


@pytest.mark.parametrize(
    ("said", "told", "tier"),
    [
        ("", {}, Tier.CLOUD),
        ("", {"n": Tier.EDGE}, Tier.EDGE),
        ("", {"other": Tier.EDGE}, Tier.CLOUD),
        ('tier = "edge"', {}, Tier.EDGE),
        ('tier = "edge"', {"n": Tier.CLOUD}, Tier.EDGE),
        ('tier = "cloud"', {"n": Tier.EDGE}, Tier.CLOUD),
        ('tier = "end"', {}, Tier.END),
    ],
)
def test_a_neighbour_stands_where_it_is_configured_or_tells_or_in_the_cloud(
    said: str, told: dict[str, Tier], tier: Tier
) -> None:
    assert highest_tier(config(RELAYED.format(tier=said)), "law", told) is tier


TIERS = st.sampled_from(list(Tier))


@st.composite
def squares(draw: st.DrawFn) -> tuple[Config, dict[str, Tier]]:
    """Some machines with links in any direction, an expert on some of them, and what neighbours tell."""
    nodes = [f"n{i}" for i in range(draw(st.integers(1, 3)))]
    neighbours = [f"m{i}" for i in range(draw(st.integers(0, 3)))]
    text = ""
    for name in nodes:
        text += f'[nodes.{name}]\nkind = "fake"\ntier = "{draw(TIERS)}"\n'
    for name in neighbours:
        tier = draw(st.none() | TIERS)
        text += f'[neighbours.{name}]\nurl = "http://{name}"\n' + (f'tier = "{tier}"\n' if tier else "")
    ends = draw(st.lists(st.tuples(st.sampled_from(["here", *neighbours]), st.sampled_from([*nodes, *neighbours]))))
    for i, (source, target) in enumerate(ends):
        if source != target:
            text += f'[links.l{i}]\nsource = "{source}"\ntarget = "{target}"\ntechnology = "wifi"\n'
    also = draw(st.lists(st.sampled_from([*nodes[1:], *neighbours, "n0"]), unique=True))
    text += f'[experts.x]\nnode = "n0"\ndescription = "x"\nalso = {json.dumps([a for a in also if a != "n0"])}\n'
    return config(text), draw(st.dictionaries(st.sampled_from([*neighbours, "else"]), TIERS))


@given(squares(), TIERS)
def test_no_label_lets_data_onto_a_way_that_passes_a_machine_above_it(
    square: tuple[Config, dict[str, Tier]], label: Tier
) -> None:
    configured, told = square

    def stands(machine: str) -> Tier:
        if machine in configured.nodes:
            return configured.nodes[machine].tier
        return configured.neighbours[machine].tier or told.get(machine) or Tier.CLOUD

    try:
        routes = routes_of(configured, "x", topology_of(configured))
    except ConfigError:
        return  # No way leads to one of its machines: it is not opened.
    card = replace(expert_cards(configured)[0], tier=highest_tier(configured, "x", told))
    passed = [m for r in routes for m in (r.machine, *r.path.relays, r.path.target)]
    if beyond(card, label) is None:
        assert all(stands(m).height <= label.height for m in passed)
    if not any(link.source != "here" for link in configured.links.values()):
        # And without relays nothing is kept from a way that may be taken.
        assert card.tier is max((stands(m) for m in passed), key=lambda t: t.height)


async def test_what_a_neighbour_tells_changes_how_far_up_an_expert_is() -> None:
    configured = config(RELAYED.format(tier=""))
    square = await open_square(configured)
    try:
        seen = []
        for told in ({}, {"n": Tier.EDGE}, {}):
            follow_tiers(configured, square, told)
            seen.append((square.experts[0].card.tier, square.version))
        assert [tier for tier, _ in seen] == [Tier.CLOUD, Tier.EDGE, Tier.CLOUD]
        assert len({version for _, version in seen}) == 3, "whoever keeps something of the cards sees that they changed"
        assert square.experts[0].backend is square.get("law").backend
    finally:
        await square.aclose()


# -- Through gateways


@asynccontextmanager
async def gateway(text: str, folder: Path, port: int) -> AsyncIterator[Any]:
    folder.mkdir()
    text = f'{textwrap.dedent(text)}\n[store]\npath = "{folder}/runs.sqlite"\n[graph]\nrouter = "keywords"\n'
    config = parse_config(text, file=folder / "agora.toml")
    async with open_node(config) as node, listening(node, host="127.0.0.1", port=port) as where:
        yield node, where


NEAR = """
[nodes.dead]
kind = "openai"
url = "http://127.0.0.1:{dead}/v1"
model = "m"
connect_timeout_s = 1
[neighbours.roadside]
url = "http://127.0.0.1:{port}"
refresh_s = 60
[experts.law]
node = "dead"
also = ["roadside"]
description = "law"
system_prompt = "You are a lawyer."
"""

ROADSIDE = """
[nodes.n]
kind = "fake"
reply = "from the roadside unit"
[experts.law]
node = "n"
description = "law"
"""


@pytest.mark.parametrize(
    ("stands", "behind", "label", "said"),
    [
        ('tier = "edge"', "edge", "edge", None),
        ('tier = "edge"', "edge", "local", "it is on a machine of tier edge"),
        ("", "edge", "edge", None),  # It says nothing of itself, and its own expert is on it or further up.
        ("", "cloud", "edge", "it is on a machine of tier cloud"),
        # It may see the question, whom it would ask may not: it says so itself.
        ('tier = "edge"', "cloud", "edge", "roadside: "),
        ('tier = "edge"', "cloud", "cloud", None),
    ],
)
async def test_a_label_holds_over_a_relay(
    tmp_path: Path, stands: str, behind: str, label: str, said: str | None
) -> None:
    port = unused_port()
    near = NEAR.format(dead=unused_port(), port=port).replace("[nodes.dead]", '[nodes.dead]\ntier = "end"')
    relay = ROADSIDE.replace("[nodes.n]", f'[nodes.n]\ntier = "{behind}"') + f"[server]\n{stands}\n"
    async with (
        gateway(relay, tmp_path / "far", port) as (far, _),
        gateway(near, tmp_path / "near", 0) as (_, where),
        aiohttp.ClientSession() as http,
    ):
        body = {"model": "law", "messages": [{"role": "user", "content": "May I?"}], "reach": label}
        async with http.post(f"{where}/v1/chat/completions", json=body) as reply:
            answer = await reply.json()
        if said is None:
            assert answer["choices"][0]["message"]["content"] == "from the roadside unit"
        else:
            assert said in answer["error"]["message"]
            assert not far.square.get("law").backend.requests


async def test_a_gateway_answers_over_a_relay_whole_and_as_a_stream(tmp_path: Path) -> None:
    port = unused_port()
    near = NEAR.format(dead=unused_port(), port=port)
    async with (
        gateway(ROADSIDE, tmp_path / "far", port) as (far, _),
        gateway(near, tmp_path / "near", 0) as (_, where),
        aiohttp.ClientSession() as http,
    ):
        body = {"model": "law", "messages": [{"role": "user", "content": "May I?"}]}
        async with http.post(f"{where}/v1/chat/completions", json=body) as reply:
            said = await reply.json()
        assert said["choices"][0]["message"]["content"] == "from the roadside unit"
        assert said["agora"]["path"] == "roadside"
        assert any("dead" in note for note in said["agora"]["notes"])
        stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with http.post(f"{where}/v1/chat/completions", json=stream) as reply:
            events = (await reply.text()).strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        assert '"completion_tokens":4' in events[-2]
        graph = {**body, "model": "agora"}
        async with http.post(f"{where}/v1/chat/completions", json=graph) as reply:
            assert "from the roadside unit" in (await reply.json())["choices"][0]["message"]["content"]
        asked = far.square.get("law").backend.requests[0]
        assert asked.messages[0].content == "You are a lawyer."
        async with http.get(f"{where}/metrics") as reply:
            metrics = await reply.text()
        assert 'agora_path_usable{expert="law",path="dead"}' in metrics
        assert 'agora_path_usable{expert="law",path="roadside"} 1.0' in metrics


async def test_gateways_that_are_each_others_relay_do_not_go_in_circles(tmp_path: Path) -> None:
    a, b = unused_port(), unused_port()
    async with (
        gateway(NEAR.format(dead=unused_port(), port=b), tmp_path / "a", a) as (_, where),
        gateway(NEAR.format(dead=unused_port(), port=a), tmp_path / "b", b) as (far, _),
        aiohttp.ClientSession() as http,
    ):
        body = {"model": "law", "messages": [{"role": "user", "content": "May I?"}]}
        for _ in range(2):
            async with http.post(f"{where}/v1/chat/completions", json=body) as reply:
                assert reply.status in (502, 503, 508)
                assert "dead" in (await reply.json())["error"]["message"]
        # That a request came back says nothing against the way: others may take it.
        law = far.square.get("law")
        states = {s.name: s.breaker for s in law.backend.states()}
        assert states["roadside"] == "closed"


async def test_a_relay_refuses_a_request_that_may_not_go_on(tmp_path: Path) -> None:
    port = unused_port()
    near = NEAR.format(dead=unused_port(), port=port)
    async with gateway(ROADSIDE, tmp_path / "far", port), square_of(near) as square:
        spent = Passage(hops=0, path=(new_node_id(),))
        with passing(spent), pytest.raises(Unavailable, match=r"dead: .*; roadside: .*may pass 0"):
            await square.experts[0].ask("May I?")
        assert (await square.experts[0].ask("May I?")).path == "roadside"


async def test_slots_that_are_shared_hold_back_both_backends(server: Server) -> None:
    slots = Slots(1, 0, owner="cloud")
    one = OpenAIBackend(url(server), "m", slots=slots)
    two = OpenAIBackend(url(server), "m", slots=slots)
    async with slots.hold():
        assert one.load.running == two.load.running == 1
    assert LoopDetected("x").transient is False
    await one.aclose()
    await two.aclose()
