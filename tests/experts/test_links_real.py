"""Paths over real links: network namespaces joined by veth, their bandwidth held down by `tc tbf`; and a real vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from agora.config import parse_config
from agora.network.multipath import MultipathBackend
from agora.protocols import GenerateRequest, Message
from experts.build import open_square
from experts.vllm import VLLMBackend
from experts.vllm_launch import default_python

SERVER = """
import asyncio, json
from aiohttp import web

async def chat(request):
    body = await request.json()
    said = "I have read %d characters" % len(body["messages"][-1]["content"])
    if not body.get("stream"):
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        return web.json_response({"id": "1", "model": "m", "choices": [choice]})
    reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await reply.prepare(request)
    for word in said.split(" "):
        delta = {"id": "1", "choices": [{"index": 0, "delta": {"content": word + " "}, "finish_reason": None}]}
        await reply.write(b"data: " + json.dumps(delta).encode() + b"\\n\\n")
    end = {"id": "1", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    await reply.write(b"data: " + json.dumps(end).encode() + b"\\n\\ndata: [DONE]\\n\\n")
    return reply

app = web.Application(client_max_size=2**24)
app.add_routes([web.post("/v1/chat/completions", chat)])
web.run_app(app, host="0.0.0.0", port=8000, access_log=None)
"""
"""Runs in a namespace of its own, whose only ways out are the two links."""

FAST_MBIT, SLOW_MBIT = 40.0, 1.0
TEXT = "word " * 19_000
"""95 kB: 0.02 s on the fast link and 0.8 s on the slow one."""


def sh(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


@dataclass
class Links:
    """Two links into a namespace; each with an address here and one there."""

    namespace: str
    devices: dict[str, str]
    here: dict[str, str]
    there: dict[str, str]

    def rate(self, name: str, mbit: float) -> None:
        """Holds a link's bandwidth down, both ways."""
        shape = ["root", "tbf", "rate", f"{mbit}mbit", "burst", "32kb", "latency", "800ms"]
        sh("tc", "qdisc", "replace", "dev", self.devices[name], *shape)
        sh("ip", "netns", "exec", self.namespace, "tc", "qdisc", "replace", "dev", f"{self.devices[name]}p", *shape)

    def down(self, name: str) -> None:
        sh("ip", "link", "set", self.devices[name], "down")

    def up(self, name: str) -> None:
        sh("ip", "link", "set", self.devices[name], "up")


@pytest.fixture
def links() -> Iterator[Links]:
    if missing := [p for p in ("ip", "tc") if shutil.which(p) is None]:
        pytest.skip(f"no {' and '.join(missing)} on this machine (iproute2)")
    tag = f"{os.getpid() % 10_000:04d}"
    made = Links(f"ag{tag}", {}, {}, {})
    with contextlib.ExitStack() as stack:
        try:
            sh("ip", "netns", "add", made.namespace)
            stack.callback(subprocess.run, ["ip", "netns", "del", made.namespace], capture_output=True)
            sh("ip", "-n", made.namespace, "link", "set", "lo", "up")
            for n, (name, mbit) in enumerate((("wifi", FAST_MBIT), ("mobile", SLOW_MBIT))):
                device, net = f"ag{n}{tag}", f"10.213.{int(tag) % 250}.{4 * n}"
                base = net.rpartition(".")[0]
                made.devices[name] = device
                made.here[name], made.there[name] = f"{base}.{4 * n + 1}", f"{base}.{4 * n + 2}"
                sh("ip", "link", "add", device, "type", "veth", "peer", "name", f"{device}p", "netns", made.namespace)
                stack.callback(subprocess.run, ["ip", "link", "del", device], capture_output=True)
                sh("ip", "addr", "add", f"{made.here[name]}/30", "dev", device)
                sh("ip", "-n", made.namespace, "addr", "add", f"{made.there[name]}/30", "dev", f"{device}p")
                sh("ip", "link", "set", device, "up")
                sh("ip", "-n", made.namespace, "link", "set", f"{device}p", "up")
                made.rate(name, mbit)
        except (OSError, subprocess.TimeoutExpired) as e:
            pytest.skip(f"network namespaces with tc tbf cannot be made here: {e}")
        yield made


def serve(links: Links, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        command = ["ip", "netns", "exec", links.namespace, sys.executable, "-c", SERVER]
        return subprocess.Popen(command, stdout=out, stderr=out)


@asynccontextmanager
async def over(links: Links, tmp_path: Path) -> AsyncIterator[MultipathBackend]:
    """A server behind the links, and the backend that a configuration opens over them."""
    process = serve(links, tmp_path / "server.log")
    try:
        config = """
        [nodes.cloud]
        kind = "openai"
        url = "http://192.0.2.1/v1"
        model = "m"
        connect_timeout_s = 1
        [experts.law]
        node = "cloud"
        description = "law"
        [links.wifi]
        target = "cloud"
        technology = "wifi"
        local_address = "{wifi}"
        url = "http://{wifi_there}:8000/v1"
        [links.mobile]
        target = "cloud"
        technology = "5g"
        local_address = "{mobile}"
        url = "http://{mobile_there}:8000/v1"
        """.format(**links.here, **{f"{k}_there": v for k, v in links.there.items()})
        square = await open_square(parse_config(textwrap.dedent(config), file=tmp_path / "agora.toml"))
        try:
            backend = square.experts[0].backend
            assert isinstance(backend, MultipathBackend)
            until = time.monotonic() + 30
            while not all([(await w.backend.health()).ok for w in backend.ways]):
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                assert time.monotonic() < until, "the server cannot be reached over both links"
                await asyncio.sleep(0.1)
            yield backend
        finally:
            await square.aclose()
            await let_go()
    finally:
        process.kill()
        process.wait()


async def let_go() -> None:
    """Drops what could not be sent when its link went down: it would hold its socket until the system gives up."""
    loop = asyncio.get_running_loop()
    for found in gc.get_objects():
        # By its type alone: some objects do things when they are asked for their class.
        if issubclass(type(found), asyncio.Transport) and getattr(found, "_loop", None) is loop and found.is_closing():
            found.abort()
    await asyncio.sleep(0)


def ask(text: str = TEXT) -> GenerateRequest:
    return GenerateRequest(messages=(Message(role="user", content=text),), timeout_s=20)


async def paths(backend: MultipathBackend, many: int) -> list[str]:
    """The paths that so many requests, one after the other, came by."""
    found = []
    for _ in range(many):
        answer = await backend.generate(ask())
        assert answer.text.startswith("I have read 95000 ")
        found.append(answer.path)
    return found


async def test_the_link_with_more_bandwidth_is_found_and_the_other_one_bears_its_loss(
    links: Links, tmp_path: Path
) -> None:
    async with over(links, tmp_path) as backend:
        await paths(backend, 10)
        assert (await paths(backend, 10)).count("wifi") >= 8
        # The link goes down while requests are on it.
        asking = [asyncio.create_task(backend.generate(ask())) for _ in range(4)]
        await asyncio.sleep(0.01)
        links.down("wifi")
        answers = await asyncio.gather(*asking)
        assert all(a.text.startswith("I have read 95000 ") for a in answers), "none is lost"
        assert set(await paths(backend, 3)) == {"5g"}
        links.up("wifi")
        until = time.monotonic() + 40
        while "wifi" not in await paths(backend, 1):
            assert time.monotonic() < until, f"the link that is up again is not used: {backend.states()}"


async def test_when_the_bandwidths_change_places_so_do_the_requests(links: Links, tmp_path: Path) -> None:
    async with over(links, tmp_path) as backend:
        await paths(backend, 12)
        links.rate("wifi", 0.5)
        links.rate("mobile", FAST_MBIT)
        until = time.monotonic() + 60
        while (await paths(backend, 4)).count("5g") < 4:
            assert time.monotonic() < until, backend.states()


# -- A real model server


@pytest.fixture
def python() -> Path:
    found = default_python()
    has_vllm = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([str(found), "-c", has_vllm]).returncode:
        pytest.skip("vLLM is not installed: make vllm")
    return found


@pytest.mark.vllm
@pytest.mark.timeout(600)
async def test_a_stream_of_a_real_vllm_goes_on_over_another_link(python: Path, tmp_path: Path) -> None:
    config = """
    [nodes.cloud]
    kind = "vllm"
    model = "{model}"
    url = "{url}"
    api_key_env = "KEY"
    [experts.law]
    node = "cloud"
    description = "law"
    [links.wifi]
    target = "cloud"
    technology = "wifi"
    local_address = "127.0.0.2"
    [links.mobile]
    target = "cloud"
    technology = "5g"
    local_address = "127.0.0.3"
    """
    from experts.models import ModelStore

    folder = await asyncio.to_thread(ModelStore().resolve, "smollm2-135m", pull=True)
    async with await VLLMBackend.start(folder, python=python, max_context=512) as server:
        text = textwrap.dedent(config).format(model=server.model, url=server.url)
        parsed = parse_config(text, file=tmp_path / "agora.toml")
        key = server._http._headers["Authorization"].removeprefix("Bearer ")
        square = await open_square(parsed, environment={"KEY": key})
        backend = square.experts[0].backend
        assert isinstance(backend, MultipathBackend)
        try:
            asked = GenerateRequest(
                messages=(Message(role="user", content="Count from one to twenty in words."),), max_tokens=32
            )
            whole = await backend.generate(asked)
            broken: list[str] = []
            got = ""
            async for chunk in backend.stream(asked):
                got += chunk.text
                if chunk.text and not broken and len(got) > 20:
                    # The link in use breaks in the middle of the answer.
                    way = next(w for w, s in zip(backend.ways, backend.states(), strict=True) if s.running)
                    broken.append(way.name)
                    await way.backend.aclose()
                last = chunk
            assert broken
            assert last.path != broken[0]
            assert any("broke off" in note for note in last.notes)
            # Tokens may be cut differently at the seam; the words may not be doubled or lost.
            assert got.split()[: len(whole.text.split()) // 2] == whole.text.split()[: len(whole.text.split()) // 2]
            assert last.usage is not None
            assert last.usage.calls == 2
        finally:
            await square.aclose()
