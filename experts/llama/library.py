"""llama-cpp-python, if it is installed, and what llama.cpp has to say."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from agora.errors import ModelError

INSTALL: Final = "pip install 'agora-llm[llamacpp]' (it compiles llama.cpp, which takes some minutes)"
"""How to get llama-cpp-python."""

TAIL_LINES: Final = 20
"""Lines of llama.cpp's own words kept for an error; a failed load says what is wrong in its last three."""

GRAVE: Final = frozenset({3, 4})
"""llama.cpp's log levels of warnings and errors (`ggml_log_level` in ggml.h)."""

LEVELS: Final = {3: logging.INFO, 4: logging.INFO}
"""Its levels in ours, all others being DEBUG. None is a warning: what matters of them becomes an error of agora."""

SPIN: Final = ("GOMP_SPINCOUNT", "10000")
"""How long the threads of one operation spin when they wait for each other. By default it is for milliseconds, and
where another program holds the core that one of them needs, every operation takes a whole time slice: 16 rows of a 135M
model on 2 cores, one of them busy, made 35 tokens/s. Spinning 30 times shorter they made 90, and undisturbed the same
as before, about 220."""

logger = logging.getLogger(__name__)


class Library:
    """llama.cpp in this process.

    Attributes:
        api: The module with the functions of llama.h.

    Args:
        package: The module `llama_cpp`.
    """

    def __init__(self, package: Any) -> None:
        self.api: Any = package
        self._heard = threading.local()
        # Kept as long as llama.cpp may call it: as long as the process.
        self._callback = package.llama_log_callback(self._hear)
        package.llama_log_set(self._callback, None)
        package.llama_backend_init()

    @contextmanager
    def listening(self) -> Iterator[deque[str]]:
        """The warnings and errors that llama.cpp tells on this thread within the block."""
        lines: deque[str] = deque(maxlen=TAIL_LINES)
        before, self._heard.lines = getattr(self._heard, "lines", None), lines
        try:
            yield lines
        finally:
            self._heard.lines = before

    def _hear(self, level: int, text: bytes | None, _: object) -> None:
        line = (text or b"").decode(errors="replace").rstrip()
        if not line:
            return
        lines: deque[str] | None = getattr(self._heard, "lines", None)
        if lines is not None and level in GRAVE:
            lines.append(line)
        logger.log(LEVELS.get(level, logging.DEBUG), "%s", line)


@functools.cache
def library() -> Library:
    """llama.cpp, loaded once: its log goes to one place in a process, so there is one of these.

    Raises:
        ModelError: If llama-cpp-python is not installed, or cannot be loaded.
    """
    try:
        with _spinning_shortly():
            package = importlib.import_module("llama_cpp")
    except ModuleNotFoundError as e:
        raise ModelError(f"llama-cpp-python is not installed: no module {e.name!r}", hint=INSTALL) from None
    except (ImportError, OSError, RuntimeError) as e:
        raise ModelError(
            f"llama-cpp-python is installed but cannot be loaded: {e}",
            hint="install it again on this machine: pip install --force-reinstall --no-cache-dir llama-cpp-python",
        ) from e
    return Library(package)


@contextmanager
def _spinning_shortly() -> Iterator[None]:
    """Sets `SPIN` for what is loaded in the block, unless the user has said how threads shall wait."""
    name, value = SPIN
    if name in os.environ or "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def last_words(lines: deque[str]) -> str:
    """What llama.cpp said, in one line for an error."""
    said = "; ".join(line.split(": ", 1)[-1] for line in list(lines)[-3:])
    return said[:500] or "llama.cpp does not say why"
