"""The run store on a real PostgreSQL server, started for these tests; skipped where there is none installed."""

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

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


def _program(name: str) -> str | None:
    found = shutil.which(name)
    if found:
        return found
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(places[-1]) if places else None


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    initdb, pg_ctl = _program("initdb"), _program("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("PostgreSQL is not installed")
    # Not under pytest's own folder, which other users cannot enter.
    home = Path(tempfile.mkdtemp(prefix="agora-postgres-"))
    # PostgreSQL refuses to run as root; its package brings a user for it.
    as_user: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root and there is no runuser")
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(home, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data, log = home / "data", home / "log"
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={home} -c fsync=off"
    subprocess.run(
        [*as_user, initdb, "-D", str(data), "-U", "agora", "--auth=trust"], check=True, capture_output=True, cwd=home
    )
    subprocess.run(
        [*as_user, pg_ctl, "-D", str(data), "-l", str(log), "-o", options, "-w", "start"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=home,
    )
    try:
        yield f"postgresql://agora@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run(
            [*as_user, pg_ctl, "-D", str(data), "-m", "immediate", "stop"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=home,
        )
        shutil.rmtree(home)


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
