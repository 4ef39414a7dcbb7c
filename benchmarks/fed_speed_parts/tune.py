"""Every method's settings are found on seeds of their own, and then raced on others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from benchmarks.fed_speed_parts.methods import METHODS
from benchmarks.fed_speed_parts.race import Outcome, Setting, race
from benchmarks.fed_speed_parts.tasks import TASKS

PATIENCE: Final = 1.6
"""A setting is given up on a seed when it has taken so many times as long as the best one so far did there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A method on a task and a fleet.

    Attributes:
        task: Its name.
        fleet: Its name.
        method: Its name.
    """

    task: str
    fleet: str
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Raced:
    """What came of a cell.

    Attributes:
        cell: Which.
        knobs: The settings that were best on the tuning seeds.
        tried: Every setting, with its geometric mean of seconds there; None for one that was given up.
        edge: Knobs that ended at an end of their list, so that a wider one might do better.
        outcomes: On the reported seeds, in their order.
    """

    cell: Cell
    knobs: dict[str, Any]
    tried: list[dict[str, Any]]
    edge: list[str]
    outcomes: list[Outcome]


def tuned_race(cell: Cell, *, tuning: Sequence[int], reported: Sequence[int], thin: int = 1) -> Raced:
    """Tunes a method on some seeds and races it on others.

    Args:
        cell: Which.
        tuning: Seeds to tune on.
        reported: Seeds to race on; none of the others.
        thin: Every so many-th setting of the grid is tried only.

    Raises:
        ValueError: If a seed is in both.
    """
    if set(tuning) & set(reported):
        raise ValueError(f"seeds {sorted(set(tuning) & set(reported))} would be tuned on and reported")
    method = METHODS[cell.method]
    grid = method.grid(TASKS[cell.task].rates)[::thin]
    tried: list[dict[str, Any]] = []
    best: tuple[float, Setting, list[float]] | None = None
    for setting in grid:
        took = _tried(cell, setting, tuning, best[2] if best else None)
        mean = geometric(took) if took else None
        tried.append({**setting.knobs, "seconds": mean})
        if took is not None and mean is not None and (best is None or mean < best[0]):
            best = (mean, setting, took)
    # Where nothing reached the target, the middle of the grid is as good as anything.
    chosen = best[1] if best else grid[len(grid) // 2]
    lr = [s.lr for s in grid]
    lists = {"lr": lr, **{k: [v for v in values if not isinstance(v, str)] for k, values in method.knobs.items()}}
    return Raced(
        cell=cell,
        knobs=dict(chosen.knobs),
        tried=tried,
        edge=[k for k, v in chosen.knobs.items() if len(set(lists[k])) > 2 and v in (min(lists[k]), max(lists[k]))],
        outcomes=[race(cell.task, cell.fleet, chosen, seed) for seed in reported],
    )


def _tried(cell: Cell, setting: Setting, seeds: Sequence[int], best: Sequence[float] | None) -> list[float] | None:
    """Seconds on each seed; None if it was given up on one."""
    took: list[float] = []
    for place, seed in enumerate(seeds):
        limit = PATIENCE * best[place] if best else None
        outcome = race(cell.task, cell.fleet, setting, seed, seconds=limit)
        if not outcome.reached:
            return None
        took.append(outcome.seconds)
    return took


def geometric(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(fmean(map(math.log, values)))
