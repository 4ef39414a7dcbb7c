"""Runs a command, and ends it with whoever asked for it: a script of its own, which imports nothing of agora.

    python -I -S vllm_guard.py GRACE_S FOLDER COMMAND...

The command gets a process group of its own. That whole group is ended when the command ends, when a word comes on
standard input, or when that ends without one, as it does when the parent is gone, however it went: a process that is
killed cannot clean up, but its pipes are closed for it.
Ending is SIGTERM, and SIGKILL for what is left after GRACE_S seconds. The command's output, both kinds, goes to
standard output. Standard error tells, one line each: `pid N` at the start; `failed WHY` if it cannot be started;
`ended N` once it has ended, by its exit status or minus its signal. The script ends when nothing of the group is left.
If it was the parent that went, FOLDER is removed, which was the parent's for the time of the command.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

CHECK_S: Final = 1.0
"""How often to look whether the parent is still there, should somebody else hold its end of the pipe open."""

REST_S: Final = 1.0
"""Seconds for the rest of the group once its leader has ended: Python's resource tracker frees shared memory then."""

REAP_S: Final = 5.0
"""Seconds for the kernel to end what was sent SIGKILL; one that is stuck in a driver may take for ever."""

PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36


def main(arguments: list[str]) -> int:
    """Does what the module says; returns the exit status of the script."""
    grace_s, folder, command = float(arguments[0]), arguments[1], arguments[2:]
    parent = os.getppid()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # What the command leaves behind becomes ours, so that we can end it too.
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    try:
        # This process has one thread, so running code between fork and exec is safe.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, process_group=0, preexec_fn=_die_with_parent
        )
    except OSError as e:
        _tell(f"failed {e.strerror or e}")
        return 127
    _tell(f"pid {child.pid}")
    left = _Left(child.pid)
    orphaned = False
    while not left.leader_ended():
        ready, _, _ = select.select([0, woken], [], [], CHECK_S)
        if 0 in ready:
            orphaned = not os.read(0, 4096)
            break
        if woken in ready and any(n != signal.SIGCHLD for n in os.read(woken, 4096)):
            break
        if os.getppid() != parent:
            orphaned = True
            break
    left.end(grace_s)
    child.returncode = left.status  # Reaped here; Popen need not look for it.
    if orphaned or os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


class _Left:
    """What is left of the command's group."""

    def __init__(self, leader: int) -> None:
        self._leader = leader
        self.status: int | None = None

    def leader_ended(self) -> bool:
        """Reaps whoever has ended; whether the command itself has."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == self._leader:
                    self.status = os.waitstatus_to_exitcode(status)
                    _tell(f"ended {self.status}")
        return self.status is not None

    def end(self, grace_s: float) -> None:
        """Ends everything that is left."""
        if not self.leader_ended() or not self._all_gone():
            self._signal(signal.SIGTERM)
            _wait(grace_s, self.leader_ended)
            _wait(min(grace_s, REST_S), self._all_gone)
        self._signal(signal.SIGKILL)
        _wait(REAP_S, lambda: self._strays_killed() and self._all_gone())

    def _all_gone(self) -> bool:
        if not self.leader_ended() or _children():
            return False
        try:
            os.killpg(self._leader, 0)
        except (ProcessLookupError, PermissionError):
            return True
        return False

    def _strays_killed(self) -> bool:
        """Kills those that had left the group, and now are ours."""
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return True

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._leader, number)


def _wait(seconds: float, done: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.01)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:  # noqa: PTH123
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []  # Not Linux, or not told: then there is the group.


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with_parent() -> None:
    """Should this script itself be killed."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _tell(line: str) -> None:
    # Who would read it may be gone.
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
