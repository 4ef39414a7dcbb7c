"""How a federation shows itself while it goes on: a live table in a terminal, a line for each version elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agora.cli.invocation import Invocation
from agora.cli.text import clean, counted, seconds, size

if TYPE_CHECKING:
    from fed.runs.told import Begun, Doing, Judged, Made, Noted, Stepped, Told

FRAMES_PER_S: Final = 4
"""Drawings per second: a training step takes longer than that."""

MOST_MODELS: Final = 16
"""Models with a line of their own: a terminal of 24 lines holds them."""


class FedView:
    """What is known of a run, folded from what it tells.

    Args:
        invocation: Where notes and lines go.
        lines: Whether to print a line for each version: where there is no live table, and it is not to be quiet.
    """

    def __init__(self, invocation: Invocation, *, lines: bool) -> None:
        self._invocation, self._lines = invocation, lines
        self.begun = False
        self.stopping = False
        self._limit = ""
        self._doing = ""
        self._step = ""
        self._last: Mapping[str, Any] = {}
        self._versions = 0
        self._models: dict[str, dict[str, Any]] = {}

    def __call__(self, told: Told) -> None:
        """Takes what a run tells."""
        _TAKES[type(told).__name__](self, told)

    def __rich__(self) -> RenderableType:
        """The live table."""
        parts: list[RenderableType] = []
        if self._last or self.begun:
            parts.append(self._head())
            parts.append(self._table())
        parts.append(Text(clean("stopping after this job; Ctrl-C again: at once" if self.stopping else self._now())))
        return Group(*parts)

    def _now(self) -> str:
        return self._step or self._doing

    def _head(self) -> Text:
        last = self._last
        return Text(
            f"{seconds(last.get('at', 0.0))} of the clients' time · "
            f"{counted(self._versions, 'version')}{self._limit} · "
            f"{last.get('absorbed', 0):,} updates used, {last.get('lost', 0):,} jobs lost, "
            f"{last.get('refused', 0):,} refused · "
            f"{size(last.get('bytes_up', 0))} up, {size(last.get('bytes_down', 0))} down",
            style="bold",
        )

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("model")
        for name in ("version", "updates", "staleness", "training loss", "loss", "accuracy"):
            table.add_column(name, justify="right")
        shown = list(self._models.items())[-MOST_MODELS:]
        for name, m in shown:
            table.add_row(
                Text(clean(name)),
                str(m.get("version", 0)),
                str(m.get("updates", "")),
                f"{m['staleness_mean']:.1f} ≤ {m['staleness_max']}" if "staleness_mean" in m else "",
                _number(m.get("loss")),
                _number(m.get("judged")),
                _percent(m.get("accuracy")),
            )
        return table

    def _doing_takes(self, told: Doing) -> None:
        self._doing, self._step = told.what, ""

    def _noted(self, told: Noted) -> None:
        self._invocation.note(f"note: {told.text}")

    def _begins(self, told: Begun) -> None:
        self.begun = True
        self._doing = ""
        limits = (("publications", " versions"), ("jobs", " jobs"), ("seconds", " s"))
        given = [f"{getattr(told, name):g}{unit}" for name, unit in limits if getattr(told, name) is not None]
        self._limit = f" of {told.publications}" if told.publications is not None else ""
        for row in told.rows:
            self._count(row)
        if self._lines:
            how = f"goes on after {counted(self._versions, 'version')}" if told.resumed else "begins"
            self._invocation.note(f"{how}: {counted(len(told.clients), 'client')}, until {' or '.join(given)}")

    def _stepped(self, told: Stepped) -> None:
        self._step = f"{told.client} trains {told.model}: step {told.step} of {told.steps}, loss {told.loss:.4f}"

    def _made(self, told: Made) -> None:
        self._count(told.row)
        if self._lines:
            self._invocation.note(self._line(told.row))

    def _count(self, row: Mapping[str, Any]) -> None:
        self._last = row
        self._versions += 1
        model = self._models.setdefault(row["model"], {})
        updates = model.get("updates", 0) + row["updates"]
        model.update({k: row[k] for k in ("version", "staleness_mean", "staleness_max", "loss")}, updates=updates)

    def _line(self, row: Mapping[str, Any]) -> str:
        loss = f", training loss {row['loss']:.4f}" if row["loss"] is not None else ""
        return (
            f"{seconds(row['at'])}: {row['model']} version {row['version']} of {counted(row['updates'], 'update')}, "
            f"staleness {row['staleness_mean']:.1f}{loss}; {row['lost']:,} lost, {row['refused']:,} refused, "
            f"{size(row['bytes_up'])} up, {size(row['bytes_down'])} down"
        )

    def _judged(self, told: Judged) -> None:
        row = told.row
        model = self._models.setdefault(row["model"], {})
        loss, accuracy = judged(row, several=len(self._models) > 1)
        model.update(judged=loss, accuracy=accuracy)
        if self._lines:
            right = f", accuracy {100 * accuracy:.1f} %" if accuracy is not None else ""
            self._invocation.note(f"{row['model']} version {row['version']}: loss {_number(loss)}{right}")


_TAKES: Final[Mapping[str, Callable[[FedView, Any], None]]] = {
    "Doing": FedView._doing_takes,
    "Noted": FedView._noted,
    "Begun": FedView._begins,
    "Stepped": FedView._stepped,
    "Made": FedView._made,
    "Judged": FedView._judged,
}


def judged(row: Mapping[str, Any], *, several: bool) -> tuple[float | None, float | None]:
    """Loss and accuracy of a judgement.

    Args:
        row: What it told.
        several: Whether there are several models. One of several is made for its own clients, so it is judged on their
            rows, if some were held back; an only one on the rows that all have in common.
    """
    own = row.get("own_loss") is not None and (several or row.get("loss") is None)
    return (row["own_loss"], row.get("own_accuracy")) if own else (row.get("loss"), row.get("accuracy"))


@contextmanager
def view(invocation: Invocation, *, quiet: bool) -> Iterator[FedView]:
    """A place for a run to show itself; notes are told also where it is to be quiet."""
    live = invocation.err.is_terminal and not quiet and not invocation.json
    shown = FedView(invocation, lines=not live and not quiet and not invocation.json)
    if not live:
        yield shown
        return
    with Live(shown, console=invocation.err, refresh_per_second=FRAMES_PER_S, transient=True):
        yield shown


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
