"""Are clients that need different models told apart, and does it help them? Clients found in groups against the truth.

    python -m benchmarks.clusters [--quick] [--json] [--seed N] [--plot FILE]

Data: scikit-learn's digits (1797 pictures, they come with the library). Four groups of eight clients read them, each
group with its own permutation of the labels; a client has 40 pictures, unevenly spread over the digits (Dirichlet 1).
Two tasks: a softmax classifier as plain numbers, and LoRA of ranks 4 and 8 on a small network. Each is run by agora's
asynchronous server with the same jobs in all:

- `local`: every client alone; `global`: one model; `oracle`: one for each true group; `clustered`: groups found by the
  similarity of updates, their number too (`agglomerative`); `ifca`: by losses.
- `worst_cluster_loss` is the test loss of the true group that is worst off, on pictures that nobody trained on, each
  client's weighed by its own mix of digits. `ari` is the adjusted Rand index against the true groups.
- `moving`: half-way a quarter of the clients change their group, and a new client of each group joins. ARI before the
  change and at the end, and how many new clients ended with their group.
- `same`: all clients alike: how many models they end with; 1 is right.
- `skewed`: Dirichlet 0.5, where clients of a group have few digits in common. This and `ifca` not with --quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agora.errors import InvalidRequest
from benchmarks.clusters_parts.plot import plot
from benchmarks.clusters_parts.runs import Found, alone, federated
from benchmarks.clusters_parts.tasks import TASKS, Shape, Task
from benchmarks.common import facts, parser, run, show

SKEWED: Final = 0.5
"""Dirichlet parameter of the harder task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is done.

    Attributes:
        seeds: Data sets, and runs.
        jobs: Of each run.
        moving_jobs: Of a run on the way of which clients change.
        kinds: Of runs that are compared.
        skewed: Whether the harder task is run, too.
    """

    seeds: int
    jobs: int
    moving_jobs: int
    kinds: tuple[str, ...]
    skewed: bool


QUICK: Final = Plan(
    seeds=2, jobs=1000, moving_jobs=1600, kinds=("local", "global", "clustered", "oracle"), skewed=False
)
FULL: Final = Plan(
    seeds=5, jobs=1600, moving_jobs=2400, kinds=("local", "global", "clustered", "ifca", "oracle"), skewed=True
)


def measure(plan: Plan, *, seed: int, picture: Path | None = None) -> dict[str, Any]:
    """Runs everything."""
    tasks: dict[str, Any] = {}
    courses: dict[str, list[Found]] = {}
    for name, make in TASKS.items():
        seeds = range(seed, seed + plan.seeds)
        steady = [_steady(make(Shape(), s), plan, s) for s in seeds]
        moving = [_moving(make, plan.moving_jobs, s) for s in seeds]
        same = [
            federated(make(Shape(groups=1, each=32), s), jobs=plan.jobs, seed=s, way="agglomerative") for s in seeds
        ]
        tasks[name] = _told(steady) | {"moving": _told_moving(moving, plan), "same": [f.models for f in same]}
        if plan.skewed:
            tasks[name]["skewed"] = _told([_steady(make(Shape(skew=SKEWED), s), plan, s) for s in seeds])
        courses[name] = moving
    if picture is not None:
        plot(picture, {n: t["worst_cluster_loss"] for n, t in tasks.items()}, courses, plan.moving_jobs // 2)
    every = list(tasks.values())
    return {
        "data": "scikit-learn digits, labels permuted by group, Dirichlet 1.0 within",
        "ari": _mean([t["ari"] for t in every]),
        "worst_cluster_loss": {k: _mean([t["worst_cluster_loss"][k] for t in every]) for k in plan.kinds},
        "moving": {k: _mean([t["moving"][k] for t in every]) for k in ("ari_before", "ari_after", "newcomers_right")},
        "one_cluster_right": _mean([float(n == 1) for t in every for n in t["same"]]),
        "tasks": tasks,
        "seeds": list(range(seed, seed + plan.seeds)),
        "jobs": plan.jobs,
    }


def _steady(task: Task, plan: Plan, seed: int) -> dict[str, Any]:
    found = {kind: _RUNS[kind](task, plan.jobs, seed) for kind in plan.kinds}
    return {
        "ari": found["clustered"].ari,
        "ifca_ari": found["ifca"].ari if "ifca" in found else None,
        "clusters": found["clustered"].models,
        "worst_cluster_loss": {kind: one.worst for kind, one in found.items()},
    }


_RUNS: Final[Mapping[str, Callable[[Task, int, int], Found]]] = {
    "local": lambda task, jobs, seed: alone(task, jobs=jobs, seed=seed),
    "global": lambda task, jobs, seed: federated(task, jobs=jobs, seed=seed),
    "clustered": lambda task, jobs, seed: federated(task, jobs=jobs, seed=seed, way="agglomerative"),
    "ifca": lambda task, jobs, seed: federated(task, jobs=jobs, seed=seed, way="ifca"),
    "oracle": lambda task, jobs, seed: federated(task, jobs=jobs, seed=seed, groups=task.truth()),
}
"""By kind of run."""


def _moving(make: Callable[[Shape, int], Task], jobs: int, seed: int) -> Found:
    task = make(Shape(late=1, drift_at=jobs // 2), seed)
    return federated(task, jobs=jobs, seed=seed, way="agglomerative")


def _told(steady: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    losses = [s["worst_cluster_loss"] for s in steady]
    return {
        "ari": _mean([s["ari"] for s in steady]),
        "ari_by_seed": [_rounded(s["ari"]) for s in steady],
        **({"ifca_ari": _mean([s["ifca_ari"] for s in steady])} if steady[0]["ifca_ari"] is not None else {}),
        "clusters_by_seed": [s["clusters"] for s in steady],
        "worst_cluster_loss": {k: _mean([one[k] for one in losses]) for k in losses[0]},
        "clustered_below_global": sum(one["clustered"] < one["global"] for one in losses) / len(losses),
    }


def _told_moving(moving: Sequence[Found], plan: Plan) -> dict[str, Any]:
    before = [
        max(((job, a) for _, job, a in f.course if job < plan.moving_jobs // 2), default=(0, 0.0))[1] for f in moving
    ]
    right = [r for f in moving for r in f.right.values()]
    return {
        "ari_before": _mean(before),
        "ari_after": _mean([f.ari for f in moving]),
        "ari_after_by_seed": [_rounded(f.ari) for f in moving],
        "newcomers_right": _mean([float(r) for r in right]),
        "newcomers": len(right),
    }


def _mean(values: Sequence[float]) -> float:
    return _rounded(np.mean(values)) if len(values) else 0.0


def _rounded(value: Any) -> float:
    return round(float(value), 4)


def table(result: Mapping[str, Any]) -> Table:
    """The result for people."""
    found = Table(title=f"Clients in groups, {len(result['seeds'])} seeds", box=SIMPLE_HEAD, pad_edge=False)
    found.add_column("", no_wrap=True)
    for name in (*result["tasks"], "all"):
        found.add_column(name, justify="right", no_wrap=True)
    every = list(result["tasks"].values())
    found.add_row("ARI", *(f"{t['ari']:.3f}" for t in every), f"{result['ari']:.3f}")
    found.add_section()
    for kind in result["worst_cluster_loss"]:
        losses = [t["worst_cluster_loss"][kind] for t in every]
        found.add_row(f"worst loss, {kind}", *(f"{x:.3f}" for x in losses), f"{result['worst_cluster_loss'][kind]:.3f}")
    found.add_section()
    moving = {"ari_before": "ARI before clients move", "ari_after": "ARI after", "newcomers_right": "newcomers right"}
    for key, label in moving.items():
        found.add_row(label, *(f"{t['moving'][key]:.3f}" for t in every), f"{result['moving'][key]:.3f}")
    found.add_row("one cluster if all alike", *("" for _ in every), f"{result['one_cluster_right']:.2f}")
    if "skewed" in every[0]:
        found.add_section()
        found.add_row("skewed: ARI", *(f"{t['skewed']['ari']:.3f}" for t in every), "")
        found.add_row("skewed: ARI of ifca", *(f"{t['skewed']['ifca_ari']:.3f}" for t in every), "")
        for kind in result["worst_cluster_loss"]:
            losses = [t["skewed"]["worst_cluster_loss"][kind] for t in every]
            found.add_row(f"skewed: worst loss, {kind}", *(f"{x:.3f}" for x in losses), "")
    return found


def main() -> None:
    options = parser("Are clients that need different models told apart, and does it help them?")
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses, and the groups over time")
    args = options.parse_args()
    if args.plot is not None and not args.plot.absolute().parent.is_dir():
        raise InvalidRequest(f"the plot cannot be written to {str(args.plot)!r}: there is no such folder")
    plan = QUICK if args.quick else FULL
    result = measure(plan, seed=args.seed, picture=args.plot) | {"quick": args.quick, "facts": facts()}
    show(result, args.json, None if args.json else table(result))


if __name__ == "__main__":
    run(main)
