"""One run: a method with its settings, on a task and a fleet, until the target loss is first reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

from benchmarks.fed_speed_parts.fleets import CLIENTS, drawn, named
from benchmarks.fed_speed_parts.tasks import TASKS, Labels, Matrix, Model, Sgd, digits, goal, shares
from fed.aggregate.rules import make
from fed.pace import Pace
from fed.simulate import Published, simulate
from fed.words import WHOLE

ALPHA: Final = 0.3
"""Of the Dirichlet label skew."""

GAP_LEFT: Final = 0.05
"""Share of the initial loss gap that is left when a run is over."""

MAX_JOBS: Final = 2400
"""Jobs after which a run is given up: 150 rounds of all clients, some ten times what well-tuned runs take."""

DIVERGED: Final = 4.0
"""Times the first loss from which a run with a time limit, as in tuning, is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A method, with all that is to be known.

    Attributes:
        lr: Of the clients.
        pace: How the server goes about it.
        rule: How versions are made.
        options: Of the rule.
        knobs: What of it is tuned, for reports.
    """

    lr: float
    pace: Pace
    rule: str
    options: Mapping[str, Any]
    knobs: Mapping[str, float | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run went.

    Attributes:
        reached: Whether the target was.
        seconds: Virtual, until then; else until the run was given up.
        jobs: Given out until then, those under way and lost ones included.
        versions: Made until then.
        curve: Virtual seconds and loss of every version.
    """

    reached: bool
    seconds: float
    jobs: int
    versions: int
    curve: tuple[tuple[float, float], ...]


@lru_cache(maxsize=64)
def _rows(seed: int) -> Mapping[str, tuple[Matrix, Labels]]:
    return {f"client-{i}": rows for i, rows in enumerate(shares(CLIENTS, ALPHA, seed))}


def race(task: str, fleet: str, setting: Setting, seed: int, *, seconds: float | None = None) -> Outcome:
    """Runs until a version's loss over all rows is at the target.

    Args:
        task: Name of the task.
        fleet: Name of the fleet.
        setting: The method.
        seed: Of who has which rows, who is how fast, which jobs are lost, and every draw of a batch.
        seconds: Virtual seconds after which it is given up.
    """
    what = TASKS[task]
    model, aim, rows = Model(what), goal(what, GAP_LEFT), _rows(seed)
    x, y = digits()
    world = named(drawn(fleet, what.steps, seed), [len(labels) for _, labels in rows.values()])
    curve: list[tuple[float, float]] = [(0.0, aim.first)]

    def over(published: Published) -> bool:
        loss = model.loss(published.adapter.flat, x, y)
        curve.append((published.at, loss))
        # One that diverged goes on where its time counts, or it would seem to be quick. Not `loss > …`: NaN is not.
        return loss <= aim.target or (seconds is not None and not loss < DIVERGED * aim.first)

    # Settings that diverge overflow; the rule refuses what comes of that.
    with np.errstate(all="ignore"):
        result = simulate(
            setting.pace.but(steps=what.steps, jobs=MAX_JOBS, seconds=seconds),
            world,
            Sgd(model, rows, setting.lr),
            lambda adapter: make(setting.rule, adapter, **setting.options),
            initial=what.first(),
            seed=seed,
            until=over,
        )
    return Outcome(
        reached=curve[-1][1] <= aim.target,
        seconds=result.at,
        jobs=int(result.state.next_job),
        versions=int(result.state.models[WHOLE].version),
        curve=tuple(curve),
    )
