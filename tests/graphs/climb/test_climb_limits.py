"""Climbing within time and money: who is waited for and how long, and who is not asked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import BackendTimeout
from agora.protocols import Completion, GenerateRequest
from agora.routing.cascade.policy import Ask, Query, Take
from agora.square import Square
from agora.types import Answer, Attempt, Budget, Failure, Subtask, Tier, Usage
from experts.fake import FakeBackend, Hang, Reply, question_of
from graphs.climbing import Climbing
from graphs.experience import Experience
from graphs.guidance import Guidance
from graphs.once import Once
from graphs.patience import LEAST_S, seconds_for
from graphs.spend import Spend


@pytest.mark.looptime
async def test_a_tier_that_never_answers_is_given_up_at_the_deadline(tiers: Any) -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    spend = Spend(Budget())
    attempts = await tiers.climb(tiers.three(large=Hang()), budget=Budget(deadline_s=5.0), spend=spend)
    assert loop.time() - started == pytest.approx(5.0, abs=0.1)
    assert tiers.names(attempts) == ["small", "medium", "large", "medium"]
    assert tiers.answer(attempts).text == "42?"
    assert any("large could not be asked: the run's deadline passed" in n for n in tiers.answer(attempts).notes)
    assert spend.spent.calls == 3  # the one that hangs has read its prompt


@pytest.mark.looptime
async def test_who_is_known_to_take_too_long_is_not_asked(tiers: Any) -> None:
    square = tiers.three(large=FakeBackend(tiers.reply("forty-two", 0.95), latency=10.0))
    crew = tiers.climber(square)
    assert tiers.names(await tiers.climb(square, crew=crew)) == ["small", "medium", "large"]
    attempts = await tiers.climb(square, crew=crew, budget=Budget(deadline_s=4.0))
    assert tiers.names(attempts) == ["small", "medium"]
    assert "large was not asked: it takes about 10 s, and 4 s are left" in tiers.answer(attempts).notes
    # Where its answer would not have been asked for, nothing is missed.
    quick = tiers.climber(square, accept=0.1)
    await tiers.climb(square, crew=quick, subtask=Subtask(id="t1", question="what?", expert="large"))
    attempts = await tiers.climb(square, crew=quick, budget=Budget(deadline_s=4.0))
    assert not any("was not asked" in n for n in tiers.answer(attempts).notes)


@pytest.mark.looptime
async def test_who_hangs_once_does_not_take_the_time_of_those_above_for_ever(tiers: Any) -> None:
    now = 0.0
    square = tiers.three(medium=Hang())
    crew = tiers.climber(square, accept=0.9, experience=Experience(clock=lambda: now))
    budget = Budget(deadline_s=5)
    assert tiers.names(await tiers.climb(square, crew=crew, budget=budget)) == ["small", "medium", "large"]
    assert tiers.names(await tiers.climb(square, crew=crew, budget=budget)) == ["small", "large"]
    # Where there is more time it is waited for, and after a while it has another chance.
    assert tiers.names(await tiers.climb(square, crew=crew, budget=Budget(deadline_s=60)))[:2] == ["small", "medium"]
    now = 1000.0
    assert tiers.names(await tiers.climb(square, crew=crew, budget=budget))[:2] == ["small", "medium"]


async def test_who_is_too_dear_is_not_asked(tiers: Any) -> None:
    attempts = await tiers.climb(tiers.three(), budget=Budget(cost=60e-6))
    assert tiers.names(attempts) == ["small", "medium"]
    assert any(n.startswith("large was not asked: it costs about ") for n in tiers.answer(attempts).notes)
    only = Square([tiers.expert("large", tiers.reply("4", 0.9))])
    attempts = await tiers.climb(only, budget=Budget(cost=1e-6))
    assert isinstance(attempts[-1].outcome, Failure) and attempts[-1].outcome.code == "budget"


async def test_an_answer_that_somebody_else_paid_for_counts_as_what_it_usually_costs(tiers: Any) -> None:
    policy = tiers.Scripted(
        ["medium"],
        lambda seen, allowed: Take(model=0, quality=0.5, why="done") if seen else Ask(model=0, quality=0.5, why="go"),
    )
    crew = tiers.climber(tiers.three(), policy=policy, once=Once(cache_entries=4))
    first = tiers.answer(await tiers.climb(tiers.three(), crew=crew))
    again = tiers.answer(await tiers.climb(tiers.three(), crew=crew))
    assert first.usage.cost > 0 and again.usage.calls == 0
    paid, kept = (seen[0].cost for _, seen, _ in policy.shown if seen)
    assert paid == first.usage.cost and kept == pytest.approx(paid)


@pytest.mark.looptime
@pytest.mark.parametrize("once", [None, Once()])
async def test_an_answer_is_kept_whose_expert_hangs_when_asked_how_sure_it_is(tiers: Any, once: Once | None) -> None:
    def hangs(request: Any) -> Reply | Hang:
        return tiers.reply("41", 0.9) if question_of(request) == "what?" else Hang()

    loop = asyncio.get_running_loop()
    started = loop.time()
    square = Square([tiers.expert("small", hangs), tiers.expert("large", hangs)])
    attempts = await tiers.climb(square, signals=("verbalised",), budget=Budget(deadline_s=8.0), accept=0.95, once=once)
    assert loop.time() - started == pytest.approx(2 + 3, abs=0.1)
    assert tiers.names(attempts) == ["small", "large"] and tiers.answer(attempts).text == "41"
    assert any("verbalised of large's answer could not be had" in n for n in tiers.answer(attempts).notes)


async def test_what_comes_of_one_subtask_says_nothing_of_the_next(tiers: Any) -> None:
    square = tiers.three()
    crew = tiers.climber(square)
    many = await asyncio.gather(*(tiers.climb(square, f"question {n}", crew=crew) for n in range(20)))
    assert all(tiers.names(a) == ["small", "medium", "large"] for a in many)


# A share of the deadline for each


@pytest.mark.looptime
@pytest.mark.parametrize("mute", [("small",), ("small", "medium"), ("medium", "large"), ("large",)])
async def test_in_a_new_process_those_who_never_answer_leave_time_for_the_others(
    tiers: Any, mute: tuple[str, ...]
) -> None:
    loop = asyncio.get_running_loop()
    spend = Spend(Budget())
    square = tiers.three(**dict.fromkeys(mute, Hang()))
    crew = tiers.climber(square, accept=0.9)
    attempts = await tiers.climb(square, crew=crew, budget=Budget(deadline_s=6.0), spend=spend)
    assert tiers.names(attempts)[:3] == ["small", "medium", "large"]
    # The last one had all that was left.
    assert loop.time() == pytest.approx(6.0 if "large" in mute else 2.0 * len(mute), abs=0.01)
    best = "large" if "large" not in mute else "medium" if "medium" not in mute else "small"
    assert tiers.answer(attempts).expert == best
    for attempt in attempts[:2]:
        if attempt.expert in mute:
            failure = attempt.outcome
            assert isinstance(failure, Failure) and failure.code == "timeout" and failure.transient
            assert "its share of the time left" in failure.message and failure.usage.calls == 1
    assert spend.spent.calls == 3


@pytest.mark.looptime
async def test_who_has_not_answered_in_its_share_is_not_asked_again_with_no_more_time(tiers: Any) -> None:
    square = tiers.three(small=Hang(), medium=Hang())
    crew = tiers.climber(square, accept=0.9)
    loop = asyncio.get_running_loop()
    await tiers.climb(square, crew=crew, budget=Budget(deadline_s=6.0))
    asked_at = loop.time()
    attempts = await tiers.climb(square, crew=crew, budget=Budget(deadline_s=6.0))
    assert tiers.names(attempts) == ["large"] and loop.time() == asked_at
    # Where nobody else is left it may have all the time there is.
    square.leave("large")
    attempts = await tiers.climb(square, crew=crew, budget=Budget(deadline_s=6.0))
    assert tiers.names(attempts) == ["medium"]
    assert isinstance(attempts[0].outcome, Failure) and attempts[0].outcome.code == "deadline"


@pytest.mark.looptime
async def test_who_answers_late_but_as_usual_is_waited_for_beyond_its_share(tiers: Any) -> None:
    square = tiers.three(small=FakeBackend(tiers.reply("41", 0.95), latency=4.0))
    crew = tiers.climber(square)
    assert tiers.names(await tiers.climb(square, crew=crew, budget=Budget(deadline_s=6.0)))[:2] == ["small", "medium"]
    crew = tiers.climber(square)
    assert tiers.names(await tiers.climb(square, crew=crew)) == ["small"]
    assert tiers.names(await tiers.climb(square, crew=crew, budget=Budget(deadline_s=6.0))) == ["small"]


@pytest.mark.looptime
async def test_the_top_that_is_asked_first_has_half_of_the_time(tiers: Any) -> None:
    loop = asyncio.get_running_loop()
    attempts = await tiers.climb(tiers.three(large=Hang()), max_risk=0.05, budget=Budget(deadline_s=6.0))
    assert tiers.names(attempts) == ["large", "medium"] and loop.time() == pytest.approx(3.0)


@pytest.mark.looptime
async def test_who_gives_up_by_itself_at_the_end_of_its_share_leaves_time_too(tiers: Any) -> None:
    class Obedient(FakeBackend):
        async def generate(self, request: GenerateRequest) -> Completion:
            assert request.timeout_s is not None
            await asyncio.sleep(request.timeout_s)
            raise BackendTimeout("too slow", backend=self.name)

    attempts = await tiers.climb(tiers.three(small=Obedient()), accept=0.6, budget=Budget(deadline_s=6.0))
    assert tiers.names(attempts) == ["small", "medium"] and tiers.answer(attempts).text == "42?"


async def test_those_who_cost_the_same_share_the_time_of_one_rung(tiers: Any) -> None:
    ends = [tiers.expert(f"end{n}", tiers.reply("1", 0.1), tier=Tier.END) for n in range(3)]
    top = tiers.expert("top", tiers.reply("2", 0.9), tier=Tier.CLOUD)
    climbing = Climbing(
        rungs=(ends, (top,)),
        guidance=Guidance(),
        experience=Experience(),
        accept=0.9,
        max_failures=3,
        question="what?",
    )
    step = climbing.next(Query(text="what?", seconds_left=8.0), tokens_left=None)
    assert step is not None and (step.expert, step.sharing) == ("end0", 2)
    late = Failure(code="timeout", message="late", transient=True)
    for name in ("end0", "end1"):
        climbing.ended(Attempt(expert=name, why="", outcome=late, started_at=0.0, seconds=1.0))
    # One more failure is allowed: whoever is asked now is the last.
    step = climbing.next(Query(text="what?", seconds_left=4.0), tokens_left=None)
    assert step is not None and step.sharing == 1


@given(left=st.floats(0.01, 1e4), sharing=st.integers(1, 8), usual=st.none() | st.floats(0, 1e3))
def test_a_share_is_within_the_time_left_and_the_last_has_all(left: float, sharing: int, usual: float | None) -> None:
    experience = Experience()
    if usual is not None:
        experience.saw(Answer(text="42", expert="small", usage=Usage(calls=1)), usual)
    given_s = seconds_for("small", left, sharing, experience)
    assert 0 < given_s <= left
    assert given_s >= min(left, LEAST_S, usual if usual is not None else LEAST_S)
    assert seconds_for("small", left, 1, experience) == left
    if usual is None and left >= sharing * LEAST_S:
        # Were all silent, each would have had the same, and together all of it.
        passed = 0.0
        for others in range(sharing, 0, -1):
            passed += seconds_for("small", left - passed, others, experience)
            assert passed == pytest.approx(left * (sharing - others + 1) / sharing)


def test_how_long_answers_usually_take_leaves_out_those_that_did_not_come() -> None:
    now = 0.0
    experience = Experience(clock=lambda: now)
    late = Failure(code="timeout", message="late", expert="small", usage=Usage(calls=1))
    experience.saw(late, 5.0)
    assert experience.usual_seconds("small") is None and experience.seconds("small") == 10.0
    experience.saw(Answer(text="42", expert="small", usage=Usage(calls=1)), 1.0)
    experience.saw(late, 5.0)
    assert experience.usual_seconds("small") == 1.0
    # Nothing was heard of it for long: it is as if it were new.
    now = 1000.0
    assert experience.usual_seconds("small") is None and experience.seconds("small") is None
