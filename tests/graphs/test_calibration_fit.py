"""Graded answers become calibrators, a policy and its guarantee, and what cannot is said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from agora.routing.trust import Version
from agora.square import Expert
from agora.types import ExpertCard, Tier
from experts.fake import FakeBackend
from graphs.calibrating import load_trust, version_of
from graphs.calibration_fit import Result, Wishes, fit_all
from graphs.calibration_journal import Graded
from graphs.calibration_questions import Labelled


def expert(name: str, backend: FakeBackend, *, tier: Tier = Tier.END, price: float = 1.0, **more: object) -> Expert:
    card = ExpertCard(name=name, description="an expert", tier=tier, price_per_mtok=price)
    return Expert(card=card, backend=backend, **more)  # type: ignore[arg-type]


def questions(n: int, first: int = 0) -> list[Labelled]:
    """Three kinds in turn; numbered without order, so that later ones look like earlier ones."""
    kinds = ("easy", "fair", "hard")
    made = [f"{kinds[i % 3]} {1000 + i * 7919 % 8999}: 2 + 2?" for i in range(first, first + n)]
    return [Labelled(question=text, answer="4", grader="number") for text in made]


def graded(
    asked: Sequence[Labelled],
    versions: Mapping[str, Version],
    *,
    seed: int = 0,
    cost: Mapping[str, float] | None = None,
) -> dict[str, dict[str, Graded]]:
    """`small` is right on what is easy, and sure of itself there; `big` nearly always."""
    rng = np.random.default_rng(seed)
    prices = cost or {"small": 1.0, "big": 50.0}
    told: dict[str, dict[str, Graded]] = {name: {} for name in versions}
    for q in asked:
        easy = q.question.startswith(("easy", "fair"))
        for name, version in versions.items():
            right = bool(rng.random() < ((0.97 if easy else 0.1) if name == "small" else 0.95))
            told[name][q.key] = Graded(
                question=q.key,
                version=version,
                right=right,
                answer="4" if right else f"wrong {name}",
                signals={"mean_logprob": float(rng.normal(-0.2 if easy else -2.0, 0.4))},
                cost=prices[name],
                seconds=0.1,
            )
    return told


EXPERTS = (
    expert("small", FakeBackend(name="m1"), price=1),
    expert("big", FakeBackend(name="m2"), price=50, tier=Tier.CLOUD),
)


VERSIONS = {e.name: version_of(e) for e in EXPERTS}


SURE = Wishes(max_risk=0.05, confidence=0.95)


def test_calibrators_policy_and_guarantee_are_made(tmp_path: Path) -> None:
    asked = questions(1200)
    result = fitted_from(tmp_path, asked, graded(asked, VERSIONS))
    small, big = result.experts
    assert small.report is not None and small.report.auroc > 0.9 and small.report.ece < 0.06
    assert big.report is not None and big.report.auroc == pytest.approx(0.5, abs=0.12)
    policy = result.policy
    assert policy is not None
    assert (policy.models, policy.top, policy.rows, policy.held_back) == (("small", "big"), "big", 600, 600)
    assert policy.certificate is not None and policy.certificate.chosen is not None
    assert "certified" in policy.guarantee
    json.dumps(result.to_dict(), allow_nan=False)


def fitted_from(
    tmp_path: Path, asked: Sequence[Labelled], told: Mapping[str, Mapping[str, Graded]], wishes: Wishes = SURE
) -> Result:
    return fit_all(tmp_path / "policy", asked, told, wishes)


def test_all_right_or_all_wrong_is_said_and_does_not_stop_the_others(tmp_path: Path) -> None:
    asked = questions(90)
    told = graded(asked, VERSIONS)
    told["big"] = {k: dataclasses.replace(o, right=True, answer="4") for k, o in told["big"].items()}
    result = fitted_from(tmp_path, asked, told, Wishes())
    assert result.experts[0].report is not None
    assert result.experts[1].report is None and "none of 90 answers are wrong" in result.experts[1].why
    assert result.policy is not None
    told["small"] = {k: dataclasses.replace(o, right=False) for k, o in told["small"].items()}
    assert "none of 90 answers are right" in fitted_from(tmp_path, asked, told, Wishes()).experts[0].why


def test_too_few_questions_for_a_guarantee_says_how_many(tmp_path: Path) -> None:
    asked = questions(100)
    result = fitted_from(tmp_path, asked, graded(asked, VERSIONS))
    assert result.policy is not None and result.policy.held_back == 0
    assert result.policy.kind == "always_top"
    [note] = [n for n in result.notes if "no guarantee can be tried" in n]
    assert "needs 69" in note and "give 139 or more" in note
    chosen = load_trust(tmp_path / "policy", EXPERTS).policy(max_risk=0.05)
    assert chosen is not None and chosen.kind == "always_top"


def test_too_few_questions_for_a_policy_says_how_many(tmp_path: Path) -> None:
    asked = questions(29)
    result = fitted_from(tmp_path, asked, graded(asked, VERSIONS), Wishes())
    assert result.policy is None
    assert "29 questions that all experts answered; at least 30" in result.notes[-1]


def test_an_expert_that_failed_often_is_left_out_and_reported(tmp_path: Path) -> None:
    asked = questions(150)
    versions = {**VERSIONS, "broken": Version(expert="broken", adapter=None, base="m3")}
    told = graded(asked, versions, cost={"small": 1, "big": 50, "broken": 5})
    for i, q in enumerate(asked):
        if i % 3:
            told["broken"][q.key] = Graded(question=q.key, version=versions["broken"], error="it broke")
        if i == 7:
            told["big"][q.key] = Graded(question=q.key, version=versions["big"], error="once")
    result = fitted_from(tmp_path, asked, told, Wishes())
    assert result.policy is not None and result.policy.models == ("small", "big")
    assert "broken is not in the policy: it gave no answer to 67% of the questions" in result.notes
    assert "1 of 150 questions are left out of the policy: not all experts answered them" in result.notes
    broken = result.experts[2]
    assert (broken.n, broken.failed, broken.failure) == (50, 100, "it broke")
    assert result.policy.rows == 149


def test_missing_prices_are_said(tmp_path: Path) -> None:
    asked = questions(60)
    free = fitted_from(tmp_path, asked, graded(asked, VERSIONS, cost={"small": 0, "big": 0}), Wishes())
    assert free.policy is None and "price_per_mtok" in free.notes[-1]
    half = fitted_from(tmp_path, asked, graded(asked, VERSIONS, cost={"small": 0, "big": 1}), Wishes())
    assert half.policy is not None and "small cost nothing: no price_per_mtok is given" in half.notes


def test_a_policy_that_stays_in_use_is_said(tmp_path: Path) -> None:
    asked = questions(60)
    told = graded(asked, VERSIONS)
    assert fitted_from(tmp_path, asked, told, Wishes()).policy is not None
    result = fitted_from(tmp_path, asked, {"small": told["small"]}, Wishes())
    assert result.policy is None and "fitted before stays in use" in result.notes[-1]


def test_one_expert_has_nobody_to_climb_to(tmp_path: Path) -> None:
    asked = questions(60)
    result = fitted_from(tmp_path, asked, graded(asked, {"small": VERSIONS["small"]}), Wishes())
    assert result.experts[0].report is not None
    assert result.policy is None and "at least two experts" in result.notes[-1]


def test_questions_that_an_expert_may_not_see_are_no_failures_of_its(tmp_path: Path) -> None:
    asked = questions(150)
    told = graded(asked, VERSIONS)
    few = {k: o for i, (k, o) in enumerate(told["big"].items()) if i % 10}
    result = fitted_from(tmp_path, asked, {**told, "big": few}, Wishes())
    assert result.policy is not None and result.policy.rows == 135
    assert (result.experts[1].n, result.experts[1].failed) == (135, 0)
    most = {k: o for i, (k, o) in enumerate(told["big"].items()) if i % 3}
    result = fitted_from(tmp_path, asked, {**told, "big": most}, Wishes())
    assert result.policy is None
    assert "big is not in the policy: it may not see 33% of the questions" in result.notes


def test_times_that_include_waiting_are_said(tmp_path: Path) -> None:
    asked = questions(60)
    told = graded(asked, VERSIONS)
    assert not any("waiting" in n for n in fitted_from(tmp_path, asked, told, Wishes()).notes)
    some = {k: dataclasses.replace(o, at_once=4 if i < 20 else 1) for i, (k, o) in enumerate(told["big"].items())}
    notes = fitted_from(tmp_path, asked, {**told, "big": some}, Wishes()).notes
    assert notes[0] == (
        "big: the seconds of 20 of 60 answers include waiting: up to 4 questions were asked of its machine at once"
    )
    assert len([n for n in notes if "waiting" in n]) == 1
