"""Plots of a run, as SVG. matplotlib is an extra, loaded when the first one is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agora.errors import InvalidRequest
from fed.report.read import Report
from fed.report.summary import Summary

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
"""Told apart by colour-blind readers too (Okabe and Ito 2008), and two more."""

MOST_CLIENTS: Final = 40
"""Clients with a bar of their own: as many as can be read."""

MINUTE: Final = 300.0
HOUR: Final = 3 * 3600.0
"""Seconds from which on an axis has minutes, or hours."""

_STYLE: Final = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#3c4149",
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "xtick.color": "#5b616b",
    "ytick.color": "#5b616b",
    "legend.frameon": False,
    "svg.hashsalt": "agora",
    "svg.fonttype": "path",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A plot.

    Attributes:
        name: Of its file.
        title: What it shows.
        text: What to see in it, one sentence.
        svg: The picture.
    """

    name: str
    title: str
    text: str
    svg: bytes


def figures(report: Report, summary: Summary) -> list[Figure]:
    """The plots that a run has figures for.

    Raises:
        InvalidRequest: If matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise InvalidRequest(
            "plots need matplotlib, which is not installed", hint="pip install 'agora-llm[plots]'"
        ) from None
    found = []
    with matplotlib.rc_context(_STYLE):
        for name, title, text, draw, height in _PLOTS:
            canvas = Canvas(figsize=(7.2, height), layout="constrained")
            axes = canvas.add_subplot()
            if not draw(axes, report, summary):
                continue
            out = io.BytesIO()
            canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
            found.append(Figure(name=name, title=title, text=text, svg=out.getvalue()))
    return found


def _time(axes: Any, seconds: float) -> float:
    """Labels the axis of virtual time; what seconds are divided by."""
    unit, by = ("h", 3600.0) if seconds >= HOUR else ("min", 60.0) if seconds >= MINUTE else ("s", 1.0)
    axes.set_xlabel(f"virtual time ({unit})")
    axes.set_xlim(left=0, right=seconds / by * 1.02 if seconds else 1)
    return by


def _colours(names: Sequence[str]) -> dict[str, str]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _judged(key: str, own: str, label: str) -> Callable[[Any, Report, Summary], bool]:
    def draw(axes: Any, report: Report, summary: Summary) -> bool:
        by = _time(axes, summary.seconds)
        colours = _colours([m.name for m in summary.models])
        drawn = False
        for name, colour in colours.items():
            rows = sorted((e for e in report.evaluations if e["model"] == name), key=lambda e: float(e["at"]))
            for field, line, extra in ((key, "-", ""), (own, "--", ", on its clients' own rows")):
                points = [(e["at"] / by, e[field]) for e in rows if e.get(field) is not None]
                if points:
                    label_of = f"{name}{extra}"
                    x, y = zip(*points, strict=True)
                    axes.plot(x, y, line, marker="o", markersize=3.5, color=colour, label=label_of, linewidth=1.6)
                    drawn = True
        axes.set_ylabel(label)
        if drawn and (len(colours) > 1 or any(own in e for e in report.evaluations)):
            axes.legend(fontsize=8.5)
        return drawn

    return draw


def _versions(axes: Any, report: Report, summary: Summary) -> bool:
    by = _time(axes, summary.seconds)
    for name, colour in _colours([m.name for m in summary.models]).items():
        rows = [row for row in report.rows if row["model"] == name]
        if rows:
            x, y = [0.0, *(r["at"] / by for r in rows)], [0, *(r["version"] for r in rows)]
            axes.step(x, y, where="post", color=colour, label=name, linewidth=1.6)
    axes.set_ylabel("version")
    axes.set_ylim(bottom=0)
    axes.yaxis.get_major_locator().set_params(integer=True)
    if len(summary.models) > 1:
        axes.legend(fontsize=8.5)
    return bool(report.rows)


def _bytes(axes: Any, report: Report, summary: Summary) -> bool:
    by = _time(axes, summary.seconds)
    x = [0.0, *(row["at"] / by for row in report.rows)]
    for key, colour, label in (("bytes_down", COLOURS[0], "to clients"), ("bytes_up", COLOURS[1], "from clients")):
        axes.plot(x, [0.0, *(row[key] / 1e6 for row in report.rows)], color=colour, label=label, linewidth=1.6)
    axes.set_ylabel("MB")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8.5)
    return bool(report.rows)


def _staleness(axes: Any, report: Report, summary: Summary) -> bool:
    if not summary.staleness:
        return False
    axes.bar(list(summary.staleness), list(summary.staleness.values()), width=0.85, color=COLOURS[0])
    axes.set_xlabel("versions made since the update's start")
    axes.set_ylabel("updates")
    axes.set_xlim(-0.7, max(3, *summary.staleness) + 0.7)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="x", visible=False)
    return True


def _shares(axes: Any, report: Report, summary: Summary) -> bool:
    there = sorted((c for c in summary.clients if not c.left_out), key=lambda c: (-c.share, c.name))
    if not report.rows or not there:
        return False
    shown = there[:MOST_CLIENTS]
    names = [c.name if len(c.name) <= 24 else f"{c.name[:23]}…" for c in shown]
    at = range(len(shown))
    colours = _colours([m.name for m in summary.models])
    axes.barh(at, [100 * c.share for c in shown], color=[colours.get(c.model or "", COLOURS[0]) for c in shown])
    axes.plot([100 * c.rows_share for c in shown], at, "|", color="#16181d", markersize=9, markeredgewidth=1.8)
    axes.set_yticks(list(at), names, fontsize=8.5 if len(shown) <= 20 else 6.5)
    axes.invert_yaxis()
    more = f" (the first {MOST_CLIENTS} of {len(there)})" if len(there) > MOST_CLIENTS else ""
    axes.set_xlabel(f"% of the weight; the mark: % of the rows{more}")
    axes.grid(axis="y", visible=False)
    return True


def _jobs(axes: Any, report: Report, summary: Summary) -> bool:
    by = _time(axes, summary.seconds)
    x = [0.0, *(row["at"] / by for row in report.rows)]
    kinds = (("absorbed", "used", 2), ("lost", "lost", 1), ("refused", "refused", 3), ("cancelled", "stopped", 7))
    for key, label, colour in kinds:
        if summary.totals[key] or key == "absorbed":
            y = [0, *(row[key] for row in report.rows)]
            axes.step(
                x, y, where="post", color=COLOURS[colour], label=f"{label} ({summary.totals[key]:,})", linewidth=1.6
            )
    axes.set_ylabel("jobs")
    axes.set_ylim(bottom=0)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8.5)
    return bool(report.rows)


def _groups(axes: Any, report: Report, summary: Summary) -> bool:
    if not report.groups:
        return False
    by = _time(axes, summary.seconds)
    clients = [c.name for c in summary.clients if not c.left_out]
    last = {c.name: c.model or "" for c in summary.clients}
    clients.sort(key=lambda c: (last[c], c))
    names = list(
        dict.fromkeys([*(m.name for m in summary.models), *(g for row in report.groups for g in row["groups"])])
    )
    colours = _colours(names)
    home = report.groups[0]["model"]
    spans = [(0.0, {home: clients}), *((row["at"], row["groups"]) for row in report.groups)]
    ends = [at for at, _ in spans[1:]] + [max(summary.seconds, spans[-1][0])]
    place = {client: i for i, client in enumerate(clients)}
    for (start, groups), end in zip(spans, ends, strict=True):
        for name, members in groups.items():
            at = [place[c] for c in members if c in place]
            axes.barh(at, (end - start) / by, left=start / by, height=0.9, color=colours[name], linewidth=0)
    for name in dict.fromkeys(n for _, groups in spans for n, m in groups.items() if m):
        axes.barh([0], 0, color=colours[name], label=name)
    axes.set_yticks(range(len(clients)), clients, fontsize=8.5 if len(clients) <= 20 else 6)
    if len(clients) > MOST_CLIENTS:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(clients)} clients")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=min(4, len(colours)))
    return True


_Draw = Callable[[Any, Report, Summary], bool]

_PLOTS: Final[tuple[tuple[str, str, str, _Draw, float], ...]] = (
    (
        "loss",
        "Loss",
        "On rows that nobody trained on, against the clients' time.",
        _judged("loss", "own_loss", "loss"),
        3.1,
    ),
    (
        "accuracy",
        "Accuracy",
        "On the same rows: label words, or tokens where answers are free text.",
        _judged("accuracy", "own_accuracy", "accuracy"),
        3.1,
    ),
    ("versions", "Versions", "How fast each model moves on.", _versions, 3.1),
    ("clusters", "Clusters", "Which model each client belonged to.", _groups, 3.1),
    ("bytes", "Bytes", "Sent to the clients, and come from them, in all.", _bytes, 3.1),
    ("staleness", "Staleness", "How many versions an update was late when it was used.", _staleness, 3.1),
    ("shares", "Shares", "Whose updates weigh how much, after staleness and caps.", _shares, 3.1),
    ("jobs", "Jobs", "What became of them.", _jobs, 3.1),
)
