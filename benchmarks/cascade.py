"""What does asking the cheapest model that can be trusted save? Policies on recorded outcomes of many LLMs.

`python -m benchmarks.cascade --data DIR [--eval DIR] [--set NAME] [--quick] [--json] [--plot FILE]`

Everything is fitted on `--data` and judged on `--eval`, a folder of the same layout with other rows; without it, on
random splits, 78 % to 22 %. Quality is the recorded correctness; a policy pays for every model it asked, and nothing
that is recorded of a model is looked at before it was asked. A saving is always shown beside `hull`: what mixing single
models at random reaches on the judged rows. `agora` is the kind of policy that validation within the fitted rows
picked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from threadpoolctl import threadpool_limits

from agora.errors import InvalidRequest
from agora.routing.cascade.outcomes import Outcomes
from benchmarks.cascade_parts.embeddings import embeddings
from benchmarks.cascade_parts.evaluate import Split, evaluate, summary
from benchmarks.cascade_parts.plot import plot
from benchmarks.cascade_parts.risk import risk
from benchmarks.cascade_parts.sets import SETS
from benchmarks.common import data_dir, facts, parser, run, show

SPLITS: Final = 10
"""Random splits where there is no `--eval`."""

TRAIN_SHARE: Final = 0.78
"""Share of the rows that a split is fitted on."""

QUICK_SPLITS: Final = 1
"""The same under `--quick`, the first of those: figures of single splits, ±0.01 on the smaller sets."""

QUICK_ROWS: Final = 2500
"""Most rows of a set under `--quick`: all, but of MMLU, where fewer show nothing: 57 subjects, and only the question to
go by. With 450 rows of each, agora came out below the hull on two sets."""

EMBEDDED: Final = ("routellm_mmlu",)
"""Sets whose questions are embedded. On GSM8K embeddings add nothing (AUROC 0.57 with them, 0.59 without), on 550
questions of MATH routing by words gained 0.01 more without them, and the most of RouterBench-Mini's prompts are not
recorded."""

GOALS: Final[Mapping[str, Mapping[str, float]]] = {
    "routellm_gsm8k": {"gain_over_hull": 0.052, "cost_at_95": 0.50},
    "zeroeval_gsm8k": {"gain_over_hull": 0.014},
    "zeroeval_math": {"gain_over_hull": 0.010, "lowest_gain": -0.005},
    "routerbench_mini": {"gain_over_hull": 0.012, "p95_over_always_strong": 1.0},
    "routellm_mmlu": {"auc": 0.770, "cost_at_95": 0.38},
}
"""What is aimed at, by set; on each, `agora` shall also be within 0.003 of the better of routing and cascade."""

AT_MOST: Final = frozenset({"cost_at_95", "p95_over_always_strong"})
"""Goals that are upper limits."""

WITHIN: Final = 0.003
"""How far below the better of routing and cascade `agora` may lie."""


async def read(name: str, data: Path, *, rows: int | None, seed: int) -> Outcomes:
    """A set's outcomes, with embeddings where they help; of more than `rows` rows, so many at random."""
    outcomes = SETS[name](data)
    if rows is not None and len(outcomes) > rows:
        outcomes = outcomes.take(np.sort(np.random.default_rng(seed).permutation(len(outcomes))[:rows]))
    # under --quick nothing is embedded: that alone takes minutes on a cold cache
    if rows is None and name in EMBEDDED:
        outcomes = replace(outcomes, embeddings=await embeddings(outcomes.questions))
    return outcomes


def splits_of(outcomes: Outcomes, judged: Outcomes | None, *, count: int, seed: int) -> tuple[Split, ...]:
    """One evaluation on `judged`, or `count` on random splits; each fits anew."""
    if judged is not None:
        return (evaluate(outcomes, judged, seed=seed),)
    parts = []
    for k in range(count):
        order = np.random.default_rng([seed, k]).permutation(len(outcomes))
        cut = round(TRAIN_SHARE * len(order))
        parts.append(evaluate(outcomes.take(order[:cut]), outcomes.take(order[cut:]), seed=seed + k))
    return tuple(parts)


def goals(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """What is aimed at, what came of it, and whether it was met."""
    values: dict[str, float | None] = {
        "gain_over_hull": result["gain_over_hull"],
        "cost_at_95": result["cost_at_95"],
        "lowest_gain": result["gain_over_hull_splits"]["lowest"],
        "auc": result["auc"]["agora"],
        "p95_over_always_strong": result.get("latency", {}).get("agora_over_always_strong"),
        "over_better_of_routing_and_cascade": result["over_better_of_routing_and_cascade"],
    }
    wanted = {**GOALS[name], "over_better_of_routing_and_cascade": -WITHIN}
    told = {}
    for goal, limit in wanted.items():
        value = values[goal]
        met = value is not None and (value <= limit if goal in AT_MOST else value >= limit)
        told[goal] = {"goal": limit, "value": value, "met": met}
    return told


async def measure(
    data: Path, *, against: Path | None, names: tuple[str, ...], quick: bool, seed: int, splits: int | None = None
) -> tuple[dict[str, Any], dict[str, tuple[Split, ...]]]:
    """Figures and curves of each set."""
    results: dict[str, Any] = {}
    curves: dict[str, tuple[Split, ...]] = {}
    count = splits if splits is not None else QUICK_SPLITS if quick else SPLITS
    for name in names:
        rows = QUICK_ROWS if quick else None
        outcomes = await read(name, data, rows=rows, seed=seed)
        judged = None if against is None else await read(name, against, rows=rows, seed=seed)
        curves[name] = splits_of(outcomes, judged, count=count, seed=seed)
        figures = summary(curves[name])
        results[name] = {
            "rows": len(outcomes),
            "eval_rows": len(outcomes) - round(TRAIN_SHARE * len(outcomes)) if judged is None else len(judged),
            "splits": len(curves[name]),
            "quick": quick,
            "embeddings": outcomes.embeddings is not None,
            "models": list(outcomes.models),
            **figures,
            "goals": goals(name, figures),
        }
    return results, curves


def tables(result: Mapping[str, Any]) -> Group:
    """The result for people."""
    names = ("best_single", "hull", "routing", "cascade", "cascade_routing", "stopping", "agora", "oracle")
    auc = Table(title="Mean quality between the cost of always-cheapest and always-dearest", box=SIMPLE_HEAD)
    auc.add_column("")
    for name in names:
        auc.add_column(name.replace("_", " "), justify="right")
    for name, one in result["sets"].items():
        auc.add_row(name, *(f"{one['auc'][n]:.4f}" for n in names))
    gains = Table(title="agora over mixing single models at random (hull)", box=SIMPLE_HEAD)
    for column in ("", "gain", "lowest", "gap closed", "cost at 95 %", "hull's", "p95 / strong's", "goals met"):
        gains.add_column(column, justify="right" if column else "left")
    for name, one in result["sets"].items():
        met = [g["met"] for g in one["goals"].values()]
        gains.add_row(
            name,
            f"{one['gain_over_hull']:+.4f}",
            f"{one['gain_over_hull_splits']['lowest']:+.4f}",
            _told(one["gap_closed"]),
            _told(one["cost_at_95"]),
            _told(one["hull_cost_at_95"]),
            _told(one.get("latency", {}).get("agora_over_always_strong")),
            f"{sum(met)} of {len(met)}",
        )
    return Group(auc, gains)


def _told(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    options = parser("What routing, cascades and both save on recorded outcomes, against mixing models at random.")
    options.add_argument("--eval", type=Path, metavar="DIR", help="folder of the rows to judge on, laid out as --data")
    options.add_argument("--set", choices=tuple(SETS), action="append", help="only this set (may be given again)")
    options.add_argument("--splits", type=int, metavar="N", help=f"random splits without --eval (default: {SPLITS})")
    options.add_argument("--no-risk", action="store_true", help="leave out whether promised risks are kept")
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw quality over cost into this file")
    args = options.parse_args()
    data = data_dir(args)
    if args.eval is not None and not args.eval.is_dir():
        raise InvalidRequest(f"the folder {str(args.eval)!r} is not a folder", hint="check --eval DIR")
    if args.splits is not None and args.splits < 1:
        raise InvalidRequest(f"--splits is {args.splits}; at least 1 is needed")
    names = tuple(args.set or SETS)
    with threadpool_limits(1):
        # many small matrices: a second thread only waits for the first
        sets, curves = asyncio.run(
            measure(data, against=args.eval, names=names, quick=args.quick, seed=args.seed, splits=args.splits)
        )
        result: dict[str, Any] = {"sets": sets}
        if not args.no_risk:
            result["risk"] = risk(data, quick=args.quick, seed=args.seed)
    result |= {"quick": args.quick, "seed": args.seed, "eval": args.eval is not None, **facts()}
    if args.plot is not None:
        plot(curves, args.plot)
    show(result, args.json, tables(result))


if __name__ == "__main__":
    run(main)
