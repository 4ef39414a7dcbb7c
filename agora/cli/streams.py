"""Standard output and standard error that cannot be written: told once, as what it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO


class OutputError(Exception):
    """Standard output cannot be written, so there is no use in telling the error there."""


class Guarded:
    """A stream whose failing writes are handed on; all else is the stream's own.

    Args:
        stream: The stream.
        failed: Called with what a write failed with. A reader that went away is not handed on: it is no error.
    """

    def __init__(self, stream: TextIO, failed: Callable[[OSError], None]) -> None:
        self._stream = stream
        self._failed = failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes as the stream does."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            raise
        except OSError as e:
            self._failed(e)
            return len(text)

    def flush(self) -> None:
        """Flushes as the stream does."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as e:
            self._failed(e)


def _unwritable(error: OSError) -> NoReturn:
    raise OutputError(f"cannot write to standard output: {error.strerror or error}") from error


def _ignore(error: OSError) -> None:
    """What is told on the side is no reason to lose the answer."""


@contextmanager
def guarded() -> Iterator[None]:
    """Guards both streams: standard output raises `OutputError`, standard error keeps silent."""
    before = sys.stdout, sys.stderr
    if sys.stdout is not None:
        sys.stdout = Guarded(sys.stdout, _unwritable)
    if sys.stderr is not None:
        sys.stderr = Guarded(sys.stderr, _ignore)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def discard(*streams: TextIO | None) -> None:
    """Sends what is left in the streams' buffers nowhere, so that it cannot fail again when the process ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        # A stream that is no file has nothing that the end of the process would write.
        with suppress(OSError, ValueError):
            if stream is not None:
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def flush() -> None:
    """Writes what is in the buffers, as far as there are streams that take it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()
