"""Draws how far each policy is from the lower bound, and one schedule."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agora.errors import InvalidRequest
from agora.scheduling.problem import Problem
from agora.scheduling.simulate import Schedule

COLOURS: Final[Mapping[str, str]] = {
    "agora": "tab:green",
    "min_min": "tab:blue",
    "least_loaded": "tab:orange",
    "round_robin": "tab:red",
}


def plot(
    file: Path,
    ratios: Mapping[str, NDArray[np.float64]],
    families: Mapping[str, Mapping[str, float]],
    example: tuple[Problem, Mapping[str, Schedule], float],
) -> None:
    """Writes the picture.

    Args:
        file: Where to; its ending says the format.
        ratios: By policy, makespan over lower bound of every instance.
        families: Means by family and policy.
        example: A problem, what two policies made of it, and its lower bound in seconds.

    Raises:
        InvalidRequest: If matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise InvalidRequest("--plot needs matplotlib", hint="pip install 'agora-llm[plots]'") from None
    figure, axes = plt.subplots(2, 2, figsize=(13, 8.4))
    _distribution(axes[0][0], ratios)
    _families(axes[0][1], families)
    problem, schedules, bound = example
    longest = max(s.makespan for s in schedules.values())
    for axis, (name, schedule) in zip(axes[1], schedules.items(), strict=True):
        _gantt(axis, name, problem, schedule, bound, longest)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as e:
        raise InvalidRequest(f"the plot cannot be written to {str(file)!r}: {e}") from None
    finally:
        plt.close(figure)


def _distribution(axis: Any, ratios: Mapping[str, NDArray[np.float64]]) -> None:
    for name, values in ratios.items():
        ordered = np.sort(values)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        label = f"{name} (mean {values.mean():.2f})"
        axis.plot(ordered, share, color=COLOURS[name], label=label)
    axis.set_xscale("log")
    ticks = [1, 1.5, 2, 3, 5, 10]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.set_xlim(1, max(float(v.max()) for v in ratios.values()))
    axis.set_xlabel("makespan / lower bound")
    axis.set_ylabel("share of the instances")
    axis.set_title("How far from the lower bound")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")


def _families(axis: Any, families: Mapping[str, Mapping[str, float]]) -> None:
    width = 0.8 / len(COLOURS)
    for n, name in enumerate(COLOURS):
        at = np.arange(len(families)) + (n - (len(COLOURS) - 1) / 2) * width
        bars = axis.bar(at, [f[name] for f in families.values()], width, color=COLOURS[name], label=name)
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.set_xticks(range(len(families)), [f.replace("_", " ") for f in families])
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_ylabel("mean makespan / lower bound")
    axis.set_title("By family of task graphs")


def _gantt(axis: Any, name: str, problem: Problem, schedule: Schedule, bound: float, longest: float) -> None:
    """A row for each slot that was ever used, machines one under the other."""
    row = 0
    ticks = []
    for machine in problem.machines:
        free: list[float] = []
        for done in sorted((d for d in schedule.tasks.values() if d.machine == machine.name), key=lambda d: d.start):
            slot = next((n for n, end in enumerate(free) if end <= done.start + 1e-9), len(free))
            free[slot : slot + 1] = [done.end]
            axis.barh(row + slot, done.end - done.start, left=done.start, color=COLOURS[name], edgecolor="white")
        used = max(len(free), 1)
        ticks.append((row + (used - 1) / 2, machine.name))
        row += used
        axis.axhline(row - 0.5, color="black", linewidth=0.5)
    axis.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    axis.invert_yaxis()
    axis.axvline(bound, color="black", linestyle=":", label=f"lower bound {bound:.1f} s")
    axis.axvline(schedule.makespan, color=COLOURS[name], linestyle="--", label=f"makespan {schedule.makespan:.1f} s")
    axis.set_xlim(0, longest * 1.03)
    axis.set_xlabel("seconds")
    axis.set_title(f"One instance under {name}")
    axis.legend(loc="lower right", fontsize=8)
