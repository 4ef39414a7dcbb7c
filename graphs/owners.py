"""Which process is at a run, and whether it still lives."""

from __future__ import annotations

import platform

import psutil


def this_process() -> str:
    """The name under which this process owns runs: host, process number, and when it started."""
    return _name(psutil.Process())


def alive(owner: str | None) -> bool:
    """Whether that process is still there."""
    if owner is None:
        return False
    host, pid, _ = owner.rsplit(":", 2)
    if host != platform.node():
        # A process of another machine cannot be seen from here; it is taken at its word.
        return True
    try:
        process = psutil.Process(int(pid))
        # A killed process whose parent has not asked about it yet is still listed.
        return process.status() != psutil.STATUS_ZOMBIE and _name(process) == owner
    except psutil.NoSuchProcess:
        return False


def _name(process: psutil.Process) -> str:
    # With its start time: the system gives the number of a dead process to a new one.
    return f"{platform.node()}:{process.pid}:{process.create_time():.0f}"
