"""What a server used: processor time and memory, of its process and of all that it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

IDLE_STEP_S: Final = 0.05
IDLE_SHARE: Final = 0.2
"""A server that uses less of one core than this over a step has nothing left to do but its own timers."""

IDLE_LIMIT_S: Final = 3.0
"""Longest wait for that: one that is never idle is measured as it is."""


def cpu_seconds(pid: int) -> float:
    """Processor seconds, user and system, of a process and of all its children, living and waited for.

    In steps of 10 ms (the kernel's clock tick); what is counted inside a step is exact.
    """
    used = 0.0
    for process in _tree(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            # It ended after it was listed: its parent, listed before it, did not have its times yet. Rare and small.
            continue
        used += times.user + times.system + times.children_user + times.children_system
    return used


def memory_mb(pid: int) -> float:
    """Resident memory of a process and its living children, in MiB."""
    held = 0
    for process in _tree(pid):
        try:
            held += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return held / 2**20


async def idle(pid: int) -> None:
    """Waits until the server has done what it does after a reply: logs, checkpoints, closing what it opened."""
    clock = asyncio.get_running_loop().time
    until = clock() + IDLE_LIMIT_S
    before, at = cpu_seconds(pid), clock()
    while clock() < until:
        await asyncio.sleep(IDLE_STEP_S)
        now, then = cpu_seconds(pid), clock()
        # Little use alone tells nothing on a busy machine: it may have had no turn.
        if now - before < IDLE_SHARE * (then - at) and not _wants_to_run(pid):
            return
        before, at = now, then


@dataclass(frozen=True, slots=True)
class Cores:
    """One core for whichever server is measured, another for load and upstream."""

    servers: int
    load: int


def cores() -> Cores | None:
    """Two cores that this process may use; None where it may use one only, or cannot choose."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    return Cores(allowed[0], allowed[-1]) if len(allowed) > 1 else None


def pin(pid: int, core: int) -> None:
    """Lets a process, and what it started, run on that core only."""
    for process in _tree(pid):
        _allow(process.pid, {core})


@contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """This process runs on that core only, until the end of the context; None changes nothing."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    _allow(os.getpid(), {core})
    try:
        yield
    finally:
        _allow(os.getpid(), before)


def _allow(pid: int, cores: set[int]) -> None:
    # The system call is about one thread, and servers have several.
    for thread in Path(f"/proc/{pid}/task").iterdir():
        # One that has just ended needs no core.
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)


def _wants_to_run(pid: int) -> bool:
    """Whether a thread runs or waits for a core; False where the system does not tell of threads."""
    for process in _tree(pid):
        for stat in Path(f"/proc/{process.pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):
                # The state follows the name, which may hold anything but ends in the last parenthesis.
                if stat.read_text().rpartition(")")[2].split()[0] == "R":
                    return True
    return False


def _tree(pid: int) -> Iterator[psutil.Process]:
    root = psutil.Process(pid)
    yield root
    yield from root.children(recursive=True)
