"""`VLLMBackend` over a process that speaks vLLM's command line and API, and can misbehave; see fake_vllm/."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from agora.config import Config, parse_config
from agora.errors import AdapterError, BadReply, ConfigError, InvalidRequest, ModelError, Unavailable, Unsupported
from agora.protocols import GenerateRequest, Load, Message
from agora.types import AdapterRef
from experts.build import open_square
from experts.http_reply import Reply
from experts.vllm import FOLDER_PREFIX, VLLMBackend
from experts.vllm_supervisor import Supervision

QUICK = Supervision(
    start_timeout_s=20.0, poll_s=0.02, check_every_s=0.1, checks=2, backoff_s=0.05, backoff_cap_s=0.2, grace_s=0.5
)

HELLO = GenerateRequest(prompt="hello", max_tokens=4)


@dataclass
class FakeVllm:
    """The package that is started in vLLM's place.

    Attributes:
        folder: What is on its import path.
    """

    folder: Path
    stack: AsyncExitStack

    def plan(self, **how: Any) -> None:
        new = self.folder / "new.json"
        new.write_text(json.dumps(how))
        new.replace(self.folder / "plan.json")

    @property
    def env(self) -> dict[str, str]:
        return {"PYTHONPATH": str(self.folder), "FAKE_VLLM": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}

    async def start(self, model: str | Path = "some/model", **options: Any) -> VLLMBackend:
        said: dict[str, Any] = {"python": sys.executable, "supervision": QUICK, "health_timeout_s": 0.5, **options}
        said["env"] = {**self.env, **options.get("env", {})}
        backend = await VLLMBackend.start(model, **said)
        self.stack.push_async_callback(backend.aclose)
        return backend

    def seen(self, key: str) -> list[dict[str, Any]]:
        """What it saw: its starts by "pid", its requests by "path"."""
        file = self.folder / "seen.jsonl"
        found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [f for f in found if key in f]

    def processes(self) -> list[int]:
        """Every process it ever was."""
        return [pid for start in self.seen("pid") for pid in (start["pid"], start["engine"])]


@pytest.fixture
async def fake_vllm(tmp_path: Path) -> AsyncIterator[FakeVllm]:
    package = tmp_path / "fake" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, *list(package.parents)[:2]):
        (folder / "__init__.py").touch()
    shutil.copy(Path(__file__).parent / "fake_vllm" / "api_server.py", package)
    async with AsyncExitStack() as stack:
        fake = FakeVllm(tmp_path / "fake", stack)
        fake.plan()
        yield fake
    assert not [pid for pid in fake.processes() if runs(pid)], "a process outlived its backend"


def runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def until(what: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"it did not come to pass within {seconds} s"
        await asyncio.sleep(0.01)


async def up_again(backend: VLLMBackend, restarts: int) -> None:
    await until(lambda: backend.state and backend.state.phase == "up" and backend.state.restarts >= restarts)


# -- Starting


async def test_answers_once_started(fake_vllm: FakeVllm) -> None:
    backend = await fake_vllm.start()
    answer = await backend.generate(HELLO)
    assert answer.text == str(backend.pid)
    assert backend.load == Load()
    assert (await backend.health()).ok
    assert backend.capabilities.max_context == 2048
    chunks = [c async for c in backend.stream(HELLO)]
    assert "".join(c.text for c in chunks) == answer.text
    chat = GenerateRequest(messages=(Message(role="user", content="hi"),))
    assert (await backend.generate(chat)).text == answer.text


async def test_passes_a_body_on(fake_vllm: FakeVllm) -> None:
    backend = await fake_vllm.start()
    payload = json.dumps({"model": backend.model, "prompt": "hello"}).encode()
    whole = await backend.forward("completions", payload, Reply.whole)
    assert json.loads(whole)["choices"][0]["text"] == str(backend.pid)


async def test_without_a_gpu_it_gets_what_it_needs_there(fake_vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.vllm_launch.has_gpu", lambda: False)
    await fake_vllm.start(args=["--other", "x y"], dtype="bfloat16", env={"VLLM_CPU_KVCACHE_SPACE": "3"})
    (start,) = fake_vllm.seen("pid")
    argv, env = start["argv"], start["env"]
    assert argv[argv.index("--host") + 1] == "127.0.0.1"
    assert "--enforce-eager" in argv
    assert argv[len(argv) - 1 - argv[::-1].index("--dtype") + 1] == "bfloat16"  # The last one counts.
    assert argv[-2:] == ["--other", "x y"]
    assert "--enable-lora" not in argv
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in env
    assert env["VLLM_NO_USAGE_STATS"] == "1"
    assert "HF_HUB_OFFLINE" not in env


async def test_where_there_is_a_gpu_nothing_is_forced(fake_vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.vllm_launch.has_gpu", lambda: True)
    await fake_vllm.start()
    (start,) = fake_vllm.seen("pid")
    assert not {"--dtype", "--enforce-eager", "--max-model-len"} & set(start["argv"])
    assert not [k for k in start["env"] if "CPU" in k]


async def test_the_key_is_its_own_and_never_shown(fake_vllm: FakeVllm, tmp_path: Path) -> None:
    model = tmp_path / "a-model"
    model.mkdir()
    one, two = await fake_vllm.start(model), await fake_vllm.start()
    first, second = fake_vllm.seen("pid")
    keys = {s["env"]["VLLM_API_KEY"] for s in (first, second)}
    assert len(keys) == 2 and min(len(k) for k in keys) >= 32
    for start, backend in ((first, one), (second, two)):
        assert not [a for a in start["argv"] if start["env"]["VLLM_API_KEY"] in a]
        assert "starting with key ***" in "".join(backend.log)
        assert start["env"]["VLLM_API_KEY"] not in f"{backend!r} {backend.log}"
    assert one.model == "a-model"
    assert first["env"]["HF_HUB_OFFLINE"] == "1"


async def test_without_a_chat_template_it_does_not_chat(fake_vllm: FakeVllm) -> None:
    fake_vllm.plan(chat_template=False)
    backend = await fake_vllm.start()
    assert not backend.capabilities.chat
    assert (await backend.generate(HELLO)).text
    assert (await backend.health()).ok


async def test_a_slow_start_is_waited_for(fake_vllm: FakeVllm) -> None:
    fake_vllm.plan(start_s=0.5)
    assert (await (await fake_vllm.start()).generate(HELLO)).text


async def test_a_failed_start_tells_the_cause(fake_vllm: FakeVllm) -> None:
    fake_vllm.plan(start="dies")
    with pytest.raises(ModelError) as failed:
        await fake_vllm.start(name="big")
    text = str(failed.value)
    assert text.startswith("big: the vLLM server could not start: the process ended with status 1; its log says: ")
    assert "ValueError: no weights in here | RuntimeError: Engine core initialization failed" in text
    assert "(EngineCore" not in text and "loading" not in text


async def test_arguments_it_does_not_know(fake_vllm: FakeVllm) -> None:
    with pytest.raises(ModelError, match=r"unrecognized arguments: --nonsense"):
        await fake_vllm.start(args=["--nonsense"])


@pytest.mark.parametrize("mode", ["hang", "error", "garbage", "empty"])
async def test_a_start_that_never_generates_a_token(fake_vllm: FakeVllm, mode: str) -> None:
    """It listens, and says 200 to all else."""
    fake_vllm.plan(mode=mode)
    hasty = Supervision(start_timeout_s=0.8, poll_s=0.02, grace_s=0.5)
    with pytest.raises(Unavailable, match=r"did not generate a token within 0\.8 s"):
        await fake_vllm.start(supervision=hasty, health_timeout_s=0.2)


async def test_a_cancelled_start_leaves_nothing(fake_vllm: FakeVllm) -> None:
    fake_vllm.plan(start_s=30)
    task = asyncio.create_task(fake_vllm.start())
    await until(fake_vllm.processes)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [pid for pid in fake_vllm.processes() if runs(pid)]


async def test_no_such_interpreter(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"interpreter .*nowhere cannot be run: No such file.*make vllm"):
        await VLLMBackend.start("some/model", python=tmp_path / "nowhere")


async def test_an_interpreter_that_is_none(tmp_path: Path) -> None:
    odd = tmp_path / "python"
    odd.write_text("#!/bin/sh\necho 'I am a teapot' >&2; exit 3\n")
    odd.chmod(0o755)
    with pytest.raises(ModelError, match=r"is no working Python interpreter: I am a teapot .*make vllm"):
        await VLLMBackend.start("some/model", python=odd)


async def test_an_interpreter_without_vllm() -> None:
    with pytest.raises(ModelError, match=r"vLLM is not installed for .*make vllm"):
        await VLLMBackend.start("some/model", python=sys.executable)


async def test_a_port_that_is_taken(fake_vllm: FakeVllm) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(Unavailable, match=f"port {port} of 127.0.0.1 cannot be used: address already in use"):
            await fake_vllm.start(port=port)
    assert (await fake_vllm.start(port=port)).url == f"http://127.0.0.1:{port}/v1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"args": ["--port", "1"]}, r"args hold --port"),
        ({"args": ["--api_key=x"]}, r"args hold --api-key"),
        ({"env": {"VLLM_API_KEY": "x"}}, r"env holds VLLM_API_KEY"),
        ({"max_context": 1}, r"max_context is 1; it must be ≥ 2"),
        ({"max_lora_rank": 513}, r"max_lora_rank is 513"),
        ({"max_running": 0}, r"limit of requests at once is 0"),
    ],
)
async def test_options_out_of_range(fake_vllm: FakeVllm, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await fake_vllm.start(**options)
    assert not fake_vllm.processes()


# -- Dying, hanging, ending


@pytest.mark.parametrize("victim", ["pid", "engine"])
async def test_killed_it_comes_back(fake_vllm: FakeVllm, victim: str) -> None:
    backend = await fake_vllm.start()
    url = backend.url
    (first,) = fake_vllm.seen("pid")
    if victim == "engine":  # vLLM's server ends by itself when its engine has.
        os.kill(first["engine"], signal.SIGKILL)
    os.kill(first["pid"], signal.SIGKILL)
    await until(lambda: backend.state and backend.state.phase != "up", 2.0)
    with pytest.raises(Unavailable, match=r"is down since .*the process was ended by SIGKILL.*ask another backend"):
        await backend.generate(HELLO)
    health = await backend.health()
    assert not health.ok and "SIGKILL" in health.detail
    await up_again(backend, 1)
    assert (await backend.generate(HELLO)).text == str(backend.pid)
    assert backend.pid != first["pid"]
    assert backend.url == url
    assert not runs(first["engine"])


async def test_a_request_under_way_fails_clearly(fake_vllm: FakeVllm) -> None:
    slow = Supervision(poll_s=0.02, backoff_s=2.0, grace_s=0.5)  # Not back before the requests have been told.
    backend = await fake_vllm.start(max_running=1, supervision=slow)
    fake_vllm.plan(mode="hang")
    tasks = [asyncio.create_task(backend.generate(HELLO)) for _ in range(3)]
    await until(lambda: backend.load == Load(running=1, waiting=2))
    os.kill(fake_vllm.seen("pid")[0]["pid"], signal.SIGKILL)
    failures = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5.0)
    assert all(isinstance(e, Unavailable) and "SIGKILL" in e.message for e in failures), failures
    assert backend.load == Load()


@pytest.mark.parametrize("mode", ["hang", "error", "garbage", "empty"])
async def test_dead_while_it_says_200_it_is_started_again(fake_vllm: FakeVllm, mode: str) -> None:
    backend = await fake_vllm.start(health_timeout_s=0.1)
    first = backend.pid
    fake_vllm.plan(mode=mode)
    await until(lambda: backend.state and backend.state.phase != "up")
    with pytest.raises(Unavailable, match=r"it runs, but 2 times in a row it generated no token"):
        await backend.generate(HELLO)
    fake_vllm.plan()
    await up_again(backend, 1)
    assert (await backend.generate(HELLO)).text == str(backend.pid) != str(first)


async def test_while_it_answers_it_is_not_asked(fake_vllm: FakeVllm) -> None:
    rarely = Supervision(poll_s=0.02, check_every_s=0.7, grace_s=0.5)
    backend = await fake_vllm.start(supervision=rarely)
    asked = len(fake_vllm.seen("path"))
    for _ in range(10):
        await asyncio.sleep(0.03)
        await backend.generate(HELLO)
    assert len(fake_vllm.seen("path")) - asked == 10
    await until(lambda: len(fake_vllm.seen("path")) - asked > 10)  # Left alone, it is asked.


async def test_it_is_tried_again_for_ever_and_tells_how_it_goes(fake_vllm: FakeVllm) -> None:
    backend = await fake_vllm.start()
    fake_vllm.plan(start="dies")
    os.kill(backend.pid or 0, signal.SIGKILL)
    await until(lambda: len(fake_vllm.seen("pid")) >= 4)
    state = backend.state
    assert state is not None and state.phase != "up"
    await until(lambda: backend.state and "no weights in here" in backend.state.why)
    with pytest.raises(Unavailable, match=r"no weights in here"):
        await backend.generate(HELLO)
    assert backend.state is not None and backend.state.since == state.since, "it has been down since it was killed"
    fake_vllm.plan()
    await up_again(backend, 3)
    assert (await backend.generate(HELLO)).text


async def test_closing_ends_every_process_and_removes_every_file(fake_vllm: FakeVllm, tmp_path: Path) -> None:
    backend = await fake_vllm.start(env={"TMPDIR": str(tmp_path)})
    folder = Path(fake_vllm.seen("pid")[0]["cwd"])
    assert folder.name.startswith(FOLDER_PREFIX)
    await backend.aclose()
    await backend.aclose()
    assert not [pid for pid in fake_vllm.processes() if runs(pid)]
    assert not folder.exists()
    with pytest.raises(Unavailable, match="was closed"):
        await backend.generate(HELLO)
    assert not (await backend.health()).ok


async def test_closing_while_it_is_down(fake_vllm: FakeVllm) -> None:
    patient = Supervision(poll_s=0.02, backoff_s=60.0, grace_s=0.5)
    backend = await fake_vllm.start(supervision=patient)
    os.kill(backend.pid or 0, signal.SIGKILL)
    await until(lambda: backend.state and backend.state.next_start is not None)
    await asyncio.wait_for(backend.aclose(), 2.0)
    assert not (await backend.health()).ok
    with pytest.raises(Unavailable, match="closed"):
        await backend.generate(HELLO)


async def test_closing_ends_a_reply_that_has_begun(fake_vllm: FakeVllm) -> None:
    backend = await fake_vllm.start()
    fake_vllm.plan(mode="stalls")
    chunks = backend.stream(HELLO)
    assert (await anext(chunks)).text
    rest = asyncio.create_task(anext(chunks))
    whole = asyncio.create_task(backend.generate(HELLO))
    await until(lambda: len([s for s in fake_vllm.seen("path") if s["body"].get("max_tokens") == 4]) == 2)
    await asyncio.sleep(0.05)  # By now the second reply has begun too.
    await backend.aclose()
    ends = await asyncio.wait_for(asyncio.gather(rest, whole, return_exceptions=True), 1.0)
    assert all(isinstance(e, Unavailable) and "was closed" in e.message for e in ends), ends
    assert backend.load == Load()


async def test_a_server_that_does_not_want_to_end(fake_vllm: FakeVllm) -> None:
    backend = await fake_vllm.start()
    os.kill(backend.pid or 0, signal.SIGSTOP)  # Neither SIGTERM nor a request is looked at any more.
    await asyncio.wait_for(backend.aclose(), 5.0)


AGORA = """
import asyncio, sys
from experts.build import open_square
from experts.http_reply import Reply
from experts.vllm import VLLMBackend
async def main():
    backend = await VLLMBackend.start("some/model", python=sys.executable)
    print("up", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_it_ends_with_agora_however_agora_ends(fake_vllm: FakeVllm, number: signal.Signals) -> None:
    environment = {**os.environ, **fake_vllm.env}
    environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parents[2])
    agora = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", AGORA], env=environment, stdout=subprocess.PIPE
    )
    with agora:
        assert agora.stdout is not None
        assert await asyncio.to_thread(agora.stdout.readline) == b"up\n"
        pids = fake_vllm.processes()
        assert len(pids) == 2 and all(map(runs, pids))
        agora.send_signal(number)
        await until(lambda: not any(map(runs, pids)))
    folder = Path(fake_vllm.seen("pid")[0]["cwd"])
    await until(lambda: not folder.exists())


async def test_it_ends_also_if_its_guard_is_killed(fake_vllm: FakeVllm) -> None:
    backend = await fake_vllm.start()
    pids = fake_vllm.processes()
    guard = psutil.Process(backend.pid).parent()
    assert guard is not None and any("vllm_guard.py" in a for a in guard.cmdline())
    guard.kill()
    await until(lambda: not any(map(runs, pids)))
    await up_again(backend, 1)
    assert (await backend.generate(HELLO)).text == str(backend.pid)


# -- Metrics


async def test_metrics(fake_vllm: FakeVllm) -> None:
    (fake_vllm.folder / "metrics.txt").write_text("vllm:num_requests_running 2.0\nother 1.0\n")
    metrics = await (await fake_vllm.start()).metrics()
    assert metrics.running == 2
    assert metrics.waiting is None


async def test_metrics_that_are_none(fake_vllm: FakeVllm) -> None:
    (fake_vllm.folder / "metrics.txt").write_text("vllm:num_requests_running many\n")
    backend = await fake_vllm.start()
    with pytest.raises(BadReply, match="/metrics cannot be read"):
        await backend.metrics()


# -- Adapters

RED = AdapterRef.parse("red@v1")


@pytest.fixture
async def adapted(fake_vllm: FakeVllm, tiny_model: Path) -> VLLMBackend:
    return await fake_vllm.start(tiny_model, adapters=True, max_lora_rank=10)


async def test_room_is_made_for_adapters(fake_vllm: FakeVllm, adapted: VLLMBackend) -> None:
    (start,) = fake_vllm.seen("pid")
    argv = start["argv"]
    assert "--enable-lora" in argv
    assert argv[argv.index("--max-lora-rank") + 1] == "16", "vLLM takes 8, 16, 32, … only"
    assert start["env"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert adapted.capabilities.adapters


async def test_an_adapter_comes_and_goes(
    fake_vllm: FakeVllm, adapted: VLLMBackend, tiny_adapters: dict[str, Path]
) -> None:
    asked = GenerateRequest(prompt="hello", adapter=RED)
    with pytest.raises(AdapterError, match="does not serve adapter 'red@v1'"):
        await adapted.generate(asked)
    info = await adapted.load_adapter(RED, tiny_adapters["red@v1"])
    assert info.rank == 4
    assert dict(adapted.adapters) == {RED: info}
    assert await adapted.served_adapters() == ("red@v1",)
    assert (await adapted.generate(asked)).text
    assert await adapted.load_adapter(RED, tiny_adapters["red@v1"]) == info
    assert len([s for s in fake_vllm.seen("path") if "load_lora" in s["path"]]) == 1, "nothing to do the second time"
    await adapted.unload_adapter(RED)
    assert not adapted.adapters
    with pytest.raises(AdapterError):
        await adapted.generate(asked)
    with pytest.raises(AdapterError, match=r"cannot be unloaded: .*cannot be found"):
        await adapted.unload_adapter(RED)


async def test_a_name_never_gets_other_weights(adapted: VLLMBackend, tiny_adapters: dict[str, Path]) -> None:
    await adapted.load_adapter(RED, tiny_adapters["red@v1"])
    with pytest.raises(AdapterError, match="other weights; an adapter is immutable"):
        await adapted.load_adapter(RED, tiny_adapters["red@v2"])
    await adapted.unload_adapter(RED)
    with pytest.raises(AdapterError, match="other weights; an adapter is immutable"):
        await adapted.load_adapter(RED, tiny_adapters["red@v2"])
    await adapted.load_adapter(RED, tiny_adapters["red@v1"])


async def test_adapters_are_there_again_after_a_restart(
    fake_vllm: FakeVllm, adapted: VLLMBackend, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The very weights that were checked, whatever has become of the folder meanwhile."""
    folder = shutil.copytree(tiny_adapters["red@v1"], tmp_path / "red")
    await adapted.load_adapter(RED, folder)
    shutil.rmtree(folder)
    shutil.copytree(tiny_adapters["red@v2"], folder)
    os.kill(adapted.pid or 0, signal.SIGKILL)
    await up_again(adapted, 1)
    assert (await adapted.generate(GenerateRequest(prompt="hello", adapter=RED))).text == str(adapted.pid)
    read = Path([s for s in fake_vllm.seen("path") if "load_lora" in s["path"]][-1]["body"]["lora_path"])
    weights = "adapter_model.safetensors"
    assert (read / weights).read_bytes() == (tiny_adapters["red@v1"] / weights).read_bytes()


async def test_adapters_that_cannot_be(
    fake_vllm: FakeVllm, adapted: VLLMBackend, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=r"has no version .*red@v1"):
        await adapted.load_adapter(AdapterRef.parse("red"), tiny_adapters["red@v1"])
    with pytest.raises(AdapterError, match="cannot be read"):
        await adapted.load_adapter(RED, tmp_path / "nowhere")
    pickled = shutil.copytree(tiny_adapters["red@v1"], tmp_path / "pickled")
    (pickled / "adapter_model.bin").touch()
    with pytest.raises(AdapterError, match="can run code"):
        await adapted.load_adapter(RED, pickled)
    fake_vllm.plan(adapters="refused")
    with pytest.raises(AdapterError, match="refused by the server: HTTP 500: LoRA rank 99"):
        await adapted.load_adapter(RED, tiny_adapters["red@v1"])
    assert not adapted.adapters
    fake_vllm.plan()
    await adapted.load_adapter(RED, tiny_adapters["red@v1"])


async def test_an_adapter_for_another_base_model(
    fake_vllm: FakeVllm, tiny_model: Path, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 128, "head_dim": 32}))
    backend = await fake_vllm.start(other, adapters=True)
    with pytest.raises(AdapterError, match="is for another base model"):
        await backend.load_adapter(RED, tiny_adapters["red@v1"])
    assert not [s for s in fake_vllm.seen("path") if "lora" in s["path"]], "the server was not even asked"


async def test_a_rank_there_is_no_room_for(
    fake_vllm: FakeVllm, tiny_model: Path, tiny_adapters: dict[str, Path]
) -> None:
    backend = await fake_vllm.start(tiny_model, adapters=True, max_lora_rank=1)
    with pytest.raises(AdapterError, match=r"has rank 4; the server was started for at most 1 \(set max_lora_rank\)"):
        await backend.load_adapter(RED, tiny_adapters["red@v1"])


async def test_started_without_adapters(fake_vllm: FakeVllm, tiny_adapters: dict[str, Path]) -> None:
    backend = await fake_vllm.start()
    with pytest.raises(Unsupported, match="without adapters"):
        await backend.load_adapter(RED, tiny_adapters["red@v1"])


# -- A server that someone else runs


@pytest.fixture
async def attached(fake_vllm: FakeVllm) -> AsyncIterator[VLLMBackend]:
    theirs = await fake_vllm.start(adapters=True)
    key = fake_vllm.seen("pid")[0]["env"]["VLLM_API_KEY"]
    backend = VLLMBackend.attach(theirs.url, theirs.model, api_key=key)
    yield backend
    await backend.aclose()
    assert (await theirs.generate(HELLO)).text, "closing what is attached does not end the server"


async def test_attached_it_answers(fake_vllm: FakeVllm, attached: VLLMBackend) -> None:
    (fake_vllm.folder / "metrics.txt").touch()
    assert (await attached.generate(HELLO)).text
    assert (await attached.health()).ok
    assert (await attached.probe()).max_context == 2048
    assert (await attached.metrics()).running is None
    assert attached.state is None and attached.pid is None and attached.log == ()


async def test_attached_it_loads_adapters(
    fake_vllm: FakeVllm, attached: VLLMBackend, tiny_adapters: dict[str, Path]
) -> None:
    await attached.load_adapter(RED, tiny_adapters["red@v1"])
    assert (await attached.generate(GenerateRequest(prompt="hello", adapter=RED))).text
    # Another agora, or this one after a restart: the same folder under the same name is the same adapter.
    again = VLLMBackend.attach(attached.url, attached.model, api_key=fake_vllm.seen("pid")[0]["env"]["VLLM_API_KEY"])
    try:
        await again.load_adapter(RED, tiny_adapters["red@v1"])
        blue = AdapterRef.parse("blue@v1")
        await attached.load_adapter(blue, tiny_adapters["blue@v1"])
        with pytest.raises(AdapterError, match=r"loaded already, from .*nobody can tell"):
            await again.load_adapter(blue, tiny_adapters["red@v2"])
    finally:
        await again.aclose()


async def test_attached_to_one_that_takes_no_adapters(
    fake_vllm: FakeVllm, attached: VLLMBackend, tiny_adapters: dict[str, Path]
) -> None:
    fake_vllm.plan(adapters="not allowed")
    with pytest.raises(AdapterError, match=r"refused by the server.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        await attached.load_adapter(RED, tiny_adapters["red@v1"])


async def test_attached_to_nobody() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        backend = VLLMBackend.attach(f"http://127.0.0.1:{s.getsockname()[1]}", "m")
        health = await backend.health()
        await backend.aclose()
    assert not health.ok and "cannot connect" in health.detail


# -- From a configuration


def node(fake: FakeVllm, options: str, adapter: str = "") -> Config:
    env = ", ".join(f'{k} = "{v}"' for k, v in fake.env.items())
    return parse_config(
        f'[nodes.n]\nkind = "vllm"\n{options}\n'
        + (f'python = "{sys.executable}"\nenv = {{ {env} }}\n' if "url" not in options else "")
        + f'[experts.a]\nnode = "n"\ndescription = "d"\n{adapter}',
        file=None,
    )


async def test_a_node_that_is_started(fake_vllm: FakeVllm, tiny_model: Path, tiny_adapters: dict[str, Path]) -> None:
    options = f'model = "{tiny_model}"\nmax_context = 99\nmax_lora_rank = 32\nargs = ["--other", "x"]'
    adapter = f'adapter = {{ name = "red@v1", folder = "{tiny_adapters["red@v1"]}" }}'
    square = await open_square(node(fake_vllm, options, adapter))
    try:
        (expert,) = square
        assert isinstance(expert.backend, VLLMBackend)
        assert (await expert.ask("who are you?")).text == str(expert.backend.pid)
        asked = fake_vllm.seen("path")[-1]
        assert (asked["path"], asked["body"]["model"]) == ("/v1/chat/completions", "red@v1")
    finally:
        await square.aclose()
    argv = fake_vllm.seen("pid")[0]["argv"]
    assert argv[argv.index("--model") + 1] == str(tiny_model)
    assert argv[argv.index("--max-lora-rank") + 1] == "32"
    assert "99" in argv and argv[-2:] == ["--other", "x"]


async def test_a_node_whose_adapter_is_refused_leaves_nothing(
    fake_vllm: FakeVllm, tiny_model: Path, tiny_adapters: dict[str, Path]
) -> None:
    fake_vllm.plan(adapters="refused")
    adapter = f'adapter = {{ name = "red@v1", folder = "{tiny_adapters["red@v1"]}" }}'
    with pytest.raises(AdapterError, match="refused by the server"):
        await open_square(node(fake_vllm, f'model = "{tiny_model}"', adapter))
    assert fake_vllm.processes() and not any(map(runs, fake_vllm.processes()))


async def test_a_node_that_someone_else_runs(fake_vllm: FakeVllm) -> None:
    theirs = await fake_vllm.start()
    key = fake_vllm.seen("pid")[0]["env"]["VLLM_API_KEY"]
    options = f'model = "{theirs.model}"\nurl = "{theirs.url}"\napi_key_env = "THEIR_KEY"'
    square = await open_square(node(fake_vllm, options), environment={"THEIR_KEY": key})
    try:
        assert (await square.experts[0].ask("who are you?")).text == str(theirs.pid)
    finally:
        await square.aclose()
    with pytest.raises(ConfigError, match=r"api_key_env: the environment variable THEIR_KEY is not set"):
        await open_square(node(fake_vllm, options), environment={})


@pytest.mark.parametrize(
    ("options", "adapter", "message"),
    [
        ('model = "m"', 'adapter = { name = "red@v1" }', r"folder: is required on a vLLM node that agora starts"),
        ('model = "m"\nmax_waiting = 1', "", r"max_waiting: needs max_running"),
        ('model = "m"\nurl = "http://h/v1"\nport = 1', "", r"has a url, so nothing is started: leave out port"),
        ('model = "m"\napi_key_env = "KEY"', "", r"api_key_env needs a url"),
    ],
)
def test_nodes_that_cannot_be(tmp_path: Path, options: str, adapter: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(
            f'[nodes.n]\nkind = "vllm"\n{options}\n[experts.a]\nnode = "n"\ndescription = "d"\n{adapter}', file=None
        )
