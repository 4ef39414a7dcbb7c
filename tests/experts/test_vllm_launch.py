"""Command lines, ports, the log's telling lines, and the waits between starts: the parts around a vLLM process."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import pytest

from agora.errors import InvalidRequest
from experts.vllm_launch import Install, Launch, default_python, free_port, has_gpu, model_folder, port_is_free
from experts.vllm_process import KEPT_LINES, MAX_LINE_CHARS, ServerProcess, telling_lines
from experts.vllm_supervisor import Supervision

CPU = Install(python=Path("/venv/bin/python"), version="0.32.0", gpu=False)


def test_a_hub_id_is_served_under_its_name() -> None:
    launch = Launch(model="org/model", served_as="org/model", port=7, args=("--max-num-seqs", "8"))
    command = launch.command(CPU)
    assert command[:3] == ["/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert command[command.index("--served-model-name") + 1] == "org/model"
    assert command[-2:] == ["--max-num-seqs", "8"]


@pytest.mark.parametrize(("wanted", "room"), [(1, 1), (2, 8), (16, 16), (17, 32), (300, 320), (512, 512)])
def test_room_for_ranks_that_vllm_knows(wanted: int, room: int) -> None:
    launch = Launch(model="m", served_as="m", port=7, adapters=True, max_lora_rank=wanted)
    command = launch.command(CPU)
    assert command[command.index("--max-lora-rank") + 1] == str(room)


def test_what_the_environment_says_beats_the_defaults_and_the_node_beats_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_API_KEY", "from outside")
    launch = Launch(model="m", served_as="m", port=7, env={"VLLM_LOGGING_LEVEL": "ERROR"})
    environment = launch.environment(CPU, "its own")
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert environment["VLLM_LOGGING_LEVEL"] == "ERROR"
    assert environment["VLLM_API_KEY"] == "its own"


def test_the_interpreter_that_is_used_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGORA_VLLM_PYTHON", raising=False)
    beside = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
    assert default_python() == (beside if beside.exists() else Path(sys.executable))
    python = tmp_path / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert default_python() == python, "the link itself: what it points to is outside the environment"
    monkeypatch.setenv("AGORA_VLLM_PYTHON", "/opt/python")
    assert default_python() == Path("/opt/python")


def test_a_gpu_shows_by_its_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("experts.vllm_launch.GPU_SIGNS", (str(tmp_path / "nvidiactl"),))
    assert not has_gpu()
    (tmp_path / "nvidiactl").touch()
    assert has_gpu()


def test_folders_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert model_folder("model") == tmp_path / "model"
    assert model_folder("org/model") is None


def test_a_free_port_is_free() -> None:
    assert port_is_free(free_port())


# -- The log

FAILED_START = """\
(APIServer pid=1) INFO 11-22 21:06:53 [api_server.py:1] vLLM API server version 0.32.0
(EngineCore pid=2) ERROR 11-22 21:06:54 [core.py:1] EngineCore failed to start.
(EngineCore pid=2) ERROR 11-22 21:06:54 [core.py:1] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-22 21:06:54 [core.py:1]   File "core.py", line 1, in run_engine_core
(EngineCore pid=2) ERROR 11-22 21:06:54 [core.py:1] ValueError: No available memory for the cache blocks.
(EngineCore pid=2) Process EngineCore:
(EngineCore pid=2) Traceback (most recent call last):
(EngineCore pid=2) ValueError: No available memory for the cache blocks.
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
/usr/lib/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: 1 leaked semaphore
  warnings.warn('resource_tracker: There appear to be %d '
"""


def test_the_causes_are_told_once_and_without_noise() -> None:
    assert telling_lines(FAILED_START.splitlines()) == [
        "ValueError: No available memory for the cache blocks.",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]


def test_of_many_errors_the_first_and_the_last_are_told() -> None:
    lines = [f"ValueError: {n}" for n in range(9)]
    assert telling_lines(lines) == ["ValueError: 0", "ValueError: 1", "ValueError: 8"]


def test_without_an_error_the_last_lines_are_told() -> None:
    assert telling_lines(["one", "two", "", "three", "four"]) == ["two", "three", "four"]


async def test_a_log_without_end_stays_bounded(tmp_path: Path) -> None:
    flood = (
        "import sys\nfor n in range(3000): print(n, 'x' * 3000)\nsys.stdout.write('\\x1b[31mred\\x1b[0m' + 'y' * 10**6)"
    )
    process = await ServerProcess.launch(
        [sys.executable, "-S", "-c", flood], environment={}, folder=tmp_path, grace_s=0.5
    )
    await asyncio.wait_for(process.gone(), 20)
    assert len(process.lines) == KEPT_LINES
    assert max(map(len, process.lines)) <= MAX_LINE_CHARS
    assert process.lines[-2].startswith("2999 ")
    assert process.how().startswith("the process ended with status 0; its log says: ")
    await process.stop()


async def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    process = await ServerProcess.launch(["/nowhere/python"], environment={}, folder=tmp_path, grace_s=0.5)
    await asyncio.wait_for(process.gone(), 20)
    assert process.ended.is_set()
    assert process.how() == "it could not be started: No such file or directory"
    assert tmp_path.exists()


# -- Waits


def test_waits_grow_up_to_a_cap_and_vary() -> None:
    how = Supervision(backoff_s=1.0, backoff_cap_s=60.0)
    rng = random.Random(1)
    waits = {n: [how.wait(n, rng) for _ in range(200)] for n in (1, 2, 5, 7, 5000)}
    for n, longest in ((1, 1.0), (2, 2.0), (5, 16.0), (7, 60.0), (5000, 60.0)):
        assert longest / 2 <= min(waits[n]) < max(waits[n]) <= longest
        assert max(waits[n]) - min(waits[n]) > longest / 4


@pytest.mark.parametrize("wrong", [{"checks": 0}, {"poll_s": 0.0}, {"start_timeout_s": -1.0}])
def test_supervision_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        Supervision(**wrong)  # type: ignore[arg-type]
