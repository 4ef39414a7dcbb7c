"""The run store on a real PostgreSQL server; skipped where there is none installed."""

import asyncio

import pytest

from agora.errors import InvalidRequest, RunNotFound, StoreError
from agora.square import Expert, Square
from agora.types import Answer, ExpertCard, Subtask
from experts.fake import FakeBackend, Reply, question_of
from graphs.horizontal import horizontal
from graphs.plan import StaticPlanner
from graphs.run import resume, run
from graphs.store import RunStatus, RunStore

pytest.importorskip("psycopg")


def graph_of(backend: FakeBackend, store: RunStore):  # type: ignore[no-untyped-def]
    square = Square([Expert(card=ExpertCard(name="one", description="does things"), backend=backend)])
    plan = [Subtask(id="a", question="do a"), Subtask(id="b", question="do b", inputs=("a",))]
    return horizontal(square, planner=StaticPlanner(plan), checkpointer=store.checkpointer)


async def test_a_run_is_kept_and_resumed(server: str) -> None:
    async with RunStore.open(server) as store:
        await store.create("r1", "all", graph="horizontal", config_path=None)
        slow = FakeBackend(lambda r: Reply("did b", latency=60) if "do b" in question_of(r) else "did a")
        working = asyncio.create_task(run(graph_of(slow, store), "all", run_id="r1"))
        while not any(c.outcome == "open" and c.request and "do b" in question_of(c.request) for c in slow.calls):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        await store.interrupt("r1")
    async with RunStore.open(server) as store:
        assert (await store.get("r1")).status is RunStatus.INTERRUPTED
        await store.take_over("r1")
        quick = FakeBackend({"do b": "did b"})
        result = await resume(graph_of(quick, store), "r1")
        await store.finish("r1", result=result)
        assert len(quick.requests) == 1
        outcome = result.outcome("b")
        assert isinstance(outcome, Answer) and outcome.text == "did b"
        assert (await store.list())[0].result == result
        with pytest.raises(InvalidRequest, match="already"):
            await store.create("r1", "again", graph="horizontal", config_path=None)
        with pytest.raises(RunNotFound):
            await store.get("r9")


async def test_a_server_that_is_not_there_is_one_clear_error_without_the_password() -> None:
    with pytest.raises(StoreError, match="PostgreSQL") as told:
        async with RunStore.open("postgresql://agora:secret@127.0.0.1:9/none"):
            pass
    assert "secret" not in str(told.value)


async def test_an_address_of_another_kind_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="mysql"):
        async with RunStore.open("mysql://somewhere/else"):
            pass


async def test_the_gateways_runs_live_in_it_and_go_on_after_a_restart(server: str) -> None:
    from agora.events import AttemptEnded, RunFinished
    from agora.serve.runs import Runs

    async with RunStore.open(server) as store:
        backend = FakeBackend(lambda r: Reply("did it", latency=60 if "do b" in question_of(r) else 0.0))
        runs = Runs(store, {"horizontal": graph_of(backend, store)}, default_graph="horizontal")
        await runs.start()
        record = await runs.create("all", metadata={"who": "me"})
        seen = []
        async for seq, event in runs.watch(record.id):
            seen.append((seq, event))
            if isinstance(event, AttemptEnded):
                break
        await runs.aclose()
    async with RunStore.open(server) as store:
        assert (await store.get(record.id)).status is RunStatus.INTERRUPTED
        backend = FakeBackend(lambda r: "did it")
        runs = Runs(store, {"horizontal": graph_of(backend, store)}, default_graph="horizontal")
        await runs.start()
        seen += [item async for item in runs.watch(record.id, after=seen[-1][0])]
        ended = await runs.get(record.id)
        await runs.aclose()
    assert [n for n, _ in seen] == list(range(1, len(seen) + 1))
    assert isinstance(seen[-1][1], RunFinished)
    assert (ended.status, ended.metadata) == (RunStatus.DONE, {"who": "me"})
    # What was answered before is not asked again.
    assert len(backend.requests) == 1
