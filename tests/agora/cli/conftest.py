"""A command line of one's own: its own folders, no network, no models."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agora.cli.app import run

FAKE = """
[nodes.quick]
kind = "fake"
replies = { "bond" = "A loan one can sell.", "photosynthesis" = "Plants eat light." }
reply = "forty-two"

[nodes.other]
kind = "fake"
reply = "forty-three"

[experts.finance]
node = "quick"
ready = "finance"

[experts.education]
node = "other"
ready = "education"

[graph]
router = "keywords"

[store]
path = "runs.sqlite"
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What was printed, if it is one JSON value and nothing else."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of its error."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


Agora = Callable[..., Outcome]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder of a user who has nothing; the network is off."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AGORA_DEBUG", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def environment(root: Path) -> dict[str, str]:
    """The environment of such a user."""
    return {
        "HOME": str(root),
        "XDG_CONFIG_HOME": str(root / "config"),
        "XDG_DATA_HOME": str(root / "data"),
        "XDG_CACHE_HOME": str(root / "cache"),
        "AGORA_CACHE": str(root / "cache" / "agora"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(root / "hub"),
        "COLUMNS": "200",
    }


@pytest.fixture
def agora(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Agora:
    """Runs a command line in this process."""

    def call(*arguments: str, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = run(arguments)
        said = capsys.readouterr()
        return Outcome(int(code), said.out, said.err)

    return call


@pytest.fixture
def fake(home: Path) -> Path:
    """An agora.toml with two scripted experts in the working folder."""
    file = home / "agora.toml"
    file.write_text(FAKE)
    return file


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """Starts a command line as a process of its own; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def call(*arguments: str, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", "from agora.cli import main; main()", *arguments],
            cwd=home,
            env={**os.environ, **environment(home.parent)},
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()
        process.communicate()
