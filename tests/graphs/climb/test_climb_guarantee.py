"""Climbing with a guarantee: what is asked without a certificate, and where one ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from agora.errors import Unavailable
from agora.routing.cascade.policy import Ask, Decision, Query, Seen, Take
from agora.types import Answer, Attempt, Budget, Subtask, Tier, outcome_from_dict, outcome_to_dict
from experts.fake import FakeBackend, Hang, Reply, question_of
from graphs.calibrating import Chosen
from graphs.departure import Departure, Redactor
from graphs.once import Once


async def test_without_a_certificate_the_top_alone_is_asked(tiers: Any) -> None:
    plain = tiers.Told({"small": lambda signals: 0.99})
    crew = tiers.climber(tiers.three(), trust=plain, max_risk=0.05)
    attempts = await tiers.climb(tiers.three(), crew=crew)
    assert tiers.names(attempts) == ["large"]
    assert any("nothing cheaper than the top tier is certified for that" in n for n in crew.notes)
    assert tiers.names(await tiers.climb(tiers.three(), max_risk=0.05)) == ["large"]
    # What cannot be kept is done without, and said.
    attempts = await tiers.climb(tiers.three(large=Unavailable("down")), max_risk=0.05)
    assert tiers.names(attempts) == ["large", "medium"]
    assert any("large could not be asked" in n for n in tiers.answer(attempts).notes)
    assert tiers.names(
        await tiers.climb(tiers.three(), max_risk=0.05, subtask=Subtask(id="t1", question="what?", reach=Tier.EDGE))
    ) == ["medium"]


async def test_a_certified_policy_is_followed_and_says_where_its_guarantee_ends(tiers: Any) -> None:
    def decide(seen: Sequence[Seen], allowed: set[int]) -> Decision:
        if 1 in allowed:
            return Ask(model=1, quality=0.9, why="the top")
        if seen:
            return Take(model=seen[-1].model, quality=0.9, why="done")
        return Ask(model=0, quality=0.5, why="what is left")

    policy = tiers.Scripted(["small", "large"], decide)
    trust = tiers.Told(chosen=Chosen(policy=policy, kind="cascade", why="fits", certified=True))
    crew = tiers.climber(tiers.three(), trust=trust, max_risk=0.05)
    attempts = await tiers.climb(tiers.three(), crew=crew)
    assert tiers.names(attempts) == ["large"] and tiers.answer(attempts).notes == ()
    assert any("at most 0.05, certified with a confidence of 0.95 (cascade)" in n for n in crew.notes)
    beyond = "the guarantee does not cover this answer, since not everybody could be asked"
    square = tiers.three(large=Unavailable("down"))
    attempts = await tiers.climb(square, crew=tiers.climber(square, trust=trust, max_risk=0.05))
    assert tiers.names(attempts) == ["large", "small"] and beyond in tiers.answer(attempts).notes
    near = Subtask(id="t1", question="what?", reach=Tier.EDGE)
    attempts = await tiers.climb(
        tiers.three(), crew=tiers.climber(tiers.three(), trust=trust, max_risk=0.05), subtask=near
    )
    assert tiers.names(attempts) == ["small"] and beyond in tiers.answer(attempts).notes


NOT_COVERED = "the guarantee does not cover this answer, "


async def test_a_certified_policy_that_heeds_the_deadline_says_where_its_guarantee_ends(tiers: Any) -> None:
    def decide(query: Query, seen: Sequence[Seen], allowed: set[int]) -> Decision:
        if seen:
            return Take(model=seen[-1].model, quality=0.9, why="done")
        hurried = query.seconds_left is not None and query.seconds_left < 5
        return Ask(model=0 if hurried else 1, quality=0.9, why="in time")

    crew = tiers.climber(tiers.three(), trust=tiers.certified(decide, "small", "large"), max_risk=0.05)
    attempts = await tiers.climb(tiers.three(), crew=crew, budget=Budget(deadline_s=100))
    assert tiers.names(attempts) == ["large"] and tiers.answer(attempts).notes == ()
    attempts = await tiers.climb(tiers.three(), crew=crew, budget=Budget(deadline_s=3))
    assert tiers.names(attempts) == ["small"]
    assert tiers.answer(attempts).notes == (f"{NOT_COVERED}since money or time was short",)


async def test_a_guarantee_is_for_policies_that_see_all_and_do_not_fail(tiers: Any) -> None:
    def fails(query: Query, seen: Sequence[Seen], allowed: set[int]) -> Decision:
        raise ZeroDivisionError("no")

    def upwards(query: Query, seen: Sequence[Seen], allowed: set[int]) -> Decision:
        if any(s.model for s in seen):
            return Take(model=seen[-1].model, quality=0.9, why="done")
        return Ask(model=min(allowed), quality=0.9, why="up")

    crew = tiers.climber(tiers.three(), trust=tiers.certified(fails, "small", "medium", "large"), max_risk=0.05)
    assert f"{NOT_COVERED}since the policy failed" in tiers.answer(await tiers.climb(tiers.three(), crew=crew)).notes
    trust = tiers.certified(upwards, "small", "medium", "large")
    crew = tiers.climber(tiers.three(), trust=trust, max_risk=0.05, embedder=tiers.Words(fails=True))
    assert (
        f"{NOT_COVERED}since the question's vector is missing"
        in tiers.answer(await tiers.climb(tiers.three(), crew=crew)).notes
    )
    # What the one that failed would have said might have led further up.
    square = tiers.three(small=Unavailable("down"))
    attempts = await tiers.climb(square, crew=tiers.climber(square, trust=trust, max_risk=0.05))
    assert tiers.names(attempts) == ["small", "medium"]
    assert tiers.answer(attempts).notes == (f"{NOT_COVERED}since not everybody could be asked",)


async def test_a_guarantee_is_for_texts_that_leave_as_they_are(tiers: Any) -> None:
    trust = tiers.certified(lambda query, seen, allowed: Ask(model=0, quality=0.9, why="go"), "large")
    redacts = Departure(redactor=Redactor(["email"]), shorteners=[])
    for departure, max_risk, told in ((redacts, 0.05, True), (None, 0.05, False), (redacts, None, False)):
        crew = tiers.climber(tiers.three(), departure=departure, trust=trust, max_risk=max_risk)
        await tiers.climb(tiers.three(), crew=crew)
        assert any("does not cover what is condensed or redacted" in n for n in crew.notes) is told


def sure_or_up(query: Query, seen: Sequence[Seen], allowed: set[int]) -> Decision:
    """Takes the small one's answer if it says that it is sure."""
    if not seen:
        return Ask(model=0, quality=0.5, why="small first")
    if seen[-1].model == 0 and 1 in allowed and seen[-1].signals.get("verbalised", 0.0) < 0.5:
        return Ask(model=1, quality=0.9, why="small is not sure")
    return Take(model=seen[-1].model, quality=0.9, why="done")


SHORT = f"{NOT_COVERED}since time or money was short for small's answer or for what tells how sure it is"


@pytest.mark.looptime
@pytest.mark.parametrize("cached", [False, True])
async def test_a_guarantee_is_for_answers_judged_with_all_signals(tiers: Any, cached: bool) -> None:
    def small(reply: str | Hang) -> Any:
        return lambda request: tiers.reply("41", 0.5) if question_of(request) == "what?" else reply

    async def notes(how_sure: str | Hang, **budget: float) -> tuple[str, ...]:
        square = tiers.three(small=small(how_sure))
        once = Once(cache_entries=4) if cached else None
        crew = tiers.climber(
            square,
            trust=tiers.certified(sure_or_up, "small", "large"),
            max_risk=0.05,
            signals=("verbalised",),
            once=once,
        )
        attempts = await tiers.climb(square, crew=crew, budget=Budget(**budget))
        assert tiers.names(attempts)[0] == "small"
        # An answer that nobody could judge in full is not kept for those who have more time.
        assert once is None or once.kept == len(attempts) - any("could not be had" in n for n in said(attempts))
        return tuple(tiers.answer(attempts).notes)

    def said(attempts: Sequence[Attempt]) -> list[str]:
        return [n for a in attempts if isinstance(a.outcome, Answer) and a.outcome.limited for n in a.outcome.notes]

    assert await notes("90") == ()
    assert await notes("90", deadline_s=60.0) == ()
    assert SHORT in await notes(Hang(), deadline_s=8.0)
    # What it said when it was calibrated was as useless: the promise was certified with that.
    assert not any(NOT_COVERED in n for n in await notes("quite", deadline_s=60.0))


async def test_a_guarantee_is_not_for_signals_that_money_was_short_for(tiers: Any) -> None:
    square = tiers.three()
    policy = tiers.certified(sure_or_up, "medium", "large")
    crew = tiers.climber(square, trust=policy, max_risk=0.05, signals=("self_consistency",), samples=4)
    # Enough for an answer of 2 tokens and a sample or two, each of whose prompts may have 42.
    attempts = await tiers.climb(square, crew=crew, budget=Budget(tokens=48))
    limited = attempts[0].outcome
    assert isinstance(limited, Answer) and limited.limited and limited.signals["self_consistency"] == 1.0
    assert any(n.startswith(NOT_COVERED) for n in tiers.answer(attempts).notes)


async def test_a_guarantee_is_not_for_answers_cut_short_by_the_budget(tiers: Any) -> None:
    long = FakeBackend(Reply("word " * 60, logprobs=(-0.1,) * 20))
    take = tiers.certified(
        lambda query, seen, allowed: (
            Take(model=0, quality=0.9, why="done") if seen else Ask(model=0, quality=0.9, why="go")
        ),
        "small",
        "large",
    )
    for tokens, covered in ((None, True), (80, False)):
        square = tiers.three(small=long)
        crew = tiers.climber(square, trust=take, max_risk=0.05)
        attempts = await tiers.climb(square, crew=crew, budget=Budget(tokens=tokens))
        told = tiers.answer(attempts).notes
        assert any("cut short" in n for n in told) is not covered
        assert (SHORT in told) is not covered


def test_that_it_was_limited_survives_a_record() -> None:
    answer = Answer(text="42", expert="small", limited=True)
    assert outcome_from_dict(outcome_to_dict(answer)) == answer
    plain = outcome_to_dict(Answer(text="42", expert="small"))
    # As records of an earlier version have it.
    del plain["limited"]
    assert outcome_from_dict(plain) == Answer(text="42", expert="small")
