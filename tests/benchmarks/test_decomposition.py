"""The decomposition benchmark counts right, on sets small enough to count by hand."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from agora.types import Subtask, TaskGraph
from benchmarks.decomposition import SETS, plan_scores, same_shape, score, shape_of, side_by_side, whole, written_out

TALLER = "Which is taller, the Eiffel Tower or Big Ben?"
BRIDGE = "When was the director of Jaws born?"
PLAIN = "Would a pear sink in water?"


def write(data: Path, name: str, rows: list[dict[str, Any]]) -> None:
    path = data / SETS[name].path
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(r) + "\n" for r in rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    # Rows that are not to be measured have no question: measuring them would fail.
    unseen = {"question": "", "type": "bridge", "branch": 2}
    write(tmp_path, "strategyqa", [
        {"question": TALLER, "decomposition": ["How tall is A?", "How tall is B?", "Is #1 more than #2?"]},
        {"question": TALLER, "decomposition": ["How tall is A?", "Is B taller than #1?", "Is #2 yes?"]},
        {"question": PLAIN, "decomposition": ["How dense is a pear?", "Is #1 more than water?"]},
        {"question": PLAIN, "decomposition": ["Would a pear sink?"]},
    ])  # fmt: skip
    write(
        tmp_path, "parallelqa", [unseen, {"question": TALLER, "branch": 2}, unseen, {"question": TALLER, "branch": 5}]
    )
    write(tmp_path, "hotpotqa_bridge", [
        unseen, {"question": BRIDGE, "type": "bridge"}, unseen, {"question": "", "type": "comparison"},
    ])  # fmt: skip
    write(tmp_path, "gsm8k", [{"question": PLAIN}, {"question": TALLER}])
    return tmp_path


def test_every_figure_is_what_counting_by_hand_gives(data: Path) -> None:
    scores = plan_scores(data, limit=None)
    strategy = scores["strategyqa"]
    assert strategy.pop("ms_per_plan") > 0
    assert strategy == {
        "questions": 4,
        "parts_match": 3 / 4,
        "dependencies_match": 2 / 4,
        "parts_mae": 1 / 4,
        "one_subtask_parts_match": 1 / 4,
        "one_subtask_dependencies_match": 1 / 4,
        "one_subtask_parts_mae": (2 + 2 + 1) / 4,
        "left_whole": 2 / 4,
    }
    parallel = scores["parallelqa"]
    assert (parallel["questions"], parallel["parts_match"], parallel["parts_mae"]) == (2, 1 / 2, 3 / 2)
    assert (scores["hotpotqa_bridge"]["questions"], scores["hotpotqa_bridge"]["dependencies_match"]) == (1, 1)
    assert scores["gsm8k"]["left_whole"] == scores["gsm8k"]["parts_match"] == 1 / 2


def test_it_says_what_was_measured_and_what_is_missing(data: Path) -> None:
    scores = plan_scores(data, limit=1)
    assert scores["strategyqa"]["questions"] == 1
    assert "even" in scores["tuned_on"] and "odd" in scores["reported_on"]
    assert scores["missing"] == f"{SETS['hotpotqa_comparison'].path}, {SETS['movie_recommendation'].path}"
    assert "hotpotqa_comparison" not in scores


def test_shapes_are_compared_up_to_names() -> None:
    apart = (Subtask(id="x", question="a"), Subtask(id="y", question="b"))
    plan = TaskGraph((Subtask(id="z", question="compare", inputs=("x", "y")), *apart))
    assert same_shape(shape_of(plan), side_by_side(2))
    assert same_shape(side_by_side(2), written_out({"decomposition": ["a", "b", "Is #2 like #1?"]}))
    assert not same_shape(side_by_side(2), written_out({"decomposition": ["a", "Is it #1?", "Is it #2?"]}))
    assert not same_shape(side_by_side(2), side_by_side(3))
    assert same_shape(whole(), written_out({"decomposition": ["What is #9, or #1?"]})), "no edges to what is not there"


def test_no_questions_make_no_figures() -> None:
    assert score([]) == {"questions": 0}
    assert nx.is_directed_acyclic_graph(side_by_side(8))


def test_it_runs_from_the_command_line(data: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.decomposition", "--data", str(folder), "--quick", "--json"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    shown = json.loads(run(data).stdout)
    assert shown["quick"] is True and shown["gsm8k"]["questions"] == 2
    empty = run(tmp_path_factory.mktemp("empty"))
    assert empty.returncode == 2 and "has none of: strategyqa/dev.jsonl.gz" in empty.stderr
