"""`agora doctor`: keys, address and neighbours."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agora.cli import checks_serving
from agora.config import parse_config
from agora.serve.keys import Role, new_key
from agora.serve.node import open_node
from agora.serve.server import listening

FAKE_EXPERT = '[nodes.f]\nkind = "fake"\n[experts.{0}]\nnode = "f"\ndescription = "{0}"\n'


@pytest.fixture
def ports() -> None:
    """For tests that are about ports."""


@pytest.fixture(autouse=True)
def _port_is_free(request, monkeypatch):
    """Whoever uses agora's usual port on this machine is none of the other tests' business."""
    if "ports" not in request.fixturenames:
        monkeypatch.setattr(checks_serving, "_cannot_listen", lambda family, where: None)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def found(said) -> dict[str, dict]:
    return {f["what"]: f for f in said.json["findings"]}


@contextlib.contextmanager
def serving(config: str, folder: Path) -> Iterator[str]:
    """A gateway on a thread of its own, since the command line brings its own event loop; its URL."""
    loop = asyncio.new_event_loop()
    end = asyncio.Event()
    config += f'\n[graph]\nrouter = "keywords"\n[store]\npath = "{folder}/served.sqlite"\n'

    async def serve() -> None:
        async with (
            open_node(parse_config(config, file=folder / "served.toml")) as node,
            listening(node, host="127.0.0.1", port=0) as url,
        ):
            ready.url = url
            up.set()
            await end.wait()

    ready, up = SimpleNamespace(url=""), threading.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert up.wait(20)
        yield ready.url
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(20)
        loop.close()


def test_without_a_word_about_serving_the_address_is_looked_at_and_no_keys_are_missed(agora, home):
    findings = found(agora("doctor", "--json"))
    assert findings["server"]["detail"] == "127.0.0.1:8711 is free"
    assert "server keys" not in findings


def test_an_address_that_others_reach_needs_keys(agora, fake, free_port):
    text = fake.read_text() + f'[server]\nhost = "0.0.0.0"\nport = {free_port}\n'
    fake.write_text(text)
    said = agora("doctor", "--json")
    assert said.code == 1
    finding = found(said)["server keys"]
    assert finding["status"] == "fail"
    assert finding["detail"].startswith("0.0.0.0 is reachable from other machines")
    assert "agora keys new NAME" in finding["hint"]
    fake.write_text(text + 'keys = "keys.json"\n')
    missing = found(agora("doctor", "--json"))["server keys"]
    assert missing["status"] == "fail" and "agora keys new NAME" in missing["hint"]
    key = new_key(fake.parent / "keys.json", "alice")
    new_key(fake.parent / "keys.json", "edge", role=Role.NEIGHBOUR)
    said = agora("doctor", "--json")
    assert said.code == 0
    assert found(said)["server keys"]["detail"] == f"2 keys in {fake.parent / 'keys.json'}, 1 of them for neighbours"
    assert key not in said.out


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_keys_that_others_may_read_fail_and_an_empty_file_of_keys_is_noted(agora, fake):
    file = fake.parent / "keys.json"
    fake.write_text(fake.read_text() + '[server]\nkeys = "keys.json"\n')
    file.write_text('{"keys": []}')
    file.chmod(0o600)
    said = agora("doctor", "--json")
    assert (said.code, found(said)["server keys"]["status"]) == (0, "note")
    assert found(said)["server keys"]["hint"] == "type: agora keys new NAME"
    file.chmod(0o644)
    said = agora("doctor", "--json")
    assert said.code == 1
    assert found(said)["server keys"]["hint"] == f"chmod 600 {file}"
    file.chmod(0o600)
    file.write_text("{}")
    assert "not a file of keys" in found(agora("doctor", "--json"))["server keys"]["detail"]


def test_a_port_that_an_agora_serves_on_is_fine_and_another_programs_is_not(agora, ports, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(checks_serving, "HEALTH_S", 1.0)
    text = fake.read_text()
    with serving(FAKE_EXPERT.format("law"), tmp_path) as url:
        port = int(url.rpartition(":")[2])
        fake.write_text(text + f"[server]\nport = {port}\n")
        said = agora("doctor", "--json")
        assert (said.code, found(said)["server"]["detail"]) == (0, f"an agora serves on 127.0.0.1:{port}")
    assert found(agora("doctor", "--json"))["server"]["detail"] == f"127.0.0.1:{port} is free"
    for answers in ({"status": "ok"}, ["x"], None):
        with other_server(answers) as port:
            fake.write_text(text + f"[server]\nport = {port}\n")
            said = agora("doctor", "--json")
            finding = found(said)["server"]
            assert (said.code, finding["detail"]) == (1, f"another program listens on 127.0.0.1:{port}")
            assert finding["hint"] == "end it, or set [server] port to another one"


def test_an_address_of_another_machine_or_of_none_fails(agora, ports, fake):
    text = fake.read_text()
    fake.write_text(text + '[server]\nhost = "192.0.2.1"\n')
    assert "cannot listen on 192.0.2.1:8711" in found(agora("doctor", "--json"))["server"]["detail"]
    fake.write_text(text + '[server]\nhost = "no such host"\n')
    said = agora("doctor", "--json")
    assert (said.code, found(said)["server"]["status"]) == (1, "fail")
    assert "no such host" in found(said)["server"]["detail"]


@contextlib.contextmanager
def other_server(answers: Any) -> Iterator[int]:
    """Something that listens: it answers with that as JSON, or, for None, never."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answers).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with contextlib.ExitStack() as stack:
        if answers is None:
            mute = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            yield mute.getsockname()[1]
            return
        server = stack.enter_context(http.server.HTTPServer(("127.0.0.1", 0), Handler))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        yield server.server_port


def test_neighbours_tell_who_they_are_and_one_that_is_away_is_no_failure(agora, fake, tmp_path, free_port, monkeypatch):
    monkeypatch.setenv("EDGE_KEY", "agora-wrong")
    with (
        serving(FAKE_EXPERT.format("law") + '[server]\nname = "edge-2"\n', tmp_path) as url,
        other_server({"node": "none"}) as liar,
    ):
        fake.write_text(
            fake.read_text().replace("[graph]", '[graph]\nsynthesiser = "llm"\nsynthesiser_expert = "good.tax"')
            + f'[neighbours.good]\nurl = "{url}"\n'
            + f'[neighbours.few]\nurl = "{url}"\nexperts = ["law", "art"]\n'
            + f'[neighbours.away]\nurl = "http://127.0.0.1:{free_port}"\n'
            + f'[neighbours.liar]\nurl = "http://127.0.0.1:{liar}"\n'
        )
        said = agora("doctor", "--json")
    assert said.code == 0
    findings = found(said)
    good, few, away, liar = (findings[f"neighbour {n}"] for n in ("good", "few", "away", "liar"))
    assert good["detail"].startswith("edge-2 (") and "offers 1 expert (law), " in good["detail"]
    assert " ms" in good["detail"] and good["detail"].endswith("; nobody there is called tax")
    assert few["detail"].endswith("; nobody there is called art")
    assert [f["status"] for f in (good, few, away, liar)] == ["note"] * 4
    assert "Connection refused" in away["detail"] and away["hint"] == "is 'agora serve' running there?"
    assert "its card is wrong" in liar["detail"]


def test_a_neighbour_that_is_whole_is_ok(agora, fake, tmp_path):
    with serving(FAKE_EXPERT.format("law"), tmp_path) as url:
        fake.write_text(fake.read_text() + f'[neighbours.edge]\nurl = "{url}"\nexperts = ["law"]\n')
        assert found(agora("doctor", "--json"))["neighbour edge"]["status"] == "ok"


def test_a_neighbours_key_must_be_set_and_one_that_is_refused_is_told_and_not_shown(agora, fake, tmp_path, monkeypatch):
    theirs = new_key(tmp_path / "theirs.json", "us", role=Role.NEIGHBOUR)
    with serving(FAKE_EXPERT.format("law") + f'[server]\nkeys = "{tmp_path}/theirs.json"\n', tmp_path) as url:
        fake.write_text(fake.read_text() + f'[neighbours.edge]\nurl = "{url}"\napi_key_env = "EDGE_KEY"\n')
        said = agora("doctor", "--json")
        assert said.code == 1
        assert found(said)["neighbour edge"]["hint"] == "export EDGE_KEY=…"
        monkeypatch.setenv("EDGE_KEY", "agora-verysecret")
        said = agora("doctor", "--json")
        monkeypatch.setenv("EDGE_KEY", theirs)
        good = found(agora("doctor", "--json"))["neighbour edge"]
    finding = found(said)["neighbour edge"]
    assert (said.code, finding["status"]) == (0, "note")
    assert "refuses" in finding["detail"] and "agora keys new NAME --neighbour" in finding["hint"]
    assert "verysecret" not in said.out + said.err
    assert good["status"] == "ok"


def test_what_waits_waits_together(agora, fake, monkeypatch):
    monkeypatch.setattr("agora.serve.look.LOOK_TIMEOUT_S", 0.5)
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(other_server(None)) for _ in range(8)]
        more = [f'[neighbours.n{p}]\nurl = "http://127.0.0.1:{p}"\n' for p in ports]
        fake.write_text(fake.read_text() + "".join(more))
        config = parse_config(fake.read_text(), file=fake)
        began = time.monotonic()
        findings = asyncio.run(checks_serving.neighbours(config))
        took = time.monotonic() - began
    assert [f.status for f in findings] == ["note"] * 8
    assert 0.4 < took < 3
