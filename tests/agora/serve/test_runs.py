"""Runs that outlive connections and processes: nothing accepted is lost, nothing is told twice or too early."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agora.errors import InvalidRequest, RunNotFound, StoreError
from agora.events import AttemptEnded, Event, Planned, RunFailed, RunFinished, RunStarted, RunState, apply
from agora.serve.errors import ApiError
from agora.serve.live_run import TAIL
from agora.serve.runs import ORIGIN, Runs
from agora.square import Expert, Square
from agora.types import Answer, Budget, ExpertCard, Subtask, TaskGraph
from experts.fake import FakeBackend, Reply, question_of
from graphs.horizontal import horizontal
from graphs.plan import StaticPlanner
from graphs.run import Graph
from graphs.store import RunStatus, RunStore

CHAIN = TaskGraph(
    (
        Subtask(id="a", question="do a"),
        Subtask(id="b", question="do b", inputs=("a",)),
        Subtask(id="c", question="do c"),
        Subtask(id="d", question="do d", inputs=("b", "c")),
    )
)


def asked(request: Any) -> str:
    return question_of(request).rpartition("do ")[2]


def fake(latency: float = 0.0, **more: Any) -> FakeBackend:
    return FakeBackend(lambda r: Reply(f"did {asked(r)}", latency=latency), **more)


def graph_of(store: RunStore, backend: FakeBackend, plan: TaskGraph = CHAIN) -> Graph:
    expert = Expert(card=ExpertCard(name="one", description="does things"), backend=backend)
    return horizontal(Square([expert]), planner=StaticPlanner(plan), checkpointer=store.checkpointer)


@asynccontextmanager
async def opened(
    path: Path | str, backend: FakeBackend, *, resume: bool = True, drain_s: float = 0.0, **more: Any
) -> AsyncIterator[tuple[Runs, RunStore]]:
    """The service of one process, from its start to its end."""
    async with RunStore.open(path) as store:
        runs = Runs(store, {"horizontal": graph_of(store, backend)}, default_graph="horizontal", **more)
        await runs.start(resume=resume)
        try:
            yield runs, store
        finally:
            await runs.aclose(drain_s)


async def seen(runs: Runs, run_id: str, after: int = 0, most: int | None = None) -> list[tuple[int, Event]]:
    """What one who watches sees: until the end, or so many events."""
    events: list[tuple[int, Event]] = []
    async with asyncio.timeout(20), aclosing(runs.watch(run_id, after=after)) as watched:
        async for item in watched:
            events.append(item)
            if len(events) == most:
                break
    return events


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def test_a_run_is_worked_on_and_its_events_are_told_in_order(tmp_path: Path) -> None:
    async with opened(tmp_path / "runs.sqlite", fake(0.01)) as (runs, store):
        record = await runs.create("all", metadata={"who": "me"}, budget=Budget(tokens=5_000))
        assert record.status is RunStatus.RUNNING
        assert (await store.get(record.id)).question == "all"
        events = await seen(runs, record.id)
        ended = await runs.get(record.id)
        assert await runs.list() == [replace(ended, result=None)]
    assert [n for n, _ in events] == list(range(1, len(events) + 1))
    assert isinstance(events[0][1], RunStarted)
    assert isinstance(events[1][1], Planned)
    assert isinstance(events[-1][1], RunFinished)
    assert ended.status is RunStatus.DONE
    assert ended.result == events[-1][1].result
    assert (ended.metadata, ended.budget, ended.origin) == ({"who": "me"}, Budget(tokens=5_000), ORIGIN)


async def test_what_was_accepted_is_listed_and_told_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    async with opened(path, fake()) as (runs, _):
        done = await runs.create("all")
        before = await seen(runs, done.id)
    async with opened(path, fake()) as (runs, _):
        assert [r.id for r in await runs.list()] == [done.id]
        assert await seen(runs, done.id) == before
        assert await seen(runs, done.id, after=3) == before[3:]


async def test_a_process_that_ends_leaves_its_runs_to_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    first = fake(0.05)
    async with opened(path, first, max_runs=1) as (runs, _):
        begun = await runs.create("all")
        waiting = await runs.create("all the rest")
        assert runs.is_waiting(waiting.id)
        told = await seen(runs, begun.id, most=5)
    assert first.load.total == 0
    second = fake()
    async with opened(path, second) as (runs, store):
        rest = await seen(runs, begun.id, after=told[-1][0])
        assert (await seen(runs, waiting.id))[-1][1].__class__ is RunFinished
        assert (await store.get(begun.id)).crashes == 0
        assert (await runs.get(begun.id)).status is RunStatus.DONE
    whole = told + rest
    assert [n for n, _ in whole] == list(range(1, len(whole) + 1))
    # What was answered before is neither asked nor told again.
    ended = [(e.subtask, e.attempt) for _, e in whole if isinstance(e, AttemptEnded)]
    assert sorted(ended) == [("a", 1), ("b", 1), ("c", 1), ("d", 1)]
    assert sum(isinstance(e, Planned) for _, e in whole) == 1


@pytest.mark.parametrize("cut", range(1, 12))
async def test_a_restart_anywhere_loses_no_event_and_repeats_none(tmp_path: Path, cut: int) -> None:
    """One who watches sees the first `cut` events of a live run, loses the connection, and comes after a restart."""
    path = tmp_path / "runs.sqlite"
    async with opened(path, fake(0.004)) as (runs, _):
        record = await runs.create("all", run_id="r1")
        first = await seen(runs, record.id, most=cut)
    async with opened(path, fake(0.004)) as (runs, store):
        rest = await seen(runs, record.id, after=first[-1][0])
        stored = await store.events(record.id)
    assert first + rest == stored
    assert [n for n, _ in stored] == list(range(1, len(stored) + 1))
    assert isinstance(stored[-1][1], RunFinished)
    state = RunState()
    for _, event in stored:
        state = apply(state, event)
    assert state.result is not None and state.result.complete
    assert all(isinstance(s.outcome, Answer) for s in state.subtasks.values())


async def test_no_event_is_seen_that_is_not_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = asyncio.Event()
    append = RunStore.append

    async def slow(store: RunStore, batch: Any) -> Any:
        await held.wait()
        return await append(store, batch)

    monkeypatch.setattr(RunStore, "append", slow)
    backend = fake()
    async with opened(tmp_path / "runs.sqlite", backend) as (runs, store):
        record = await runs.create("all")
        # The run itself does not wait for the disk.
        await until(lambda: len(backend.requests) == 4)
        watching = asyncio.create_task(seen(runs, record.id))
        await asyncio.sleep(0.05)
        assert not watching.done()
        assert await store.last_seq(record.id) == 0
        held.set()
        assert isinstance((await watching)[-1][1], RunFinished)


async def test_many_watch_and_those_who_are_slow_hold_nothing_up(tmp_path: Path) -> None:
    plan = TaskGraph(tuple(Subtask(id=f"s{n}", question=f"do {n}") for n in range(200)))
    backend = fake()
    async with RunStore.open(tmp_path / "runs.sqlite") as store:
        runs = Runs(store, {"g": graph_of(store, backend, plan)}, default_graph="g")
        await runs.start()
        record = await runs.create("all")
        slow = runs.watch(record.id)
        first = await anext(slow)
        quick = await asyncio.gather(*(seen(runs, record.id) for _ in range(5)))
        assert (await runs.get(record.id)).status is RunStatus.DONE
        rest = [item async for item in slow]
        await runs.aclose()
    assert len(quick[0]) > TAIL
    assert all(q == quick[0] for q in quick)
    assert [first, *rest] == quick[0]


async def test_those_who_watch_and_go_leave_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path / "runs.sqlite", fake(5)) as (runs, _):
        record = await runs.create("all")
        await seen(runs, record.id, most=2)
        before = asyncio.all_tasks()
        watchers = [asyncio.create_task(seen(runs, record.id)) for _ in range(20)]
        await asyncio.sleep(0.02)
        for w in watchers:
            w.cancel()
        await asyncio.wait(watchers)
        assert asyncio.all_tasks() == before
        assert runs.load.running == 1


async def test_a_cancelled_run_frees_its_experts_and_stays_so(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    backend = fake(60)
    async with opened(path, backend) as (runs, _):
        record = await runs.create("all")
        watching = asyncio.create_task(seen(runs, record.id))
        await until(lambda: backend.load.running == 2)
        cancelled = await runs.cancel(record.id)
        assert backend.load.total == 0
        assert cancelled.status is RunStatus.CANCELLED
        events = await watching
        last = events[-1][1]
        assert isinstance(last, RunFailed) and last.code == "cancelled"
        assert await runs.cancel(record.id) == cancelled
        with pytest.raises(ApiError, match="cancelled") as told:
            await runs.resume(record.id)
        assert told.value.status == 409
    later = fake()
    async with opened(path, later) as (runs, _):
        assert (await runs.get(record.id)).status is RunStatus.CANCELLED
        assert await seen(runs, record.id) == events
    assert later.requests == []


async def test_a_run_that_waits_or_is_interrupted_is_cancelled_too(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    backend = fake(60)
    async with opened(path, backend, max_runs=1) as (runs, _):
        first = await runs.create("all")
        second = await runs.create("all")
        await runs.cancel(second.id)
        assert runs.load.running == 1 and runs.load.waiting == 0
    async with opened(path, backend, resume=False) as (runs, _):
        assert (await runs.get(first.id)).status is RunStatus.INTERRUPTED
        assert (await runs.cancel(first.id)).status is RunStatus.CANCELLED
        assert [e.code for _, e in await seen(runs, first.id) if isinstance(e, RunFailed)] == ["cancelled"]
        with pytest.raises(RunNotFound):
            await runs.cancel("nobody")


async def test_an_ended_run_is_not_cancelled_afterwards(tmp_path: Path) -> None:
    async with opened(tmp_path / "runs.sqlite", fake()) as (runs, _):
        record = await runs.create("all")
        await seen(runs, record.id)
        assert (await runs.cancel(record.id)).status is RunStatus.DONE


async def test_the_same_id_is_the_same_run(tmp_path: Path) -> None:
    backend = fake(0.01)
    async with opened(tmp_path / "runs.sqlite", backend) as (runs, _):
        made = await asyncio.gather(*(runs.create("all", run_id="mine") for _ in range(5)))
        assert {r.id for r in made} == {"mine"}
        await seen(runs, "mine")
        assert (await runs.create("all", run_id="mine")).status is RunStatus.DONE
        assert len(backend.requests) == 4
        with pytest.raises(ApiError, match="another question") as told:
            await runs.create("something else", run_id="mine")
        assert told.value.status == 409


async def test_what_cannot_be_asked_is_refused_and_not_written_down(tmp_path: Path) -> None:
    async with opened(tmp_path / "runs.sqlite", fake()) as (runs, store):
        with pytest.raises(InvalidRequest, match="empty"):
            await runs.create("  ")
        with pytest.raises(InvalidRequest, match="must match"):
            await runs.create("all", run_id="../x")
        with pytest.raises(ApiError, match="unknown; allowed: horizontal") as told:
            await runs.create("all", graph="vertical")
        assert (told.value.status, told.value.param) == (400, "graph")
        assert await store.list() == []


async def test_too_many_runs_are_refused_for_now(tmp_path: Path) -> None:
    backend = fake(60)
    async with opened(tmp_path / "runs.sqlite", backend, max_runs=1, max_waiting=2) as (runs, store):
        made = [await runs.create("all") for _ in range(3)]
        with pytest.raises(ApiError) as told:
            await runs.create("all")
        assert told.value.status == 429 and told.value.retry_after_s
        assert len(await store.list()) == 3
        # The same again is no new run.
        assert (await runs.create("all", run_id=made[0].id)).id == made[0].id
        await runs.cancel(made[0].id)
        await runs.create("all")


async def test_runs_take_turns_in_the_order_they_came(tmp_path: Path) -> None:
    backend = fake(0.002)
    async with opened(tmp_path / "runs.sqlite", backend, max_runs=1) as (runs, store):
        made = [(await runs.create("all", run_id=f"r{n}")).id for n in range(4)]
        await asyncio.gather(*(seen(runs, i) for i in made))
        ends = {r.id: r.finished_at or 0.0 for r in await store.list()}
    assert sorted(made, key=ends.__getitem__) == made


async def test_whoever_asks_and_goes_away_at_once_has_still_asked(tmp_path: Path) -> None:
    async with opened(tmp_path / "runs.sqlite", fake()) as (runs, store):
        asking = asyncio.create_task(runs.create("all"))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        await until(lambda: runs.load.total == 0)
        async with asyncio.timeout(5):
            while [r.status for r in await store.list()] != [RunStatus.DONE]:
                await asyncio.sleep(0.01)


async def test_runs_that_can_end_in_time_do(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    async with opened(path, fake(0.02), drain_s=5) as (runs, _):
        record = await runs.create("all")
        await until(lambda: runs.load.running == 1)
        closing = asyncio.create_task(runs.aclose(5))
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as told:
            await runs.create("more")
        assert told.value.status == 503
        await closing
    async with RunStore.open(path) as store:
        assert (await store.get(record.id)).status is RunStatus.DONE


async def test_a_run_that_cannot_be_written_down_is_not_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*args: Any, **more: Any) -> None:
        raise StoreError("cannot write to the run store: database or disk is full")

    async with opened(tmp_path / "runs.sqlite", fake()) as (runs, _):
        with monkeypatch.context() as patch:
            patch.setattr(RunStore, "create", full)
            with pytest.raises(ApiError, match="full") as told:
                await runs.create("all")
            assert told.value.status == 503
        assert (await seen(runs, (await runs.create("all")).id))[-1][1].__class__ is RunFinished


async def test_a_disk_that_fills_fails_the_run_and_not_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agora.serve.workshop.FIRST_RETRY_S", 0.02)
    backend = fake(0.05)
    async with opened(tmp_path / "runs.sqlite", backend) as (runs, store):
        record = await runs.create("all")
        await seen(runs, record.id, most=2)
        db: Any = store.checkpointer.conn  # type: ignore[attr-defined]
        pages = (await (await db.execute("PRAGMA page_count")).fetchone() or (0,))[0]
        await db.execute(f"PRAGMA max_page_count = {pages}")
        # Events and checkpoints of this fill the last page.
        filler = [asyncio.create_task(runs.create("all " * 20_000)) for _ in range(5)]
        await asyncio.wait(filler)
        assert any(isinstance(f.exception(), ApiError) for f in filler)
        await until(lambda: runs.load.total == 0 or all(live.unwritten for live in runs._live.values()))
        failed = await runs.get(record.id)
        assert failed.status in (RunStatus.FAILED, RunStatus.DONE)
        await db.execute("PRAGMA max_page_count = 1073741823")
        await until(lambda: runs.load.total == 0)
        for r in await runs.list():
            assert r.status in (RunStatus.FAILED, RunStatus.DONE)
            if r.status is RunStatus.FAILED:
                assert "full" in (r.error or "")
        after = await runs.create("all")
        assert (await seen(runs, after.id))[-1][1].__class__ is RunFinished
        # A failed run can be gone on with.
        for r in await runs.list(status=RunStatus.FAILED):
            await runs.resume(r.id)
            assert (await seen(runs, r.id))[-1][1].__class__ is RunFinished


async def test_a_run_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*args: Any, **more: Any) -> None:
        raise RuntimeError("a bug \ud800")

    monkeypatch.setattr("agora.serve.workshop.run", broken)
    async with opened(tmp_path / "runs.sqlite", fake()) as (runs, _):
        record = await runs.create("all")
        last = (await seen(runs, record.id))[-1][1]
        assert isinstance(last, RunFailed) and "RuntimeError: a bug" in last.message
        failed = await runs.get(record.id)
        assert failed.status is RunStatus.FAILED and "a bug" in (failed.error or "")


WORKER = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from test_runs import fake, opened

async def main():
    async with opened({path!r}, fake(0.3)) as (runs, _):
        await runs.create("all", run_id="r1")
        await runs.create("all the rest", run_id="r2")
        print("accepted", flush=True)
        async for seq, event in runs.watch("r1"):
            print(seq, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_process_that_is_killed_loses_nothing_that_it_accepted_or_told(tmp_path: Path) -> None:
    path = str(tmp_path / "runs.sqlite")
    code = WORKER.format(tests=str(Path(__file__).parent), path=path)
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )
    assert worker.stdout is not None
    told = []
    async with asyncio.timeout(60):
        assert await worker.stdout.readline() == b"accepted\n"
        while len(told) < 5:
            told.append(int(await worker.stdout.readline()))
        worker.kill()
        await worker.wait()
    assert worker.returncode == -signal.SIGKILL
    assert told == [1, 2, 3, 4, 5]

    backend = fake()
    async with opened(path, backend) as (runs, store):
        assert (await store.get("r1")).crashes == 1
        events = await seen(runs, "r1")
        rest = await seen(runs, "r2")
        assert (await runs.get("r1")).status is (await runs.get("r2")).status is RunStatus.DONE
    for whole in (events, rest):
        assert [n for n, _ in whole] == list(range(1, len(whole) + 1))
        assert isinstance(whole[-1][1], RunFinished)
    assert len(events) > 5


async def test_a_run_at_which_processes_die_is_left_alone_at_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "runs.sqlite"
    dead = "another:1:1"
    async with RunStore.open(path) as store:
        await store.create("r1", "all", graph="horizontal", config_path=None, origin=ORIGIN)
        monkeypatch.setattr("graphs.records.alive", lambda owner: owner != dead)
        for crashes in range(1, 4):
            await store._db.write("UPDATE runs SET status = 'running', owner = ?", (dead,))
            await store.take_over("r1")
            assert (await store.get("r1")).crashes == crashes
        await store.interrupt("r1")
    backend = fake()
    async with opened(path, backend) as (runs, _):
        assert (await runs.get("r1")).status is RunStatus.INTERRUPTED
        assert "3 processes died" in caplog.text
        assert await seen(runs, "r1") == []
        # By hand it can still be gone on with.
        await runs.resume("r1")
        assert (await seen(runs, "r1"))[-1][1].__class__ is RunFinished


async def test_only_the_gateways_own_runs_are_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "runs.sqlite"
    async with RunStore.open(path) as store:
        await store.create("by-hand", "all", graph="horizontal", config_path=None)
        await store.create("other-graph", "all", graph="gone", config_path=None, origin=ORIGIN)
        await store.interrupt("by-hand")
        await store.interrupt("other-graph")
    backend = fake()
    async with opened(path, backend) as (runs, _):
        assert runs.load.total == 0
        assert "no graph 'gone'" in caplog.text
        with pytest.raises(ApiError) as told:
            await runs.resume("other-graph")
        assert told.value.status == 409
    assert backend.requests == []


async def test_a_run_that_is_cancelled_while_it_ends_comes_to_one_end(tmp_path: Path) -> None:
    """Its result counts if it was there first; either way it is written down once."""
    backend = fake(0.003)
    async with opened(tmp_path / "runs.sqlite", backend) as (runs, store):
        for n in range(20):
            record = await runs.create("all")
            await asyncio.sleep(0.002 * n)
            ended = await runs.cancel(record.id)
            last = (await store.events(record.id))[-1][1]
            if ended.status is RunStatus.DONE:
                assert isinstance(last, RunFinished)
            else:
                assert ended.status is RunStatus.CANCELLED
                assert isinstance(last, RunFailed)
            assert backend.load.total == 0
