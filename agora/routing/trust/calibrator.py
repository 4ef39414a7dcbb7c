"""From what an answer's signals are to the probability that it is right, for one version of one expert."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agora.errors import InvalidRequest
from agora.routing.trust.features import Feature, columns, learn_features, width
from agora.routing.trust.logistic import fit_logistic
from agora.routing.trust.metrics import aurc, auroc, ece
from agora.routing.trust.scaling import Scaling, fit_scaling, scaling_from_dict

MIN_LABELS: Final = 30
"""Labels below which nothing is fitted: the share of right answers alone is then uncertain by ±0.18."""

MIN_OF_EACH: Final = 5
"""Right and wrong answers needed: one of each in every fold."""

FOLDS: Final = 5
"""Parts of the cross-validation, of the scores that the scaling is fitted to and of the report."""


class CannotCalibrate(InvalidRequest):
    """These labels allow no calibration."""

    code = "cannot_calibrate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How good a calibrator is on answers that it was not fitted to (cross-validated).

    Attributes:
        n: Labels.
        accuracy: Share of right answers.
        auroc: Probability that a right answer gets more confidence than a wrong one.
        ece: Expected calibration error.
        aurc: Area under the risk–coverage curve; without any order it is 1 − accuracy.
        method: `platt` or `isotonic`.
    """

    n: int
    accuracy: float
    auroc: float
    ece: float
    aurc: float
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A logistic regression makes one score of the signals; the scaling, fitted to scores of rows that the regression
    had not seen, makes it a probability.

    Attributes:
        features: The signals that are used.
        weights: One for each column of `agora.routing.trust.features.columns`.
        intercept: Of the score.
        scaling: From score to probability.

    Raises:
        ValueError: If they do not fit together.
    """

    features: tuple[Feature, ...]
    weights: tuple[float, ...]
    intercept: float
    scaling: Scaling

    def __post_init__(self) -> None:
        if len(self.weights) != width(self.features):
            raise ValueError(f"{len(self.weights)} weights do not fit {len(self.features)} signals")
        if not all(map(math.isfinite, (*self.weights, self.intercept))):
            raise ValueError("a weight is not a number")

    def __call__(self, signals: Mapping[str, float]) -> float:
        """Probability in [0, 1] that an answer with these signals is right."""
        return self.of_scores(self.scores(columns(self.features, [signals])))[0]

    def scores(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """One score for each row of columns."""
        return table @ np.asarray(self.weights, dtype=np.float64) + self.intercept

    def of_scores(self, scores: NDArray[np.float64]) -> list[float]:
        """The probabilities that go with scores."""
        return [min(max(self.scaling(float(s)), 0.0), 1.0) for s in scores]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrator:
    """The probability that an answer is right, from its signals, for one version of one expert.

    Attributes:
        estimate: Makes it of the signals.
        report: How good it is.
    """

    estimate: Estimate
    report: Report

    def __call__(self, signals: Mapping[str, float]) -> float:
        """Probability in [0, 1] that an answer with these signals is right; never NaN.

        Signals that are missing, NaN or infinite count as not told, those that are not known are passed over.
        """
        return self.estimate(signals)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        e = self.estimate
        return {
            "features": [asdict(f) for f in e.features],
            "weights": list(e.weights),
            "intercept": e.intercept,
            "scaling": e.scaling.to_dict(),
            "report": asdict(self.report),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Calibrator:
        """Reads what `to_dict` wrote.

        Raises:
            KeyError: If something is missing.
            TypeError: If something is of another type.
            ValueError: If a value is out of range.
        """
        estimate = Estimate(
            features=tuple(Feature(**f) for f in plain["features"]),
            weights=tuple(float(w) for w in plain["weights"]),
            intercept=float(plain["intercept"]),
            scaling=scaling_from_dict(plain["scaling"]),
        )
        return cls(estimate=estimate, report=Report(**plain["report"]))


def check_labels(right: Sequence[bool] | NDArray[np.bool_]) -> None:
    """Checks that there are enough labels of both kinds.

    Raises:
        CannotCalibrate: If not; it says how many are needed.
    """
    n, up = len(right), int(sum(bool(r) for r in right))
    if n < MIN_LABELS:
        raise CannotCalibrate(f"{n} labelled answers; at least {MIN_LABELS} are needed, a few hundred are better")
    for count, kind in ((up, "right"), (n - up, "wrong")):
        if count < MIN_OF_EACH:
            raise CannotCalibrate(
                f"{count or 'none'} of {n} answers {'is' if count == 1 else 'are'} {kind}; at least {MIN_OF_EACH} are"
                " needed to tell right from wrong",
                hint="give more questions, harder and easier ones",
            )


def fit_calibrator(
    signals: Sequence[Mapping[str, float]], right: Sequence[bool] | NDArray[np.bool_], *, seed: int = 0
) -> Calibrator:
    """Fits a calibrator and judges it by cross-validation.

    Args:
        signals: Of each answer, by name; what is missing, NaN or infinite counts as not told. Without any signal the
            probability is the share of right answers.
        right: Whether each answer was right.
        seed: Of the folds.

    Raises:
        CannotCalibrate: If there are too few labels, or too few of one kind; it says how many are needed.
        InvalidRequest: If there are not as many labels as answers.
    """
    truth = np.asarray(right, dtype=np.bool_)
    if truth.ndim != 1 or len(truth) != len(signals):
        raise InvalidRequest(f"{len(signals)} answers and {truth.size} labels; there must be as many of both")
    check_labels(truth)
    rows = list(signals)
    told = np.empty(len(rows))
    for fold in _folds(truth, seed):
        inside = np.setdiff1d(np.arange(len(rows)), fold)
        made = _fit([rows[i] for i in inside], truth[inside], seed=seed, total=len(rows))
        told[fold] = made.of_scores(made.scores(columns(made.features, [rows[i] for i in fold])))
    estimate = _fit(rows, truth, seed=seed, total=len(rows))
    ordered = auroc(told, truth)
    assert ordered is not None
    report = Report(
        n=len(rows),
        accuracy=float(truth.mean()),
        auroc=ordered,
        ece=ece(told, truth),
        aurc=aurc(told, truth),
        method=estimate.scaling.kind,
    )
    return Calibrator(estimate=estimate, report=report)


def _fit(rows: Sequence[Mapping[str, float]], truth: NDArray[np.bool_], *, seed: int, total: int) -> Estimate:
    features = learn_features(rows)
    table = columns(features, rows)
    labels = truth.astype(np.float64)
    unseen = np.empty(len(rows))
    for fold in _folds(truth, seed + 1):
        inside = np.ones(len(rows), dtype=np.bool_)
        inside[fold] = False
        weights, intercept = fit_logistic(table[inside], labels[inside])
        unseen[fold] = table[fold] @ weights + intercept
    weights, intercept = fit_logistic(table, labels)
    return Estimate(
        features=features,
        weights=tuple(map(float, weights)),
        intercept=intercept,
        scaling=fit_scaling(unseen, truth, labels=total),
    )


def _folds(truth: NDArray[np.bool_], seed: int) -> list[NDArray[np.int_]]:
    """Positions of `FOLDS` parts with equal shares of right answers."""
    rng = np.random.default_rng(seed)
    dealt = np.concatenate([rng.permutation(np.flatnonzero(truth == kind)) for kind in (True, False)])
    return [np.sort(dealt[start::FOLDS]) for start in range(FOLDS)]
