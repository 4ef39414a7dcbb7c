"""The vertical graph as a whole: runs, events, checkpoints, with and without LangGraph around it."""

from __future__ import annotations

import asyncio
import math
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from agora.errors import InvalidRequest, Unavailable
from agora.events import AttemptEnded, AttemptStarted, Event, RunFinished, RunState, Status, apply, event_to_dict
from agora.square import Expert, Square
from agora.types import (
    Answer,
    Budget,
    ExpertCard,
    RunResult,
    Subtask,
    TaskGraph,
    Tier,
    outcome_from_dict,
    outcome_to_dict,
)
from experts.fake import FakeBackend, Hang, Reply, question_of
from graphs import resume, run, stream, vertical
from graphs.once import Once
from graphs.plan import StaticPlanner
from graphs.run import Graph
from graphs.store import RunStore

PLAN = TaskGraph(
    (
        Subtask(id="a", question="do a"),
        Subtask(id="b", question="do b"),
        Subtask(id="c", question="with #a and #b", inputs=("a", "b")),
    )
)


def says(text: str, probability: float, **options: Any) -> Reply:
    return Reply(text, logprobs=(math.log(probability),) * 20, **options)


def backends(small: Any = None, large: Any = None) -> dict[str, FakeBackend]:
    return {
        "small": FakeBackend(small or (lambda r: says("small says", 0.5)), name="small"),
        "large": FakeBackend(large or (lambda r: says("large says", 0.9)), name="large"),
    }


def square(of: dict[str, FakeBackend]) -> Square:
    tiers = {"small": Tier.END, "large": Tier.CLOUD}
    prices = {"small": 1.0, "large": 10.0}
    return Square(
        [
            Expert(card=ExpertCard(name=n, description=n, tier=tiers[n], price_per_mtok=prices[n]), backend=b, node=n)
            for n, b in of.items()
        ]
    )


def untimed(value: Any) -> Any:
    """Plain values without times and ids."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in ("at", "seconds", "started_at", "run")}
    return [untimed(v) for v in value] if isinstance(value, list) else value


async def test_every_subtask_climbs_by_itself() -> None:
    def small(request: Any) -> Reply:
        return says("sure", 0.9) if "do a" in question_of(request) else says("maybe", 0.4)

    result = await run(vertical(square(backends(small)), planner=StaticPlanner(PLAN)), "all")
    assert {i: [x.expert for x in many] for i, many in result.attempts.items()} == {
        "a": ["small"],
        "b": ["small", "large"],
        "c": ["small", "large"],
    }
    assert result.complete and result.usage.calls == 5
    assert result.usage.cost == pytest.approx(sum(x.outcome.usage.cost for m in result.attempts.values() for x in m))
    assert any("no policy was fitted" in n or "asked one tier after the other" in n for n in result.notes)
    assert RunResult.from_dict(result.to_dict()) == result


@pytest.mark.parametrize("large", [None, Unavailable("down")])
async def test_it_comes_to_the_same_with_and_without_langgraph(large: Any) -> None:
    told: list[tuple[RunResult, list[Event]]] = []
    for checkpointer in (None, InMemorySaver()):
        events: list[Event] = []
        graph = vertical(square(backends(large=large)), planner=StaticPlanner(PLAN), checkpointer=checkpointer)
        told.append((await run(graph, "all", on_event=events.append), events))
    (direct, events), (recorded, their_events) = told
    assert untimed(direct.to_dict()) == untimed(recorded.to_dict())
    assert sorted(str(untimed(event_to_dict(e))) for e in events) == sorted(
        str(untimed(event_to_dict(e))) for e in their_events
    )
    # Where only the lower tier answered, its answer counts, and says so.
    expected = "small" if large is not None else "large"
    assert {direct.outcome(s.id).expert for s in PLAN} == {expected}
    if large is not None:
        assert any("large could not be asked" in n for n in direct.notes)


async def test_events_tell_an_answer_as_done_only_when_it_is_taken() -> None:
    state = RunState()
    seen: list[Status] = []
    graph = vertical(square(backends()), planner=StaticPlanner([Subtask(id="a", question="do a")]))
    async for event in stream(graph, "all"):
        state = apply(state, event)
        assert apply(state, event) == state
        if isinstance(event, AttemptEnded):
            seen.append(state.subtasks["a"].status)
    assert seen == [Status.RUNNING, Status.DONE]
    assert state.result is not None and state.subtasks["a"].outcome == state.result.outcome("a")


async def test_a_run_may_bring_its_own_budget() -> None:
    graph = vertical(square(backends()), budget=Budget(cost=1e-3))
    assert (await run(graph, "what?")).text == "large says"
    short = await run(graph, "what?", budget=Budget(cost=1e-4))
    assert short.text == "small says" and short.usage.cost <= 1e-4
    assert any("large was not asked: it costs about" in n for n in short.notes)


async def test_what_was_said_before_is_told_to_every_tier() -> None:
    of = backends()
    await run(vertical(square(of)), "why?", said_before="user: is it so?")
    for backend in of.values():
        assert [question_of(r) for r in backend.requests] == ["user: is it so?\n\nwhy?"]


async def test_the_label_of_a_run_holds_on_the_ladder() -> None:
    of = backends()
    graph = vertical(square(of), planner=StaticPlanner(PLAN))
    result = await graph.ainvoke({"question": "all", "reach": "local"})
    assert "small says" in result["answer"] and not of["large"].calls


async def test_identical_subtasks_are_asked_once_on_every_tier() -> None:
    same = TaskGraph(tuple(Subtask(id=f"s{n}", question="do the same") for n in range(5)))
    of = backends(lambda r: says("maybe", 0.4, latency=0.02), lambda r: says("sure", 0.9, latency=0.02))
    result = await run(vertical(square(of), planner=StaticPlanner(same), once=Once()), "all")
    assert {n: len(b.calls) for n, b in of.items()} == {"small": 1, "large": 1}
    assert result.complete and result.usage.calls == 2


async def test_langgraph_limits_that_could_never_move_are_refused() -> None:
    graph = vertical(square(backends()), checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "r1"}, "max_concurrency": 8}
    with pytest.raises(InvalidRequest, match="max_concurrency is 8"):
        await graph.ainvoke({"question": "what?"}, config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"accept": 1.2}, "accept"),
        ({"accept": math.nan}, "accept"),
        ({"max_risk": 0.0}, "max_risk"),
        ({"confidence": 1.0}, "confidence"),
        ({"trade_off": -1.0}, "trade_off"),
        ({"trade_off": math.inf}, "trade_off"),
        ({"experts": []}, "experts"),
        ({"experts": ["small", "small"]}, "experts"),
        ({"signals": ["mood"]}, "allowed: self_consistency"),
        ({"samples": 0}, "samples"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"stream_cost": 0.0}, "cost"),
        ({"stream_seconds": -1.0}, "stream_seconds"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        vertical(square(backends()), **options)


# Bad luck


@pytest.mark.looptime
async def test_a_node_that_never_answers_costs_the_deadline_and_no_more() -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    graph = vertical(square(backends(large=Hang())), planner=StaticPlanner(PLAN), budget=Budget(deadline_s=6.0))
    result = await run(graph, "all")
    assert loop.time() - started < 6.5
    assert isinstance(result.outcome("a"), Answer) and isinstance(result.outcome("b"), Answer)
    assert any("large could not be asked: the run's deadline passed" in n for n in result.notes)


@pytest.mark.looptime
async def test_a_flapping_node_is_asked_no_more_than_once_in_a_climb() -> None:
    asked = 0

    def flaps(request: Any) -> Any:
        nonlocal asked
        asked += 1
        return Unavailable("down") if asked % 2 else says("large says", 0.9)

    result = await run(vertical(square(backends(large=flaps)), planner=StaticPlanner(PLAN)), "all")
    assert result.complete and asked == 3


async def test_all_down_says_what_is_missing_and_asks_once_more() -> None:
    of = backends(Unavailable("down"), Unavailable("down"))
    result = await run(vertical(square(of)), "what?")
    assert result.missing and "No part of this could be answered" in result.text
    assert [len(b.calls) for b in of.values()] == [2, 2]  # passing failures are asked again in a second round
    assert (await run(vertical(Square()), "what?")).missing


@pytest.mark.parametrize("garbage", ["\x00\x00", "\ud800", "   ", "x" * 200_000])
async def test_garbage_is_an_answer_cleaned_or_a_failure(garbage: str) -> None:
    result = await run(vertical(square(backends(small=lambda r: Reply(garbage)))), "what?")
    assert result.complete and result.text == "large says"
    assert RunResult.from_dict(result.to_dict()) == result


async def test_log_probabilities_that_are_no_numbers_tell_nothing() -> None:
    for bad in (math.nan, math.inf, -math.inf, 3.0):
        of = backends(small=lambda r, bad=bad: Reply("a b c", logprobs=(bad, -0.1, -0.1)))
        result = await run(vertical(square(of)), "what?")
        assert result.text == "large says"
        first = result.attempts["t1"][0].outcome
        assert isinstance(first, Answer) and first.confidence is None


async def test_a_clock_that_jumps_changes_no_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    jumps = iter([1e9, 0.0, -5.0] * 1000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    graph = vertical(square(backends()), planner=StaticPlanner(PLAN), stream_seconds=100.0)
    result = await run(graph, "all", budget=Budget(deadline_s=30.0))
    assert result.complete and result.text.count("large says") >= 1


# Resuming


def build(of: dict[str, FakeBackend], store: RunStore, **options: Any) -> Graph:
    return vertical(square(of), planner=StaticPlanner(PLAN), checkpointer=store.checkpointer, **options)


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
async def test_a_run_that_was_interrupted_anywhere_pays_nobody_twice(tmp_path: Path, stop_after: int) -> None:
    """Also in the middle of a climb: what the lower tier answered is not asked of it again."""
    async with RunStore.open(tmp_path / "runs.sqlite") as store:
        seconds = {("small", "a"): 0.05, ("small", "b"): 0.1, ("large", "a"): 0.3, ("large", "b"): 0.1}

        def scripted(name: str, probability: float) -> Any:
            def reply(request: Any) -> Reply:
                return says(f"{name} says", probability, latency=seconds.get((name, question_of(request)[-1]), 0.05))

            return reply

        first = backends(scripted("small", 0.5), scripted("large", 0.9))
        ended: list[tuple[str, int]] = []
        enough = asyncio.Event()

        def watch(event: Event) -> None:
            if isinstance(event, AttemptEnded):
                ended.append((event.subtask, event.attempt))
                if len(ended) == stop_after:
                    enough.set()

        working = asyncio.create_task(run(build(first, store), "all", run_id="r1", on_event=watch))
        await enough.wait()
        await asyncio.sleep(0.02)  # its record is written within milliseconds
        done = set(ended)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        finished = sum(c.outcome == "done" for b in first.values() for c in b.calls)

        second = backends()
        told: list[tuple[str, int]] = []
        started: list[tuple[str, int]] = []

        def note(event: Event) -> None:
            if isinstance(event, AttemptEnded):
                told.append((event.subtask, event.attempt))
            if isinstance(event, AttemptStarted):
                started.append((event.subtask, event.attempt))

        result = await resume(build(second, store), "r1", on_event=note)
        everything = {(s, n) for s in "abc" for n in (1, 2)}
        assert sorted(told) == sorted(everything)
        assert done <= everything - set(started)
        assert sum(len(b.calls) for b in second.values()) == len(everything) - finished
        # What was paid before counts, and each call once.
        assert result.usage.calls == len(everything)
        assert result.usage.cost == pytest.approx(
            sum(x.outcome.usage.cost for many in result.attempts.values() for x in many)
        )
        assert all(result.outcome(s).expert == "large" for s in "abc")


async def test_what_was_spent_in_the_middle_of_a_climb_counts_before_more_is_granted(tmp_path: Path) -> None:
    async with RunStore.open(tmp_path / "runs.sqlite") as store:
        first = backends(large=Hang())
        plan = StaticPlanner(TaskGraph(tuple(Subtask(id=f"s{n}", question=f"do {n}") for n in range(4))))

        def graph(of: dict[str, FakeBackend], cost: float) -> Graph:
            return vertical(square(of), planner=plan, checkpointer=store.checkpointer, budget=Budget(cost=cost))

        working = asyncio.create_task(run(graph(first, 1.0), "all", run_id="r1"))
        while first["large"].load.running < 4:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        spent = sum(c.request is not None for c in first["small"].calls)
        assert spent == 4
        # A budget that what was spent before has used up: nobody is asked any more.
        second = backends()
        paid = 4 * (2 + 2) * 1e-6  # two words asked, two answered, at 1 per million
        result = await resume(graph(second, paid), "r1")
        assert not second["large"].calls and not second["small"].calls
        assert result.complete and {result.outcome(f"s{n}").expert for n in range(4)} == {"small"}
        assert result.usage.cost == pytest.approx(paid)


async def test_a_failed_climb_is_tried_again_on_resume(tmp_path: Path) -> None:
    async with RunStore.open(tmp_path / "runs.sqlite") as store:

        def hangs(request: Any) -> Any:
            return Unavailable("down") if question_of(request) == "do a" else Hang()

        first = backends(hangs, hangs)
        working = asyncio.create_task(run(build(first, store), "all", run_id="r1"))
        while first["small"].load.running < 1 or len(first["large"].calls) < 1:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        second = backends()
        result = await resume(build(second, store), "r1")
        assert result.complete
        assert [x.expert for x in result.attempts["a"]] == ["small", "large", "small", "large"]
        # And it is the same when read back.
        finished = [e async for e in stream(build(backends(), store), "all", run_id="r2")][-1]
        assert isinstance(finished, RunFinished) and finished.result.complete


WORKER = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from test_vertical import backends, build, says
from experts.fake import Hang
from graphs.run import run
from graphs.store import RunStore

async def main():
    async with RunStore.open({path!r}) as store:
        await store.create("r1", "all", graph="vertical", config_path=None)
        def tell(e):
            print(type(e).__name__, getattr(e, "subtask", ""), getattr(e, "attempt", ""), flush=True)
        await run(build(backends(large=Hang()), store), "all", run_id="r1", on_event=tell)

asyncio.run(main())
"""


async def test_a_climb_killed_with_sigkill_goes_on_where_it_was(tmp_path: Path) -> None:
    path = str(tmp_path / "runs.sqlite")
    code = WORKER.format(tests=str(Path(__file__).parent), path=path)
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert worker.stdout is not None
    asking = 0
    async with asyncio.timeout(60):
        while asking < 2 and (line := (await worker.stdout.readline()).decode().split()):
            asking += line[0] == "AttemptStarted" and line[2] == "2"
        await asyncio.sleep(0.2)
        worker.kill()
        await worker.wait()
    assert asking == 2 and worker.returncode == -signal.SIGKILL
    async with RunStore.open(path) as store:
        second = backends()
        await store.take_over("r1")
        result = await resume(build(second, store), "r1")
    # a and b had been answered by the lower tier; it is asked for c alone.
    assert [question_of(r)[:4] for r in second["small"].requests] == ["with"]
    assert len(second["large"].requests) == 3
    assert result.complete and result.usage.calls == 6


def test_answers_that_were_stored_before_there_were_signals_are_read() -> None:
    answer = Answer(text="42", expert="small", signals={"mean_logprob": -0.5})
    plain = outcome_to_dict(answer)
    assert outcome_from_dict(plain) == answer
    del plain["signals"]
    old = outcome_from_dict(plain)
    assert isinstance(old, Answer) and old.signals == {} and old.text == "42"
