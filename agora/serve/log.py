"""The gateway's log: one JSON object a line, written by a thread of its own so that a slow disk holds up no request."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, BinaryIO, Final

import orjson

MAX_LINES: Final = 10_000
"""Lines that may wait to be written: some seconds at full speed. Beyond it lines are dropped, and
counted in the next."""

GATHER_S: Final = 0.1
"""Seconds in which lines are gathered before they are written: nobody who watches a log sees it, and a kill loses no
more than these."""

CLOSE_S: Final = 2.0
"""Seconds that the last lines may take to be written. A pipe whose reader has stopped reading takes none, and the
process must end all the same."""

MAX_TRACE_CHARS: Final = 8_000
"""Characters of a traceback that are kept: its end, which says what happened."""


class JsonLog(logging.Handler):
    """Writes records of `logging`, and lines given as they are.

    Args:
        out: Where to, best unbuffered: what a buffer cannot write it keeps, and fails with again when it is closed.
            Closed by whoever opened it.
        level: Least level of records.
    """

    def __init__(self, out: BinaryIO, level: int = logging.INFO) -> None:
        super().__init__(level)
        self._out = out
        self._lines: deque[bytes] = deque()
        self._dropped = 0
        self._torn = False  # whether the last line written may be cut off
        self._some = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write, name="agora-log", daemon=True)
        self._thread.start()

    def line(self, values: Mapping[str, Any]) -> None:
        """Adds one line; the time is added to it."""
        if len(self._lines) >= MAX_LINES:
            self._dropped += 1
            return
        plain = {"at": round(time.time(), 3), **values}
        if self._dropped:
            plain["dropped_lines"], self._dropped = self._dropped, 0
        self._lines.append(orjson.dumps(plain, default=str, option=orjson.OPT_APPEND_NEWLINE))
        if not self._some.is_set():
            self._some.set()

    def emit(self, record: logging.LogRecord) -> None:
        """Adds a record of `logging`."""
        plain: dict[str, Any] = {
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _valid(record.getMessage()),
        }
        if record.exc_info and record.exc_info[0] is not None:
            plain["trace"] = _valid("".join(traceback.format_exception(*record.exc_info))[-MAX_TRACE_CHARS:])
        self.line(plain)

    def __enter__(self) -> JsonLog:
        root = logging.getLogger()
        root.addHandler(self)
        self._before = root.level
        root.setLevel(min(self.level, self._before) if self._before else self.level)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        root = logging.getLogger()
        root.removeHandler(self)
        root.setLevel(self._before)
        self.close()

    def close(self) -> None:
        """Writes what waits, and ends; what nobody takes within `CLOSE_S` is given up."""
        self._closing.set()
        self._some.set()
        self._thread.join(CLOSE_S)
        super().close()

    def _write(self) -> None:
        while not (self._closing.is_set() and not self._lines):
            self._some.wait()
            # What comes in the next moment is written with it: a thread that wakes for every line costs the event loop
            # dear (1,734 requests a second of CPU against 2,400).
            self._closing.wait(GATHER_S)
            self._some.clear()
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            left = memoryview((b"\n" if self._torn else b"") + b"".join(lines))
            size = len(left)
            try:
                while left:
                    written = self._out.write(left)
                    if not written:
                        raise BlockingIOError("nothing is taken")
                    left = left[written:]
                self._out.flush()
                self._torn = False
            except (OSError, ValueError):
                # Nobody reads it any more, or the disk is full: answering goes on.
                self._dropped += len(lines)
                self._torn = self._torn or len(left) < size


def _valid(text: str) -> str:
    """The text without what UTF-8 cannot write: bytes of a header that are none reach Python as lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode()
