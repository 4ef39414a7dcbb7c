"""One panel a set: quality over cost, all curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from agora.errors import InvalidRequest
from benchmarks.cascade_parts.evaluate import Split

STYLES: Final[Mapping[str, tuple[str, str, float]]] = {
    "oracle": ("0.6", ":", 1.2),
    "hull": ("0.25", "--", 1.4),
    "routing": ("tab:blue", "-", 1.0),
    "cascade": ("tab:green", "-", 1.0),
    "cascade_routing": ("tab:orange", "-", 1.0),
    "stopping": ("tab:purple", "-", 1.0),
    "agora": ("tab:red", "-", 2.2),
}
"""Colour, line and width."""

PLACES: Final = 200
"""Costs at which curves are averaged over the splits."""


def plot(splits: Mapping[str, Sequence[Split]], path: Path) -> None:
    """Draws the mean over the splits of each set.

    Raises:
        InvalidRequest: If matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InvalidRequest(
            "--plot needs matplotlib, which is not installed", hint="type: pip install 'agora-llm[plots]'"
        ) from None
    columns = min(3, len(splits))
    rows = -(-len(splits) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.0 * rows), layout="constrained")
    for place, (name, parts) in enumerate(splits.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        floor, top = 1.0, 0.0
        for curve, (colour, line, width) in STYLES.items():
            at = np.linspace(0, 1, PLACES)
            heights = np.mean(
                [
                    np.interp(s.low + at * (s.high - s.low), s.curves[curve].cost, s.curves[curve].quality)
                    for s in parts
                ],
                axis=0,
            )
            shares = np.mean([(s.low + at * (s.high - s.low)) / s.high for s in parts], axis=0)
            axes.plot(shares, heights, color=colour, linestyle=line, linewidth=width, label=curve.replace("_", " "))
            top = max(top, float(heights.max()))
            if curve == "hull":
                # the rise from the cheapest model may be steep: what matters lies above its tenth
                floor = float(heights[PLACES // 10])
        axes.set_ylim(floor - 0.25 * (top - floor), top + 0.05 * (top - floor))
        axes.set_title(name)
        axes.set_xlabel("cost, as a share of always the dearest")
        axes.set_ylabel("quality")
        axes.grid(alpha=0.25)
        if place == 1:
            axes.legend(fontsize=8, loc="lower right")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as e:
        raise InvalidRequest(f"the plot cannot be written to {str(path)!r}: {e}") from None
