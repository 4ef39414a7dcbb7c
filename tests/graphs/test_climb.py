"""Climbing from tier to tier for one subtask: who is asked, whose answer is taken, and what is said of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from agora.errors import BadReply, Unavailable
from agora.protocols import Capabilities
from agora.routing.cascade.policy import Ask, Decision, Query, Seen, Take
from agora.square import Expert, Square
from agora.types import Answer, Attempt, Budget, ExpertCard, Failure, Modality, Subtask, Tier
from experts.fake import FakeBackend, Fault, Hang, Reply, question_of
from graphs.calibrating import Chosen
from graphs.climb import Climb
from graphs.climbing import Climbing
from graphs.departure import Departure, Redactor
from graphs.experience import Experience
from graphs.guidance import Guidance, Guide, Known, LoadTrust
from graphs.once import Once
from graphs.spend import Spend

TIERS = {"small": Tier.END, "medium": Tier.EDGE, "large": Tier.CLOUD}
PRICES = {"small": 0.0, "medium": 1.0, "large": 10.0}


def reply(text: str, probability: float) -> Reply:
    """A reply whose words have that probability each."""
    return Reply(text, logprobs=(math.log(probability),) * 20)


def expert(name: str, script: Any, *, node: str | None = None, tier: Tier | None = None, **card: Any) -> Expert:
    card = {"tier": tier or TIERS[name], "price_per_mtok": PRICES.get(name, 0.0), **card}
    return Expert(
        card=ExpertCard(name=name, description=f"{name} knows", **card),
        backend=script if isinstance(script, FakeBackend) else FakeBackend(script, name=name),
        node=node or name,
    )


def three(small: Any = None, medium: Any = None, large: Any = None) -> Square:
    return Square(
        [
            # Not in the order of the ladder: that is found by tier and price.
            expert("large", large or reply("forty-two", 0.95)),
            expert("small", small or reply("41", 0.5)),
            expert("medium", medium or reply("42?", 0.6)),
        ]
    )


class Told:
    """Calibrators and a policy that are given."""

    def __init__(
        self,
        confidences: Mapping[str, Callable[[Mapping[str, float]], float | None]] | None = None,
        chosen: Chosen | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self._confidences = confidences or {}
        self._chosen = chosen
        self.notes = notes

    def confidence(self, expert: str, signals: Mapping[str, float]) -> float | None:
        known = self._confidences.get(expert)
        return None if known is None else known(signals)

    def policy(
        self, *, trade_off: float | None = None, max_risk: float | None = None, confidence: float = 0.95
    ) -> Chosen | None:
        return self._chosen


class Scripted:
    """A policy that says what its function says, and remembers what it was shown."""

    def __init__(self, models: Sequence[str], decide: Callable[[Sequence[Seen], set[int]], Decision]) -> None:
        self.models = tuple(models)
        self._decide = decide
        self.shown: list[tuple[Query, tuple[Seen, ...], set[int]]] = []

    def decide(self, query: Query, seen: Sequence[Seen], *, allowed: Collection[int]) -> Decision:
        self.shown.append((query, tuple(seen), set(allowed)))
        return self._decide(seen, set(allowed))


async def climb(
    square: Square,
    question: str = "what?",
    *,
    budget: Budget | None = None,
    subtask: Subtask | None = None,
    experts: tuple[str, ...] | None = None,
    policy: Any = None,
    trust: Known | LoadTrust | None = None,
    max_risk: float | None = None,
    spend: Spend | None = None,
    crew: Climb | None = None,
    **options: Any,
) -> tuple[Attempt, ...]:
    budget = budget or Budget()
    crew = crew or climber(square, experts=experts, policy=policy, trust=trust, max_risk=max_risk, **options)
    loop = asyncio.get_running_loop()
    told: list[tuple[int, str | None, bool]] = []
    started: list[tuple[int, str]] = []
    attempts = await crew.solve(
        subtask or Subtask(id="t1", question=question),
        question,
        spend=spend or Spend(budget),
        deadline=None if budget.deadline_s is None else loop.time() + budget.deadline_s,
        on_start=lambda n, expert, why: started.append((n, expert)),
        on_end=lambda n, attempt, last: told.append((n, attempt.expert, last)),
    )
    # Every attempt is told once, in order, and only the last one as the last.
    assert told == [(n, a.expert, n == len(attempts)) for n, a in enumerate(attempts, 1)]
    assert all(told[n - 1][1] == name for n, name in started)
    return attempts


def climber(
    square: Square,
    *,
    experts: tuple[str, ...] | None = None,
    policy: Any = None,
    trust: Known | LoadTrust | None = None,
    max_risk: float | None = None,
    **options: Any,
) -> Climb:
    from agora.routing import KeywordRouter

    guide = Guide(square, experts=experts, policy=policy, trust=trust, max_risk=max_risk)
    return Climb(square=square, router=KeywordRouter(), guide=guide, experts=experts, **options)


def names(attempts: Sequence[Attempt]) -> list[str | None]:
    return [a.expert for a in attempts]


def answer(attempts: Sequence[Attempt]) -> Answer:
    outcome = attempts[-1].outcome
    assert isinstance(outcome, Answer), outcome
    return outcome


async def test_it_climbs_until_an_answer_is_trusted() -> None:
    attempts = await climb(three())
    assert names(attempts) == ["small", "medium", "large"]
    assert answer(attempts).text == "forty-two"
    assert answer(attempts).confidence == pytest.approx(0.95)
    assert [a.why for a in attempts] == [
        "small, the lowest who can be asked",
        "small's 0.50 is not enough: medium, the next up",
        "medium's 0.60 is not enough: large, the next up",
    ]
    assert "its confidence of 0.95 is not calibrated: it is the mean probability of its words" in answer(attempts).notes


async def test_it_stops_at_the_first_answer_that_is_good_enough() -> None:
    assert names(await climb(three(medium=reply("42", 0.9)))) == ["small", "medium"]
    assert names(await climb(three(), accept=0.5)) == ["small"]
    assert names(await climb(three(), accept=0.0)) == ["small"]


async def test_without_any_signal_it_climbs_to_the_top_and_says_so() -> None:
    def mute(text: str) -> FakeBackend:
        return FakeBackend(text, capabilities=Capabilities())

    attempts = await climb(three(mute("1"), mute("2"), mute("3")))
    assert names(attempts) == ["small", "medium", "large"]
    assert attempts[1].why.startswith("nothing tells how sure small is: medium")
    assert answer(attempts).confidence is None
    assert "nothing tells how far this answer can be trusted" in answer(attempts).notes


async def test_an_explicit_ladder_is_climbed_as_given() -> None:
    attempts = await climb(three(), experts=("medium", "nobody", "small"))
    assert names(attempts) == ["medium", "small"]
    attempts = await climb(three(), experts=("nobody",))
    failure = attempts[-1].outcome
    assert isinstance(failure, Failure) and failure.code == "no_expert" and "nobody: not here" in failure.message


async def test_those_on_the_same_rung_stand_in_for_each_other_and_are_not_climbed_through() -> None:
    square = Square(
        [
            expert("law", reply("?", 0.3), tier=Tier.END, keywords=("law",)),
            expert("tax", reply("?", 0.3), tier=Tier.END, keywords=("tax", "income")),
            expert("top", reply("yes", 0.9), tier=Tier.CLOUD),
        ]
    )
    assert names(await climb(square, "what is the income tax?")) == ["tax", "top"]
    assert names(await climb(square, "is that the law?")) == ["law", "top"]
    square.leave("law")
    square.join(expert("law", Unavailable("down"), tier=Tier.END, keywords=("law",)))
    attempts = await climb(square, "is that the law?")
    assert names(attempts) == ["law", "tax", "top"]
    assert attempts[1].why.startswith("law failed; ")


FAILS: list[Fault] = [Unavailable("down"), BadReply("garbage")]


@pytest.mark.parametrize("fault", FAILS)
async def test_a_failed_tier_is_passed_over(fault: Fault) -> None:
    attempts = await climb(three(medium=fault))
    assert names(attempts) == ["small", "medium", "large"]
    assert attempts[2].why.startswith("medium failed; small's 0.50 is not enough: large")
    assert answer(attempts).text == "forty-two"
    attempts = await climb(three(small=fault))
    assert names(attempts) == ["small", "medium", "large"]


@pytest.mark.parametrize("fault", [*FAILS, Reply("")])
async def test_where_everyone_above_fails_the_lower_answer_is_taken_and_says_so(fault: Any) -> None:
    attempts = await climb(three(medium=fault, large=fault))
    assert names(attempts) == ["small", "medium", "large", "small"]
    taken = answer(attempts)
    assert taken.text == "41" and taken.confidence == pytest.approx(0.5)
    assert sum("could not be asked" in n for n in taken.notes) == 2
    assert any(n.startswith("large could not be asked: ") for n in taken.notes)
    # It was paid when it was asked, and not again.
    assert taken.usage.calls == 0 and taken.usage.cost == 0
    assert attempts[0].outcome.usage.calls == 1
    assert attempts[-1].why.startswith("large failed; small's answer is taken: ")


async def test_all_down_is_one_clear_failure() -> None:
    down = Unavailable("down")
    attempts = await climb(three(down, down, down))
    assert names(attempts) == ["small", "medium", "large"]
    assert isinstance(attempts[-1].outcome, Failure) and attempts[-1].outcome.code == "unavailable"
    attempts = await climb(three(down, down, down), max_attempts=2)
    assert len(attempts) == 2


async def test_after_a_machine_failed_another_one_is_asked_first() -> None:
    square = Square(
        [
            expert("small", reply("1", 0.2), node="here"),
            expert("medium", Unavailable("down"), node="far"),
            expert("big", reply("3", 0.9), node="far", tier=Tier.EDGE, price_per_mtok=2.0),
            expert("large", reply("4", 0.9), node="elsewhere"),
        ]
    )
    assert names(await climb(square)) == ["small", "medium", "large"]
    square.leave("large")
    assert names(await climb(square)) == ["small", "medium", "big"]


@pytest.mark.looptime
async def test_a_tier_that_never_answers_is_given_up_at_the_deadline() -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    spend = Spend(Budget())
    attempts = await climb(three(large=Hang()), budget=Budget(deadline_s=5.0), spend=spend)
    assert loop.time() - started == pytest.approx(5.0, abs=0.1)
    assert names(attempts) == ["small", "medium", "large", "medium"]
    assert answer(attempts).text == "42?"
    assert any("large could not be asked: the run's deadline passed" in n for n in answer(attempts).notes)
    assert spend.spent.calls == 3  # the one that hangs has read its prompt


@pytest.mark.looptime
async def test_who_is_known_to_take_too_long_is_not_asked() -> None:
    square = three(large=FakeBackend(reply("forty-two", 0.95), latency=10.0))
    crew = climber(square)
    assert names(await climb(square, crew=crew)) == ["small", "medium", "large"]
    attempts = await climb(square, crew=crew, budget=Budget(deadline_s=4.0))
    assert names(attempts) == ["small", "medium"]
    assert "large was not asked: it takes about 10 s, and 4 s are left" in answer(attempts).notes
    # Where its answer would not have been asked for, nothing is missed.
    quick = climber(square, accept=0.1)
    await climb(square, crew=quick, subtask=Subtask(id="t1", question="what?", expert="large"))
    attempts = await climb(square, crew=quick, budget=Budget(deadline_s=4.0))
    assert not any("was not asked" in n for n in answer(attempts).notes)


@pytest.mark.looptime
async def test_who_hangs_once_does_not_take_the_time_of_those_above_for_ever() -> None:
    now = 0.0
    square = three(medium=Hang())
    crew = climber(square, accept=0.9, experience=Experience(clock=lambda: now))
    budget = Budget(deadline_s=5)
    assert names(await climb(square, crew=crew, budget=budget)) == ["small", "medium", "small"]
    assert names(await climb(square, crew=crew, budget=budget)) == ["small", "large"]
    # Where there is more time it is waited for, and after a while it has another chance.
    assert names(await climb(square, crew=crew, budget=Budget(deadline_s=60)))[:2] == ["small", "medium"]
    now = 1000.0
    assert names(await climb(square, crew=crew, budget=budget))[:2] == ["small", "medium"]


async def test_who_is_too_dear_is_not_asked() -> None:
    attempts = await climb(three(), budget=Budget(cost=60e-6))
    assert names(attempts) == ["small", "medium"]
    assert any(n.startswith("large was not asked: it costs about ") for n in answer(attempts).notes)
    only = Square([expert("large", reply("4", 0.9))])
    attempts = await climb(only, budget=Budget(cost=1e-6))
    assert isinstance(attempts[-1].outcome, Failure) and attempts[-1].outcome.code == "budget"


async def test_a_question_for_one_expert_is_asked_of_that_one_only() -> None:
    pinned = Subtask(id="t1", question="what?", expert="medium")
    attempts = await climb(three(), subtask=pinned)
    assert names(attempts) == ["medium"] and answer(attempts).text == "42?"
    attempts = await climb(three(medium=Unavailable("down")), subtask=pinned)
    assert names(attempts) == ["medium"] and isinstance(attempts[-1].outcome, Failure)
    attempts = await climb(three(), subtask=Subtask(id="t1", question="what?", expert="gone"))
    failure = attempts[-1].outcome
    assert isinstance(failure, Failure) and "names expert 'gone', who cannot be asked" in failure.message
    # Also one that is not on the ladder.
    assert names(await climb(three(), subtask=pinned, experts=("small", "large"))) == ["medium"]


async def test_modality_context_and_labels_bound_the_ladder() -> None:
    square = three()
    square.join(expert("eyes", reply("a cat", 0.9), tier=Tier.CLOUD, modalities=(Modality.IMAGE,)))
    image = Subtask(id="t1", question="what is it?", modality=Modality.IMAGE)
    assert names(await climb(square, subtask=image)) == ["eyes"]
    assert names(await climb(three(), subtask=Subtask(id="t1", question="what?", reach=Tier.EDGE))) == [
        "small",
        "medium",
    ]
    assert names(await climb(three(), subtask=Subtask(id="t1", question="what?", reach=Tier.END))) == ["small"]


# With a policy


async def test_the_policy_says_whom_to_ask_and_what_to_take() -> None:
    def decide(seen: Sequence[Seen], allowed: set[int]) -> Decision:
        if not seen:
            return Ask(model=1, quality=0.6, why="medium first")
        if len(seen) == 1:
            return Ask(model=0, quality=0.4, why="and small, to agree with")
        return Take(model=1, quality=0.77, why="better than small")

    policy = Scripted(["small", "medium"], decide)
    attempts = await climb(three(), policy=policy)
    assert names(attempts) == ["medium", "small", "medium"]
    assert [a.why for a in attempts] == [
        "medium first",
        "and small, to agree with",
        "small answered; medium's answer is taken: better than small",
    ]
    assert answer(attempts).text == "42?" and answer(attempts).confidence == 0.77
    assert answer(attempts).notes == ()
    query, seen, allowed = policy.shown[-1]
    assert query.text == "what?" and allowed == set()
    assert [(s.model, s.answer) for s in seen] == [(1, "42"), (0, "41")]
    assert seen[0].signals["mean_logprob"] == pytest.approx(math.log(0.6))
    assert seen[0].cost > 0 and all(math.isfinite(v) for s in seen for v in s.signals.values())


async def test_a_policy_for_other_models_is_followed_as_far_as_it_goes() -> None:
    def decide(seen: Sequence[Seen], allowed: set[int]) -> Decision:
        if allowed:
            return Ask(model=max(allowed), quality=0.5, why="the best there is")
        return Take(model=seen[-1].model, quality=0.5, why="all asked")

    policy = Scripted(["tiny", "small", "medium", "huge"], decide)
    assert names(await climb(three(), policy=policy)) == ["medium", "small"]
    assert all(allowed <= {1, 2} for _, _, allowed in policy.shown)
    square = three()
    crew = climber(square, policy=policy)
    assert names(await climb(square, crew=crew)) == ["medium", "small"]
    assert crew.notes == (
        "the policy is also for tiny, huge, not here now",
        "the policy does not know large, and does not ask there",
    )
    # None of its models: up the ladder.
    nobody = Scripted(["tiny", "huge"], decide)
    assert names(await climb(three(), policy=nobody)) == ["small", "medium", "large"]


@pytest.mark.parametrize(
    "bad",
    [
        lambda seen, allowed: Ask(model=7, quality=0.5, why="who?"),
        lambda seen, allowed: Take(model=0, quality=0.5, why="not seen"),
        lambda seen, allowed: 1 / 0,
        lambda seen, allowed: None,
    ],
)
async def test_a_policy_that_fails_is_said_and_the_ladder_climbed(bad: Any) -> None:
    attempts = await climb(three(), policy=Scripted(["small", "medium", "large"], bad))
    assert names(attempts) == ["small", "medium", "large"]
    assert sum("the policy failed" in n for n in answer(attempts).notes) == 1


async def test_a_policy_that_fails_in_the_middle_loses_nothing() -> None:
    def decide(seen: Sequence[Seen], allowed: set[int]) -> Decision:
        if seen:
            raise RuntimeError("boom")
        return Ask(model=1, quality=0.5, why="first")

    attempts = await climb(three(), policy=Scripted(["small", "medium", "large"], decide))
    assert names(attempts) == ["medium", "large"]


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -0.5, 1.5])
async def test_confidence_that_is_no_probability_counts_as_unknown(nonsense: float) -> None:
    policy = Scripted(
        ["small"],
        lambda seen, allowed: (
            Take(model=0, quality=nonsense, why="done") if seen else Ask(model=0, quality=nonsense, why="go")
        ),
    )
    taken = answer(await climb(three(), policy=policy))
    assert taken.confidence == pytest.approx(0.5)
    assert any("not calibrated" in n for n in taken.notes)
    trust = Told({"small": lambda signals: nonsense, "medium": lambda signals: 0.9})
    attempts = await climb(three(), trust=trust)
    assert names(attempts) == ["small", "medium"] and answer(attempts).confidence == 0.9


async def test_calibrated_confidence_decides_where_there_is_no_policy() -> None:
    trust = Told({"small": lambda signals: 0.8}, notes=("medium has no calibration",))
    crew = climber(three(), trust=trust)
    attempts = await climb(three(), crew=crew)
    assert names(attempts) == ["small"] and answer(attempts).confidence == 0.8
    assert answer(attempts).notes == ()
    assert crew.notes[0] == "medium has no calibration"

    def boom(signals: Mapping[str, float]) -> float:
        raise ValueError("damaged")

    attempts = await climb(three(), trust=Told({"small": boom}))
    assert names(attempts) == ["small", "medium", "large"]


async def test_a_policy_sees_what_is_left_to_spend() -> None:
    policy = Scripted(
        ["large"],
        lambda seen, allowed: Take(model=0, quality=0.5, why="done") if seen else Ask(model=0, quality=0.5, why="go"),
    )
    await climb(three(), policy=policy, budget=Budget(cost=1.0, deadline_s=50.0))
    first, last = policy.shown[0][0], policy.shown[-1][0]
    assert first.cost_left == 1.0 and last.cost_left is not None and last.cost_left < 1.0
    assert first.seconds_left is not None and 49 < first.seconds_left <= 50


class Words:
    """Vectors of words, or a failure."""

    def __init__(self, fails: bool = False) -> None:
        self._fails = fails

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if self._fails:
            raise RuntimeError("no model")
        return np.full((len(texts), 3), 1 / math.sqrt(3), dtype=np.float32)


async def test_a_policy_is_given_the_questions_vector() -> None:
    policy = Scripted(
        ["small"],
        lambda seen, allowed: Take(model=0, quality=0.5, why="done") if seen else Ask(model=0, quality=0.5, why="go"),
    )
    await climb(three(), policy=policy, embedder=Words())
    vector = policy.shown[0][0].embedding
    assert vector is not None and vector.shape == (3,)
    attempts = await climb(three(), policy=policy, embedder=Words(fails=True))
    assert policy.shown[-1][0].embedding is None
    assert "the policy decided without the question's vector: RuntimeError: no model" in answer(attempts).notes


# With a guarantee


async def test_without_a_certificate_the_top_alone_is_asked() -> None:
    plain = Told({"small": lambda signals: 0.99})
    crew = climber(three(), trust=plain, max_risk=0.05)
    attempts = await climb(three(), crew=crew)
    assert names(attempts) == ["large"]
    assert any("nothing cheaper than the top tier is certified for that" in n for n in crew.notes)
    assert names(await climb(three(), max_risk=0.05)) == ["large"]
    # What cannot be kept is done without, and said.
    attempts = await climb(three(large=Unavailable("down")), max_risk=0.05)
    assert names(attempts) == ["large", "medium"]
    assert any("large could not be asked" in n for n in answer(attempts).notes)
    assert names(await climb(three(), max_risk=0.05, subtask=Subtask(id="t1", question="what?", reach=Tier.EDGE))) == [
        "medium"
    ]


async def test_a_certified_policy_is_followed_and_says_where_its_guarantee_ends() -> None:
    def decide(seen: Sequence[Seen], allowed: set[int]) -> Decision:
        if 1 in allowed:
            return Ask(model=1, quality=0.9, why="the top")
        if seen:
            return Take(model=seen[-1].model, quality=0.9, why="done")
        return Ask(model=0, quality=0.5, why="what is left")

    policy = Scripted(["small", "large"], decide)
    trust = Told(chosen=Chosen(policy=policy, kind="cascade", why="fits", certified=True))
    crew = climber(three(), trust=trust, max_risk=0.05)
    attempts = await climb(three(), crew=crew)
    assert names(attempts) == ["large"] and answer(attempts).notes == ()
    assert any("at most 0.05, certified with a confidence of 0.95 (cascade)" in n for n in crew.notes)
    beyond = "the guarantee does not cover this answer, since not everybody could be asked"
    square = three(large=Unavailable("down"))
    attempts = await climb(square, crew=climber(square, trust=trust, max_risk=0.05))
    assert names(attempts) == ["large", "small"] and beyond in answer(attempts).notes
    near = Subtask(id="t1", question="what?", reach=Tier.EDGE)
    attempts = await climb(three(), crew=climber(three(), trust=trust, max_risk=0.05), subtask=near)
    assert names(attempts) == ["small"] and beyond in answer(attempts).notes


def certified(decide: Callable[[Query, Sequence[Seen], set[int]], Decision], *models: str) -> Told:
    class Fit:
        def __init__(self) -> None:
            self.models = models

        def decide(self, query: Query, seen: Sequence[Seen], *, allowed: Collection[int]) -> Decision:
            return decide(query, seen, set(allowed))

    return Told(chosen=Chosen(policy=Fit(), kind="cascade", why="fits", certified=True))


NOT_COVERED = "the guarantee does not cover this answer, "


async def test_a_certified_policy_that_heeds_the_deadline_says_where_its_guarantee_ends() -> None:
    def decide(query: Query, seen: Sequence[Seen], allowed: set[int]) -> Decision:
        if seen:
            return Take(model=seen[-1].model, quality=0.9, why="done")
        hurried = query.seconds_left is not None and query.seconds_left < 5
        return Ask(model=0 if hurried else 1, quality=0.9, why="in time")

    crew = climber(three(), trust=certified(decide, "small", "large"), max_risk=0.05)
    attempts = await climb(three(), crew=crew, budget=Budget(deadline_s=100))
    assert names(attempts) == ["large"] and answer(attempts).notes == ()
    attempts = await climb(three(), crew=crew, budget=Budget(deadline_s=3))
    assert names(attempts) == ["small"]
    assert answer(attempts).notes == (f"{NOT_COVERED}since money or time was short",)


async def test_a_guarantee_is_for_policies_that_see_all_and_do_not_fail() -> None:
    def fails(query: Query, seen: Sequence[Seen], allowed: set[int]) -> Decision:
        raise ZeroDivisionError("no")

    def upwards(query: Query, seen: Sequence[Seen], allowed: set[int]) -> Decision:
        if any(s.model for s in seen):
            return Take(model=seen[-1].model, quality=0.9, why="done")
        return Ask(model=min(allowed), quality=0.9, why="up")

    crew = climber(three(), trust=certified(fails, "small", "medium", "large"), max_risk=0.05)
    assert f"{NOT_COVERED}since the policy failed" in answer(await climb(three(), crew=crew)).notes
    trust = certified(upwards, "small", "medium", "large")
    crew = climber(three(), trust=trust, max_risk=0.05, embedder=Words(fails=True))
    assert f"{NOT_COVERED}since the question's vector is missing" in answer(await climb(three(), crew=crew)).notes
    # What the one that failed would have said might have led further up.
    square = three(small=Unavailable("down"))
    attempts = await climb(square, crew=climber(square, trust=trust, max_risk=0.05))
    assert names(attempts) == ["small", "medium"]
    assert answer(attempts).notes == (f"{NOT_COVERED}since not everybody could be asked",)


async def test_a_guarantee_is_for_texts_that_leave_as_they_are() -> None:
    trust = certified(lambda query, seen, allowed: Ask(model=0, quality=0.9, why="go"), "large")
    redacts = Departure(redactor=Redactor(["email"]), shorteners=[])
    for departure, max_risk, told in ((redacts, 0.05, True), (None, 0.05, False), (redacts, None, False)):
        crew = climber(three(), departure=departure, trust=trust, max_risk=max_risk)
        await climb(three(), crew=crew)
        assert any("does not cover what is condensed or redacted" in n for n in crew.notes) is told


async def test_an_answer_that_somebody_else_paid_for_counts_as_what_it_usually_costs() -> None:
    policy = Scripted(
        ["medium"],
        lambda seen, allowed: Take(model=0, quality=0.5, why="done") if seen else Ask(model=0, quality=0.5, why="go"),
    )
    crew = climber(three(), policy=policy, once=Once(cache_entries=4))
    first = answer(await climb(three(), crew=crew))
    again = answer(await climb(three(), crew=crew))
    assert first.usage.cost > 0 and again.usage.calls == 0
    paid, kept = (seen[0].cost for _, seen, _ in policy.shown if seen)
    assert paid == first.usage.cost and kept == pytest.approx(paid)


def test_an_answer_of_someone_who_has_left_is_better_than_none() -> None:
    # As when a run goes on that was interrupted, and the others fail.
    (medium,) = (e for e in three() if e.name == "medium")
    climbing = Climbing(
        rungs=((medium,),), guidance=Guidance(), experience=Experience(), accept=0.9, max_failures=3, question="what?"
    )
    gone = Answer(text="41", expert="small")
    climbing.ended(Attempt(expert="small", why="first", outcome=gone, started_at=0.0, seconds=0.1))
    step = climbing.next(Query(text="what?"), tokens_left=None)
    assert step is not None and (step.take, step.expert) == (False, "medium")
    down = Failure(code="unavailable", message="down", transient=True)
    climbing.ended(Attempt(expert="medium", why="next", outcome=down, started_at=0.0, seconds=0.1))
    step = climbing.next(Query(text="what?"), tokens_left=None)
    assert step is not None and (step.take, step.expert) == (True, "small")
    assert any("medium could not be asked: down" in n for n in climbing.answer_notes("small"))


# With who is here


async def test_what_is_known_is_looked_up_again_when_someone_joins() -> None:
    square = three()
    asked: list[list[str]] = []

    def load(here: Sequence[Expert]) -> Known:
        asked.append([e.name for e in here])
        return Told({e.name: lambda signals: 0.1 for e in here})

    crew = climber(square, trust=load)
    await climb(square, crew=crew)
    await climb(square, crew=crew)
    assert len(asked) == 1
    square.join(expert("huge", reply("42", 0.9), tier=Tier.CLOUD, price_per_mtok=99.0))
    attempts = await climb(square, crew=crew)
    assert len(asked) == 2 and names(attempts)[-1] == "huge"


async def test_what_cannot_be_read_is_as_if_it_were_not_there() -> None:
    def load(here: Sequence[Expert]) -> Known:
        raise OSError("disk on fire")

    crew = climber(three(), trust=load)
    assert names(await climb(three(), crew=crew)) == ["small", "medium", "large"]
    assert "what was calibrated cannot be read: OSError: disk on fire" in crew.notes


async def test_who_left_meanwhile_is_passed_over() -> None:
    square = three()

    def leaves(request: Any) -> Reply:
        square.leave("medium")
        return reply("41", 0.5)

    square.leave("small")
    square.join(expert("small", leaves))
    attempts = await climb(square)
    assert names(attempts) == ["small", "medium", "large"]
    assert isinstance(attempts[1].outcome, Failure) and "has left" in attempts[1].outcome.message


async def test_signals_that_are_asked_for_count_and_are_paid() -> None:
    spend = Spend(Budget())
    square = three(small=FakeBackend(reply("41", 0.5), scores={"True": -0.1, "False": -9.0}))
    attempts = await climb(square, signals=("p_true",), spend=spend)
    assert names(attempts) == ["small"]
    got = answer(attempts)
    assert got.signals["p_true"] > 0.99 and got.confidence == got.signals["p_true"]
    assert got.usage.calls == 2 and spend.spent == got.usage
    assert any("the probability with which the expert calls it true" in n for n in got.notes)


@pytest.mark.looptime
@pytest.mark.parametrize("once", [None, Once()])
async def test_an_answer_is_kept_whose_expert_hangs_when_asked_how_sure_it_is(once: Once | None) -> None:
    def hangs(request: Any) -> Reply | Hang:
        return reply("41", 0.9) if question_of(request) == "what?" else Hang()

    loop = asyncio.get_running_loop()
    started = loop.time()
    square = Square([expert("small", hangs), expert("large", hangs)])
    attempts = await climb(square, signals=("verbalised",), budget=Budget(deadline_s=8.0), accept=0.95, once=once)
    assert loop.time() - started == pytest.approx(4 + 2, abs=0.1)
    assert names(attempts) == ["small", "large"] and answer(attempts).text == "41"
    assert any("verbalised of large's answer could not be had" in n for n in answer(attempts).notes)


async def test_what_comes_of_one_subtask_says_nothing_of_the_next() -> None:
    square = three()
    crew = climber(square)
    many = await asyncio.gather(*(climb(square, f"question {n}", crew=crew) for n in range(20)))
    assert all(names(a) == ["small", "medium", "large"] for a in many)
