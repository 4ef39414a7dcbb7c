"""What was learned counts for the same experts only, and is read whole or not at all."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from agora.config import Config
from agora.errors import ConfigError, InvalidRequest, ModelError
from agora.routing.cascade.policy import Ask, Query, Take
from agora.routing.trust import Version
from agora.square import Expert
from agora.types import AdapterRef, ExpertCard, Tier
from experts.fake import FakeBackend
from graphs import calibrating
from graphs.calibrating import FITTED, POLICY, PolicyFolder, Trust, load_trust, version_of
from graphs.calibration_family import family_of, judge
from graphs.calibration_fit import Result, Wishes, fit_all, outcomes_of
from graphs.calibration_folder import current, replacing
from graphs.calibration_journal import Graded
from graphs.calibration_questions import Labelled
from graphs.calibration_version import asked_for


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


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("policy")
    asked = questions(1200)
    return folder, fit_all(folder, asked, graded(asked, VERSIONS), SURE)


def test_what_is_certified_keeps_the_promise_on_fresh_questions_and_saves(calibrated: tuple[Path, Result]) -> None:
    folder, _ = calibrated
    trust = load_trust(folder, EXPERTS)
    assert trust.notes == () and trust.kept is not None
    fresh = questions(3000, first=1200)
    outcomes = outcomes_of(fresh, list(graded(fresh, VERSIONS, seed=9).items()))
    members = family_of(trust.kept.fitted)
    losses = judge(trust.kept.fitted, members, outcomes).losses.mean(axis=0)
    chosen = trust.policy(max_risk=0.05)
    assert chosen is not None and chosen.certified
    at = next(i for i, m in enumerate(members) if m.policy(trust.kept.fitted) == chosen.policy)
    assert losses[at] < 0.05
    assert members[at].cost < 0.75 * trust.kept.fitted.top.cost


def test_policies_decide_as_they_were_judged(calibrated: tuple[Path, Result]) -> None:
    folder, _ = calibrated
    trust = load_trust(folder, EXPERTS)
    assert trust.kept is not None
    fitted = trust.kept.fitted
    asked = questions(90)
    told = graded(asked, VERSIONS, seed=4)
    outcomes = outcomes_of(asked, list(told.items()))
    members = family_of(fitted)
    losses = judge(fitted, members, outcomes).losses
    for column in (0, len(members) // 2, len(members) - 1):
        policy = members[column].policy(fitted)
        for row, q in enumerate(asked):
            taken = followed(policy, q, [told["small"][q.key], told["big"][q.key]])
            assert losses[row, column] == outcomes.quality[row, 1] - outcomes.quality[row, taken]


def followed(policy, q: Labelled, outcomes: Sequence[Graded]) -> int:  # type: ignore[no-untyped-def]
    """Whose answer a policy takes when it is followed step by step."""
    from agora.routing.cascade.policy import Seen

    seen: list[Seen] = []
    while True:
        allowed = {0, 1} - {s.model for s in seen}
        decision = policy.decide(Query(text=q.text), seen, allowed=allowed)
        if isinstance(decision, Take):
            return decision.model
        assert isinstance(decision, Ask)
        o = outcomes[decision.model]
        seen.append(Seen(model=decision.model, answer=o.answer, signals=o.signals, cost=o.cost, seconds=o.seconds))


def test_another_promise_is_certified_from_what_was_kept(calibrated: tuple[Path, Result]) -> None:
    folder, _ = calibrated
    trust = load_trust(folder, EXPERTS)
    strict, loose = trust.policy(max_risk=0.001, confidence=0.999), trust.policy(max_risk=0.3)
    assert strict is not None and strict.certified and strict.kind == "always_top"
    assert "nothing certified" in strict.why and strict.notes == (strict.why,)
    assert loose is not None and loose.kind != "always_top"
    assert strict.policy.decide(Query(text="2 + 2?"), [], allowed={0, 1}).model == 1
    with pytest.raises(InvalidRequest, match="max_risk"):
        trust.policy(max_risk=2)


def test_among_certified_policies_the_trade_off_chooses(calibrated: tuple[Path, Result]) -> None:
    folder, _ = calibrated
    trust = load_trust(folder, EXPERTS)
    assert trust.kept is not None
    by_policy = [(m.policy(trust.kept.fitted), m) for m in family_of(trust.kept.fitted)]
    cheap, careful = trust.policy(max_risk=0.05), trust.policy(max_risk=0.05, trade_off=1e6)
    assert cheap is not None and careful is not None
    assert careful.certified
    members = [next(m for p, m in by_policy if p == c.policy) for c in (cheap, careful)]
    assert members[1].quality >= members[0].quality
    assert members[1].cost >= members[0].cost


def test_confidence_is_calibrated_and_never_fails(calibrated: tuple[Path, Result]) -> None:
    folder, _ = calibrated
    trust = load_trust(folder, EXPERTS)
    sure, unsure = trust.confidence("small", {"mean_logprob": -0.1}), trust.confidence("small", {"mean_logprob": -2.5})
    assert sure is not None and unsure is not None and sure > 0.85 and unsure < 0.4
    for strange in ({}, {"mean_logprob": math.nan}, {"mean_logprob": math.inf}, {"other": 1.0}):
        told = trust.confidence("small", strange)
        assert told is not None and 0 <= told <= 1
    assert trust.confidence("nobody", {}) is None


def test_another_adapter_is_another_expert(calibrated: tuple[Path, Result]) -> None:
    folder, _ = calibrated
    changed = dataclasses.replace(EXPERTS[0], adapter=AdapterRef.parse("sst2@v2"))
    trust = load_trust(folder, [changed, EXPERTS[1]])
    assert trust.confidence("small", {"mean_logprob": -0.1}) is None
    assert trust.confidence("big", {}) is not None
    assert trust.policy() is None and trust.models == ()
    assert any("sst2@v2" in n and "no longer counts" in n for n in trust.notes)
    assert any(n.startswith("the policy no longer counts") for n in trust.notes)


def test_without_one_of_its_experts_a_policy_has_no_guarantee(calibrated: tuple[Path, Result]) -> None:
    folder, _ = calibrated
    trust = load_trust(folder, EXPERTS[:1])
    assert trust.absent == ("big",)
    assert "big, not here now" in " ".join(trust.notes)
    chosen = trust.policy(max_risk=0.05)
    assert chosen is not None and chosen.kind == "always_top" and "big is not here" in chosen.why
    assert trust.policy() is not None


def test_a_folder_that_is_not_there_knows_nothing_and_says_so(tmp_path: Path) -> None:
    trust = load_trust(tmp_path / "none", EXPERTS)
    assert trust.policy() is None and trust.confidence("small", {}) is None
    assert "nothing is calibrated" in trust.notes[0]
    (tmp_path / "empty").mkdir()
    assert "small has not been calibrated" in load_trust(tmp_path / "empty", EXPERTS).notes
    assert Trust().policy(max_risk=0.1) is None


@pytest.mark.parametrize(
    ("file", "change", "error"),
    [
        (FITTED, lambda raw: raw[:-40], ConfigError),
        (FITTED, lambda raw: raw.replace(b"0.0", b"1.0", 1), ConfigError),
        (f"{POLICY}/policy.json", lambda raw: raw.replace(b"cascade", b"cascode"), None),
        (f"{POLICY}/*.safetensors", lambda raw: raw[:-8] + b"12345678", ModelError),
    ],
)
def test_damage_is_noticed(calibrated, tmp_path: Path, file: str, change, error) -> None:  # type: ignore[no-untyped-def]
    folder, _ = calibrated
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    [path] = current(copy).glob(file)
    path.write_bytes(change(path.read_bytes()))
    if error is None:
        # A policy that is not the one which was judged has no guarantee, whatever else is with it.
        trust = load_trust(copy, EXPERTS)
        assert trust.policy() is None and "is not the one" in " ".join(trust.notes)
    else:
        with pytest.raises(error, match="damaged"):
            load_trust(copy, EXPERTS)


def test_a_policy_that_looks_at_embeddings_has_no_guarantee_without_them(tmp_path: Path) -> None:
    asked = questions(300)
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    result = fit_all(tmp_path / "policy", asked, graded(asked, VERSIONS), Wishes(max_risk=0.1), embeddings=vectors)
    assert result.policy is not None and result.policy.certificate is not None
    seeing = load_trust(tmp_path / "policy", EXPERTS)
    assert not seeing.blind and seeing.notes == ()
    keywords = Config().model_copy(update={"graph": Config().graph.model_copy(update={"router": "keywords"})})
    blind = load_trust(tmp_path / "policy", EXPERTS, config=keywords)
    assert blind.blind and "embeddings" in blind.notes[0]
    chosen = blind.policy(max_risk=0.1)
    assert chosen is not None and chosen.kind == "always_top"
    assert blind.policy() is not None
    # The router is there, but its model could not be had.
    assert load_trust(tmp_path / "policy", EXPERTS, embeds=False).blind


def test_another_price_or_other_signals_void_what_was_fitted(tmp_path: Path) -> None:
    asked = questions(300)
    told = {
        name: {
            key: dataclasses.replace(o, tokens=10, price=e.card.price_per_mtok, asked_for=("verbalised",))
            for key, o in found.items()
        }
        for e, (name, found) in zip(EXPERTS, graded(asked, VERSIONS).items(), strict=True)
    }
    assert told["big"][asked[0].key].priced(50).cost == 50.0
    assert told["big"][asked[0].key].priced(1_000_050).cost == 60.0
    fit_all(tmp_path / "policy", asked, told, Wishes(max_risk=0.1))
    assert load_trust(tmp_path / "policy", EXPERTS).policy(max_risk=0.1).kind != "always_top"  # type: ignore[union-attr]
    config = Config()
    same = config.model_copy(update={"vertical": config.vertical.model_copy(update={"signals": ("verbalised",)})})
    trust = load_trust(tmp_path / "policy", EXPERTS, config=same, embeds=True)
    assert trust.unlike is None
    other = load_trust(tmp_path / "policy", EXPERTS, config=config, embeds=True)
    chosen = other.policy(max_risk=0.1)
    assert chosen is not None and chosen.kind == "always_top" and "verbalised" in chosen.why
    assert any("was fitted with the signals verbalised" in n for n in other.notes)
    dearer = dataclasses.replace(EXPERTS[1], card=dataclasses.replace(EXPERTS[1].card, price_per_mtok=99.0))
    trust = load_trust(tmp_path / "policy", [EXPERTS[0], dearer])
    assert trust.policy() is None and trust.confidence("big", {}) is not None
    assert any("big cost 50 per million tokens and costs 99" in n for n in trust.notes)


def test_where_the_top_tier_is_away_nothing_is_certified(calibrated: tuple[Path, Result]) -> None:
    folder, _ = calibrated
    for here, certified in ((EXPERTS[:1], False), (EXPERTS[1:], True)):
        chosen = load_trust(folder, here).policy(max_risk=0.05)
        assert chosen is not None and (chosen.kind, chosen.certified) == ("always_top", certified)


def test_another_number_of_samples_voids_the_guarantee(tmp_path: Path) -> None:
    asked = questions(300)
    told = {
        name: {k: dataclasses.replace(o, asked_for=asked_for(("self_consistency",), 5)) for k, o in found.items()}
        for name, found in graded(asked, VERSIONS).items()
    }
    fit_all(tmp_path / "policy", asked, told, Wishes(max_risk=0.1))

    def trust(samples: int) -> Trust:
        table = Config().vertical.model_copy(update={"signals": ("self_consistency",), "samples": samples})
        config = Config().model_copy(update={"vertical": table})
        return load_trust(tmp_path / "policy", EXPERTS, config=config, embeds=True)

    assert trust(5).unlike is None and trust(5).policy(max_risk=0.1).kind != "always_top"  # type: ignore[union-attr]
    chosen = trust(9).policy(max_risk=0.1)
    assert chosen is not None and chosen.kind == "always_top" and "self_consistency of 5" in chosen.why
    assert any("self_consistency of 5, and [vertical] asks for self_consistency of 9" in n for n in trust(9).notes)


def test_what_is_done_before_a_text_leaves_belongs_to_those_above_the_end_tier(tmp_path: Path) -> None:
    asked = questions(200)
    table = Config().vertical.model_copy(update={"redact": ("email",)})
    redacts = Config().model_copy(update={"vertical": table})
    versions = {e.name: version_of(e, redacts) for e in EXPERTS}
    fit_all(tmp_path / "policy", asked, graded(asked, versions), Wishes())
    same = load_trust(tmp_path / "policy", EXPERTS, config=redacts, embeds=True)
    assert same.notes == () and same.departed
    whole = load_trust(tmp_path / "policy", EXPERTS, config=Config(), embeds=True)
    assert not whole.departed and whole.policy() is None
    # The one of the end tier sees the whole text either way.
    assert whole.confidence("small", {}) is not None and whole.confidence("big", {}) is None


def test_a_folder_that_is_put_in_place_while_it_is_read_is_read_anew(
    calibrated: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(calibrated[0], tmp_path / "policy")
    real, before = current, current(tmp_path / "policy")
    looked = []

    def slow(folder: Path) -> Path:
        looked.append(real(folder))
        if len(looked) == 1:
            # Somebody else has calibrated twice since, and what was about to be read is given up.
            for _ in range(2):
                with replacing(folder):
                    pass
            assert not before.exists()
            shutil.copytree(real(folder), before)
            (before / FITTED).write_text("no longer whole")
        return looked[-1]

    monkeypatch.setattr(calibrating, "current", slow)
    trust = load_trust(tmp_path / "policy", EXPERTS)
    assert trust.policy() is not None and trust.notes == ()
    assert len(looked) == 2 and looked[0] != looked[1]


def test_the_stamp_of_a_folder_changes_with_what_counts(tmp_path: Path) -> None:
    watched = PolicyFolder(folder=tmp_path / "policy")
    stamps = [watched.stamp()]
    for n in (60, 90):
        fit_all(tmp_path / "policy", questions(n), graded(questions(n), VERSIONS), Wishes())
        stamps.append(watched.stamp())
    assert len(set(stamps)) == 3 and watched.stamp() == stamps[-1]
    assert watched(EXPERTS).policy() is not None
