"""The report as one page of HTML, with everything in it: pictures, tables and the configuration. No scripts."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any, Final

import jinja2

from fed.report.figures import figures
from fed.report.read import Report
from fed.report.summary import Summary

MOST_PROBLEMS: Final = 200
"""Problems on the page; the record has all of them."""

MOST_CLIENTS: Final = 500
"""Clients on the page; `clients.json` has all of them."""


def page(report: Report, summary: Summary) -> str:
    """The page.

    Args:
        report: The run.
        summary: Its figures.

    Raises:
        InvalidRequest: If matplotlib is not installed.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(_FILTERS)
    template = environment.from_string(resources.files("fed.report").joinpath("page.html").read_text(encoding="utf-8"))
    pictures = [
        {
            "name": f.name,
            "title": f.title,
            "text": f.text,
            "src": f"data:image/svg+xml;base64,{base64.b64encode(f.svg).decode()}",
        }
        for f in figures(report, summary)
    ]
    return template.render(
        name=summary.name,
        summary=summary,
        figures=pictures,
        config=report.config,
        problems=summary.problems[:MOST_PROBLEMS],
        clients=summary.clients[:MOST_CLIENTS],
        clustered=bool(report.groups),
    )


def size(value: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def seconds(value: float) -> str:
    """A duration for people."""
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


_FILTERS: Final[Mapping[str, Callable[..., Any]]] = {
    "size": size,
    "seconds": seconds,
    "number": _number,
    "percent": _percent,
}
