"""A run without LangGraph around it comes to the same as one with it."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from agora.errors import InvalidRequest, Unavailable
from agora.events import AttemptEnded, Event, Planned, RunFinished, event_to_dict
from agora.protocols import Capabilities
from agora.square import Expert, Square
from agora.types import Budget, ExpertCard, RunResult, Subtask
from experts.fake import FakeBackend
from graphs import horizontal, run, stream
from graphs.direct import how_of
from graphs.plan import StaticPlanner

PLAN = [
    Subtask(id="t1", question="one", expert="a"),
    Subtask(id="t2", question="two", expert="b"),
    Subtask(id="t3", question="both: #t1 #t2", inputs=("t1", "t2")),
]


def square(*, fails: bool = False) -> Square:
    def expert(name: str, **options: Any) -> Expert:
        backend = FakeBackend(lambda r: f"{name} says hello", name=name, capabilities=Capabilities(), **options)
        return Expert(card=ExpertCard(name=name, description=name), backend=backend)

    failures = (lambda call: Unavailable("gone", backend="b")) if fails else None
    return Square([expert("a"), expert("b", failures=failures) if failures else expert("b")])


def untimed(value: Any) -> Any:
    """Plain values without times and ids."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in ("at", "seconds", "started_at", "run")}
    return [untimed(v) for v in value] if isinstance(value, list) else value


async def both(fails: bool) -> list[tuple[RunResult, list[Event]]]:
    told = []
    for checkpointer in (None, InMemorySaver()):
        graph = horizontal(square(fails=fails), planner=StaticPlanner(PLAN), checkpointer=checkpointer)
        assert (how_of(graph) is None) == (checkpointer is not None)
        events: list[Event] = []
        told.append((await run(graph, "What?", on_event=events.append), events))
    return told


@pytest.mark.parametrize("fails", [False, True])
async def test_it_comes_to_the_same(fails: bool) -> None:
    (direct, events), (recorded, their_events) = await both(fails)
    assert untimed(direct.to_dict()) == untimed(recorded.to_dict())
    assert direct.complete
    assert sorted(str(untimed(event_to_dict(e))) for e in events) == sorted(
        str(untimed(event_to_dict(e))) for e in their_events
    )


async def test_events_are_streamed_in_the_order_they_happen() -> None:
    graph = horizontal(square(), planner=StaticPlanner(PLAN))
    events = [e async for e in stream(graph, "What?")]
    assert isinstance(events[1], Planned)
    assert isinstance(events[-1], RunFinished)
    assert len([e for e in events if isinstance(e, AttemptEnded)]) == 3


async def test_an_abandoned_stream_ends_the_work() -> None:
    backend = FakeBackend("slow", latency=60.0)
    slow = Square([Expert(card=ExpertCard(name="a", description="a"), backend=backend)])
    events = stream(horizontal(slow), "What?")
    async for _ in events:
        if backend.load.running:
            break
    await events.aclose()
    await asyncio.sleep(0)
    assert backend.load.total == 0


async def test_errors_are_the_same() -> None:
    graph = horizontal(square(), planner=StaticPlanner(PLAN))
    with pytest.raises(InvalidRequest, match="empty"):
        await run(graph, " ")
    with pytest.raises(InvalidRequest, match="must match"):
        await run(graph, "What?", run_id="a/b")


async def test_a_budget_holds() -> None:
    graph = horizontal(square(), planner=StaticPlanner(PLAN), budget=Budget(tokens=10))
    assert not (await run(graph, "What?")).complete
    assert (await run(graph, "What?", budget=Budget(tokens=100_000))).complete


async def test_tracing_gets_langgraph(monkeypatch: pytest.MonkeyPatch) -> None:
    from langsmith.utils import get_env_var

    graph = horizontal(square())
    assert how_of(graph) is not None
    get_env_var.cache_clear()
    monkeypatch.setenv("LANGSMITH_TRACING", "true")
    try:
        assert how_of(graph) is None
    finally:
        monkeypatch.undo()
        get_env_var.cache_clear()
    assert dataclasses.is_dataclass(how_of(graph))


async def test_what_was_said_before_is_told_to_everyone_asked_either_way() -> None:
    for checkpointer in (None, InMemorySaver()):
        backend = FakeBackend()
        everyone = Square([Expert(card=ExpertCard(name="a", description="a"), backend=backend)])
        graph = horizontal(
            everyone, planner=StaticPlanner([Subtask(id="t1", question="Why?")]), checkpointer=checkpointer
        )
        result = await run(graph, "Why?", said_before="user: Is it so?")
        assert result.question == "Why?"
        assert result.graph.order[0].question == "Why?"
        assert result.text == "user: Is it so?\n\nWhy?"
        assert (await run(graph, "Why?")).text == "Why?"
        with pytest.raises(InvalidRequest, match="what was said before it have 100,0"):
            await run(graph, "Why?", said_before="x" * 99_999)
