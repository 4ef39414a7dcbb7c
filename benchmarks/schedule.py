"""How long does it take until everything is done, by who gives out the work? Dynamic HEFT against simpler policies.

`python -m benchmarks.schedule [--quick] [--json] [--seed N] [--plot FILE]`

Random task graphs (layered, fork-join, and questions decomposed as people did) on end, edge and cloud machines whose
slots slow each other. Durations turn out other than expected: each task's by a lognormal factor, and each machine's by
one that all its tasks share. Every policy plays the same instances with the same durations. Makespans are told over a
lower bound that knows these durations beforehand: the larger of the critical path and the total work; no schedule can
be shorter, and most instances have none that short.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agora.errors import InvalidRequest
from agora.scheduling.bounds import lower_bound
from agora.scheduling.policies import DynamicHeft, LeastLoaded, MinMin, RoundRobin
from agora.scheduling.problem import Problem
from agora.scheduling.simulate import Schedule, Truth, simulate, uncertain
from agora.scheduling.view import Policy
from benchmarks.common import facts, parser, run, show
from benchmarks.schedule_parts.instances import FAMILIES, instance
from benchmarks.schedule_parts.plot import plot

POLICIES: Final[Mapping[str, Callable[[], Policy]]] = {
    "agora": DynamicHeft,
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "min_min": MinMin,
}
"""What is compared."""

ABLATION: Final[Mapping[str, Callable[[], Policy]]] = {"agora_without_learning": lambda: DynamicHeft(learn=False)}
"""agora without something, to see what that is worth."""

PER_FAMILY: Final = 100
"""Instances of each family."""

QUICK_PER_FAMILY: Final = 36
"""Those under `--quick`: 108 in all."""

TASK_SIGMA: Final = 0.5
"""Standard deviation of the logarithm of a task's duration over the expected one: two of three tasks take between 0.6
and 1.6 times as long."""

MACHINE_SIGMA: Final = 0.25
"""That of a machine's: two of three are between 0.8 and 1.3 times as slow as thought."""

RESAMPLES: Final = 2_000
"""Bootstrap resamples: the ends of a 95 % interval then stand on 50 of them each."""

STREAM: Final = 0x5C4ED
"""Sets this benchmark's random numbers apart from those of others with the same seed."""


def drawn(family: str, number: int, seed: int) -> tuple[Problem, Truth]:
    """One instance of a family, and what its durations turn out to be."""
    rng = np.random.default_rng([STREAM, seed, list(FAMILIES).index(family), number])
    problem = instance(family, rng)
    return problem, uncertain(problem, rng, tasks=TASK_SIGMA, machines=MACHINE_SIGMA)


def bound_of(problem: Problem, truth: Truth) -> float:
    """The lower bound in seconds, by what durations turn out to be."""
    return lower_bound(problem, lambda task, machine: truth.work(problem, task, machine))


def measure(*, quick: bool, seed: int, picture: Path | None = None) -> dict[str, Any]:
    """Plays every instance under every policy."""
    per_family = QUICK_PER_FAMILY if quick else PER_FAMILY
    every = {**POLICIES, **ABLATION}
    ratios: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in every}
    seconds, decisions, tasks = dict.fromkeys(every, 0.0), dict.fromkeys(every, 0), 0
    for family in FAMILIES:
        for number in range(per_family):
            problem, truth = drawn(family, number, seed)
            bound = bound_of(problem, truth)
            tasks += len(problem.tasks)
            for name, make in every.items():
                began = time.perf_counter()
                schedule = simulate(problem, make(), truth)
                seconds[name] += time.perf_counter() - began
                decisions[name] += schedule.decisions
                ratios[name][family].append(schedule.makespan / bound)
    whole = {name: np.concatenate([np.array(r) for r in by.values()]) for name, by in ratios.items()}
    families = {f: {name: _rounded(np.mean(ratios[name][f])) for name in POLICIES} for f in FAMILIES}
    if picture is not None:
        plot(picture, {n: whole[n] for n in POLICIES}, families, _example(seed))
    return {
        "instances": per_family * len(FAMILIES),
        "tasks_mean": _rounded(tasks / (per_family * len(FAMILIES))),
        "makespan_over_lower_bound": {name: _rounded(whole[name].mean()) for name in POLICIES},
        "ci95": {name: _interval(whole[name], seed) for name in POLICIES},
        "agora_minus": {
            other: {
                "mean": _rounded((whole["agora"] - whole[other]).mean()),
                "ci95": _interval(whole["agora"] - whole[other], seed),
                "shorter": _rounded(np.mean(whole["agora"] < whole[other] * (1 - 1e-9))),
                "longer": _rounded(np.mean(whole["agora"] > whole[other] * (1 + 1e-9))),
            }
            for other in (*POLICIES, *ABLATION)
            if other != "agora"
        },
        "families": families,
        "families_agora_minus_min_min": {
            f: {"mean": _rounded(d.mean()), "ci95": _interval(d, seed)}
            for f in FAMILIES
            for d in [np.array(ratios["agora"][f]) - np.array(ratios["min_min"][f])]
        },
        "ablation": {name: _rounded(whole[name].mean()) for name in ABLATION},
        "ms_per_decision": {name: _rounded(1e3 * seconds[name] / decisions[name]) for name in POLICIES},
        "sigma": {"task": TASK_SIGMA, "machine": MACHINE_SIGMA},
        "quick": quick,
        "seed": seed,
    }


def _example(seed: int) -> tuple[Problem, dict[str, Schedule], float]:
    """The first fork-join: agora, and the best of the others on average."""
    problem, truth = drawn("fork_join", 0, seed)
    played = {name: simulate(problem, POLICIES[name](), truth) for name in ("agora", "min_min")}
    return problem, played, bound_of(problem, truth)


def _interval(values: NDArray[np.float64], seed: int) -> list[float]:
    """95 % interval of the mean, by a percentile bootstrap over instances."""
    rng = np.random.default_rng(seed)
    picks = (values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES))
    draws = np.fromiter(picks, dtype=np.float64, count=RESAMPLES)
    return [_rounded(x) for x in np.quantile(draws, [0.025, 0.975])]


def _rounded(value: Any) -> float:
    return round(float(value), 4)


def table(result: Mapping[str, Any]) -> Table:
    """The result for people."""
    found = Table(
        title=f"Makespan over the lower bound, mean of {result['instances']} instances",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    found.add_column("", no_wrap=True)
    for name in POLICIES:
        found.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for family, means in result["families"].items():
        found.add_row(family.replace("_", " "), *(f"{means[name]:.3f}" for name in POLICIES))
    found.add_section()
    found.add_row("all", *(f"{result['makespan_over_lower_bound'][n]:.3f}" for n in POLICIES))
    found.add_row("  95 %", *("[{:.3f}, {:.3f}]".format(*result["ci95"][n]) for n in POLICIES))
    minus = {n: result["agora_minus"].get(n) for n in POLICIES}
    found.add_row("agora minus it", *("" if m is None else f"{m['mean']:+.3f}" for m in minus.values()))
    found.add_row("  95 %", *("" if m is None else "[{:+.3f}, {:+.3f}]".format(*m["ci95"]) for m in minus.values()))
    found.add_row("ms per decision", *(f"{result['ms_per_decision'][n]:.2f}" for n in POLICIES))
    return found


def main() -> None:
    options = parser("How long until everything is done, by who gives out the work.")
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw the distances from the bound, and a schedule")
    args = options.parse_args()
    if args.plot is not None and not args.plot.absolute().parent.is_dir():
        # Told before minutes of measuring.
        raise InvalidRequest(f"the plot cannot be written to {str(args.plot)!r}: there is no such folder")
    result = measure(quick=args.quick, seed=args.seed, picture=args.plot) | {"facts": facts()}
    show(result, args.json, None if args.json else table(result))


if __name__ == "__main__":
    run(main)
