"""The figures of `benchmarks.cascade` mean what they say, on curves worked out by hand and on a made-up data folder."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agora.errors import InvalidRequest
from agora.routing.cascade.frontier import hull, under_curve
from benchmarks.cascade import goals
from benchmarks.cascade_parts.curves import Curve, oracle, ordered, single_hull
from benchmarks.cascade_parts.evaluate import auroc
from benchmarks.cascade_parts.sets import ROUTELLM, SETS


def rows(n: int, seed: int = 0) -> list[dict[str, object]]:
    """A weak model that says when it is lost, and a strong one."""
    rng = np.random.default_rng(seed)
    made: list[dict[str, object]] = []
    for i in range(n):
        weak, strong = rng.random() < 0.6, rng.random() < 0.9
        doubt = "However, I assume it, " if not weak and rng.random() < 0.8 else "So it is "
        made.append(
            {
                "question": f"How much is {i} and {i + 1}, taken {rng.integers(2, 9)} times?",
                "mixtral_8x7b_correct": int(weak),
                "gpt4_1106_correct": int(strong),
                "mixtral_8x7b_response": f"{doubt}which gives it.\n#### {i if weak else rng.integers(500, 999)}",
                "gpt4_1106_response": f"We add and multiply. #### {i if strong else rng.integers(1000, 1999)}",
            }
        )
    return made


def folder(path: Path, n: int, seed: int = 0) -> Path:
    (path / ROUTELLM).mkdir(parents=True)
    with gzip.open(path / ROUTELLM / "gsm8k_test.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(n, seed))
    return path


def test_hull_and_area_by_hand() -> None:
    cost, quality = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.2, 0.3, 0.8, 0.7])
    assert hull(cost, quality) == [0, 2]
    # from 0.2 at 1 to 0.8 at 3, then flat to 4
    assert under_curve(cost[[0, 2]], quality[[0, 2]], 1.0, 4.0) == pytest.approx((2 * 0.5 + 0.8) / 3)
    assert under_curve([2.0], [0.4], 1.0, 5.0) == pytest.approx(0.4)


def test_curve_figures_by_hand() -> None:
    curve = ordered(np.array([4.0, 1.0]), np.array([1.0, 0.5]))
    assert list(curve.cost) == [1.0, 4.0]
    assert curve.at(2.5) == pytest.approx(0.75)
    assert curve.cost_of(0.75) == pytest.approx(2.5)
    assert curve.cost_of(0.4) == 1.0
    assert curve.cost_of(1.01) is None
    assert curve.auc(1.0, 4.0) == pytest.approx(0.75)
    # on a log axis the cheap half counts for more: ∫ q d(log c) / log 4 with q = 1/3 + c/6
    assert curve.auc_log(1.0, 4.0) == pytest.approx(1 / 3 + 3 / (6 * np.log(4)), abs=1e-3)


def test_oracle_and_hull_by_hand() -> None:
    cost, quality = np.array([[1.0, 3.0]] * 4), np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    best = oracle(cost, quality)
    # three of four can be right, for one dear call among cheap ones
    assert best.quality[-1] == 0.75 and best.cost[-1] == pytest.approx(1.5)
    mixed = single_hull(cost, quality)
    assert list(mixed.cost) == [1.0] and list(mixed.quality) == [0.5]


def test_auroc_by_hand() -> None:
    right = np.array([True, True, False, False])
    assert auroc(right, np.array([4.0, 3.0, 2.0, 1.0])) == 1.0
    assert auroc(right, np.array([1.0, 1.0, 1.0, 1.0])) == 0.5
    assert auroc(np.array([True, True]), np.array([1.0, 2.0])) is None


def test_goals_are_met_or_not() -> None:
    figures = {
        "gain_over_hull": 0.06,
        "cost_at_95": 0.6,
        "gain_over_hull_splits": {"lowest": 0.0},
        "auc": {"agora": 0.8},
        "over_better_of_routing_and_cascade": -0.01,
    }
    told = goals("routellm_gsm8k", figures)
    assert [told[g]["met"] for g in ("gain_over_hull", "cost_at_95", "over_better_of_routing_and_cascade")] == [
        True,
        False,
        False,
    ]
    assert not goals("routellm_gsm8k", figures | {"cost_at_95": None})["cost_at_95"]["met"]


def test_sets_are_read(tmp_path: Path) -> None:
    outcomes = SETS["routellm_gsm8k"](folder(tmp_path, 12))
    assert outcomes.models == ("mixtral_8x7b", "gpt4_1106") and len(outcomes) == 12
    assert outcomes.cost[0, 1] == pytest.approx(24.7 * len(str(rows(12)[0]["gpt4_1106_response"])))
    assert outcomes.answers is not None and "hedges" in outcomes.signals
    with pytest.raises(InvalidRequest, match=r"mmlu\.jsonl\.gz is not in"):
        SETS["routellm_mmlu"](tmp_path)


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.cascade", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_one_json_object_with_the_named_keys(tmp_path: Path) -> None:
    data, other, plot = folder(tmp_path / "a", 150), folder(tmp_path / "b", 120, seed=1), tmp_path / "curves.png"
    said = run(
        *("--data", data, "--eval", other, "--set", "routellm_gsm8k"),
        *("--quick", "--json", "--no-risk", "--plot", plot),
    )
    assert said.returncode == 0, said.stderr
    result = json.loads(said.stdout)
    one = result["sets"]["routellm_gsm8k"]
    assert {"best_single", "hull", "routing", "cascade", "cascade_routing", "agora", "oracle"} <= set(one["auc"])
    assert set(one["auc"]) == set(one["auc_log"])
    assert one["auc"]["oracle"] >= one["auc"]["agora"] and one["auc"]["oracle"] >= one["auc"]["hull"]
    assert one["gain_over_hull"] == pytest.approx(one["auc"]["agora"] - one["auc"]["hull"], abs=2e-4)
    assert one["gain_over_hull"] > 0.01, "the weak model says when it is lost: that must be worth something"
    assert one["eval_rows"] == 120 and one["splits"] == 1 and result["quick"] and result["eval"]
    assert one["auroc"]["own_answer"] > one["auroc"]["question"]
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("args", "said"),
    [(("--data", "/nowhere"), "is not a folder"), (("--data", ".", "--splits", "0"), "--splits is 0")],
)
def test_wrong_options_are_told_in_a_line(args: tuple[str, ...], said: str) -> None:
    done = run(*args)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_curve_is_plain() -> None:
    assert Curve(cost=np.array([1.0]), quality=np.array([0.5])).auc(1.0, 1.0) == 0.5
