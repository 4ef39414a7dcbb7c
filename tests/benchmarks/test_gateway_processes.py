"""What the gateway benchmark reads of a process is what it used, and no process outlives it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from benchmarks.gateway_parts import usage
from benchmarks.gateway_parts.fleet import Fleet, StartFailed

SPIN = "import time\nwhile time.process_time() < {0}: pass\n"
SPIN_SYSTEM = "import os, time\nwhile os.times().system < {0}: os.urandom(100_000)\n"
WAIT = "print('ready', flush=True); import time; time.sleep(60)"


@contextmanager
def python(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has said `ready`."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().strip() == b"ready"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("spin", [SPIN, SPIN_SYSTEM], ids=["user", "system"])
def test_processor_time_is_what_was_used(spin: str) -> None:
    with python(spin.format(0.3) + WAIT) as process:
        assert usage.cpu_seconds(process.pid) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("ended", [False, True], ids=["living", "ended"])
def test_processor_time_of_children_counts(ended: bool) -> None:
    child = SPIN.format(0.3) + ("" if ended else WAIT)
    wait = "p.wait(); print('ready', flush=True)" if ended else ""
    code = (
        f"import subprocess, sys, time\np = subprocess.Popen([sys.executable, '-c', {child!r}])\n{wait}\ntime.sleep(60)"
    )
    with python(code) as process:
        children = psutil.Process(process.pid).children()
        try:
            # The parent's own start is ~0.05 s of it.
            assert 0.3 <= usage.cpu_seconds(process.pid) < 0.55
        finally:
            for c in children:
                c.kill()


def test_waiting_costs_nothing() -> None:
    with python(WAIT) as process:
        before = usage.cpu_seconds(process.pid)
        time.sleep(0.1)
        assert usage.cpu_seconds(process.pid) - before < 0.02


def test_memory_is_seen_to_grow() -> None:
    grow = "import sys; print('ready', flush=True); sys.stdin.readline(); held = bytearray(b'x') * (30 << 20);" + WAIT
    with subprocess.Popen([sys.executable, "-c", grow], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdout.readline()
            before = usage.memory_mb(process.pid)
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
            assert usage.memory_mb(process.pid) - before == pytest.approx(30, abs=1)
        finally:
            process.kill()


async def test_work_after_the_reply_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # However little of a core a busy machine gives it.
    monkeypatch.setattr(usage, "IDLE_LIMIT_S", 30.0)
    with python("print('ready', flush=True)\n" + SPIN.format(0.3) + "import time; time.sleep(60)") as process:
        await usage.idle(process.pid)
        assert usage.cpu_seconds(process.pid) >= 0.29


async def test_a_process_that_never_rests_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "IDLE_LIMIT_S", 0.15)
    with python("print('ready', flush=True)\nwhile True: pass") as process:
        began = time.monotonic()
        await asyncio.wait_for(usage.idle(process.pid), 1.0)
        assert time.monotonic() - began >= 0.15


needs_cores = pytest.mark.skipif(usage.cores() is None, reason="needs two cores")


@needs_cores
def test_a_server_is_pinned_with_all_its_threads_and_children() -> None:
    code = (
        "import subprocess, sys, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n" + WAIT
    )
    pair = usage.cores()
    assert pair is not None and pair.servers != pair.load
    with python(code) as process:
        usage.pin(process.pid, pair.servers)
        family = [process.pid, *(c.pid for c in psutil.Process(process.pid).children())]
        threads = [int(t.name) for p in family for t in Path(f"/proc/{p}/task").iterdir()]
        try:
            assert len(family) == 2 and len(threads) >= 3
            assert {frozenset(os.sched_getaffinity(t)) for t in threads} == {frozenset({pair.servers})}
        finally:
            for p in family[1:]:
                os.kill(p, signal.SIGKILL)


@needs_cores
def test_this_process_has_all_its_cores_back_afterwards() -> None:
    before, pair = os.sched_getaffinity(0), usage.cores()
    assert pair is not None
    with pytest.raises(ZeroDivisionError), usage.on_core(pair.load):
        assert os.sched_getaffinity(0) == {pair.load}
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before


LISTEN = (
    "import socket, subprocess, sys, time\n"
    "{before}\n"
    "s = socket.create_server(('127.0.0.1', 0))\n"
    "print(f'listening on http://127.0.0.1:{{s.getsockname()[1]}} now', flush=True)\n"
    "time.sleep(60)\n"
)
CHILD = "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print('child', p.pid, flush=True)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def gone(pid: int) -> bool:
    """Whether a process has ended; a child of a killed server is reaped by init, in its own time."""
    for _ in range(100):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


async def test_a_server_and_its_children_end_with_the_fleet(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        server = fleet.start("one", [sys.executable, "-c", LISTEN.format(before=CHILD)])
        assert (await server.listening()).startswith("http://127.0.0.1:")
        child = int(server.said().split()[1])
        assert psutil.pid_exists(child)
    assert gone(server.pid) and gone(child)


async def test_one_that_will_not_end_is_killed_and_so_are_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gateway_parts.fleet.END_S", 0.1)
    with pytest.raises(KeyboardInterrupt), Fleet(tmp_path) as fleet:
        server = fleet.start("one", [sys.executable, "-c", LISTEN.format(before=f"{STUBBORN}; {CHILD}")])
        await server.listening()
        child = int(server.said().split()[1])
        # As Ctrl-C does.
        raise KeyboardInterrupt
    assert gone(server.pid) and gone(child)


async def test_children_of_a_server_that_died_end_too(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        server = fleet.start("one", [sys.executable, "-c", LISTEN.format(before=CHILD)])
        await server.listening()
        child = int(server.said().split()[1])
        os.kill(server.pid, signal.SIGKILL)
    assert gone(server.pid) and gone(child)


async def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        server = fleet.start("one", [sys.executable, "-c", "print('no port left'); raise SystemExit(3)"])
        with pytest.raises(StartFailed, match="one ended with code 3; it said:\nno port left"):
            await server.listening()
        with pytest.raises(StartFailed, match="two cannot be run"):
            fleet.start("two", [str(tmp_path / "nothing")])


async def test_a_server_that_never_listens_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gateway_parts.fleet.START_S", 0.1)
    with Fleet(tmp_path) as fleet:
        server = fleet.start("one", [sys.executable, "-c", "import time; time.sleep(60)"])
        with pytest.raises(StartFailed, match=r"one does not listen after 0\.1 s"):
            await server.listening()
    assert gone(server.pid)
