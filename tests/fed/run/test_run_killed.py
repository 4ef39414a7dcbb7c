"""A run that is killed or interrupted goes on, and ends with the bytes of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fed.config import FedConfig
from fed.run import run

Project = Callable[..., FedConfig]

VERSIONS = 20


@pytest.fixture
def config(project: Project) -> FedConfig:
    return project(
        ("publications = 6", f"publications = {VERSIONS}"),
        ("seed = 3", "seed = 3\nevaluate_every = 6"),
        more="[[chain]]\nkind = 'int8'\n",
    )


def ended_early(config: FedConfig, how: signal.Signals) -> tuple[int, str]:
    """Starts the command line, ends it after some versions, and returns its exit code and what it said."""
    assert config.file is not None
    process = subprocess.Popen(
        [sys.executable, "-c", "from agora.cli import main; main()", "fed", "run", str(config.file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    record = config.run.out / "record.jsonl"
    try:
        for _ in range(6000):
            if record.exists() and record.read_bytes().count(b"\n") >= 5:
                break
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(how)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return process.returncode, said


def files(folder: Path) -> dict[str, bytes]:
    names = ("record.jsonl", "evaluations.jsonl", "result.json", "clients.json", "config.toml")
    found = {name: (folder / name).read_bytes() for name in names}
    return found | {str(p.relative_to(folder)): p.read_bytes() for p in (folder / "adapters").rglob("*.*")}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_early_ends_with_the_same_bytes(
    config: FedConfig, tmp_path: Path, how: signal.Signals
) -> None:
    code, said = ended_early(config, how)
    assert not (config.run.out / "result.json").exists()
    assert "Traceback" not in said
    if how is signal.SIGINT:
        assert code == 130
        assert f"go on with: agora fed run {config.file} --resume" in said
    else:
        assert code == -signal.SIGKILL
    made = (config.run.out / "record.jsonl").read_bytes().count(b"\n")
    assert 5 <= made < VERSIONS
    ended = run(config, config.run.out, resume=True)
    run(config, tmp_path / "whole")
    assert ended.finished and ended.result["versions"] == VERSIONS
    there, expected = files(config.run.out), files(tmp_path / "whole")
    assert there.keys() == expected.keys()
    assert [name for name in there if there[name] != expected[name] and name != "config.toml"] == []
