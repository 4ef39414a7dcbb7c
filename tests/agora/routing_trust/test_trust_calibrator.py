"""Signals become probabilities that come true."""

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from agora.errors import InvalidRequest
from agora.routing.trust import Calibrator, CannotCalibrate, ece, fit_calibrator
from agora.routing.trust.logistic import fit_logistic
from agora.routing.trust.scaling import Isotonic, Platt, fit_scaling, scaling_from_dict


def made_up(n: int, seed: int = 0) -> tuple[list[dict[str, float]], np.ndarray]:
    """Answers whose log-odds are 1.5·a + 0.5 − 1·(b is missing)."""
    rng = np.random.default_rng(seed)
    a, told = rng.normal(size=n), rng.random(n) < 0.7
    right = rng.random(n) < expit(1.5 * a + 0.5 - 1.0 * ~told)
    rows = [{"a": float(x), **({"b": float(rng.normal())} if t else {})} for x, t in zip(a, told, strict=True)]
    return rows, right


@pytest.fixture(scope="module")
def few() -> Calibrator:
    return fit_calibrator(*made_up(400))


@pytest.fixture(scope="module")
def many() -> Calibrator:
    return fit_calibrator(*made_up(3000))


def test_probabilities_come_true_on_answers_not_seen(few: Calibrator, many: Calibrator) -> None:
    rows, right = made_up(4000, seed=1)
    for calibrator, allowed in ((few, 0.06), (many, 0.04)):
        told = np.array([calibrator(row) for row in rows])
        assert ece(told, right) < allowed
        assert np.corrcoef(told, right)[0, 1] > 0.45


def test_platt_below_a_thousand_labels_isotonic_from_there_on(few: Calibrator, many: Calibrator) -> None:
    assert (few.report.method, many.report.method) == ("platt", "isotonic")
    assert fit_calibrator(*made_up(999)).report.method == "platt"
    assert fit_calibrator(*made_up(1000)).report.method == "isotonic"


def test_the_report_is_what_other_answers_show(many: Calibrator) -> None:
    rows, right = made_up(8000, seed=2)
    fresh = fit_calibrator(rows, right).report
    assert many.report.n == 3000
    assert many.report.auroc == pytest.approx(fresh.auroc, abs=0.03)
    assert many.report.aurc == pytest.approx(fresh.aurc, abs=0.03)
    assert many.report.accuracy == pytest.approx(fresh.accuracy, abs=0.03)


def test_chance_is_reported_as_chance() -> None:
    rng = np.random.default_rng(0)
    noise = [{f"s{i}": float(rng.normal()) for i in range(12)} for _ in range(300)]
    report = fit_calibrator(noise, rng.random(300) < 0.5).report
    # Fitted to the same rows it would seem to tell right from wrong; cross-validated it does not.
    assert report.auroc == pytest.approx(0.5, abs=0.1)


numbers = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, 1e308, -1e308, 5e-324]))


@given(signals=st.dictionaries(st.sampled_from(["a", "b", "unknown"]), numbers))
def test_always_a_probability(few: Calibrator, many: Calibrator, signals: dict[str, float]) -> None:
    for calibrator in (few, many):
        assert 0 <= calibrator(signals) <= 1


@settings(max_examples=8, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["x", "y"]), numbers), min_size=40, max_size=60),
    seed=st.integers(0, 9),
)
def test_any_signals_can_be_fitted(rows: list[dict[str, float]], seed: int) -> None:
    right = np.random.default_rng(seed).permutation([i % 3 > 0 for i in range(len(rows))])
    calibrator = fit_calibrator(rows, right)
    told = [calibrator(row) for row in rows]
    assert all(0 <= t <= 1 for t in told)
    assert all(math.isfinite(v) for v in (calibrator.report.ece, calibrator.report.aurc, calibrator.report.auroc))


def test_what_is_not_told_counts_as_missing_however_it_is_not_told(few: Calibrator) -> None:
    told = {few({"a": 1.0}), few({"a": 1.0, "b": math.nan}), few({"a": 1.0, "b": math.inf})}
    assert len(told) == 1
    # Its lack means something here, and has been learned.
    assert told.pop() < few({"a": 1.0, "b": 0.0}) - 0.05


def test_far_out_is_no_surer_than_the_farthest_seen(few: Calibrator) -> None:
    assert few({"a": 1e9, "b": 0.0}) == few({"a": 100.0, "b": 0.0}) < 1


def test_without_any_signal_it_is_the_share_of_right_answers() -> None:
    right = [i % 4 > 0 for i in range(200)]
    calibrator = fit_calibrator([{} for _ in right], right)
    assert calibrator({}) == pytest.approx(0.75, abs=0.02)
    assert calibrator({"new": 3.0}) == calibrator({})


@pytest.mark.parametrize(
    ("right", "said"),
    [
        ([True] * 10 + [False] * 9, "19 labelled answers; at least 30"),
        ([True] * 100, "none of 100 answers are wrong; at least 5"),
        ([False] * 100, "none of 100 answers are right"),
        ([True] * 99 + [False], "1 of 100 answers is wrong"),
        ([], "0 labelled answers"),
    ],
)
def test_too_little_to_learn_from_is_said(right: list[bool], said: str) -> None:
    with pytest.raises(CannotCalibrate, match=said):
        fit_calibrator([{} for _ in right], right)


def test_as_many_labels_as_answers() -> None:
    with pytest.raises(InvalidRequest, match="2 answers and 1 labels"):
        fit_calibrator([{}, {}], [True])


def test_same_seed_same_calibrator() -> None:
    rows, right = made_up(200)
    assert fit_calibrator(rows, right, seed=3) == fit_calibrator(rows, right, seed=3)


def test_kept_as_json_and_read_back(few: Calibrator, many: Calibrator) -> None:
    for calibrator in (few, many):
        again = Calibrator.from_dict(json.loads(json.dumps(calibrator.to_dict(), allow_nan=False)))
        assert again == calibrator
        assert again({"a": 0.3}) == calibrator({"a": 0.3})


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [1.0]},
        {"intercept": math.nan},
        {"scaling": {"kind": "magic"}},
        {"scaling": {"kind": "isotonic", "scores": [0, 1], "probabilities": [0.5, 0.4]}},
        {"scaling": {"kind": "isotonic", "scores": [0], "probabilities": [1.5]}},
        {"features": [{"name": "a", "mean": 0.0, "spread": 0.0, "lacks": False}]},
    ],
)
def test_nonsense_is_not_read_back(few: Calibrator, change: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Calibrator.from_dict({**few.to_dict(), **change})


def test_logistic_regression_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(200, 3))
    label = rng.random(200) < expit(table @ [1.0, -2.0, 0.0])
    weights, intercept = fit_logistic(table, label.astype(float), ridge=2.0)
    model = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(table, label)
    assert weights == pytest.approx(model.coef_[0], abs=1e-4)
    assert intercept == pytest.approx(model.intercept_[0], abs=1e-4)
    # Soft labels: the gradient of Σ log loss + ½·ridge·|w|² is zero there.
    soft = np.clip(label + rng.normal(size=200) * 0.1, 0, 1)
    weights, intercept = fit_logistic(table, soft, ridge=2.0)
    off = expit(table @ weights + intercept) - soft
    assert table.T @ off + 2.0 * weights == pytest.approx(np.zeros(3), abs=1e-3)
    assert off.sum() == pytest.approx(0, abs=1e-3)


def test_isotonic_regression_is_that_of_scikit_learn_but_never_sure() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=2000).round(1)
    right = rng.random(2000) < expit(2 * scores)
    ours = Isotonic.fit(scores, right)
    theirs = IsotonicRegression(out_of_bounds="clip").fit(scores, right)
    inner = np.linspace(-1.5, 1.5, 31).round(1)
    assert [ours(s) for s in inner] == pytest.approx(theirs.predict(inner), abs=1e-9)
    assert 0 < ours(-100) < ours(100) < 1


@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=10, max_size=60))
def test_scalings_never_fall(pairs: list[tuple[int, bool]]) -> None:
    scores, right = np.array([float(s) for s, _ in pairs]), np.array([r for _, r in pairs])
    for scaling in (Platt.fit(scores, right), Isotonic.fit(scores, right)):
        told = [scaling(s) for s in np.linspace(-8, 8, 33)]
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(told))
        assert all(0 < t < 1 for t in told)
        assert scaling_from_dict(json.loads(json.dumps(scaling.to_dict()))) == scaling
        assert 0 <= scaling(1e308) <= 1 and 0 <= scaling(-1e308) <= 1


def test_what_is_reported_is_of_the_kind_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of 1000 labels each fold leaves 800: too few for isotonic regression by themselves.
    kinds: list[str] = []

    def noted(*args: Any, **more: Any) -> Any:
        made = fit_scaling(*args, **more)
        kinds.append(made.kind)
        return made

    monkeypatch.setattr("agora.routing.trust.calibrator.fit_scaling", noted)
    rng = np.random.default_rng(0)
    truth = rng.random(1000) < 0.5
    told = [{"s": float(v)} for v in rng.normal(size=1000) + truth]
    assert fit_calibrator(told, truth).report.method == "isotonic"
    assert set(kinds) == {"isotonic"}
