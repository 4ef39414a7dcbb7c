"""How often `RulePlanner` splits a question as people did, beside the planner that never splits.

What a gold decomposition is:

- StrategyQA: the written sub-questions; "#1" in one of them is an edge from the first to it.
- ParallelQA: `branch` subtasks that can run side by side, and one that joins them.
- HotpotQA tells only the type of a question. A *comparison* is two subtasks and one that joins them; a *bridge* is one
  subtask and one that needs it.
- Movie recommendation: 8 titles to look up side by side (Kim et al., "An LLM Compiler for Parallel Function Calling",
  ICML 2024) and one subtask that joins them.
- GSM8K: story problems, to be left whole.

The rules were written while looking at the StrategyQA and GSM8K training splits and at the even-numbered rows of the
other sets. Only the rest is measured: StrategyQA's dev split, GSM8K's test split, odd-numbered rows. HotpotQA's
comparison questions appear in two files under different numbers, so they are taken from one of them only.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeAlias

import networkx as nx
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agora.errors import InvalidRequest
from agora.types import TaskGraph
from benchmarks.common import data_dir, facts, parser, read_jsonl, run, show
from graphs.rules import RulePlanner

QUICK_QUESTIONS: Final = 200
"""Questions of each set under `--quick`."""

MOVIE_TITLES: Final = 8
"""Titles in one movie recommendation: four that were liked and four to choose from."""

_REFERENCE = re.compile(r"#(\d+)")

Row = Mapping[str, Any]
Shape: TypeAlias = "nx.DiGraph[int]"
"""A decomposition without its words: nodes are subtasks, edges run from an input to what needs it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldSet:
    """A set of questions with known decompositions.

    Attributes:
        path: Its file below the data folder.
        gold: The shape a row's question should be split into.
        keep: Whether a row is measured, by its number in the file from 0 and its values.
    """

    path: str
    gold: Callable[[Row], Shape]
    keep: Callable[[int, Row], bool]


def whole(row: Row | None = None) -> Shape:
    """One subtask."""
    return _shape(1, ())


def side_by_side(parts: int) -> Shape:
    """So many subtasks, and one that needs them all."""
    return _shape(parts + 1, ((n, parts) for n in range(parts)))


def written_out(row: Row) -> Shape:
    """The shape of written sub-questions in which "#1" stands for the answer of the first."""
    parts = row["decomposition"]
    found = ((int(m[1]) - 1, n) for n, part in enumerate(parts) for m in _REFERENCE.finditer(part))
    return _shape(len(parts), ((a, b) for a, b in found if 0 <= a < b))


SETS: Final[Mapping[str, GoldSet]] = {
    "strategyqa": GoldSet(path="strategyqa/dev.jsonl.gz", gold=written_out, keep=lambda n, row: True),
    "parallelqa": GoldSet(
        path="multihop/parallelqa.jsonl.gz",
        gold=lambda row: side_by_side(int(row["branch"])),
        keep=lambda n, row: n % 2 == 1,
    ),
    "hotpotqa_comparison": GoldSet(
        path="multihop/hotpotqa_comparison.jsonl.gz",
        gold=lambda row: side_by_side(2),
        keep=lambda n, row: n % 2 == 1,
    ),
    "hotpotqa_bridge": GoldSet(
        path="multihop/hotpotqa_dev.jsonl.gz",
        gold=lambda row: _shape(2, ((0, 1),)),
        keep=lambda n, row: n % 2 == 1 and row["type"] == "bridge",
    ),
    "movie_recommendation": GoldSet(
        path="multihop/movie_recommendation.jsonl.gz",
        gold=lambda row: side_by_side(MOVIE_TITLES),
        keep=lambda n, row: n % 2 == 1,
    ),
    "gsm8k": GoldSet(path="gsm8k/test.jsonl.gz", gold=whole, keep=lambda n, row: True),
}
"""Name → the part of the set that no rule was written for."""


def plan_scores(data_dir: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Measures `RulePlanner` on every set that is there.

    Args:
        data_dir: The data folder.
        limit: Most questions of each set, from its beginning; all if None.

    Returns:
        What is measured in words (`method`), and for each set:

        - `questions`: how many;
        - `parts_match`: fraction whose number of subtasks is the gold one;
        - `dependencies_match`: fraction whose whole graph is: as many subtasks, and the same edges once they are
          renamed (isomorphic graphs);
        - `parts_mae`: mean absolute error of the number of subtasks;
        - `one_subtask_…`: the same of a planner that never splits;
        - `left_whole`: fraction that stays one subtask;
        - `ms_per_plan`: mean milliseconds to make a plan.

        `missing` names the files that are not there, if any.
    """
    scores: dict[str, Any] = {
        "method": (
            "gold: StrategyQA's written sub-questions and their #refs; ParallelQA: branch + 1 joining; HotpotQA "
            "comparison: 2 + 1 joining, bridge: 1 before 1; movie recommendation: 8 + 1 joining; GSM8K: whole. "
            "dependencies_match: isomorphic graphs. one_subtask: a planner that never splits"
        ),
        "tuned_on": "StrategyQA train, GSM8K train, even-numbered rows of the other sets",
        "reported_on": "StrategyQA dev, GSM8K test, odd-numbered rows of the other sets",
    }
    missing: list[str] = []
    for name, wanted in SETS.items():
        path = data_dir / wanted.path
        if not path.is_file():
            missing.append(wanted.path)
            continue
        kept = (row for n, row in enumerate(read_jsonl(path)) if wanted.keep(n, row))
        scores[name] = score((row["question"], wanted.gold(row)) for row in islice(kept, limit))
    if missing:
        scores["missing"] = ", ".join(missing)
    return scores


def score(questions: Iterable[tuple[str, Shape]]) -> dict[str, float | int]:
    """The figures of `plan_scores` for questions with their gold shapes."""
    planner = RulePlanner()
    one = whole()
    made: list[tuple[Shape, Shape]] = []
    seconds = 0.0
    for question, gold in questions:
        began = time.perf_counter()
        graph = planner.split(question).graph
        seconds += time.perf_counter() - began
        made.append((shape_of(graph), gold))
    if not made:
        return {"questions": 0}
    ours = _against(made)
    never = _against([(one, gold) for _, gold in made])
    return {
        "questions": len(made),
        **ours,
        **{f"one_subtask_{k}": v for k, v in never.items()},
        "left_whole": sum(len(shape) == 1 for shape, _ in made) / len(made),
        "ms_per_plan": seconds / len(made) * 1e3,
    }


def shape_of(graph: TaskGraph) -> Shape:
    """A plan without its words."""
    place = {s.id: n for n, s in enumerate(graph.subtasks)}
    return _shape(len(graph), ((place[i], place[s.id]) for s in graph.subtasks for i in s.inputs))


def same_shape(a: Shape, b: Shape) -> bool:
    """Whether two plans have the same edges once their subtasks are renamed."""
    if len(a) != len(b) or a.number_of_edges() != b.number_of_edges():
        return False
    return bool(nx.is_isomorphic(a, b))


def _against(pairs: list[tuple[Shape, Shape]]) -> dict[str, float]:
    n = len(pairs)
    return {
        "parts_match": sum(len(a) == len(b) for a, b in pairs) / n,
        "dependencies_match": sum(same_shape(a, b) for a, b in pairs) / n,
        "parts_mae": sum(abs(len(a) - len(b)) for a, b in pairs) / n,
    }


def _shape(parts: int, edges: Iterable[tuple[int, int]]) -> Shape:
    graph: Shape = nx.DiGraph()
    graph.add_nodes_from(range(parts))
    graph.add_edges_from(edges)
    return graph


def table(scores: Mapping[str, Any]) -> Table:
    """The scores for people."""
    shown = Table(title="RulePlanner against gold decompositions / never splitting", box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("", no_wrap=True)
    for column in ("n", "parts", "edges", "off by", "whole", "ms"):
        shown.add_column(column, justify="right", no_wrap=True)
    for name, s in scores.items():
        if not isinstance(s, Mapping) or not s.get("questions"):
            continue
        both = (f"{s[k]:.2f}/{s[f'one_subtask_{k}']:.2f}" for k in ("parts_match", "dependencies_match", "parts_mae"))
        shown.add_row(name, str(s["questions"]), *both, f"{s['left_whole']:.2f}", f"{s['ms_per_plan']:.1f}")
    shown.caption = f"Rules written on {scores['tuned_on']}; measured on {scores['reported_on']}."
    return shown


def main() -> None:
    """Runs the benchmark."""
    args = parser(__doc__.splitlines()[0] if __doc__ else "").parse_args()
    scores = plan_scores(data_dir(args), limit=QUICK_QUESTIONS if args.quick else None)
    if not any(isinstance(s, Mapping) for s in scores.values()):
        raise InvalidRequest(f"the data folder has none of: {scores['missing']}", hint="check --data DIR")
    result = {**scores, "quick": args.quick, "facts": facts()}
    show(result, args.json, None if args.json else table(scores))


if __name__ == "__main__":
    run(main)
