"""Starts the servers that are compared, each in a process group of its own, and ends them whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from agora.errors import AgoraError

START_S: Final = 120.0
"""Seconds until a server listens: LiteLLM's imports take 10 s alone, far more beside others."""

END_S: Final = 5.0
"""Seconds after SIGTERM until SIGKILL."""

LOOK_EVERY_S: Final = 0.05

_URL: Final = re.compile(r"http://127\.0\.0\.1:\d+")


class StartFailed(AgoraError):
    """A server that is to be measured does not start."""

    code = "start_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A process that was started.

    Attributes:
        name: What to call it.
        process: The leader of its group.
        log: Where its output goes, both streams.
        url: Where it listens, if known beforehand.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    url: str | None

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self, most: int = 2000) -> str:
        """The end of what it said."""
        return self.log.read_text(errors="replace")[-most:].strip()

    async def listening(self) -> str:
        """Its URL, once it listens there: told beforehand, or by the server itself.

        Raises:
            StartFailed: If it ends first, or takes too long.
        """
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise StartFailed(f"{self.name} ended with code {self.process.returncode}; it said:\n{self.said()}")
            found = self.url
            if found is None and (told := _URL.search(self.log.read_text(errors="replace"))):
                found = told.group()
            if found is not None and await _connects(found):
                return found
            await asyncio.sleep(LOOK_EVERY_S)
        raise StartFailed(f"{self.name} does not listen after {START_S:g} s; it said:\n{self.said()}")


class Fleet:
    """The processes started; leaving its context ends them all, with what they started themselves.

    Args:
        folder: Where their logs go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers: list[Server] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        url: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Server:
        """Starts a server.

        Raises:
            StartFailed: If the program cannot be run.
        """
        log = self._folder / f"{name}.log"
        with log.open("wb") as out:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(env or {})},
                    # A group of its own: Ctrl-C reaches us alone, and we end it with all its children.
                    start_new_session=True,
                )
            except OSError as e:
                raise StartFailed(f"{name} cannot be run: {e}") from None
        server = Server(name=name, process=process, log=log, url=url)
        self._servers.append(server)
        return server

    def close(self) -> None:
        """Ends them: politely, then not."""
        for server in self._servers:
            _signal(server, signal.SIGTERM)
        until = time.monotonic() + END_S
        for server in self._servers:
            while not _ended(server) and time.monotonic() < until:
                time.sleep(LOOK_EVERY_S)
            # Also where the leader has ended: its children may not have. It has not been waited for yet, so the number
            # of its group cannot be another's by now.
            _signal(server, signal.SIGKILL)
            server.process.wait()
        self._servers.clear()


def free_port() -> int:
    """A port nobody listens on, for servers that cannot choose one and tell it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def _connects(url: str) -> bool:
    host, _, port = url.removeprefix("http://").rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


def _ended(server: Server) -> bool:
    """Whether the leader has ended, without waiting for it."""
    if server.process.returncode is not None:
        return True
    return os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _signal(server: Server, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, number)
