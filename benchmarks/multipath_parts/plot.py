"""Draws the times of jobs by policy, and one trace with where agora sent what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Final

import numpy as np

from agora.errors import InvalidRequest
from agora.network.path import Technology
from agora.network.trace_files import Recording
from benchmarks.multipath_parts.simulate import Played
from benchmarks.multipath_parts.traces import DEADLINE_S

COLOURS: Final[Mapping[str, str]] = {
    "4g": "tab:orange",
    "5g": "tab:blue",
    "best_static": "black",
    "agora": "tab:green",
    "oracle": "tab:grey",
}

WINDOW_S: Final = 200.0
"""Seconds of the example: enough for some sixty jobs, few enough to tell them apart."""


def plot(file: FilePath, played: Mapping[str, Sequence[Played]], recordings: Sequence[Recording]) -> None:
    """Writes the picture.

    Args:
        file: Where to; its ending says the format.
        played: What each policy made of each recording.
        recordings: The recordings, in that order.

    Raises:
        InvalidRequest: If matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise InvalidRequest("--plot needs matplotlib", hint="pip install 'agora-llm[plots]'") from None
    figure, (times, example) = plt.subplots(1, 2, figsize=(13, 4.6), width_ratios=(1, 1.5))
    _times(times, played)
    _example(example, recordings, played)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as e:
        raise InvalidRequest(f"the plot cannot be written to {str(file)!r}: {e}") from None
    finally:
        plt.close(figure)


def _times(axes: Any, played: Mapping[str, Sequence[Played]]) -> None:
    """Share of jobs not answered after so many seconds: the tail is what differs, so both axes are logarithmic."""
    for name, of_policy in played.items():
        seconds = np.sort([d.seconds for p in of_policy for d in p.done])
        left = 1 - np.arange(1, len(seconds) + 1) / len(seconds)
        style = "--" if name in ("best_static", "oracle") else "-"
        axes.step(seconds, left, where="post", label=name, color=COLOURS[name], linestyle=style)
    axes.axvline(DEADLINE_S, color="tab:red", linewidth=1, linestyle=":")
    axes.text(DEADLINE_S * 1.03, 0.7, "deadline", color="tab:red")
    axes.set(xscale="log", yscale="log", xlim=(0.25, 10), ylim=(1e-3, 1), xlabel="seconds")
    axes.set(ylabel="share of jobs not answered yet", title="Time to the answer")
    axes.set_xticks([0.3, 0.5, 1, 2, 5, 10], ["0.3", "0.5", "1", "2", "5", "10"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


def _example(axes: Any, recordings: Sequence[Recording], played: Mapping[str, Sequence[Played]]) -> None:
    """The recording on which always 5G was late most often: there is most to see."""
    at = max(range(len(recordings)), key=lambda i: played["5g"][i].late)
    recording, jobs = recordings[at], played["agora"][at].done
    start = _busiest(recording)
    for tech in (Technology.NR, Technology.LTE):
        trace = recording.traces[tech]
        axes.step(
            np.array(trace.times_s) - start,
            np.maximum(trace.mbps, 0.5),
            where="post",
            color=COLOURS[tech.value],
            linewidth=1,
            label=f"{tech.value} Mbit/s",
        )
    seen = [d for d in jobs if start <= d.at < start + WINDOW_S]
    for tech, height in ((Technology.NR, 6000.0), (Technology.LTE, 4000.0)):
        mine = [d for d in seen if d.took is tech]
        axes.scatter([d.at - start for d in mine], [height] * len(mine), s=14, color=COLOURS[tech.value], marker="s")
        axes.text(WINDOW_S * 1.01, height, f"sent on {tech.value}", va="center", color=COLOURS[tech.value])
    hedged = [d for d in seen if d.hedged is not None]
    axes.scatter([d.at - start for d in hedged], [2800.0] * len(hedged), s=22, color="tab:purple", marker="+")
    axes.text(WINDOW_S * 1.01, 2650, "second copy", va="center", color="tab:purple")
    late = [d for d in seen if d.late]
    axes.scatter([d.at - start for d in late], [1900.0] * len(late), s=22, color="tab:red", marker="x")
    axes.text(WINDOW_S * 1.01, 1700, "late", va="center", color="tab:red")
    axes.set(yscale="log", xlim=(0, WINDOW_S), ylim=(0.4, 9000), xlabel="seconds", ylabel="Mbit/s (0 drawn as 0.5)")
    axes.set(title=f"What agora did while {recording.name} played")
    axes.legend(loc="lower left")


def _busiest(recording: Recording) -> float:
    """Where the window begins in which 5G is without service most."""
    trace = recording.traces[Technology.NR]
    starts = np.arange(trace.start_s, max(trace.end_s - WINDOW_S, trace.start_s + 1), 10.0)
    times, weak = np.array(trace.times_s), np.array(trace.mbps) < 10
    return float(max(starts, key=lambda s: weak[(times >= s) & (times < s + WINDOW_S)].sum()))
