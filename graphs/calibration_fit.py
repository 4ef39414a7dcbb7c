"""From graded answers to calibrators, a policy and its guarantee."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agora.routing.cascade.beliefs import MAX_MODELS
from agora.routing.cascade.fit import LEAST_ROWS, fit
from agora.routing.cascade.outcomes import Outcomes
from agora.routing.risk import Certificate, certify, rows_needed
from agora.routing.trust import (
    Calibrator,
    CalibratorStore,
    CannotCalibrate,
    Report,
    Version,
    fit_calibrator,
)
from graphs.calibrating import CALIBRATORS, FITTED, Chosen, Kept, chosen_of, save_kept
from graphs.calibration_family import family_of, judge, top_of
from graphs.calibration_folder import replacing
from graphs.calibration_journal import Graded
from graphs.calibration_questions import Labelled

HELD_BACK: Final = 0.5
"""Share of the questions that is held back to certify, where a guarantee is wanted. Certifying needs more rows than
fitting does: its margin falls with their square root."""

MOST_FAILED: Final = 0.2
"""Share of the questions that an expert may fail, or not see, before it is left out of the policy: those questions are
lost for the others too."""

LEAST_SIGNAL: Final = 0.5
"""Share of an expert's answers that must tell a signal for the policy to use it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertResult:
    """What came of one expert.

    Attributes:
        version: Which version of it was asked.
        n: Answers.
        failed: Questions without an answer.
        failure: Why, of the last one.
        accuracy: Share of right answers; None if there are none.
        report: How good its calibrator is; None if none could be fitted.
        why: Why none could be fitted; empty if one was.
        cost: Money per answer.
        seconds: Time per answer, as `Graded` has it.
    """

    version: Version
    n: int
    failed: int
    failure: str
    accuracy: float | None
    report: Report | None
    why: str
    cost: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """What policy was fitted.

    Attributes:
        models: Its experts, the cheapest first.
        top: The one that always-the-top-tier asks.
        rows: Questions it was fitted to.
        held_back: Questions it was certified on; 0 where no guarantee was wanted.
        kind: Of the policy that is followed.
        why: Why this one.
        compared: What was compared in validation, as the fit tells it.
        certificate: What was certified; None where no guarantee was wanted, or none could be tried.
        guarantee: The same in words.
    """

    models: tuple[str, ...]
    top: str
    rows: int
    held_back: int
    kind: str
    why: str
    compared: Mapping[str, Any]
    certificate: Certificate | None
    guarantee: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a calibration.

    Attributes:
        experts: In the order of the ladder.
        policy: None if none could be fitted.
        notes: What the reader should know, e.g. why there is no policy.
    """

    experts: tuple[ExpertResult, ...]
    policy: PolicyResult | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        policy = None
        if self.policy is not None:
            policy = {**asdict(self.policy), "models": list(self.policy.models)}
            policy["certificate"] = self.policy.certificate.to_dict() if self.policy.certificate else None
            policy["compared"] = dict(self.policy.compared)
        return {"experts": [asdict(e) for e in self.experts], "policy": policy, "notes": list(self.notes)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What is wanted of the policy.

    Attributes:
        trade_off: Money that an answer's being right is worth; None for the quality of the best single expert.
        max_risk: Most accuracy that may be lost against always asking the top tier; None for no guarantee.
        confidence: Probability with which that must hold.
        deadline: Seconds within which questions should be answered; None for no deadline.
        seed: Of the split and the folds.
    """

    trade_off: float | None = None
    max_risk: float | None = None
    confidence: float = 0.95
    deadline: float | None = None
    seed: int = 0


def fit_all(
    folder: Path,
    questions: Sequence[Labelled],
    graded: Mapping[str, Mapping[str, Graded]],
    wishes: Wishes,
    *,
    embeddings: NDArray[np.float32] | None = None,
) -> Result:
    """Fits what can be fitted, and puts it into the policy folder, all at once. Blocking, seconds to minutes.

    Args:
        folder: The policy folder; nothing else may write to it meanwhile (`graphs.calibration_journal`).
        questions: The questions.
        graded: Outcomes by expert, in the order of the ladder, and by question key.
        wishes: What is wanted.
        embeddings: Of the questions' texts, shape (n, dim); None if those who answer have no embedding model either.

    Raises:
        ConfigError: If something cannot be written.
        ModelError: If the policy cannot be written.
    """
    vectors = None if embeddings is None else {q.key: v for q, v in zip(questions, embeddings, strict=True)}
    notes = [note for found in graded.values() if (note := _waited(list(found.values())))]
    with replacing(folder) as learned:
        store = CalibratorStore(learned / CALIBRATORS)
        experts = tuple(_expert(store, list(found.values()), wishes.seed) for found in graded.values() if found)
        policy = _policy(learned, questions, graded, wishes, vectors, notes)
        if policy is None and (learned / FITTED).exists():
            notes.append("the policy that was fitted before stays in use, as far as it is for the experts as they are")
    return Result(experts=experts, policy=policy, notes=tuple(notes))


def _waited(outcomes: Sequence[Graded]) -> str:
    """What to say of times that are not those of one question alone."""
    waited = [o.at_once for o in outcomes if o.right is not None and o.at_once > 1]
    if not waited:
        return ""
    return (
        f"{outcomes[0].version.expert}: the seconds of {len(waited)} of {len(outcomes)} answers include waiting: "
        f"up to {max(waited)} questions were asked of its machine at once"
    )


def _expert(store: CalibratorStore, outcomes: Sequence[Graded], seed: int) -> ExpertResult:
    version = outcomes[0].version
    answered = [o for o in outcomes if o.right is not None]
    failures = [o.error for o in outcomes if o.right is None]
    made: Calibrator | None = None
    why = ""
    try:
        made = fit_calibrator([o.signals for o in answered], [bool(o.right) for o in answered], seed=seed)
        store.put(version, made)
    except CannotCalibrate as e:
        why = str(e)
    return ExpertResult(
        version=version,
        n=len(answered),
        failed=len(failures),
        failure=failures[-1] if failures else "",
        accuracy=fmean(bool(o.right) for o in answered) if answered else None,
        report=made.report if made is not None else None,
        why=why,
        cost=fmean(o.cost for o in answered) if answered else 0.0,
        seconds=fmean(o.seconds for o in answered) if answered else 0.0,
    )


def _policy(
    folder: Path,
    questions: Sequence[Labelled],
    graded: Mapping[str, Mapping[str, Graded]],
    wishes: Wishes,
    vectors: Mapping[str, NDArray[np.float32]] | None,
    notes: list[str],
) -> PolicyResult | None:
    names = []
    for name, found in graded.items():
        failed = sum(o.right is None for o in found.values()) / max(len(questions), 1)
        unseen = 1 - len(found) / max(len(questions), 1)
        if unseen > MOST_FAILED:
            notes.append(f"{name} is not in the policy: it may not see {unseen:.0%} of the questions")
        elif failed > MOST_FAILED:
            notes.append(f"{name} is not in the policy: it gave no answer to {failed:.0%} of the questions")
        else:
            names.append(name)
    if len(names) < 2:
        notes.append("no policy: at least two experts that answer are needed to choose among")
        return None
    if why := too_many(len(names)):
        notes.append(f"no policy: {why}")
        return None
    whole = [q for q in questions if all(_answered(graded[n].get(q.key)) for n in names)]
    if (lost := len(questions) - len(whole)) > 0:
        notes.append(f"{lost} of {len(questions)} questions are left out of the policy: not all experts answered them")
    held = _held_back(len(whole), wishes, notes)
    if len(whole) - held < LEAST_ROWS:
        notes.append(f"no policy: {len(whole)} questions that all experts answered; at least {LEAST_ROWS} are needed")
        return None
    outcomes = outcomes_of(whole, [(n, graded[n]) for n in names], vectors)
    if not outcomes.cost.any():
        notes.append(
            "no policy: all experts cost nothing, so there is nothing to save; "
            "give them a price_per_mtok in agora.toml (what their time is worth, for machines of one's own)"
        )
        return None
    if free := [names[j] for j in np.flatnonzero(~outcomes.cost.any(axis=0))]:
        notes.append(f"{', '.join(free)} cost nothing: no price_per_mtok is given")
    order = np.random.default_rng(wishes.seed).permutation(len(whole))
    rest = outcomes.take(np.sort(order[held:]))
    fitted = fit(rest, seed=wishes.seed, trade_off=wishes.trade_off, deadline=wishes.deadline)
    losses = judge(fitted, family_of(fitted), outcomes.take(np.sort(order[:held]))).losses if held else None
    one = [graded[n][whole[0].key] for n in names]
    kept = Kept(
        fitted=fitted,
        versions=tuple(o.version for o in one),
        losses=losses,
        prices=tuple(o.price for o in one),
        signals=one[0].asked_for,
    )
    save_kept(folder, kept)
    certificate = None
    if losses is not None and wishes.max_risk is not None:
        certificate = certify(losses, max_risk=wishes.max_risk, confidence=wishes.confidence)
    top = top_of(fitted)
    if certificate is None:
        chosen = None
        guarantee = "none asked for" if wishes.max_risk is None else "nothing certified: too few questions to try"
    else:
        chosen = chosen_of(fitted, certificate, trade_off=wishes.trade_off) if certificate.certified else None
        guarantee = certificate.why
    kind, why = _followed(fitted.report, chosen, guaranteed=wishes.max_risk is not None, top=top)
    return PolicyResult(
        models=fitted.models,
        top=top,
        rows=len(rest),
        held_back=held,
        kind=kind,
        why=why,
        compared=fitted.report,
        certificate=certificate,
        guarantee=guarantee,
    )


def too_many(count: int) -> str | None:
    """Why there can be no policy for that many experts; None if there can."""
    if count <= MAX_MODELS:
        return None
    return f"{count} experts, and a policy chooses among {MAX_MODELS} at most; name them in [vertical] experts"


def _followed(report: Mapping[str, Any], chosen: Chosen | None, *, guaranteed: bool, top: str) -> tuple[str, str]:
    if chosen is not None:
        return chosen.kind, chosen.why
    if guaranteed:
        return "always_top", f"{top} is always asked: nothing cheaper is certified"
    return str(report["picked"]), str(report["why"])


def _held_back(n: int, wishes: Wishes, notes: list[str]) -> int:
    """How many questions are held back to certify."""
    if wishes.max_risk is None:
        return 0
    held = int(n * HELD_BACK)
    needed = rows_needed(wishes.max_risk, wishes.confidence)
    if held < needed:
        notes.append(
            f"no guarantee can be tried: max_risk = {wishes.max_risk:g} with confidence = {wishes.confidence:g} needs "
            f"{needed} questions held back, and of {n} there are {held}; give {int(needed / HELD_BACK) + 1} or more"
        )
        return 0
    return held


def _answered(outcome: Graded | None) -> bool:
    return outcome is not None and outcome.right is not None


def outcomes_of(
    questions: Sequence[Labelled],
    graded: Sequence[tuple[str, Mapping[str, Graded]]],
    vectors: Mapping[str, NDArray[np.float32]] | None = None,
) -> Outcomes:
    """The table that policies are fitted to.

    Args:
        questions: Which all of the experts answered.
        graded: Each expert's name and its outcomes by question key, the cheapest first.
        vectors: The questions' embeddings by key, where there are any.
    """
    rows = [[found[q.key] for _, found in graded] for q in questions]
    told = {name for row in rows for o in row for name in o.signals}
    signals = {
        name: np.array([[o.signals.get(name, np.nan) for o in row] for row in rows], dtype=np.float64)
        for name in sorted(told)
    }
    return Outcomes(
        models=tuple(name for name, _ in graded),
        questions=tuple(q.text for q in questions),
        quality=np.array([[float(bool(o.right)) for o in row] for row in rows]),
        cost=np.array([[o.cost for o in row] for row in rows]),
        seconds=np.array([[o.seconds for o in row] for row in rows]),
        answers=tuple(tuple(o.answer for o in row) for row in rows),
        signals={n: t for n, t in signals.items() if np.isfinite(t).mean(axis=0).max() >= LEAST_SIGNAL},
        embeddings=None if vectors is None else np.stack([vectors[q.key] for q in questions]),
    )
