"""Climbing by a policy, by calibrated confidence and by signals that are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from agora.protocols import Capabilities, Completion, GenerateRequest, TokenLogprob
from agora.routing.cascade.policy import Ask, Decision, Seen, Take
from agora.types import Budget
from experts.fake import FakeBackend
from graphs.spend import Spend


async def test_the_policy_says_whom_to_ask_and_what_to_take(tiers: Any) -> None:
    def decide(seen: Sequence[Seen], allowed: set[int]) -> Decision:
        if not seen:
            return Ask(model=1, quality=0.6, why="medium first")
        if len(seen) == 1:
            return Ask(model=0, quality=0.4, why="and small, to agree with")
        return Take(model=1, quality=0.77, why="better than small")

    policy = tiers.Scripted(["small", "medium"], decide)
    attempts = await tiers.climb(tiers.three(), policy=policy)
    assert tiers.names(attempts) == ["medium", "small", "medium"]
    assert [a.why for a in attempts] == [
        "medium first",
        "and small, to agree with",
        "small answered; medium's answer is taken: better than small",
    ]
    assert tiers.answer(attempts).text == "42?" and tiers.answer(attempts).confidence == 0.77
    assert tiers.answer(attempts).notes == ()
    query, seen, allowed = policy.shown[-1]
    assert query.text == "what?" and allowed == set()
    assert [(s.model, s.answer) for s in seen] == [(1, "42"), (0, "41")]
    assert seen[0].signals["mean_logprob"] == pytest.approx(math.log(0.6))
    assert seen[0].cost > 0 and all(math.isfinite(v) for s in seen for v in s.signals.values())


async def test_a_policy_for_other_models_is_followed_as_far_as_it_goes(tiers: Any) -> None:
    def decide(seen: Sequence[Seen], allowed: set[int]) -> Decision:
        if allowed:
            return Ask(model=max(allowed), quality=0.5, why="the best there is")
        return Take(model=seen[-1].model, quality=0.5, why="all asked")

    policy = tiers.Scripted(["tiny", "small", "medium", "huge"], decide)
    assert tiers.names(await tiers.climb(tiers.three(), policy=policy)) == ["medium", "small"]
    assert all(allowed <= {1, 2} for _, _, allowed in policy.shown)
    square = tiers.three()
    crew = tiers.climber(square, policy=policy)
    assert tiers.names(await tiers.climb(square, crew=crew)) == ["medium", "small"]
    assert crew.notes == (
        "the policy is also for tiny, huge, not here now",
        "the policy does not know large, and does not ask there",
    )
    # None of its models: up the ladder.
    nobody = tiers.Scripted(["tiny", "huge"], decide)
    assert tiers.names(await tiers.climb(tiers.three(), policy=nobody)) == ["small", "medium", "large"]


@pytest.mark.parametrize(
    "bad",
    [
        lambda seen, allowed: Ask(model=7, quality=0.5, why="who?"),
        lambda seen, allowed: Take(model=0, quality=0.5, why="not seen"),
        lambda seen, allowed: 1 / 0,
        lambda seen, allowed: None,
    ],
)
async def test_a_policy_that_fails_is_said_and_the_ladder_climbed(tiers: Any, bad: Any) -> None:
    attempts = await tiers.climb(tiers.three(), policy=tiers.Scripted(["small", "medium", "large"], bad))
    assert tiers.names(attempts) == ["small", "medium", "large"]
    assert sum("the policy failed" in n for n in tiers.answer(attempts).notes) == 1


async def test_a_policy_that_fails_in_the_middle_loses_nothing(tiers: Any) -> None:
    def decide(seen: Sequence[Seen], allowed: set[int]) -> Decision:
        if seen:
            raise RuntimeError("boom")
        return Ask(model=1, quality=0.5, why="first")

    attempts = await tiers.climb(tiers.three(), policy=tiers.Scripted(["small", "medium", "large"], decide))
    assert tiers.names(attempts) == ["medium", "large"]


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -0.5, 1.5])
async def test_confidence_that_is_no_probability_counts_as_unknown(tiers: Any, nonsense: float) -> None:
    policy = tiers.Scripted(
        ["small"],
        lambda seen, allowed: (
            Take(model=0, quality=nonsense, why="done") if seen else Ask(model=0, quality=nonsense, why="go")
        ),
    )
    taken = tiers.answer(await tiers.climb(tiers.three(), policy=policy))
    assert taken.confidence == pytest.approx(0.5)
    assert any("not calibrated" in n for n in taken.notes)
    trust = tiers.Told({"small": lambda signals: nonsense, "medium": lambda signals: 0.9})
    attempts = await tiers.climb(tiers.three(), trust=trust)
    assert tiers.names(attempts) == ["small", "medium"] and tiers.answer(attempts).confidence == 0.9


async def test_calibrated_confidence_decides_where_there_is_no_policy(tiers: Any) -> None:
    trust = tiers.Told({"small": lambda signals: 0.8}, notes=("medium has no calibration",))
    crew = tiers.climber(tiers.three(), trust=trust)
    attempts = await tiers.climb(tiers.three(), crew=crew)
    assert tiers.names(attempts) == ["small"] and tiers.answer(attempts).confidence == 0.8
    assert tiers.answer(attempts).notes == ()
    assert crew.notes[0] == "medium has no calibration"

    def boom(signals: Mapping[str, float]) -> float:
        raise ValueError("damaged")

    attempts = await tiers.climb(tiers.three(), trust=tiers.Told({"small": boom}))
    assert tiers.names(attempts) == ["small", "medium", "large"]


async def test_a_policy_sees_what_is_left_to_spend(tiers: Any) -> None:
    policy = tiers.Scripted(
        ["large"],
        lambda seen, allowed: Take(model=0, quality=0.5, why="done") if seen else Ask(model=0, quality=0.5, why="go"),
    )
    await tiers.climb(tiers.three(), policy=policy, budget=Budget(cost=1.0, deadline_s=50.0))
    first, last = policy.shown[0][0], policy.shown[-1][0]
    assert first.cost_left == 1.0 and last.cost_left is not None and last.cost_left < 1.0
    assert first.seconds_left is not None and 49 < first.seconds_left <= 50


async def test_a_policy_is_given_the_questions_vector(tiers: Any) -> None:
    policy = tiers.Scripted(
        ["small"],
        lambda seen, allowed: Take(model=0, quality=0.5, why="done") if seen else Ask(model=0, quality=0.5, why="go"),
    )
    await tiers.climb(tiers.three(), policy=policy, embedder=tiers.Words())
    vector = policy.shown[0][0].embedding
    assert vector is not None and vector.shape == (3,)
    attempts = await tiers.climb(tiers.three(), policy=policy, embedder=tiers.Words(fails=True))
    assert policy.shown[-1][0].embedding is None
    assert "the policy decided without the question's vector: RuntimeError: no model" in tiers.answer(attempts).notes


async def test_signals_that_are_asked_for_count_and_are_paid(tiers: Any) -> None:
    spend = Spend(Budget())
    square = tiers.three(small=FakeBackend(tiers.reply("41", 0.5), scores={"True": -0.1, "False": -9.0}))
    attempts = await tiers.climb(square, signals=("p_true",), spend=spend)
    assert tiers.names(attempts) == ["small"]
    got = tiers.answer(attempts)
    assert got.signals["p_true"] > 0.99 and got.confidence == got.signals["p_true"]
    assert got.usage.calls == 2 and spend.spent == got.usage
    assert any("the probability with which the expert calls it true" in n for n in got.notes)


async def test_alternatives_are_asked_for_where_entropy_is_wanted(tiers: Any) -> None:
    class Telling(FakeBackend):
        """Tells as many alternatives as are asked for."""

        async def generate(self, request: GenerateRequest) -> Completion:
            many = request.logprobs or 0
            top = tuple((f"t{n}", math.log(1 / many)) for n in range(many))
            done = await super().generate(request)
            return replace(done, logprobs=tuple(TokenLogprob(token="t0", logprob=-1.0, top=top) for _ in range(3)))

    square = tiers.three(small=Telling("41"))
    crew = tiers.climber(square, signals=("entropy",), accept=0.0)
    got = tiers.answer(await tiers.climb(square, crew=crew))
    assert got.signals["entropy"] == pytest.approx(math.log(10), abs=0.1)
    assert "entropy" not in tiers.answer(await tiers.climb(square, accept=0.0)).signals
    assert not any("entropy" in n for n in crew.notes)


async def test_signals_that_can_never_be_had_are_said_beforehand(tiers: Any) -> None:
    square = tiers.three(
        small=FakeBackend("41", capabilities=Capabilities()), medium=FakeBackend("41", capabilities=Capabilities())
    )
    crew = tiers.climber(square, signals=("entropy", "p_true", "verbalised"), accept=0.0)
    assert [n for n in crew.notes if "cannot be had" in n] == [
        "entropy cannot be had of small, medium: what answers there does not claim logprobs (if it can, say so in"
        " [nodes.small.capabilities])",
        "p_true cannot be had of small, medium: what answers there does not claim score or logprobs (if it can, say so"
        " in [nodes.small.capabilities])",
    ]
    taken = tiers.answer(await tiers.climb(square, crew=crew))
    assert "entropy of small's answer could not be had: its backend does not claim logprobs" in taken.notes
    # Of those who are not on the ladder nothing is wanted.
    crew = tiers.climber(square, signals=("entropy",), experts=("large",))
    assert not any("cannot be had" in n for n in crew.notes)
