"""Questions are graded, outcomes survive, and what is learned of them counts for the same experts only."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from agora.config import Config, load_config
from agora.errors import BackendTimeout, ConfigError, InvalidRequest, ModelError, Rejected, Unavailable
from agora.routing.cascade.policy import Ask, Query, Take
from agora.routing.trust import Version
from agora.square import Expert
from agora.types import AdapterRef, ExpertCard, Tier
from experts.fake import FakeBackend
from graphs.calibrating import FITTED, POLICY, Trust, load_trust, policy_folder, version_of
from graphs.calibration_asking import GIVE_UP_AFTER, Order, ask_all, ladder
from graphs.calibration_family import family_of, judge
from graphs.calibration_fit import Result, Wishes, fit_all, outcomes_of
from graphs.calibration_journal import Graded, Journal
from graphs.calibration_questions import Labelled, read_questions

# -- Questions


@pytest.mark.parametrize(
    ("asked", "right", "wrong"),
    [
        (Labelled(question="q", answer="18", grader="number"), "So she makes $18.00.", "So she makes 19."),
        (Labelled(question="q", answer="1,000", grader="number"), "#### 1000", "#### 100"),
        (Labelled(question="q", answer="0.5", grader="number"), r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{3}}"),
        (Labelled(question="q", answer="18", grader="number"), "The answer is 18", "I cannot say."),
        (Labelled(question="q", answer="-3", grader="number"), "It falls to -3 degrees.", "It rises to 3 degrees."),
        (Labelled(question="q", answer="Paris", grader="exact"), " paris. ", "Lyon"),
        (Labelled(question="q", answer="Paris", grader="exact"), "The answer is Paris.", "Paris or Lyon"),
        (Labelled(question="q", answer="positive", grader="contains"), "Clearly POSITIVE!", "positively not"),
        (Labelled(question="q", answer="C++", grader="contains"), "use c++ here", "use c+ here"),
        (Labelled(question="q", answer="B", choices=("a", "b"), grader="choice"), "(B)", "(A)"),
        (Labelled(question="q", answer="dog", choices=("cat", "dog"), grader="choice"), "The answer is B.", "A"),
        (Labelled(question="q", answer="B", choices=("cat", "dog"), grader="choice"), "Dog.", "Cat."),
        (Labelled(question="q", answer="B", choices=("5", "7"), grader="choice"), "the answer is 7", "the answer is 5"),
    ],
)
def test_answers_are_graded(asked: Labelled, right: str, wrong: str) -> None:
    assert asked.is_right(right)
    assert not asked.is_right(wrong)


def lines(path: Path, *rows: object) -> Path:
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
def test_questions_are_read_and_told_how_to_grade(tmp_path: Path, name: str) -> None:
    file = lines(
        tmp_path / name,
        {"question": "2 + 2?", "answer": 4},
        "",
        {"question": "Capital?", "answer": "Paris"},
        {"question": "Which?", "answer": "B", "choices": ["cat", "dog"]},
        {"question": "Which?", "answer": "dog", "grader": "contains"},
        {"question": "2 + 2?", "answer": 4},
    )
    found = read_questions(file)
    assert [q.grader for q in found] == ["number", "exact", "choice", "contains"]
    assert found[2].text == "Which?\nA. cat\nB. dog"
    assert len({q.key for q in found}) == 4
    assert read_questions(file, limit=2) == found[:2]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 2 is not JSON"),
        ([1], "line 2 is list; it must be an object"),
        ({"answer": "x"}, "line 2 has no 'question'; it has 'answer'"),
        ({"question": "x"}, "line 2 has no 'answer'"),
        ({"question": "", "answer": "x"}, "line 2: question is ''"),
        ({"question": "x", "answer": None}, "line 2: answer is None"),
        ({"question": "x", "answer": " "}, "line 2: answer is ' '"),
        ({"question": "x", "answer": True}, "line 2: answer is True"),
        ({"question": "x", "answer": "y", "grader": "magic"}, "grader is 'magic'; allowed: exact, number"),
        ({"question": "x", "answer": "y", "grader": "number"}, "must be a number"),
        ({"question": "x", "answer": "y", "grader": "choice"}, "needs choices"),
        ({"question": "x", "answer": "E", "choices": ["a", "b"]}, "must be one of the choices"),
        ({"question": "x", "answer": "A", "choices": "ab"}, "choices must be a list"),
        ({"question": "x", "answer": "A", "choices": list("abcdefghijk")}, "at most 10"),
    ],
)
def test_a_row_that_is_none_is_told_with_its_line(tmp_path: Path, row: object, said: str) -> None:
    file = lines(tmp_path / "q.jsonl", {"question": "fine", "answer": "yes"}, row)
    with pytest.raises(InvalidRequest, match=said):
        read_questions(file)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", None, "there is no file"),
        ("q.jsonl", b"", "has no questions"),
        ("q.jsonl", b"\n \n", "has no questions"),
        ("q.jsonl", b"\xff\xfe", "line 1 is not UTF-8"),
        ("q.jsonl.gz", b"no gzip", "cannot be read"),
        ("q.jsonl.gz", gzip.compress(b'{"question": "x", "answer": "y"}\n' * 500)[:60], "cannot be read"),
        ("folder", "dir", "cannot be read"),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path: Path, name: str, content: bytes | str | None, said: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "dir":
        path.mkdir()
    with pytest.raises(InvalidRequest, match=said):
        read_questions(path)


# -- The journal

V = Version(expert="small", adapter=None, base="m")


def test_a_question_counts_once_and_has_one_answer(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    rows = [{"question": q, "answer": a} for q, a in (("a", "1"), ("b", "2"), ("a", "1"))]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert [q.question for q in read_questions(file)] == ["a", "b"]
    file.write_text("\n".join(map(json.dumps, [*rows, {"question": "b", "answer": "3"}])))
    with pytest.raises(InvalidRequest, match="line 4 asks what line 2 asks"):
        read_questions(file)


def test_outcomes_survive_and_a_torn_line_costs_one(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    first, second = Graded(question="a", version=V, right=True, signals={"s": 0.5}), Graded(question="b", version=V)
    with Journal(path) as journal:
        journal.put(first)
        journal.put(second)
    with path.open("ab") as file:
        file.write(b'{"question": "c", "versi')
    with Journal(path) as journal:
        assert (journal.known, journal.damaged) == ({first.key: first, second.key: second}, 1)
        journal.put(dataclasses.replace(second, right=False))
    with Journal(path) as journal:
        # The torn line did not swallow the one after it; and the last word on a question counts.
        assert [o.right for o in journal.known.values()] == [True, False]
        assert journal.damaged == 1


def test_a_fresh_journal_keeps_the_old_one_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.put(Graded(question="a", version=V, right=True))
    with Journal(path, fresh=True) as journal:
        assert not journal.known
    assert '"a"' in (tmp_path / "j.jsonl.old").read_text()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "j.jsonl"),
        pytest.raises(ConfigError, match="another calibration"),
        Journal(tmp_path / "j.jsonl"),
    ):
        pass
    with Journal(tmp_path / "j.jsonl"):
        pass


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another folder"), Journal(tmp_path / "file" / "j.jsonl"):
        pass


# -- Asking


def expert(name: str, backend: FakeBackend, *, tier: Tier = Tier.END, price: float = 1.0, **more: object) -> Expert:
    card = ExpertCard(name=name, description="an expert", tier=tier, price_per_mtok=price)
    return Expert(card=card, backend=backend, **more)  # type: ignore[arg-type]


def questions(n: int, first: int = 0) -> list[Labelled]:
    """Three kinds in turn; numbered without order, so that later ones look like earlier ones."""
    kinds = ("easy", "fair", "hard")
    made = [f"{kinds[i % 3]} {1000 + i * 7919 % 8999}: 2 + 2?" for i in range(first, first + n)]
    return [Labelled(question=text, answer="4", grader="number") for text in made]


async def ask(experts: Sequence[Expert], asked: Sequence[Labelled], **more: object) -> dict[str, dict[str, Graded]]:
    told: dict[str, dict[str, Graded]] = {e.name: {} for e in experts}
    order = Order(questions=asked, experts={e.name: (e, version_of(e)) for e in experts}, **more)  # type: ignore[arg-type]
    await ask_all(order, (), lambda name, outcome: told[name].__setitem__(outcome.question, outcome))
    return told


async def test_every_expert_is_asked_every_question_and_graded() -> None:
    small = expert("small", FakeBackend({"easy": "#### 4"}, otherwise="#### 5", name="a"))
    big = expert("big", FakeBackend(lambda request: "#### 4", name="b"), price=50)
    asked = questions(30)
    told = await ask([small, big], asked)
    assert [told["small"][q.key].right for q in asked] == [q.question.startswith("easy") for q in asked]
    assert all(told["big"][q.key].right for q in asked)
    one = told["big"][asked[0].key]
    assert one.answer == "4"
    assert one.cost > 40 * told["small"][asked[0].key].cost > 0
    assert {"mean_logprob", "chars"} <= set(one.signals)
    assert all(math.isfinite(v) for v in one.signals.values())


async def test_signals_are_asked_for_where_wanted_and_their_cost_counts() -> None:
    backend = FakeBackend(lambda request: "#### 4", name="a")
    asked = questions(3)
    plain = await ask([expert("e", backend)], asked)
    more = await ask([expert("e", backend)], asked, signals=("self_consistency",), samples=3)
    for q in asked:
        assert more["e"][q.key].signals["self_consistency"] == 1.0
        assert more["e"][q.key].cost > plain["e"][q.key].cost


@pytest.mark.looptime
async def test_a_failure_that_passes_is_asked_again_and_one_that_stays_is_told() -> None:
    flaky = expert("flaky", FakeBackend([Unavailable("down"), "#### 4", "#### 4"], name="f"))
    stubborn = expert("stubborn", FakeBackend([Rejected("no"), "#### 4", "#### 4"], name="s"))
    told = await ask([flaky, stubborn], questions(2), max_parallel=1)
    assert [o.right for o in told["flaky"].values()] == [True, True]
    assert sorted(bool(o.error) for o in told["stubborn"].values()) == [False, True]
    assert any("no" in o.error for o in told["stubborn"].values())


@pytest.mark.looptime
async def test_an_expert_that_is_not_there_is_given_up_and_holds_up_nobody() -> None:
    gone = FakeBackend(name="gone", failures=lambda call: Unavailable("nobody there"))
    here = FakeBackend(lambda request: "#### 4", name="here")
    asked = questions(100)
    told = await ask([expert("gone", gone), expert("here", here)], asked)
    assert all(o.right for o in told["here"].values())
    assert all(o.right is None for o in told["gone"].values())
    assert len(told["gone"]) == 100
    assert sum(o.error.startswith("not asked") for o in told["gone"].values()) >= 100 - GIVE_UP_AFTER - 8
    assert len(gone.calls) < 80


@pytest.mark.looptime
async def test_one_that_never_answers_costs_its_time_once_for_each_question() -> None:
    late = FakeBackend(name="late", latency=100.0, failures=lambda call: BackendTimeout("no reply within 100 s"))
    began = asyncio.get_running_loop().time()
    told = await ask([expert("late", late)], questions(50))
    assert len(late.calls) <= GIVE_UP_AFTER + 8 and all(o.error for o in told["late"].values())
    assert asyncio.get_running_loop().time() - began <= 200.0


async def test_never_more_in_flight_than_allowed() -> None:
    running = most = 0

    async def slow(request: object) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return "#### 4"

    await ask([expert(f"e{i}", FakeBackend(slow, name=f"b{i}")) for i in range(3)], questions(10), max_parallel=5)
    assert most == 5


async def test_a_journal_that_cannot_be_written_ends_it_with_its_own_error() -> None:
    def full(name: str, outcome: Graded) -> None:
        raise ConfigError("no space")

    small = expert("small", FakeBackend(name="a"))
    with pytest.raises(ConfigError, match="no space"):
        await ask_all(Order(questions=questions(20), experts={"small": (small, version_of(small))}), (), full)


def test_the_ladder_is_by_tier_and_price_unless_named() -> None:
    made = [
        expert("cloud", FakeBackend(), tier=Tier.CLOUD, price=5),
        expert("dear", FakeBackend(), tier=Tier.EDGE, price=9),
        expert("edge", FakeBackend(), tier=Tier.EDGE, price=1),
        expert("end", FakeBackend(), price=100),
    ]
    here = {e.name: e for e in made}
    assert ladder(here, None) == ("end", "edge", "dear", "cloud")
    assert ladder(here, ["cloud", "end", "cloud"]) == ("cloud", "end")
    with pytest.raises(InvalidRequest, match="no expert 'x' is here; here: cloud, dear"):
        ladder(here, ["x"])
    with pytest.raises(InvalidRequest, match="nobody"):
        ladder({}, None)


# -- Fitting


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


def test_calibrators_policy_and_guarantee_are_made(calibrated: tuple[Path, Result]) -> None:
    _, result = calibrated
    small, big = result.experts
    assert small.report is not None and small.report.auroc > 0.9 and small.report.ece < 0.06
    assert big.report is not None and big.report.auroc == pytest.approx(0.5, abs=0.12)
    policy = result.policy
    assert policy is not None
    assert (policy.models, policy.top, policy.rows, policy.held_back) == (("small", "big"), "big", 600, 600)
    assert policy.certificate is not None and policy.certificate.chosen is not None
    assert "certified" in policy.guarantee
    json.dumps(result.to_dict(), allow_nan=False)


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
    for source in folder.rglob("*"):
        if source.is_file():
            target = copy / source.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    [path] = copy.glob(file)
    path.write_bytes(change(path.read_bytes()))
    if error is None:
        # A policy that is not the one which was judged has no guarantee, whatever else is with it.
        trust = load_trust(copy, EXPERTS)
        assert trust.policy() is None and "is not the one" in " ".join(trust.notes)
    else:
        with pytest.raises(error, match="damaged"):
            load_trust(copy, EXPERTS)


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


# -- Which version an expert is


def test_versions_follow_the_model_that_the_configuration_names(tmp_path: Path) -> None:
    file = tmp_path / "agora.toml"
    file.write_text(
        'models.small.source = "smollm2-135m"\n'
        '[nodes.here]\nkind = "local"\nmodel = "small"\n'
        '[nodes.there]\nkind = "openai"\nurl = "http://127.0.0.1:1/v1"\nmodel = "gpt-x"\n'
        '[experts.a]\nnode = "here"\ndescription = "a"\n[experts.b]\nnode = "there"\ndescription = "b"\n'
        '[vertical]\npolicy = "learned"\n'
    )
    config: Config = load_config(file)
    a, b = expert("a", FakeBackend(name="here"), node="here"), expert("b", FakeBackend(name="there"), node="there")
    assert version_of(a, config) == Version(expert="a", adapter=None, base="smollm2-135m")
    assert version_of(b, config).base == "gpt-x"
    assert version_of(a).base == "here"
    assert version_of(dataclasses.replace(a, adapter=AdapterRef.parse("x@v3")), config).adapter == "x@v3"
    assert policy_folder(config) == tmp_path / "learned"
    assert policy_folder(Config()).name == "vertical"


def test_how_an_expert_is_spoken_to_belongs_to_its_version() -> None:
    plain = EXPERTS[0]
    cooler = dataclasses.replace(plain, temperature=1.0)
    terse = dataclasses.replace(plain, system_prompt="Be brief.")
    shorter = dataclasses.replace(plain, card=dataclasses.replace(plain.card, max_tokens=8))
    versions = [version_of(e) for e in (plain, cooler, terse, shorter)]
    assert len(set(versions)) == 4 and len({v.file for v in versions}) == 4
    assert version_of(dataclasses.replace(plain, system_prompt="Be brief.")) == versions[2]
    assert versions[0].settings == "" and "settings" in versions[1].words
