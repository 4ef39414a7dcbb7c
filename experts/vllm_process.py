"""One vLLM process: started under a guard, listened to, and ended with everything it has started."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from agora.errors import ModelError

_log = logging.getLogger(__name__)

GUARD: Final = Path(__file__).with_name("vllm_guard.py")

KEPT_LINES: Final = 400
"""Lines of the log that are kept: vLLM's two tracebacks of a failed start are ~150."""

MAX_LINE_CHARS: Final = 1_000
"""Characters kept of a line of the log."""

TOLD_LINES: Final = 3
"""Lines of the log that an error quotes: the engine's own error, the server's about it, and one to spare."""

TOLD_CHARS: Final = 300
"""Characters of each line that an error quotes."""

GUARD_S: Final = 10.0
"""Seconds for the guard beyond the grace period; it waits 6 s for the rest of a group."""

LAST_WORDS_S: Final = 1.0
"""Seconds to read what is left of a log once everything that wrote it has ended."""

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

_PREFIX = re.compile(r"^(?:\([A-Za-z_0-9]+ pid=\d+\) *)?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] *)?")
"""`(EngineCore pid=12) ERROR 11-22 21:06:53 [core.py:1] `, which vLLM puts before its lines."""

_FAILURE = re.compile(
    r"^(?:[\w.]*(?:Error|Exception|Interrupt)\b(?:: .|$)|[\w./ -]*: error: )|No module named|out of memory"
)
"""The last line of a traceback, or argparse's complaint."""

_NOISE = re.compile(r"resource_tracker|nanobind|warnings\.warn|^\s*$")


class ServerProcess:
    """A server's process and what it says. Made by `launch`, on the running loop.

    Attributes:
        ended: Set once the server has ended, whether or not all that it started is gone.
    """

    def __init__(self, guard: asyncio.subprocess.Process, *, grace_s: float, secret: str) -> None:
        self._guard = guard
        self._grace_s = grace_s
        self._secret = secret
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._pid: int | None = None
        self._status: int | None = None
        self._refused = ""
        self.ended = asyncio.Event()
        self._limit: asyncio.TimerHandle | None = None
        assert guard.stdout is not None
        assert guard.stderr is not None
        self._readers = (
            asyncio.create_task(self._read(guard.stdout, self._heard)),
            asyncio.create_task(self._read(guard.stderr, self._told)),
        )
        self._gone = asyncio.create_task(self._watch())

    @classmethod
    async def launch(
        cls,
        command: Sequence[str | os.PathLike[str]],
        *,
        environment: Mapping[str, str],
        folder: Path,
        grace_s: float,
        secret: str = "",
    ) -> ServerProcess:
        """Starts a command under `experts/vllm_guard.py`.

        Args:
            command: The program and its arguments.
            environment: All of its environment.
            folder: Where it works; removed by the guard should this process be killed.
            grace_s: Seconds between SIGTERM and SIGKILL.
            secret: Never shown from its log.

        Raises:
            ModelError: If no process can be started.
        """
        try:
            guard = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", GUARD, str(grace_s), folder, *command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=dict(environment),
                cwd=folder,
                start_new_session=True,
            )
        except OSError as e:
            raise ModelError(f"no process can be started: {e.strerror or e}") from None
        return cls(guard, grace_s=grace_s, secret=secret)

    @property
    def pid(self) -> int | None:
        """The server's process, which leads its process group; None until it runs."""
        return self._pid

    @property
    def lines(self) -> tuple[str, ...]:
        """The last lines of its log, oldest first."""
        return tuple(self._lines)

    def how(self) -> str:
        """How it ended, with the lines of its log that may say why."""
        if self._refused:
            return f"it could not be started: {self._refused}"
        if self._status is None:
            end = "ended in an unknown way"
        elif self._status < 0:
            with suppress(ValueError):
                end = f"was ended by {signal.Signals(-self._status).name}"
        else:
            end = f"ended with status {self._status}"
        return f"the process {end}{self.said()}"

    def said(self) -> str:
        """The lines of its log that may say what is wrong, ready to be put behind a sentence."""
        lines = telling_lines(self._lines)
        return f"; its log says: {' | '.join(lines)}" if lines else "; its log is empty"

    async def gone(self) -> None:
        """Waits until nothing of it is left."""
        await asyncio.shield(self._gone)

    async def stop(self) -> None:
        """Ends it and everything it has started; returns when all is gone. Safe to call again."""
        stdin = self._guard.stdin
        assert stdin is not None
        if not stdin.is_closing():
            stdin.write(b"stop\n")
            stdin.close()
        if self._limit is None:
            self._limit = asyncio.get_running_loop().call_later(self._grace_s + GUARD_S, self._kill)
        await asyncio.shield(self._gone)

    def _kill(self) -> None:
        """The guard itself is stuck."""
        with suppress(ProcessLookupError):
            self._guard.kill()

    async def _watch(self) -> None:
        output, words = self._readers
        # The guard alone holds that pipe, so it ends with the guard. Waiting for its process could take for ever:
        # some Pythons wait for the output's pipe too, which what it has left behind may hold.
        await words
        if self._status is None and self._pid is not None:
            # The guard was killed before it had ended the group.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pid, signal.SIGKILL)
        # What was said is all in the pipe by now; only a stray that has left the group could hold it open.
        await asyncio.wait((output,), timeout=LAST_WORDS_S)
        output.cancel()
        await asyncio.gather(output, return_exceptions=True)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._guard.wait(), LAST_WORDS_S)
        if self._limit is not None:
            self._limit.cancel()
        self.ended.set()

    @staticmethod
    async def _read(stream: asyncio.StreamReader, take: Callable[[str], None]) -> None:
        rest = b""
        while piece := await stream.read(65_536):
            *lines, rest = (rest + piece).split(b"\n")
            rest = rest[-4 * MAX_LINE_CHARS :]
            for line in lines:
                # A progress bar is one long line, each of its states behind a carriage return.
                take(line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace"))
        if rest:
            take(rest.decode("utf-8", "replace"))

    def _heard(self, line: str) -> None:
        line = _ANSI.sub("", line).rstrip()[:MAX_LINE_CHARS]
        if self._secret:
            line = line.replace(self._secret, "***")
        if line:
            self._lines.append(line)
            _log.debug("%s", line)

    def _told(self, line: str) -> None:
        """A word of the guard."""
        word, _, rest = line.partition(" ")
        if word == "pid" and rest.isdecimal():
            self._pid = int(rest)
        elif word == "ended" and rest.lstrip("-").isdecimal():
            self._status = int(rest)
            self.ended.set()
        elif word == "failed":
            self._refused = rest
        else:
            self._heard(line)


def telling_lines(lines: Sequence[str] | deque[str]) -> list[str]:
    """The lines of a log that tell what went wrong: the ends of its tracebacks, else its last lines."""
    plain = [text for line in lines if (text := _PREFIX.sub("", line).strip()) and not _NOISE.search(text)]
    failures = list(dict.fromkeys(text for text in plain if _FAILURE.search(text)))
    # The first failure is mostly the cause of the others, and the last what came of it.
    chosen = failures if len(failures) <= TOLD_LINES else [*failures[: TOLD_LINES - 1], failures[-1]]
    return [line[:TOLD_CHARS] for line in chosen or plain[-TOLD_LINES:]]
