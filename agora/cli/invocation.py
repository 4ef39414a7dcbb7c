"""One call of the command line: how it speaks, and how its errors are told.

Exit codes: 0 done; 1 an error, told in one line; 2 wrong usage; 3 an answer with parts missing; 70 a bug in agora;
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Coroutine
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from agora.cli.streams import OutputError
from agora.cli.text import clean
from agora.errors import AgoraError

T = TypeVar("T")

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment that keeps libraries from writing into what agora shows; the user's own settings win."""


class ExitCode(IntEnum):
    """What the process returns."""

    OK = 0
    ERROR = 1
    USAGE = 2
    PARTIAL = 3
    BUG = 70
    INTERRUPTED = 130


PLAIN_WIDTH = 200
"""Columns where there is no terminal: tables stay on one line for other programs to read."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leaves it to the one place where errors end, rather than to exit from here with an error code."""
        raise BrokenPipeError


def _console(*, stderr: bool = False) -> Console:
    console = _Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PLAIN_WIDTH
    return console


@dataclass(slots=True, kw_only=True)
class Invocation:
    """What one call of the command line carries along.

    Attributes:
        debug: Show tracebacks and the log.
        json: Print one JSON object and nothing else on stdout, errors too.
        out: Where answers go.
        err: Where progress, notes and errors go.
        run: The run that is written down in the store, once there is one.
        finished: Whether its result is written down too.
        kept: What the reader must be told under `--json` too: it goes into the error's `notes`.
    """

    debug: bool = False
    json: bool = False
    out: Console = field(default_factory=_console)
    err: Console = field(default_factory=lambda: _console(stderr=True))
    run: str | None = None
    finished: bool = False
    kept: list[str] = field(default_factory=list)

    def note(self, text: str, *, keep: bool = False) -> None:
        """Tells something on the side; under `--json` nothing, or with `keep` in the error that follows."""
        if keep:
            self.kept.append(text)
        if not self.json:
            self.err.print(Text(clean(text), style="dim"), soft_wrap=True)

    def say(self, text: str | Text = "") -> None:
        """Prints text as it is, long lines unbroken."""
        self.out.print(text, markup=False, soft_wrap=True)

    def print_json(self, value: Any) -> None:
        """Prints one JSON object on one or more lines; plain ASCII, so that any terminal can take it."""
        self.out.file.write(json.dumps(value, indent=2) + "\n")
        self.out.file.flush()

    def set_debug(self) -> None:
        """Turns on the log."""
        self.debug = True
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
        for name in ("agora", "experts", "graphs"):
            logging.getLogger(name).setLevel(logging.DEBUG)

    def tell_error(self, error: AgoraError) -> None:
        """An error in one line, and a line for what to do next."""
        hint = error.hint
        if (go_on := self._go_on()) is not None:
            hint = f"{hint}; then go on with: {go_on}" if hint else f"go on with: {go_on}"
        self._tell_json(error.code, error.message, hint)
        self._tell("error", error.message, hint)
        self._trace(error)

    def tell_output(self, error: OutputError, hint: str | None = None) -> None:
        """Standard output that cannot be written: told on standard error alone."""
        if self.run is not None and hint is None:
            hint = f"see the answer again: agora runs show {self.run}" if self.finished else f"see: {self._go_on()}"
        self._tell("error", str(error), hint)
        self._trace(error)

    def tell_interrupted(self) -> None:
        """Ctrl-C, for programs; people have been told where the work was stopped."""
        hint = f"agora runs show {self.run}" if self.run is not None and self.finished else self._go_on()
        self._tell_json("interrupted", "stopped by Ctrl-C", hint)

    def tell_usage(self, error: typer.TyperException) -> None:
        """What is wrong with the command line itself."""
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "agora"
        message = _with_value(error, error.format_message().strip().rstrip("."))
        hint = f"see: {command} --help"
        self._tell_json("usage", message, hint)
        self._tell("error", message, hint)

    def tell_bug(self, error: Exception) -> None:
        """Something that agora did not foresee."""
        message = f"a bug in agora: {type(error).__name__}: {error}".rstrip(": ")
        hint = "" if self.debug else "AGORA_DEBUG=1 before the same command shows where; please report it"
        self._tell_json("internal", message, hint or None)
        self._tell("error", message, hint)
        self._trace(error)

    def _go_on(self) -> str | None:
        return f"agora runs resume {self.run}" if self.run is not None and not self.finished else None

    def _tell_json(self, code: str, message: str, hint: str | None) -> None:
        """The error as one JSON object, where that was asked for; with the run it ended, if that is in the store."""
        if not self.json:
            return
        error: dict[str, Any] = {"code": code, "message": message, "hint": hint}
        if self.run is not None:
            error["run"] = self.run
        if self.kept:
            error["notes"] = self.kept
        self.print_json({"error": error})

    def _tell(self, kind: str, message: str, hint: str | None) -> None:
        self.err.print(Text(f"{kind}: ", style="bold red").append(clean(message), style="default"), soft_wrap=True)
        if hint:
            self.err.print(Text("hint: ", style="bold").append(clean(hint), style="default"), soft_wrap=True)

    def _trace(self, error: BaseException) -> None:
        if self.debug:
            self.err.file.write("".join(traceback.format_exception(error)))


_MUST_BE: Final = {"int_parsing": "a whole number", "float_parsing": "a number", "int_from_float": "a whole number"}
"""What an option's value has to be, by the name of the check that it failed."""


def _with_value(error: typer.TyperException, message: str) -> str:
    """The message with the value that was seen and what is allowed, where a value failed its check."""
    # Asked for what it can do rather than for its type, which would have to be imported at every start.
    errors = getattr(error.__cause__, "errors", None)
    found = errors()[0] if callable(errors) else {}
    said = found.get("msg", "")
    if not said or said not in message:
        return message
    must_be = _MUST_BE.get(found["type"])
    value = repr(found.get("input"))
    return message.replace(said, f"{value} is not {must_be}" if must_be else f"{value}: {said[:1].lower()}{said[1:]}")


def of(context: typer.Context) -> Invocation:
    """The invocation that a command runs in."""
    found = context.find_object(Invocation)
    assert found is not None
    return found


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Runs a command's asynchronous work, as `asyncio.run` does; Ctrl-C cancels it.

    Raises:
        KeyboardInterrupt: After Ctrl-C, when the work has tidied up. Threads may still be loading weights: nothing can
            stop them but the end of the process, so they are not waited for.
    """
    runner = asyncio.Runner()
    try:
        result = runner.run(work)
    except KeyboardInterrupt:
        raise
    except BaseException:
        runner.close()
        raise
    runner.close()
    return result


def quieten() -> None:
    """Keeps libraries that agora stands on from writing to the terminal."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    # Without any handler, logging writes warnings to stderr by itself.
    logging.getLogger().addHandler(logging.NullHandler())
