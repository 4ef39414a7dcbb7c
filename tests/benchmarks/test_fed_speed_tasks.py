"""The tasks of the benchmark of federated speed: their gradients, their target, and who has which rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.fed_speed_parts.fleets import CLIENTS, drawn, named
from benchmarks.fed_speed_parts.methods import METHODS
from benchmarks.fed_speed_parts.race import GAP_LEFT, race
from benchmarks.fed_speed_parts.tasks import TASKS, Model, Sgd, digits, goal, shares
from fed.words import Job


@pytest.mark.parametrize("name", TASKS)
def test_gradients_are_those_of_the_loss(name: str) -> None:
    task = TASKS[name]
    model, (x, y) = Model(task), digits()
    rng = np.random.default_rng(0)
    w = rng.normal(0, 0.3, task.spec.size)
    x = x[:50].astype(np.float64)
    found = model.gradient(w, x, y[:50])
    for _ in range(5):
        direction = rng.normal(size=w.size)
        step = 1e-5 * direction
        slope = (model.loss(w + step, x, y[:50]) - model.loss(w - step, x, y[:50])) / 2e-5
        assert slope == pytest.approx(float(found @ direction), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", TASKS)
def test_the_target_leaves_a_twentieth_of_the_way_to_the_optimum(name: str) -> None:
    task = TASKS[name]
    aim, (x, y) = goal(task, GAP_LEFT), digits()
    assert aim.first == pytest.approx(Model(task).loss(task.first().flat, x, y), rel=1e-5)
    assert (aim.target - aim.optimum) / (aim.first - aim.optimum) == pytest.approx(0.05)


def test_the_optimum_of_the_convex_task_has_no_gradient_left_worth_telling() -> None:
    from sklearn.linear_model import LogisticRegression

    task, (x, y) = TASKS["softmax"], digits()
    # scikit-learn adds ½‖w‖²/C to the sum, and leaves the intercept alone: so its optimum bounds ours from below.
    other = LogisticRegression(C=1 / (task.l2 * len(y)), max_iter=5000, tol=1e-8).fit(x.astype(np.float64), y)
    w = np.concatenate([other.coef_.T.ravel(), other.intercept_])
    theirs = Model(task).loss(w, x.astype(np.float64), y)
    without = theirs - 0.5 * task.l2 * float(other.intercept_ @ other.intercept_)
    assert without - 1e-6 <= goal(task, GAP_LEFT).optimum <= theirs + 1e-6


def test_every_row_is_one_clients_and_labels_are_skewed() -> None:
    parts = shares(CLIENTS, 0.3, 3)
    assert len(parts) == CLIENTS
    assert sum(len(y) for _, y in parts) == len(digits()[1])
    most = [np.bincount(y, minlength=10).max() / len(y) for _, y in parts]
    assert np.mean(most) > 0.3
    again = shares(CLIENTS, 0.3, 3)
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(parts, again, strict=True))


def test_a_job_is_trained_the_same_again_and_lowers_the_clients_loss() -> None:
    task = TASKS["softmax"]
    model, rows = Model(task), {"a": shares(CLIENTS, 0.3, 0)[0]}
    job = Job(id=0, client="a", model="all", version=0, seed=5, steps=20)
    start = task.first()
    trained = Sgd(model, rows, 1.0).train(start, job)
    again = Sgd(model, rows, 1.0).train(start, job)
    assert trained.delta.tobytes() == again.delta.tobytes()
    x, y = rows["a"]
    assert model.loss(start.flat + trained.delta, x, y) < model.loss(start.flat, x, y)


def test_the_slowest_client_and_not_its_speed_alone_makes_a_round_long() -> None:
    speeds = [c.profile.seconds_per_step * 2 for c in drawn("lognormal", 2, 1).clients]
    setting = METHODS["sync"].grid(TASKS["softmax"].rates)[9]
    outcome = race("softmax", "lognormal", setting, 1)
    assert outcome.reached
    # Rounds end with the slowest job, or earlier where that was lost.
    assert 0.6 * max(speeds) < outcome.seconds / outcome.versions <= max(speeds) * 1.0001
    times = [at for at, _ in outcome.curve]
    assert times == sorted(times)
    assert outcome.jobs <= CLIENTS * (outcome.versions + 1)


def test_a_run_that_does_not_get_there_is_told_apart() -> None:
    setting = METHODS["sync"].grid(TASKS["softmax"].rates)[0]
    outcome = race("softmax", "control", setting, 1, seconds=2.5)
    assert not outcome.reached
    assert outcome.seconds == pytest.approx(2.5)


def test_a_run_that_diverges_is_not_taken_for_a_quick_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.fed_speed_parts.race.MAX_JOBS", 320)
    setting = replace(METHODS["fedbuff"].grid(TASKS["softmax"].rates)[0], lr=1e12)
    outcome = race("softmax", "control", setting, 1)
    assert not outcome.reached
    assert outcome.jobs == 320
    assert outcome.seconds > 15


def test_tiers_are_one_two_and_four_seconds_a_job() -> None:
    fleet = named(drawn("tiers_1_2_4", 5, 0), list(range(1, CLIENTS + 1)))
    seconds = sorted({round(c.profile.seconds_per_step * 5, 6) for c in fleet.clients})
    assert seconds == [1.0, 2.0, 4.0]
    assert [c.examples for c in fleet.clients] == list(range(1, CLIENTS + 1))
