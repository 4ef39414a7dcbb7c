"""Draws losses over virtual time, and how many times as fast agora is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from agora.errors import InvalidRequest
from benchmarks.fed_speed_parts.fleets import FLEETS, TITLES
from benchmarks.fed_speed_parts.methods import METHODS
from benchmarks.fed_speed_parts.tasks import Goal
from benchmarks.fed_speed_parts.tune import Cell, Raced

COLOURS: Final[Mapping[str, str]] = {
    "agora": "tab:green",
    "sync": "tab:red",
    "overselect": "tab:orange",
    "fedasync": "tab:purple",
    "fedbuff": "tab:blue",
}
"""Of the methods that are drawn."""


def plot(file: Path, raced: Mapping[Cell, Raced], goals: Mapping[str, Goal]) -> None:
    """Writes the picture: a row for each task, a column for each fleet.

    Args:
        file: Where to; its ending says the format.
        raced: What came of every cell.
        goals: Of every task.

    Raises:
        InvalidRequest: If matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise InvalidRequest("--plot needs matplotlib", hint="pip install 'agora-llm[plots]'") from None
    fleets = [f for f in FLEETS if any(cell.fleet == f for cell in raced)]
    figure, axes = plt.subplots(len(goals), len(fleets), figsize=(4.2 * len(fleets), 3.6 * len(goals)), squeeze=False)
    for row, (task, aim) in zip(axes, goals.items(), strict=True):
        for axis, fleet in zip(row, fleets, strict=True):
            _curves(axis, raced, task, fleet, aim)
    axes[0][0].legend(fontsize=8)
    figure.suptitle("Share of the initial loss gap that is left, by virtual time: median seed of each method")
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as e:
        raise InvalidRequest(f"the plot cannot be written to {str(file)!r}: {e}") from None
    finally:
        plt.close(figure)


def _curves(axis: Any, raced: Mapping[Cell, Raced], task: str, fleet: str, aim: Goal) -> None:
    ends = []
    for method, colour in COLOURS.items():
        outcomes = sorted(raced[Cell(task=task, fleet=fleet, method=method)].outcomes, key=lambda o: o.seconds)
        middle = outcomes[(len(outcomes) - 1) // 2]
        at, loss = np.array(middle.curve).T
        left = (loss - aim.optimum) / (aim.first - aim.optimum)
        axis.plot(at, left, color=colour, label=f"{METHODS[method].title}", linewidth=1.2)
        ends.append(middle.seconds)
    axis.axhline((aim.target - aim.optimum) / (aim.first - aim.optimum), color="black", linestyle=":", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_ylim(0.03, 1.5)
    # Linear near zero, so that the start can be seen: plain rounds take several times as long as all others.
    axis.set_xscale("symlog", linthresh=1.0)
    axis.set_xlim(0, max(ends) * 1.1)
    axis.set_title(f"{task}, {TITLES[fleet]}")
    axis.set_xlabel("virtual seconds (median job: 1 s)")
    axis.grid(alpha=0.3)
