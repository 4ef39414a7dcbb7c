"""How long work shows itself: a bar in a terminal, a line for each step elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Protocol

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from agora.cli.invocation import Invocation
from agora.cli.text import clean, size


class Steps(Protocol):
    """What `experts.progress.PullProgress` says."""

    @property
    def phase(self) -> str:
        """What is being done."""

    @property
    def done(self) -> int:
        """Bytes done."""

    @property
    def total(self) -> int | None:
        """Bytes in all, if known."""


class _Stopped(Exception):
    """Ends a pull whose command is over."""


class _Bar(BarColumn):
    """A bar where there is something to measure, and nothing elsewhere."""

    def render(self, task: Task) -> RenderableType:  # type: ignore[override]
        return super().render(task) if task.total else Text()


class _Amount(ProgressColumn):
    """`12 MB of 93 MB`."""

    def render(self, task: Task) -> Text:
        return Text(f"{size(task.completed)} of {size(task.total)}" if task.total else "", style="dim")


class PullView:
    """Shows pulls, each by what is pulled. Called from the pulling threads.

    Args:
        invocation: Where to show them.
        bars: The bars to draw into; None to print a line for each new phase.
    """

    def __init__(self, invocation: Invocation, bars: Progress | None) -> None:
        self._invocation = invocation
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._phases: dict[str, str] = {}
        self._lock = Lock()
        self._stopped = False

    def __call__(self, source: str, progress: Steps) -> None:
        """Shows how far the pull of `source` is; ends it if its command is over."""
        if self._stopped:
            raise _Stopped(source)
        with self._lock:
            if self._bars is not None:
                self._draw(self._bars, source, progress)
            elif self._phases.get(source) != progress.phase:
                self._phases[source] = progress.phase
                much = f" ({size(progress.total)})" if progress.total else ""
                self._invocation.note(f"{source}: {progress.phase}{much}")

    def doing(self, what: str) -> None:
        """Shows something of unknown length that is going on until the end, in a terminal only."""
        if self._bars is not None:
            self._bars.add_task(clean(what), total=None)

    def stop(self) -> None:
        """Ends pulls that are still going on in their threads."""
        self._stopped = True

    def _draw(self, bars: Progress, source: str, progress: Steps) -> None:
        if source not in self._tasks:
            self._tasks[source] = bars.add_task("", total=None)
        text = clean(f"{source}: {progress.phase}")
        bars.update(self._tasks[source], description=text, completed=progress.done, total=progress.total)


@contextmanager
def pulls(invocation: Invocation) -> Iterator[PullView]:
    """A place to show pulls; empty again afterwards."""
    if invocation.json or not invocation.err.is_terminal:
        view = PullView(invocation, None)
        try:
            yield view
        finally:
            view.stop()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        _Bar(),
        _Amount(),
    )
    with Progress(*columns, console=invocation.err, transient=True) as bars:
        view = PullView(invocation, bars)
        try:
            yield view
        finally:
            view.stop()
