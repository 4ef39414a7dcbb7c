"""The square's benchmark: what it asks, how it counts, and (slowly) that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agora.config import load_config
from benchmarks.square import HELD, NODES, Done, Story, config, free_ports, judge, questions
from graphs.plan import make_planner


async def test_its_questions_have_two_or_three_subtasks() -> None:
    planner = make_planner("rules")
    sizes = [len((await planner.plan(q, timeout_s=None, budget=None)).graph) for q in questions()]
    assert set(sizes) <= {2, 3}
    assert sizes.count(2) >= 5
    assert sizes.count(3) >= 5


def test_its_nodes_are_all_neighbours_of_one_another(tmp_path: Path) -> None:
    ports = free_ports(NODES)
    assert len(set(ports.values())) == len(NODES)
    for name in NODES:
        file = tmp_path / f"{name}.toml"
        file.write_text(config(name, ports))
        read = load_config(file)
        assert set(read.neighbours) == set(NODES) - {name}
        assert read.neighbours[next(iter(read.neighbours))].url.startswith("http://127.0.0.1:")


def done(began: float, seconds: float, *experts: tuple[str, ...], failure: str = "") -> Done:
    return Done(began=began, ended=began + seconds, experts=experts, failure=failure)


def test_what_happened_is_counted_as_it_was() -> None:
    story = Story(
        done=[
            done(0.0, 1.0, ("law",), ("c.law",)),
            done(9.5, 1.5, ("c.law", "b.law"), ("tax",)),
            done(9.9, 3.0, ("c.law", "law"), ("c.tax", "b.tax")),
            done(12.0, 2.0, ("law",)),
            done(13.0, 1.0, failure="HTTP 502: no"),
            done(31.0, 4.0, ("c.law",), ("c.tax",)),
        ],
        held=25,
        sent=30,
        killed=10.0,
        noticed=10.2,
        restarted=20.0,
        back=30.0,
    )
    found = judge(story)
    assert found["failed_requests"] == 1
    assert found["failures"] == ["HTTP 502: no"]
    assert found["in_flight_at_kill"] == 25
    assert found["asked_twice"] == 3
    assert found["requests_hurt"] == 2
    assert found["subtasks"] == 9
    assert found["noticed_s"] == pytest.approx(0.2)
    assert found["recovered_s"] == pytest.approx(2.9)
    assert found["restarted_to_back_s"] == pytest.approx(10)
    assert (found["subtasks_on_the_node_before"], found["subtasks_on_the_node_after"]) == (1, 2)
    assert found["latency_s"]["before"] == {"p50": 1.0, "p95": 1.0, "requests": 1}
    assert found["latency_s"]["at_the_kill"]["requests"] == 2
    assert found["latency_s"]["two_nodes"]["requests"] == 2
    assert found["latency_s"]["after"]["p50"] == 4.0


@pytest.mark.slow
def test_nothing_is_lost_when_a_node_is_killed() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.square", "--quick", "--json"], capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["failed_requests"] == 0
    assert found["requests"] >= 500
    assert found["in_flight_at_kill"] >= HELD
    assert found["asked_twice"] >= HELD
    assert found["subtasks_on_the_node_after"] > 0
