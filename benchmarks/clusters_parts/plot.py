"""Draws the loss of the worst-off group by kind of run, and how groups are found over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from agora.errors import InvalidRequest
from benchmarks.clusters_parts.runs import Found

COLOURS: Final[Mapping[str, str]] = {
    "local": "tab:gray",
    "global": "tab:red",
    "clustered": "tab:green",
    "ifca": "tab:olive",
    "oracle": "tab:blue",
}


def plot(
    file: Path, losses: Mapping[str, Mapping[str, float]], courses: Mapping[str, Sequence[Found]], change: int
) -> None:
    """Writes the picture.

    Args:
        file: Where to; its ending says the format.
        losses: By task and kind of run, the loss of the worst-off group.
        courses: By task, the runs on the way of which clients change.
        change: The job at which they do.

    Raises:
        InvalidRequest: If matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise InvalidRequest("--plot needs matplotlib", hint="pip install 'agora-llm[plots]'") from None
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6))
    kinds = list(next(iter(losses.values())))
    width = 0.8 / len(kinds)
    for n, kind in enumerate(kinds):
        at = np.arange(len(losses)) + (n - (len(kinds) - 1) / 2) * width
        bars = left.bar(at, [found[kind] for found in losses.values()], width, color=COLOURS[kind], label=kind)
        left.bar_label(bars, fmt="%.2f", fontsize=8)
    left.set_xticks(range(len(losses)), list(losses))
    left.set_ylabel("test loss of the worst-off group")
    left.set_title("What groups are worth")
    left.legend(fontsize=8)
    for (name, runs), style in zip(courses.items(), ("-", "--", ":"), strict=False):
        for n, one in enumerate(runs):
            jobs, aris = [job for _, job, _ in one.course], [a for _, _, a in one.course]
            right.plot(jobs, aris, style, color=f"C{n}", alpha=0.8, label=name if n == 0 else None)
    right.axvline(change, color="black", linewidth=0.8)
    right.annotate("a quarter of the clients\nchange their group", (change, 0.05), (5, 0), textcoords="offset points")
    right.set_xlabel("jobs given out")
    right.set_ylabel("ARI against the groups of the moment")
    right.set_ylim(-0.05, 1.05)
    right.set_title("Groups found over time, a colour each seed")
    right.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as e:
        raise InvalidRequest(f"the plot cannot be written to {str(file)!r}: {e}") from None
    finally:
        plt.close(figure)
