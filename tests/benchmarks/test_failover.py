"""The failover benchmark: what counts as failed, and one small run of it with real processes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from rich.progress import Progress

from agora.config import parse_config
from benchmarks import failover
from benchmarks.failover import IN_FLIGHT, NODES, Story, gateway_config, judge, measure, node_config, table
from benchmarks.failover_parts.client import READERS, Done
from benchmarks.multipath_parts.hedging import hedging


def done(began: float, seconds: float, **values: object) -> Done:
    values = {"form": "whole", **values}
    return Done(began=began, ended=began + seconds, **values)  # type: ignore[arg-type]


def test_figures_are_of_the_right_requests() -> None:
    story = Story(victim="a", held=31, killed=10.0, opened=10.25, restarted=12.0, closed=15.0)
    story.done += [done(n / 10, 1.0) for n in range(80)]
    story.done += [done(9.5, 3.0, form="stream", notes=("path a broke off after 7 characters",))]
    story.done += [done(11.0, 2.0, failure="HTTP 503"), done(13.0, 60.0), done(16.0, 0.5, form="graph")]
    result = judge(story)
    assert result["failed_requests"] == 1
    assert result["in_flight_at_kill"] == 31
    assert result["breaker_open_s"] == pytest.approx(0.25)
    assert result["p99_before_ms"] == pytest.approx(1000)
    assert 2900 < result["p99_during_ms"] <= 3000, "what came long after the kill does not count"
    assert result["streams_resumed"] == 1
    assert result["p99_after_ms"] == pytest.approx(500)
    assert result["restart_to_closed_s"] == pytest.approx(3.0)
    table(result)


def test_streams_that_are_cut_or_garbled_are_not_read_as_answers() -> None:
    def event(text: str, **more: object) -> str:
        return "data: " + json.dumps({"choices": [{"delta": {"content": text}}], **more}) + "\n\n"

    whole = event("one ") + event("two", agora={"path": "a"}) + "data: [DONE]\n\n"
    assert READERS["stream"](whole) == ("one two", {"path": "a"})
    with pytest.raises(ValueError, match="end"):
        READERS["stream"](event("one "))
    with pytest.raises(KeyError):
        READERS["stream"]('data: {"error": {"message": "broke"}}\n\ndata: [DONE]\n\n')


def test_its_configurations_are_ones_a_user_could_write() -> None:
    ports = {name: 9000 + n for n, name in enumerate((*NODES, "gateway"))}
    gateway = parse_config(gateway_config(ports), file=Path("/somewhere/agora.toml"))
    assert gateway.graph.name == "multi_access"
    assert gateway.experts[failover.EXPERT].also == ("b", "c")
    for name in NODES:
        parse_config(node_config(name, ports), file=Path("/somewhere/agora.toml"))


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_nothing_is_lost_when_a_machine_is_killed() -> None:
    with Progress(disable=True) as progress:
        result, _ = await measure(6 * IN_FLIGHT, progress)
    assert result["failed_requests"] == 0, result["failures"]
    assert result["in_flight_at_kill"] >= 20
    assert result["requests"] >= 500
    assert 0 <= result["breaker_open_s"] < 5


def test_second_copies_cut_the_tail_within_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.multipath_parts.hedging.QUICK_REQUESTS", 1200)
    result = hedging(quick=True, seed=1)
    assert result["hedging"]["p99_cut"] >= 5
    assert 0 < result["hedging"]["extra_requests"] <= 0.05
    assert result["hedging_correlated"]["extra_requests"] <= 0.05
    assert result["hedging_correlated"]["p99_cut"] == pytest.approx(1, abs=0.3)
    asyncio.set_event_loop(None)
