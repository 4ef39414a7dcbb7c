"""`agora serve` as a process: it starts, answers, drains on SIGTERM, and says clearly why it does not start."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

CONFIG = """
[server]
name = "here"
{server}

[nodes.f]
kind = "fake"
reply = "done"
latency_s = {latency}

[experts.one]
node = "f"
description = "everything"

[graph]
router = "keywords"

[store]
path = "runs.sqlite"
"""

Serve = Callable[..., "Served"]


class Served:
    """A running `agora serve`."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of a POST."""
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return _asked(request)

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a GET."""
        return _asked(urllib.request.Request(f"{self.url}{path}"))

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ends it; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(20)


def _asked(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as e:
        with e:
            return e.code, json.load(e)


def command(folder: Path, *more: str) -> list[str]:
    run = "from agora.cli.app import main; main()"
    return [sys.executable, "-c", run, "serve", "--config", str(folder / "agora.toml"), *more]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    running: list[subprocess.Popen[str]] = []

    def begin(*, server: str = "", latency: float = 0.0, config: str = CONFIG) -> Served:
        (tmp_path / "agora.toml").write_text(config.format(server=server, latency=latency))
        process = subprocess.Popen(
            command(tmp_path, "--port", "0", "--log", str(tmp_path / "log")),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        running.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+?(?=/v1)", line)
        assert found, line
        return Served(process, found[0])

    yield begin
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def ask_slowly(served: Served, answers: list[Any], errors: list[Exception]) -> threading.Thread:
    def work() -> None:
        try:
            answers.append(
                served.post("/v1/chat/completions", {"model": "one", "messages": [{"role": "user", "content": "x"}]})
            )
        except Exception as e:
            errors.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def running(served: Served) -> int:
    with urllib.request.urlopen(f"{served.url}/metrics", timeout=5) as reply:
        text = reply.read().decode()
    return int(float(re.findall(r'agora_requests_now\{of="all",state="running"\} (\S+)', text)[0]))


def test_it_serves_and_drains(serve: Serve, tmp_path: Path) -> None:
    served = serve(latency=1.0)
    assert served.get("/readyz")[0] == 200
    answers: list[Any] = []
    errors: list[Exception] = []
    thread = ask_slowly(served, answers, errors)
    wait_for(lambda: running(served) == 1)
    served.process.send_signal(signal.SIGTERM)
    wait_for(lambda: served.get("/readyz")[0] == 503)
    status, body = served.post("/v1/chat/completions", {"model": "one", "messages": [{"role": "user", "content": "y"}]})
    assert (status, body["error"]["code"]) == (503, "draining")
    thread.join()
    assert not errors
    assert answers[0][0] == 200
    assert served.process.wait(20) == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    chats = [line for line in lines if line.get("route") == "/v1/chat/completions"]
    assert [(c["status"], c["model"]) for c in chats] == [(503, "-"), (200, "one")]
    assert all(c["request"] and c["ms"] >= 0 for c in chats)


def test_what_does_not_end_in_time_is_cut_off(serve: Serve) -> None:
    served = serve(server="drain_s = 0.3", latency=60.0)
    answers: list[Any] = []
    errors: list[Exception] = []
    thread = ask_slowly(served, answers, errors)
    wait_for(lambda: running(served) == 1)
    began = time.monotonic()
    assert served.end() == 0
    assert time.monotonic() - began < 10
    thread.join()
    assert errors
    assert not answers


def test_a_second_signal_cuts_off_at_once(serve: Serve) -> None:
    served = serve(latency=60.0)
    thread = ask_slowly(served, [], [])
    wait_for(lambda: running(served) == 1)
    served.process.send_signal(signal.SIGINT)
    wait_for(lambda: served.get("/readyz")[0] == 503)
    assert served.end(signal.SIGINT) == 0
    thread.join()


def test_a_run_that_was_accepted_outlives_a_kill(serve: Serve) -> None:
    served = serve(latency=1.0)
    status, run = served.post("/v1/runs", {"question": "What is light?"})
    assert status == 202
    served.process.kill()
    served.process.wait()
    again = serve(latency=0.0)
    wait_for(lambda: again.get(f"/v1/runs/{run['id']}")[1]["status"] == "done")
    listed = again.get("/v1/runs")[1]["data"]
    assert [r["id"] for r in listed] == [run["id"]]
    assert again.end() == 0


def test_what_was_accepted_is_not_lost_in_a_drain(serve: Serve) -> None:
    """A request whose body is still on its way."""
    served = serve()
    where = urlsplit(served.url)
    text = "x" * 90_000

    assert where.hostname is not None and where.port is not None
    body = json.dumps({"model": "one", "messages": [{"role": "user", "content": text}]}).encode()
    with socket.create_connection((where.hostname, where.port), timeout=10) as late:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        late.sendall(b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body[:1000]))
        time.sleep(0.2)
        served.process.send_signal(signal.SIGTERM)
        wait_for(lambda: served.get("/readyz")[0] == 503)
        time.sleep(0.2)
        late.sendall(body[1000:])
        assert late.recv(12) == b"HTTP/1.1 200"
    assert served.process.wait(20) == 0


def test_the_command_line_asks_neighbours_too(serve: Serve, tmp_path: Path) -> None:
    served = serve()
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "agora.toml").write_text(f"""
[nodes.f]
kind = "fake"
reply = "from here"
[experts.two]
node = "f"
description = "nothing"
[neighbours.far]
url = "{served.url}"
[graph]
planner = "static"
router = "keywords"
[[graph.subtasks]]
id = "t1"
question = "{{question}}"
expert = "far.one"
""")
    run = [sys.executable, "-c", "from agora.cli.app import main; main()", "ask", "Anything?", "--no-store", "--json"]
    done = subprocess.run([*run, "--config", str(alone / "agora.toml")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["text"], result["attempts"]["t1"][0]["expert"]) == ("done", "far.one")


def refused(folder: Path, config: str, *more: str) -> str:
    (folder / "agora.toml").write_text(config)
    done = subprocess.run(command(folder, *more), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(tmp_path, CONFIG.format(server="", latency=0), "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}" in said
    assert "--port" in said


def test_other_machines_are_not_served_without_keys(tmp_path: Path) -> None:
    said = refused(tmp_path, CONFIG.format(server="", latency=0), "--host", "0.0.0.0")
    assert "agora keys new" in said


def test_an_expert_may_not_be_called_like_the_graph(tmp_path: Path) -> None:
    said = refused(tmp_path, CONFIG.format(server="", latency=0).replace("experts.one", "experts.agora"))
    assert "agora" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_a_full_disk_keeps_nobody_from_an_answer(tmp_path: Path) -> None:
    (tmp_path / "agora.toml").write_text(CONFIG.format(server="", latency=0))
    process = subprocess.Popen(
        command(tmp_path, "--port", "0", "--log", "/dev/full"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        found = re.search(r"http://\S+?(?=/v1)", process.stdout.readline())
        assert found
        served = Served(process, found[0])
        chat = {"model": "one", "messages": [{"role": "user", "content": "x"}]}
        assert served.post("/v1/chat/completions", chat)[0] == 200
        assert served.end() == 0
        assert "error" not in process.stderr.read()


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refused(tmp_path, CONFIG.format(server="", latency=0), "--log", str(tmp_path / "file" / "log"))
    assert "cannot write the log" in said


@pytest.mark.skipif(os.name != "posix", reason="POSIX")
def test_keys_are_made_on_the_command_line(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "agora.toml").write_text(CONFIG.format(server='keys = "keys.json"', latency=0))
    run = [sys.executable, "-c", "from agora.cli.app import main; main()", "keys"]
    config = ["--config", str(tmp_path / "agora.toml")]
    key = subprocess.run([*run, "new", "me", *config], capture_output=True, text=True, check=True).stdout.strip()
    listed = json.loads(subprocess.run([*run, "list", "--json", *config], capture_output=True, text=True).stdout)
    assert [k["name"] for k in listed["keys"]] == ["me"]
    served = serve(server='keys = "keys.json"')
    assert served.get("/v1/models")[0] == 401
    request = urllib.request.Request(f"{served.url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert _asked(request)[0] == 200
    subprocess.run([*run, "remove", "me", *config], capture_output=True, check=True)
    wait_for(lambda: _asked(request)[0] == 401)
