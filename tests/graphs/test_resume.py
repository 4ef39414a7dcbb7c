"""A run that was killed goes on where it was: nothing finished is asked again, nothing is mixed up."""

import asyncio
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest

from agora.errors import InvalidRequest, RunNotFound, StoreError, Unavailable
from agora.square import Expert, Square
from agora.types import Answer, Budget, ExpertCard, Subtask, TaskGraph
from experts.fake import FakeBackend, Reply, question_of
from graphs.horizontal import horizontal
from graphs.plan import StaticPlanner
from graphs.run import Graph, resume, run
from graphs.store import RunStatus, RunStore

# Durations that reverse the order of the calls: the last called is the first to finish.
SECONDS = {"a": 0.9, "b": 0.7, "c": 0.5, "d": 0.05, "e": 0.05, "f": 0.5}
PLAN = TaskGraph(
    (
        Subtask(id="a", question="do a"),
        Subtask(id="b", question="do b"),
        Subtask(id="c", question="do c"),
        Subtask(id="d", question="do d"),
        Subtask(id="e", question="do e", inputs=("d",)),
        Subtask(id="f", question="do f", inputs=("a", "e")),
    )
)


def asked(request: Any) -> str:
    return question_of(request).rpartition("do ")[2]


def backend(seconds: dict[str, float] | None = None) -> FakeBackend:
    return FakeBackend(lambda r: Reply(f"did {asked(r)}", latency=(seconds or {}).get(asked(r), 0.0)))


def build(fake: FakeBackend, **more: Any) -> Graph:
    expert = Expert(card=ExpertCard(name="one", description="does things"), backend=fake)
    return horizontal(Square([expert]), planner=StaticPlanner(PLAN), **more)


WORKER = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from test_resume import SECONDS, backend, build
from graphs.run import run
from graphs.store import RunStore

async def main():
    async with RunStore.open({path!r}) as store:
        await store.create("r1", "all", graph="horizontal", config_path=None)
        fake = backend(SECONDS)
        def tell(e):
            print(type(e).__name__, getattr(e, "subtask", ""), flush=True)
        await run(build(fake, checkpointer=store.checkpointer), "all", run_id="r1", on_event=tell)

asyncio.run(main())
"""


async def test_a_run_killed_with_sigkill_is_resumed(tmp_path: Path) -> None:
    path = str(tmp_path / "runs.sqlite")
    code = WORKER.format(tests=str(Path(__file__).parent), path=path)
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert worker.stdout is not None
    ended: list[str] = []
    async with asyncio.timeout(60):
        while line := (await worker.stdout.readline()).decode().split():
            if line[0] == "AttemptEnded":
                ended.append(line[1])
            if len(ended) == 3:
                break
        await asyncio.sleep(0.1)
        worker.kill()
        await worker.wait()
    assert worker.returncode == -signal.SIGKILL
    assert ended == ["d", "e", "c"]

    async with RunStore.open(path) as store:
        assert (await store.get("r1")).status is RunStatus.INTERRUPTED
        fake = backend()
        await store.take_over("r1")
        result = await resume(build(fake, checkpointer=store.checkpointer), "r1")
        await store.finish("r1", result=result)
        record = await store.get("r1")
    assert sorted(asked(r) for r in fake.requests) == ["a", "b", "f"]
    for s in PLAN:
        outcome = result.outcome(s.id)
        assert isinstance(outcome, Answer) and outcome.text == f"did {s.id}"
    assert record.status is RunStatus.DONE and record.result == result


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
async def test_a_cancelled_run_is_resumed_wherever_it_stopped(tmp_path: Path, stop_after: int) -> None:
    async with RunStore.open(tmp_path / "runs.sqlite") as store:
        seconds = {k: v / 10 for k, v in SECONDS.items()}
        first = backend(seconds)
        graph = build(first, checkpointer=store.checkpointer)
        ended: list[str] = []
        enough = asyncio.Event()

        def watch(event: Any) -> None:
            if type(event).__name__ == "AttemptEnded":
                ended.append(event.subtask)
                if len(ended) == stop_after:
                    enough.set()

        working = asyncio.create_task(run(graph, "all", run_id="r1", on_event=watch))
        await enough.wait()
        await asyncio.sleep(0.01)  # the checkpoint of the last one is written within milliseconds
        done = set(ended)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        assert first.load.total == 0

        second = backend()
        told: list[str] = []
        result = await resume(
            build(second, checkpointer=store.checkpointer),
            "r1",
            on_event=lambda e: told.append(e.subtask) if type(e).__name__ == "AttemptEnded" else None,
        )
        assert not done & {asked(r) for r in second.requests}
        assert sorted(told) == [s.id for s in sorted(PLAN, key=lambda s: s.id)]
        for s in PLAN:
            outcome = result.outcome(s.id)
            assert isinstance(outcome, Answer) and outcome.text == f"did {s.id}"
        # What was spent before the interruption still counts.
        assert result.usage.calls == len(PLAN)
        total = sum((result.outcome(s.id).usage.tokens for s in PLAN), 0)
        assert result.usage.tokens == total


async def test_what_is_recorded_reaches_a_waiting_subtask_at_once(tmp_path: Path) -> None:
    """On resume, e (recorded) feeds f while the unrelated, earlier b is still running."""
    async with RunStore.open(tmp_path / "runs.sqlite") as store:
        plan = TaskGraph(
            (
                Subtask(id="b", question="do b"),
                Subtask(id="e", question="do e"),
                Subtask(id="f", question="do f", inputs=("e",)),
            )
        )

        def graph(fake: FakeBackend) -> Graph:
            expert = Expert(card=ExpertCard(name="one", description="does things"), backend=fake)
            return horizontal(Square([expert]), planner=StaticPlanner(plan), checkpointer=store.checkpointer)

        first = backend({"b": 60, "f": 60})
        working = asyncio.create_task(run(graph(first), "all", run_id="r1"))
        while not any(c.outcome == "open" and c.request and asked(c.request) == "f" for c in first.calls):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        second = backend({"b": 0.3})
        await resume(graph(second), "r1")
        times = {asked(c.request): c for c in second.calls if c.request}
        assert set(times) == {"b", "f"}
        b_end, f_end = times["b"].ended_s, times["f"].ended_s
        assert b_end is not None and f_end is not None and f_end < b_end - 0.2


async def test_a_failure_that_may_pass_is_asked_again_on_resume(tmp_path: Path) -> None:
    async with RunStore.open(tmp_path / "runs.sqlite") as store:

        def first_reply(request: Any) -> Any:
            return Unavailable("down") if asked(request) == "d" else Reply(f"did {asked(request)}", latency=30)

        first = FakeBackend(first_reply)
        working = asyncio.create_task(run(build(first, checkpointer=store.checkpointer), "all", run_id="r1"))
        while first.load.total != 3:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        second = backend()
        result = await resume(build(second, checkpointer=store.checkpointer), "r1")
        assert result.complete
        assert [type(a.outcome).__name__ for a in result.attempts["d"]] == ["Failure", "Answer"]
        assert [type(a.outcome).__name__ for a in result.attempts["e"]] == ["Failure", "Answer"]


async def test_a_run_that_ended_or_never_was_cannot_be_resumed(tmp_path: Path) -> None:
    async with RunStore.open(tmp_path / "runs.sqlite") as store:
        graph = build(backend(), checkpointer=store.checkpointer)
        with pytest.raises(RunNotFound, match="r9"):
            await resume(graph, "r9")
        await run(graph, "all", run_id="r1")
        with pytest.raises(InvalidRequest, match="already"):
            await resume(graph, "r1")
    with pytest.raises(RunNotFound):
        await resume(build(backend()), "r1")


async def test_a_full_disk_is_one_clear_error_and_nothing_accepted_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    async with RunStore.open(path) as store:
        await store.create("r1", "all", graph="horizontal", config_path=None)
        graph = build(backend({"a": 0.05}), checkpointer=store.checkpointer)
        await run(graph, "all", run_id="warm-up")
        db: Any = store.checkpointer.conn  # type: ignore[attr-defined]
        pages = (await (await db.execute("PRAGMA page_count")).fetchone() or (0,))[0]
        await db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match="full"):
            async with asyncio.timeout(20):
                for n in range(50):
                    await run(graph, "all" * 5_000, run_id=f"r-full-{n}")
        await db.execute("PRAGMA max_page_count = 1073741823")
        assert (await run(graph, "all", run_id="after")).complete
        assert (await store.get("r1")).question == "all"


class Failing:
    """Lets the n-th write of a saver fail, as a full disk or a locked file would."""

    def __init__(self, store: RunStore, *numbers: int) -> None:
        self.count = -1
        conn: Any = store.checkpointer
        parent = type(conn).__mro__[2]
        original = parent.aput_writes

        async def aput_writes(saver: Any, config: Any, writes: Any, *more: Any) -> None:
            if saver is conn and any(c == "__return__" for c, _ in writes):
                self.count += 1
                if self.count in numbers:
                    raise sqlite3.OperationalError("database or disk is full")
            await original(saver, config, writes, *more)

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(parent, "aput_writes", aput_writes)


async def test_a_result_that_cannot_be_kept_ends_the_run_before_more_is_asked(tmp_path: Path) -> None:
    chain = [Subtask(id=f"n{i}", question=f"do n{i}", inputs=(f"n{i - 1}",) if i else ()) for i in range(8)]
    async with RunStore.open(tmp_path / "runs.sqlite") as store:
        fake = backend({f"n{i}": 0.05 for i in range(8)})
        expert = Expert(card=ExpertCard(name="one", description="does things"), backend=fake)
        graph = horizontal(Square([expert]), planner=StaticPlanner(chain), checkpointer=store.checkpointer)
        failing = Failing(store, 2)
        try:
            with pytest.raises(StoreError, match="full"):
                await run(graph, "all", run_id="r1")
        finally:
            failing.patch.undo()
        assert len(fake.requests) <= 4
        assert fake.load.total == 0
        # The next run works, and this one goes on.
        result = await resume(graph, "r1")
        assert result.complete


async def test_a_second_round_that_was_interrupted_mixes_nothing_up(tmp_path: Path) -> None:
    """a, b and z fail once; the write of a's failure is lost; the second round is interrupted; then the run resumes."""
    plan = [Subtask(id=i, question=f"do {i}") for i in "abz"]

    def graph(fake: FakeBackend, store: RunStore) -> Graph:
        expert = Expert(card=ExpertCard(name="one", description="does things"), backend=fake)
        return horizontal(Square([expert]), planner=StaticPlanner(plan), checkpointer=store.checkpointer)

    async with RunStore.open(tmp_path / "runs.sqlite") as store:
        seen: set[str] = set()

        def reply(request: Any) -> Any:
            name = asked(request)
            if name not in seen:
                seen.add(name)
                return Unavailable("hiccup")
            return Reply(f"did {name}", latency=30 if name == "z" else 0.0)

        first = FakeBackend(reply)
        working = asyncio.create_task(run(graph(first, store), "all", run_id="r1"))
        while not (first.load.total == 1 and len(first.requests) == 6):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        db: Any = store.checkpointer.conn  # type: ignore[attr-defined]
        rows = await (await db.execute("SELECT task_id, value FROM writes WHERE channel = '__return__'")).fetchall()
        lost = [r[0] for r in rows if b"hiccup" in r[1] and b"\xa1a" in r[1]]
        assert len(lost) == 1
        await db.execute("DELETE FROM writes WHERE task_id = ?", (lost[0],))
        await db.commit()

        second = backend()
        result = await resume(graph(second, store), "r1")
        for i in "abz":
            outcome = result.outcome(i)
            assert isinstance(outcome, Answer) and outcome.text == f"did {i}"


async def test_a_record_that_cannot_be_read_is_an_error_and_no_hang(tmp_path: Path) -> None:
    async with RunStore.open(tmp_path / "runs.sqlite") as store:
        graph = build(backend({"a": 30}), checkpointer=store.checkpointer)
        working = asyncio.create_task(run(graph, "all", run_id="r1"))
        await asyncio.sleep(0.3)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        db: Any = store.checkpointer.conn  # type: ignore[attr-defined]
        await db.execute(
            "UPDATE writes SET value = replace(value, 'attempts', 'attemptz') WHERE channel = '__return__'"
        )
        await db.execute(
            "UPDATE writes SET value = CAST(replace(CAST(value AS TEXT), 'attempts', 'attemptz') AS BLOB) "
            "WHERE channel = '__return__'"
        )
        await db.commit()
        async with asyncio.timeout(5):
            with pytest.raises(StoreError, match="cannot be read"):
                await resume(graph, "r1")


async def test_two_processes_cannot_take_over_one_run(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    async with RunStore.open(path) as one, RunStore.open(path) as two:
        await one.create("r1", "all", graph="horizontal", config_path=None)
        await one.interrupt("r1")
        results = await asyncio.gather(one.take_over("r1"), two.take_over("r1"), return_exceptions=True)
        assert sorted(type(r).__name__ for r in results) == ["InvalidRequest", "NoneType"]
        result = await run(build(backend()), "all", run_id="r1")
        await one.finish("r1", result=result)
        with pytest.raises(InvalidRequest, match="already came to its end"):
            await two.take_over("r1")
        with pytest.raises(StoreError, match="not this process's"):
            await two.finish("r1", error="late")
        # A refused write leaves nothing locked.
        with pytest.raises(InvalidRequest, match="already"):
            await one.create("r1", "again", graph="horizontal", config_path=None)
        await two.create("r2", "more", graph="horizontal", config_path=None)


async def test_the_store_tells_what_is_wrong_with_it(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.sqlite"
    garbage.write_bytes(b"this is no database" * 100)
    with pytest.raises(StoreError, match=r"garbage\.sqlite"):
        async with RunStore.open(garbage):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot open"):
        async with RunStore.open(tmp_path / "file" / "runs.sqlite"):
            pass


async def test_the_store_lists_the_newest_first_and_refuses_a_taken_id(tmp_path: Path) -> None:
    async with RunStore.open(tmp_path / "deep" / "runs.sqlite") as store:
        for name in ("r1", "r2", "r3"):
            await store.create(name, f"question of {name}", graph="horizontal", config_path=None)
        assert [r.id for r in await store.list()][:1] == ["r3"]
        assert [r.id for r in await store.list(limit=2)] == ["r3", "r2"]
        with pytest.raises(InvalidRequest, match="already"):
            await store.create("r1", "again", graph="horizontal", config_path=None)
        with pytest.raises(RunNotFound):
            await store.get("r9")
        with pytest.raises(InvalidRequest, match="another process"):
            await store.take_over("r1")
        for bad in ("", "../x", "a b", "x" * 200):
            with pytest.raises(InvalidRequest):
                await store.create(bad, "q", graph="horizontal", config_path=None)


async def test_the_deadline_of_a_resumed_run_starts_anew(tmp_path: Path) -> None:
    async with RunStore.open(tmp_path / "runs.sqlite") as store:
        graph = build(backend({"a": 30}), checkpointer=store.checkpointer)
        working = asyncio.create_task(run(graph, "all", run_id="r1", budget=Budget(deadline_s=1.0)))
        await asyncio.sleep(0.3)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        await asyncio.sleep(0.8)
        result = await resume(build(backend({"a": 0.1}), checkpointer=store.checkpointer), "r1")
        assert result.complete
