"""How long until it is learned, by who waits for whom? agora's default against FedAvg, FedAsync and FedBuff.

    python -m benchmarks.fed_speed [--quick] [--json] [--seed N] [--plot FILE] [--workers N]

16 clients with Dirichlet(0.3) label skew, every tenth job lost, and four fleets: speeds lognormal over clients, in
tiers 1:2:4, lognormal over jobs, and all equal (the control: nobody is waited for, so nobody should win much). The
tasks are softmax regression with L2, which is convex, and a small network, on scikit-learn's digits. Told is the
virtual time until a version first has 5 % of the initial loss gap left, the gap to the optimum over all rows. All
methods run through agora's own server and simulator.

Every method is tuned for every task and fleet, over the same number of settings, on seeds of their own; the reported
seeds are others. agora's pace and rule are its defaults on all fleets; its learning rate and server step are tuned.
A method that does not reach the target on a seed is taken at the time when it was given up, which is less than it
needs, and is told of in `reached`.

Large ratios over plain FedAvg mostly measure the slowest client, which it waits for in every round; the ratios over
over-selection, FedAsync and FedBuff tell more.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text
from threadpoolctl import threadpool_limits

from agora.errors import InvalidRequest
from benchmarks.common import facts, parser, run, show
from benchmarks.fed_speed_parts.fleets import CLIENTS, FLEETS, LOSS, TITLES
from benchmarks.fed_speed_parts.methods import METHODS
from benchmarks.fed_speed_parts.plot import plot
from benchmarks.fed_speed_parts.race import ALPHA, GAP_LEFT, MAX_JOBS
from benchmarks.fed_speed_parts.tasks import TASKS, goal
from benchmarks.fed_speed_parts.tune import Cell, Raced, geometric, tuned_race

SEEDS: Final = 6
"""Reported ones."""

TUNING_SEEDS: Final = 3

QUICK_SEEDS: Final = 1
QUICK_TUNING_SEEDS: Final = 1
QUICK_THIN: Final = 6
"""Every sixth setting only: the figures of `--quick` show that it runs, not how fast anything is."""

TUNING_FROM: Final = 10_000
"""Tuning seeds begin here, and every `--seed` has a thousand of each kind."""

RESAMPLES: Final = 2_000
"""Bootstrap resamples over seeds: the ends of a 95 % interval then stand on 50 of them each."""

AGORA: Final = "agora"

NOTE: Final = (
    "Ratios over plain FedAvg mostly measure the slowest client, which it waits for in every round. Above 1: agora is "
    "faster. Times count until the target is first reached."
)

GOALS: Final[Mapping[str, Mapping[str, tuple[float, float]]]] = {
    "lognormal": {"vs_sync": (5, np.inf), "vs_overselect": (2.5, np.inf), "vs_fedasync": (1.7, np.inf)},
    "tiers_1_2_4": {"vs_sync": (2, np.inf), "vs_overselect": (1.5, np.inf), "vs_fedasync": (1.5, np.inf)},
    "per_job": {"vs_sync": (3.5, np.inf), "vs_overselect": (0.9, np.inf), "vs_fedasync": (1.5, np.inf)},
    "control": {"vs_sync": (0.85, 1.2)},
}
"""Least and most."""

OVER_FEDBUFF: Final = 1.15
"""Goal over FedBuff with K = 4: the geometric mean over the first two fleets."""

MOST_JOBS: Final = 1.25
"""Goal for client jobs over FedAvg's, on every fleet."""


def measure(
    *,
    quick: bool,
    seed: int,
    workers: int | None = None,
    fleets: Sequence[str] = tuple(FLEETS),
    tasks: Sequence[str] = tuple(TASKS),
    picture: Path | None = None,
) -> dict[str, Any]:
    """Tunes and races every method on every task and fleet."""
    count, tuning = (QUICK_SEEDS, QUICK_TUNING_SEEDS) if quick else (SEEDS, TUNING_SEEDS)
    cells = [Cell(task=t, fleet=f, method=m) for m in METHODS for t in tasks for f in fleets]
    one = partial(
        tuned_race,
        tuning=[TUNING_FROM + 1000 * seed + n for n in range(tuning)],
        reported=[2_000_000 + 1000 * seed + n for n in range(count)],
        thin=QUICK_THIN if quick else 1,
    )
    raced = {found.cell: found for found in _mapped(one, cells, workers or os.cpu_count() or 1)}
    if picture is not None:
        plot(picture, raced, {t: goal(TASKS[t], GAP_LEFT) for t in tasks})
    speedup = {f: _speedup(raced, f, tasks, seed) for f in fleets}
    return {
        "speedup": {f: {k: v["mean"] for k, v in found.items()} for f, found in speedup.items()},
        "ci95": {f: {k: v["ci95"] for k, v in found.items()} for f, found in speedup.items()},
        "per_task": {f: {k: v["tasks"] for k, v in found.items()} for f, found in speedup.items()},
        "over_fedbuff_k4": _over_fedbuff(speedup),
        "reached": {
            m: {f: f"{sum(map(_reached, _of(raced, m, f, tasks)))}/{count * len(tasks)}" for f in fleets}
            for m in METHODS
        },
        "goals": _goals(speedup, raced, tasks),
        "seconds": _by_cell(raced, lambda r: [_rounded(o.seconds) for o in r.outcomes]),
        "jobs": _by_cell(raced, lambda r: [o.jobs for o in r.outcomes]),
        "versions": _by_cell(raced, lambda r: [o.versions for o in r.outcomes]),
        "chosen": _by_cell(raced, lambda r: r.knobs),
        "chosen_at_edge": _by_cell(raced, lambda r: r.edge),
        "grid": {m: _grid(m) for m in METHODS},
        "tried": _by_cell(raced, lambda r: r.tried),
        "settings_each": len(raced[cells[0]].tried),
        "agora": {"pace": _agora_pace(), "rule": METHODS[AGORA].setting(1.0)[1]},
        "tasks": {t: _task(t) for t in tasks},
        "clients": CLIENTS,
        "dirichlet": ALPHA,
        "lost": LOSS,
        "gap_left": GAP_LEFT,
        "counted_until": "first reached",
        "jobs_at_most": MAX_JOBS,
        "seeds": count,
        "tuning_seeds": tuning,
        "note": NOTE,
        "quick": quick,
        "seed": seed,
    }


def _mapped(one: Callable[[Cell], Raced], cells: Sequence[Cell], workers: int) -> Iterator[Raced]:
    """Does all cells, in so many processes. More threads in one would only wait for each other: matrices are small."""
    if workers == 1:
        with threadpool_limits(1):
            yield from map(one, cells)
        return
    # Spawned: a fork of a process that has threads may wait for a lock forever.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=threadpool_limits, initargs=(1,)) as pool:
        yield from pool.map(one, cells)


def _of(raced: Mapping[Cell, Raced], method: str, fleet: str, tasks: Sequence[str]) -> list[Any]:
    """Outcomes over tasks and seeds."""
    return [o for t in tasks for o in raced[Cell(task=t, fleet=fleet, method=method)].outcomes]


def _reached(outcome: Any) -> bool:
    return bool(outcome.reached)


def _speedup(raced: Mapping[Cell, Raced], fleet: str, tasks: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """Ratios on a fleet: geometric means over seeds and tasks, their spread over seeds, and by task."""

    def ratios(method: str, figure: str) -> Any:
        """Shape (tasks, seeds)."""
        theirs, ours = (
            np.array([[getattr(o, figure) for o in raced[Cell(task=t, fleet=fleet, method=m)].outcomes] for t in tasks])
            for m in (method, AGORA)
        )
        return ours / theirs if figure == "jobs" else theirs / ours

    every = {f"vs_{m}": ratios(m, "seconds") for m in METHODS if m != AGORA}
    every["client_jobs"] = ratios("sync", "jobs")
    return {
        name: {
            "mean": _rounded(geometric(values.ravel().tolist())),
            "ci95": _interval(values, seed),
            "tasks": {t: _rounded(geometric(row.tolist())) for t, row in zip(tasks, values, strict=True)},
        }
        for name, values in every.items()
    }


def _interval(values: Any, seed: int) -> list[float]:
    """95 % interval of the geometric mean, by a percentile bootstrap over seeds, whose tasks go together."""
    rng, seeds = np.random.default_rng(seed), values.shape[1]
    logs = np.log(values).mean(0)
    draws = logs[rng.integers(seeds, size=(RESAMPLES, seeds))].mean(1)
    return [_rounded(x) for x in np.exp(np.quantile(draws, [0.025, 0.975]))]


def _over_fedbuff(speedup: Mapping[str, Mapping[str, Any]]) -> float | None:
    found = [speedup[f]["vs_fedbuff"]["mean"] for f in ("lognormal", "tiers_1_2_4") if f in speedup]
    return _rounded(geometric(found)) if found else None


def _goals(
    speedup: Mapping[str, Mapping[str, Any]], raced: Mapping[Cell, Raced], tasks: Sequence[str]
) -> dict[str, bool]:
    met = {}
    for fleet, wanted in GOALS.items():
        for name, (least, most) in wanted.items():
            if fleet in speedup:
                met[f"{fleet}.{name}"] = bool(least <= speedup[fleet][name]["mean"] <= most)
    for fleet, found in speedup.items():
        met[f"{fleet}.client_jobs"] = bool(found["client_jobs"]["mean"] <= MOST_JOBS)
        met[f"{fleet}.every_seed_reaches"] = all(map(_reached, _of(raced, AGORA, fleet, tasks)))
    over = _over_fedbuff(speedup)
    if over is not None:
        met["over_fedbuff_k4"] = over >= OVER_FEDBUFF
    return met


def _by_cell(raced: Mapping[Cell, Raced], tell: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """By method, fleet and task."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell, one in raced.items():
        found.setdefault(cell.method, {}).setdefault(cell.fleet, {})[cell.task] = tell(one)
    return found


def _grid(method: str) -> dict[str, Any]:
    of = METHODS[method]
    return {"lr": {t: [task.rates[n] for n in of.rates] for t, task in TASKS.items()}, **of.knobs}


def _agora_pace() -> dict[str, Any]:
    pace = METHODS[AGORA].setting(1.0)[0].to_json()
    return {key: pace[key] for key in ("cohort", "buffer", "discount", "share_cap", "weighting", "balanced")}


def _task(name: str) -> dict[str, Any]:
    task = TASKS[name]
    aim = goal(task, GAP_LEFT)
    return {
        "title": task.title,
        "l2": task.l2,
        "steps": task.steps,
        "batch": task.batch,
        "loss": {"first": _rounded(aim.first), "optimum": _rounded(aim.optimum), "target": _rounded(aim.target)},
    }


def _rounded(value: Any) -> float:
    return round(float(value), 4)


def table(result: Mapping[str, Any]) -> Group:
    """The result for people."""
    marked = " (quick: shows that it runs, no more)" if result["quick"] else ""
    shown = Table(title=f"How many times as fast agora's default is, {result['seeds']} seeds{marked}", box=SIMPLE_HEAD)
    shown.add_column("against", no_wrap=True)
    for fleet in result["speedup"]:
        shown.add_column(TITLES[fleet], justify="right", no_wrap=True)
    first = next(iter(result["speedup"].values()))
    for name in first:
        title = "client jobs over FedAvg's" if name == "client_jobs" else METHODS[name.removeprefix("vs_")].title
        shown.add_row(title, *(_cell(result, fleet, name) for fleet in result["speedup"]))
    chosen = Table(title=f"Tuned over {result['settings_each']} settings each", box=SIMPLE_HEAD, pad_edge=False)
    for column in (
        "method",
        "grid",
        *(f"{TITLES[f]}: best on {', '.join(result['tasks'])}" for f in result["speedup"]),
    ):
        chosen.add_column(column, overflow="fold")
    for method, by_fleet in result["chosen"].items():
        grid = "\n".join(f"{k} {_short(v)}" for k, v in result["grid"][method].items())
        best = ("\n".join(_short(k) for k in by_task.values()) for by_task in by_fleet.values())
        chosen.add_row(METHODS[method].title, grid, *best)
    missed = [goal_ for goal_, met in result["goals"].items() if not met]
    over = f"Over FedBuff with K = 4 on the first two fleets: {result['over_fedbuff_k4']}."
    goals = "All goals are met." if not missed else f"Goals not met: {', '.join(missed)}."
    return Group(shown, chosen, Text(f"{over} {goals}"), Text(result["note"]))


def _cell(result: Mapping[str, Any], fleet: str, name: str) -> str:
    low, high = result["ci95"][fleet][name]
    least, most = GOALS.get(fleet, {}).get(name, (None, None))
    if name == "client_jobs":
        wanted = f" ≤ {MOST_JOBS:g}"
    elif least is None or most is None:
        wanted = ""
    else:
        wanted = f" ≥ {least:g}" if most == np.inf else f" {least:g}–{most:g}"
    return f"{result['speedup'][fleet][name]:.2f} [{low:.2f}, {high:.2f}]{wanted}"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(_short(v) for v in value)
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("How long until it is learned, by who waits for whom.")
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw losses over time, and the ratios")
    options.add_argument("--workers", type=int, metavar="N", help="processes (default: as many as cores)")
    args = options.parse_args(argv)
    if args.plot is not None and not args.plot.absolute().parent.is_dir():
        # Told before minutes of measuring.
        raise InvalidRequest(f"the plot cannot be written to {str(args.plot)!r}: there is no such folder")
    for name in ("seed", "workers"):
        value, least = getattr(args, name), int(name == "workers")
        if value is not None and value < least:
            raise InvalidRequest(f"--{name} is {value}; it must be from {least}")
    result = measure(quick=args.quick, seed=args.seed, workers=args.workers, picture=args.plot)
    result = json.loads(json.dumps(result)) | {"facts": facts()}
    show(result, args.json, None if args.json else table(result))


if __name__ == "__main__":
    run(main)
