"""The benchmark of clusters: its tasks, what it tells, and that groups help."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agora.errors import InvalidRequest
from benchmarks import clusters
from benchmarks.clusters import Plan, measure, table
from benchmarks.clusters_parts.tasks import TASKS, Shape, Task, digits
from fed.words import Job


@pytest.mark.parametrize("name", list(TASKS))
def test_a_job_trains_the_same_from_the_same_start_and_lowers_the_loss(name: str) -> None:
    task = TASKS[name](Shape(groups=2, each=2), 0)
    now = start = task.learner.initial(0)
    job = Job(id=0, client="client-01", model="all", version=0, seed=5)
    assert task.train(start, job).delta.tobytes() == task.train(start, job).delta.tobytes()
    for n in range(20):
        now = now.plus(task.train(now, Job(id=n, client="client-01", model="all", version=0, seed=n)).delta)
    assert task.loss(now, "client-01") < 0.5 * task.loss(start, "client-01")


@pytest.mark.parametrize("name", list(TASKS))
def test_what_it_trains_by_is_the_slope_of_the_loss(name: str) -> None:
    task: Task = TASKS[name](Shape(), 1)
    learner, (x, y) = task.learner, digits()
    learner.rate = 1e-3  # type: ignore[attr-defined]
    start = learner.initial(0)
    delta, _ = learner.train(start, x[:1], y[:1], 1, np.random.default_rng(0))
    fell = learner.losses(start, x[:1], y[:1])[0] - learner.losses(start.plus(delta), x[:1], y[:1])[0]
    # One row only: a step of rate·slope lowers the loss by ‖step‖²/rate, unless the slope was clipped.
    expected = float(delta @ delta) / 1e-3
    assert fell == pytest.approx(expected, rel=0.1) or fell > expected


def test_it_tells_what_was_asked_and_groups_help(tmp_path: Path) -> None:
    plan = Plan(seeds=1, jobs=900, moving_jobs=900, kinds=("global", "clustered", "oracle"), skewed=False)
    result = measure(plan, seed=1, picture=tmp_path / "plot.png")
    losses = result["worst_cluster_loss"]
    assert losses["oracle"] < losses["clustered"] < 0.7 * losses["global"]
    assert result["ari"] > 0.8 and result["one_cluster_right"] == 1.0
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    json.dumps(result, allow_nan=False)
    assert table(result).row_count >= 8


def test_a_picture_that_cannot_be_written_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["clusters", "--plot", str(tmp_path / "no" / "plot.png")])
    with pytest.raises(InvalidRequest, match="the plot cannot be written to"):
        clusters.main()
