"""The benchmark of the simulator: its figures are what they are called, and it goes without Flower, and says so."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import simulator
from benchmarks.simulator import PeerFailed, Plan, flower, has_flower, main, measure
from benchmarks.simulator_parts import idle
from benchmarks.simulator_parts.ours import timed

TINY = Plan(turns=1, updates=96, flower_rounds=3)


def peers(folder: Path, script: str) -> Path:
    """An environment whose interpreter is this script."""
    for name in ("flwr", "ray"):
        package = folder / "lib" / "python3.11" / "site-packages" / name
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return folder


def alive(number: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "QUICK", TINY)
    monkeypatch.setattr(simulator, "IDLE_CLIENTS", 300)
    monkeypatch.setattr(simulator, "idle", lambda quick, seed: {"clients": 300, **idle.measure(300, 96, seed)})


def test_without_flower_the_ratio_is_unknown_and_the_way_to_it_is_told(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--quick", "--json", "--peers", str(tmp_path / "none")])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["flower_updates_per_s"] is None and told["ratio"] is None
    assert "make peers" in told["notes"]["flower"]
    assert told["updates_per_s"] > 0 < told["updates_per_s_wire"]
    assert {"clients", "join_s", "memory_mb", "updates_per_s", "updates_per_s_few"} <= set(told["idle"])
    assert told["idle"]["memory_mb"] > 0.03
    main(["--quick", "--peers", str(tmp_path / "none")])
    assert "make peers" in capsys.readouterr().out


def test_the_ratio_is_of_tasks_per_second(tiny: None, tmp_path: Path) -> None:
    where = peers(tmp_path, """echo '{"version": "9", "seconds": [7.0, 2.0, 1.0, 2.0], "whole_s": 15.0}'""")
    told = measure(quick=True, seed=0, peers=where)
    assert told["flower_updates_per_s"] == pytest.approx(16 / 2.0)
    assert told["flower"]["start_s"] == pytest.approx(10.0) and told["flower"]["ms_per_task"] == pytest.approx(125.0)
    assert told["ratio"] == pytest.approx(told["updates_per_s"] / 8.0)
    left = measure(quick=True, seed=0, peers=where, without=["flower"])
    assert left["ratio"] is None and "--without" in left["notes"]["flower"]


def test_a_flower_that_fails_is_no_result(tmp_path: Path) -> None:
    where = peers(tmp_path, "echo 'ray is not well' >&2; exit 3")
    assert has_flower(where) and not has_flower(tmp_path / "other")
    with pytest.raises(PeerFailed, match="code 3: ray is not well"):
        flower(where, TINY)


def test_what_flower_starts_does_not_outlive_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "FLOWER_LIMIT_S", 0.3)
    where = peers(tmp_path, f"sleep 60 & echo $! > {tmp_path}/pid; sleep 60")
    with pytest.raises(PeerFailed, match=r"not ended after 0\.3 s"):
        flower(where, TINY)
    number = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 5
    while time.monotonic() < until and alive(number):
        time.sleep(0.01)
    assert not alive(number)


@pytest.mark.parametrize("wire", [False, True])
def test_our_turns_do_the_work_they_are_timed_for(wire: bool) -> None:
    told = timed(updates=64, clients=20, wire=wire, seed=1, synchronous=not wire)
    assert told.updates == 64 and told.per_s == pytest.approx(64 / told.seconds)
