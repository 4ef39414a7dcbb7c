"""What the store keeps besides results: events in order, and what a run was started with."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agora.errors import InvalidRequest, RunNotFound, StoreError
from agora.events import AttemptEnded, Event, Planned, RunFailed, RunFinished, RunStarted, Synthesising
from agora.types import Answer, Attempt, Budget, RunResult, Subtask, TaskGraph
from graphs.databases import Taken
from graphs.journal import Journal
from graphs.records import StoredEvent
from graphs.store import NotOurs, RunExists, RunStatus, RunStore

GRAPH = TaskGraph((Subtask(id="a", question="do a"),))
ATTEMPT = Attempt(
    expert="one", why="alone", outcome=Answer(text="did a\nΩ \x00", expert="one"), started_at=1.5, seconds=0.5
)
RESULT = RunResult(
    run="r1", question="all", text="did a", graph=GRAPH, planner="static", attempts={"a": (ATTEMPT,)}, seconds=1.0
)
STORY: list[Event] = [
    RunStarted(run="r1", at=1.0, question="all"),
    Planned(run="r1", at=2.0, graph=GRAPH, planner="static", notes=("careful",)),
    AttemptEnded(run="r1", at=3.0, subtask="a", position=0, attempt=1, result=ATTEMPT, final=True),
    Synthesising(run="r1", at=4.0),
    RunFinished(run="r1", at=5.0, result=RESULT),
]


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Where a store is: both kinds there are, each empty."""
    if request.param == "sqlite":
        return tmp_path / "runs.sqlite"
    import psycopg

    server = request.getfixturevalue("server")
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return server.rpartition("/")[0] + f"/{name}"


@pytest.fixture
async def store(place: Any) -> AsyncIterator[RunStore]:
    async with RunStore.open(place) as opened:
        yield opened


async def begin(store: RunStore, *ids: str, **more: Any) -> None:
    for i in ids:
        await store.create(i, "all", graph="horizontal", config_path=None, **more)


async def test_events_are_numbered_over_all_legs_and_read_back_as_they_were(store: RunStore) -> None:
    await begin(store, "r1")
    assert await store.append_events("r1", STORY[:2]) == 2
    await store.interrupt("r1")
    await store.take_over("r1")
    assert await store.append_events("r1", STORY[2:]) == 5
    assert await store.events("r1") == list(enumerate(STORY, 1))
    assert await store.events("r1", after=3) == list(enumerate(STORY, 1))[3:]
    assert await store.events("r1", after=1, limit=2) == list(enumerate(STORY, 1))[1:3]
    assert await store.events("r1", after=5) == []
    assert await store.append_events("r1", []) == 5
    assert await store.last_seq("nobody") == 0
    assert (await store.stored_events("r1"))[1].type == "Planned"
    with pytest.raises(InvalidRequest, match="limit"):
        await store.events("r1", limit=0)


async def test_a_batch_of_several_runs_is_written_as_one(store: RunStore) -> None:
    await begin(store, "r1", "r2")
    await store.append_events("r2", STORY[:1])
    stored = await store.append([("r1", STORY[0]), ("r2", STORY[1]), ("r1", STORY[1])])
    assert {i: [e.seq for e in many] for i, many in stored.items()} == {"r1": [1, 2], "r2": [2]}
    assert [e.event for e in stored["r1"]] == STORY[:2]
    assert await store.append([]) == {}


async def test_nobody_writes_events_of_a_run_that_is_not_theirs(store: RunStore) -> None:
    await begin(store, "r1", "r2")
    await store.finish("r2", error="over")
    with pytest.raises(NotOurs, match="not this process's"):
        await store.append([("r1", STORY[0]), ("r2", STORY[0]), ("r1", STORY[1])])
    with pytest.raises(NotOurs):
        await store.append_events("nobody", STORY)
    # All or none of them.
    assert await store.events("r1") == await store.events("r2") == []
    assert await store.append_events("r1", STORY) == 5


async def test_a_runs_end_and_its_last_event_are_written_together(store: RunStore) -> None:
    await begin(store, "r1", "r2", "r3")
    await store.finish("r1", result=RESULT, events=STORY[4:])
    assert (await store.get("r1")).result == RESULT
    assert await store.events("r1") == [(1, STORY[4])]
    failed = RunFailed(run="r2", at=1.0, code="store", message="the disk is full")
    await store.finish("r2", error="the disk is full", events=[failed])
    assert await store.events("r2") == [(1, failed)]
    with pytest.raises(NotOurs):
        await store.finish("r1", error="again", events=[failed])
    assert await store.events("r1") == [(1, STORY[4])]
    with pytest.raises(RunNotFound):
        await store.finish("nobody", error="none", events=[failed])
    unwritable = RunFailed(run="r3", at=1.0, code="x", message="half a \ud800")
    with pytest.raises(StoreError, match="RunFailed"):
        await store.finish("r3", error="none", events=[unwritable])
    assert (await store.get("r3")).status is RunStatus.RUNNING


async def test_a_cancelled_run_is_never_gone_on_with(store: RunStore) -> None:
    await begin(store, "r1")
    await store.cancel("r1", error="enough")
    record = await store.get("r1")
    assert (record.status, record.error) == (RunStatus.CANCELLED, "enough")
    assert record.finished_at is not None
    with pytest.raises(InvalidRequest, match="was cancelled"):
        await store.take_over("r1")
    with pytest.raises(NotOurs):
        await store.cancel("r1")


async def test_what_a_run_was_started_with_is_kept(store: RunStore) -> None:
    budget = Budget(deadline_s=2.5, tokens=100)
    made = await store.create(
        "r1",
        "all",
        graph="horizontal",
        config_path="/here/agora.toml",
        planner="llm",
        budget=budget,
        metadata={"who": "me Ω"},
        origin="gateway",
    )
    assert made == await store.get("r1")
    assert (made.planner, made.budget, made.metadata, made.origin) == ("llm", budget, {"who": "me Ω"}, "gateway")
    with pytest.raises(RunExists):
        await begin(store, "r1")
    await begin(store, "r2")
    plain = await store.get("r2")
    assert (plain.planner, plain.budget, plain.metadata, plain.origin, plain.crashes) == (None, None, {}, None, 0)


async def test_runs_are_listed_by_status_and_page_by_page(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([float(n // 2) for n in range(100)])
    monkeypatch.setattr("graphs.store.time.time", lambda: next(now))
    ids = [f"r{n}" for n in range(7)]
    await begin(store, *ids)
    everything = [r.id for r in await store.list()]
    assert sorted(everything) == ids and everything[0] == "r6"
    paged: list[str] = []
    while page := await store.list(limit=2, before=paged[-1] if paged else None):
        paged += [r.id for r in page]
    assert paged == everything
    await store.finish("r0", result=RESULT)
    await store.finish("r1", error="no")
    await store.interrupt("r2")
    await store.cancel("r3")
    # The process that was at r4 died before it could say so; r5 is another machine's.
    await store._db.write("UPDATE runs SET owner = ? WHERE id = ?", (_owner(pid=2**22 + 1), "r4"))
    await store._db.write("UPDATE runs SET owner = ? WHERE id = ?", ("elsewhere:1:1", "r5"))
    listed = {s: await store.list(status=s) for s in RunStatus}
    by_status = {s: sorted(r.id for r in many) for s, many in listed.items()}
    assert by_status == {
        RunStatus.DONE: ["r0"],
        RunStatus.PARTIAL: [],
        RunStatus.FAILED: ["r1"],
        RunStatus.INTERRUPTED: ["r2", "r4"],
        RunStatus.CANCELLED: ["r3"],
        RunStatus.RUNNING: ["r5", "r6"],
    }
    assert all(r.status is s for s, many in listed.items() for r in many)
    assert [r.result for r in await store.list(status=RunStatus.DONE)] == [RESULT]
    assert [r.result for r in await store.list(status=RunStatus.DONE, results=False)] == [None]
    assert await store.list(origin="gateway") == []
    await store.take_over("r4")
    assert (await store.get("r4")).crashes == 1
    with pytest.raises(RunNotFound):
        await store.list(before="nobody")


def _owner(pid: int) -> str:
    from graphs.owners import this_process

    host, _, started = this_process().rsplit(":", 2)
    return f"{host}:{pid}:{started}"


async def test_without_a_living_process_none_is_running(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    await begin(store, "r1")
    for where in ("store", "records"):
        monkeypatch.setattr(f"graphs.{where}.alive", lambda owner: False)
    assert await store.list(status=RunStatus.RUNNING) == []
    assert [r.id for r in await store.list(status=RunStatus.INTERRUPTED)] == ["r1"]


OLD = """
CREATE TABLE runs (
    id TEXT PRIMARY KEY, question TEXT NOT NULL, graph TEXT NOT NULL, config TEXT, status TEXT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL, finished_at DOUBLE PRECISION, result TEXT, error TEXT, owner TEXT
);
CREATE INDEX runs_by_time ON runs (created_at);
INSERT INTO runs (id, question, graph, status, created_at) VALUES ('old', 'all', 'horizontal', 'interrupted', 1.0);
"""


async def test_a_store_of_the_first_version_opens_and_works(place: Any) -> None:
    if isinstance(place, Path):
        with closing(sqlite3.connect(place)) as db:
            db.executescript(OLD)
    else:
        import psycopg

        with psycopg.connect(place, autocommit=True) as connection:
            connection.execute(OLD.encode())

    async def look() -> None:
        async with RunStore.open(place) as store:
            old = await store.get("old")
            assert (old.planner, old.budget, old.metadata, old.origin, old.crashes) == (None, None, {}, None, 0)
            assert await store.events("old") == []

    # Two processes that find the old store at the same time, and one that comes later.
    await asyncio.gather(look(), look())
    await look()
    async with RunStore.open(place) as store:
        await store.take_over("old")
        await store.append_events("old", STORY[:3])
        await store.finish("old", result=RESULT, events=STORY[4:])
        await begin(store, "new", budget=Budget(cost=1.0))
        assert [r.id for r in await store.list()] == ["new", "old"]
        assert len(await store.events("old")) == 4


async def test_whoever_is_cancelled_while_writing_leaves_nothing_half_done(store: RunStore) -> None:
    await begin(store, "r1")
    for turns in range(1, 12):
        before = await store.last_seq("r1")
        writing = asyncio.create_task(store.append_events("r1", STORY * 20))
        for _ in range(turns):
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait([writing])
        # The next commit must not bring a half of it.
        assert await store.append_events("r1", STORY[:1]) - before in (1, 1 + 20 * len(STORY))


async def test_a_transaction_is_whole_or_not_at_all(store: RunStore) -> None:
    await begin(store, "r1", "r2")
    change = "UPDATE runs SET error = ? WHERE id = ?"
    assert not await store._db.write_all([(change, [("x", "r1"), ("x", "nobody")])])
    with pytest.raises(Taken):
        await store._db.write_all([(change, [("x", "r1")]), ("UPDATE runs SET id = ? WHERE id = ?", [("r2", "r1")])])
    with pytest.raises(StoreError):
        await store._db.write_all([(change, [("x", "r1")]), ("UPDATE nothing SET id = ? WHERE id = ?", [("a", "b")])])
    assert (await store.get("r1")).error is None
    assert await store._db.write_all([(change, [("x", "r1"), ("y", "r2")])])
    assert [(await store.get(i)).error for i in ("r1", "r2")] == ["x", "y"]


async def test_a_journal_writes_many_events_in_few_transactions(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin(store, "r1", "r2")
    batches: list[int] = []
    append = RunStore.append

    async def counted(self: RunStore, batch: Any) -> Any:
        batches.append(len(batch))
        return await append(self, batch)

    monkeypatch.setattr(RunStore, "append", counted)
    told: list[tuple[str, int]] = []

    def on_written(run_id: str, events: Any) -> None:
        told.extend((run_id, e.seq) for e in events)

    async with Journal.open(store, on_written=on_written) as journal:
        for n in range(150):
            journal.put("r1" if n % 2 else "r2", STORY[n % 5])
            if n == 0:
                await asyncio.sleep(0.002)
        await journal.flush()
        assert len(told) == 150
        journal.put("r1", STORY[0])
    assert sum(batches) == 151
    assert len(batches) <= 4
    assert [n for i, n in told if i == "r1"] == list(range(1, 77))
    assert await store.last_seq("r1") == 76


async def test_events_that_cannot_be_written_are_told_of_and_hold_up_no_others(store: RunStore) -> None:
    await begin(store, "r1", "r2", "r3")
    await store.interrupt("r2")
    lost: list[tuple[str, str]] = []
    written: list[str] = []
    async with Journal.open(
        store,
        on_written=lambda run_id, events: written.append(run_id),
        on_lost=lambda run_id, error: lost.append((run_id, error.message)),
    ) as journal:
        for i in ("r1", "r2", "r3"):
            journal.put(i, STORY[0])
        await journal.flush()
        assert written == ["r1", "r3"]
        assert [i for i, _ in lost] == ["r2"]
        journal.put("r1", STORY[1])
    assert await store.last_seq("r1") == 2


def test_a_stored_event_is_the_event() -> None:
    from graphs.records import encoded

    for e in STORY:
        assert StoredEvent(seq=1, type=type(e).__name__, body=encoded(e)).event == e


async def test_a_checkpoint_that_is_cancelled_while_it_is_written_leaves_the_file_to_others(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    config: Any = {"configurable": {"thread_id": "r1", "checkpoint_ns": "", "checkpoint_id": "1"}}
    async with RunStore.open(path) as store:
        for n in range(30):
            writing = asyncio.create_task(store.checkpointer.aput_writes(config, [("a", n)], f"t{n}"))
            for _ in range(n % 6):
                await asyncio.sleep(0)
            await asyncio.sleep(0.0001 * (n // 6))
            writing.cancel()
            await asyncio.wait([writing])
            with closing(sqlite3.connect(path, timeout=0.5, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                other.execute("ROLLBACK")
