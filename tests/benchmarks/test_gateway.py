"""The gateway benchmark: its figures are what they are called, it runs to its end, and it leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from agora.errors import InvalidRequest
from benchmarks import gateway
from benchmarks.common import show
from benchmarks.gateway_parts.contenders import CONTENDERS

ROOT = Path(__file__).parents[2]
TINY = ["--without", "litellm", "--rounds", "2", "--seconds", "0.15", "--connections", "4"]


def test_a_ratio_compares_turns_of_the_same_round() -> None:
    # In the second round the machine was half as fast: for both.
    rates = {"one": [100.0, 50.0, 104.0], "other": [50.0, 25.0, 26.0]}
    assert gateway.over(rates, "one", "other") == 2.0
    assert gateway.over(rates, "one", "absent") is None


def test_what_is_added_is_a_percentile_less_that_without() -> None:
    hundred = [n / 1000 for n in range(101)]
    more = [s + 0.002 for s in hundred[:-10]] + [s + 0.005 for s in hundred[-10:]]
    told = gateway.latencies(
        {"direct": hundred, "whole": more},
        {"direct_first": hundred, "first": more, "direct": [1 + s for s in hundred], "whole": [2 + s for s in hundred]},
    )
    assert told["added_p50_ms"] == pytest.approx(2) == told["added_stream_p50_ms"]
    assert told["added_p99_ms"] == pytest.approx(5) == told["added_stream_p99_ms"]
    assert told["added_stream_whole_p50_ms"] == pytest.approx(1000) == told["added_stream_whole_p99_ms"]
    assert told["direct_p50_ms"] == pytest.approx(50)


@pytest.mark.parametrize(
    "wrong", [["--rounds", "0"], ["--seconds", "-1"], ["--connections", "0"], ["--seconds", "nan"]]
)
def test_nonsense_is_refused(wrong: list[str]) -> None:
    with pytest.raises(InvalidRequest, match=wrong[0]):
        gateway.main(wrong)


def ours() -> set[int]:
    """Processes that a benchmark of this process started."""
    return {p.pid for p in psutil.Process().children(recursive=True)}


def test_it_runs_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    before, cores = ours(), os.sched_getaffinity(0)
    gateway.main([*TINY, "--json"])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert ours() == before and os.sched_getaffinity(0) == cores
    assert told["litellm"] is None and told["agora_over_litellm"] is None and "--without" in told["notes"]["litellm"]
    for name in CONTENDERS.keys() - {"litellm"}:
        assert told[name] > 10 and len(told["rounds"][name]) == 2
        assert min(told["rounds"][name]) <= told[name] <= told["best"][name]
        # How much of its core it got: all of it on a machine with nothing else to do.
        assert 0.02 < told["server_busy"][name] <= 1.2
    assert told["agora_expert"] > told["stategraph_proxy"]
    assert told["agora_over_bare"] > 0 and told["graph_over_stategraph"] > 0
    assert set(told["streams"]) == {"agora_expert", "agora_graph", "bare_proxy"}
    # On a busy machine a request straight to the upstream may well be the slower one.
    for figure in ("added_p50_ms", "added_stream_p50_ms", "added_stream_whole_p50_ms"):
        assert abs(told[figure]) < 1000
    assert {"added_p99_ms", "added_stream_p99_ms", "memory_growth_mb"} < told.keys() and told["memory_mb"] > 20
    show(told, as_json=False, table=gateway.table(told))
    assert "graph_over_stategraph" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_its_servers_when_it_is_ended(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "benchmarks.gateway", *TINY, "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        children: list[psutil.Process] = []
        until = time.monotonic() + 60
        # The upstream first, and then the three others.
        while len(children) < 4:
            assert process.poll() is None and time.monotonic() < until
            children = psutil.Process(process.pid).children(recursive=True)
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and out == "" and "Traceback" not in err
    assert psutil.wait_procs(children, timeout=5)[1] == []
