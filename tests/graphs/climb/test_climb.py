"""Climbing from tier to tier for one subtask: who is asked, whose answer is taken, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest

from agora.errors import BadReply, Unavailable
from agora.protocols import Capabilities
from agora.square import Square
from agora.types import Failure, Modality, Subtask, Tier
from experts.fake import FakeBackend, Fault, Reply


async def test_it_climbs_until_an_answer_is_trusted(tiers: Any) -> None:
    attempts = await tiers.climb(tiers.three())
    assert tiers.names(attempts) == ["small", "medium", "large"]
    assert tiers.answer(attempts).text == "forty-two"
    assert tiers.answer(attempts).confidence == pytest.approx(0.95)
    assert [a.why for a in attempts] == [
        "small, the lowest who can be asked",
        "small's 0.50 is not enough: medium, the next up",
        "medium's 0.60 is not enough: large, the next up",
    ]
    assert (
        "its confidence of 0.95 is not calibrated: it is the mean probability of its words"
        in tiers.answer(attempts).notes
    )


async def test_it_stops_at_the_first_answer_that_is_good_enough(tiers: Any) -> None:
    assert tiers.names(await tiers.climb(tiers.three(medium=tiers.reply("42", 0.9)))) == ["small", "medium"]
    assert tiers.names(await tiers.climb(tiers.three(), accept=0.5)) == ["small"]
    assert tiers.names(await tiers.climb(tiers.three(), accept=0.0)) == ["small"]


async def test_without_any_signal_it_climbs_to_the_top_and_says_so(tiers: Any) -> None:
    def mute(text: str) -> FakeBackend:
        return FakeBackend(text, capabilities=Capabilities())

    attempts = await tiers.climb(tiers.three(mute("1"), mute("2"), mute("3")))
    assert tiers.names(attempts) == ["small", "medium", "large"]
    assert attempts[1].why.startswith("nothing tells how sure small is: medium")
    assert tiers.answer(attempts).confidence is None
    assert "nothing tells how far this answer can be trusted" in tiers.answer(attempts).notes


async def test_an_explicit_ladder_is_climbed_as_given(tiers: Any) -> None:
    attempts = await tiers.climb(tiers.three(), experts=("medium", "nobody", "small"))
    assert tiers.names(attempts) == ["medium", "small"]
    attempts = await tiers.climb(tiers.three(), experts=("nobody",))
    failure = attempts[-1].outcome
    assert isinstance(failure, Failure) and failure.code == "no_expert" and "nobody: not here" in failure.message


async def test_those_on_the_same_rung_stand_in_for_each_other_and_are_not_climbed_through(tiers: Any) -> None:
    square = Square(
        [
            tiers.expert("law", tiers.reply("?", 0.3), tier=Tier.END, keywords=("law",)),
            tiers.expert("tax", tiers.reply("?", 0.3), tier=Tier.END, keywords=("tax", "income")),
            tiers.expert("top", tiers.reply("yes", 0.9), tier=Tier.CLOUD),
        ]
    )
    assert tiers.names(await tiers.climb(square, "what is the income tax?")) == ["tax", "top"]
    assert tiers.names(await tiers.climb(square, "is that the law?")) == ["law", "top"]
    square.leave("law")
    square.join(tiers.expert("law", Unavailable("down"), tier=Tier.END, keywords=("law",)))
    attempts = await tiers.climb(square, "is that the law?")
    assert tiers.names(attempts) == ["law", "tax", "top"]
    assert attempts[1].why.startswith("law failed; ")


FAILS: list[Fault] = [Unavailable("down"), BadReply("garbage")]


@pytest.mark.parametrize("fault", FAILS)
async def test_a_failed_tier_is_passed_over(tiers: Any, fault: Fault) -> None:
    attempts = await tiers.climb(tiers.three(medium=fault))
    assert tiers.names(attempts) == ["small", "medium", "large"]
    assert attempts[2].why.startswith("medium failed; small's 0.50 is not enough: large")
    assert tiers.answer(attempts).text == "forty-two"
    attempts = await tiers.climb(tiers.three(small=fault))
    assert tiers.names(attempts) == ["small", "medium", "large"]


@pytest.mark.parametrize("fault", [*FAILS, Reply("")])
async def test_where_everyone_above_fails_the_lower_answer_is_taken_and_says_so(tiers: Any, fault: Any) -> None:
    attempts = await tiers.climb(tiers.three(medium=fault, large=fault))
    assert tiers.names(attempts) == ["small", "medium", "large", "small"]
    taken = tiers.answer(attempts)
    assert taken.text == "41" and taken.confidence == pytest.approx(0.5)
    assert sum("could not be asked" in n for n in taken.notes) == 2
    assert any(n.startswith("large could not be asked: ") for n in taken.notes)
    # It was paid when it was asked, and not again.
    assert taken.usage.calls == 0 and taken.usage.cost == 0
    assert attempts[0].outcome.usage.calls == 1
    assert attempts[-1].why.startswith("large failed; small's answer is taken: ")


async def test_all_down_is_one_clear_failure(tiers: Any) -> None:
    down = Unavailable("down")
    attempts = await tiers.climb(tiers.three(down, down, down))
    assert tiers.names(attempts) == ["small", "medium", "large"]
    assert isinstance(attempts[-1].outcome, Failure) and attempts[-1].outcome.code == "unavailable"
    attempts = await tiers.climb(tiers.three(down, down, down), max_attempts=2)
    assert len(attempts) == 2


async def test_after_a_machine_failed_another_one_is_asked_first(tiers: Any) -> None:
    square = Square(
        [
            tiers.expert("small", tiers.reply("1", 0.2), node="here"),
            tiers.expert("medium", Unavailable("down"), node="far"),
            tiers.expert("big", tiers.reply("3", 0.9), node="far", tier=Tier.EDGE, price_per_mtok=2.0),
            tiers.expert("large", tiers.reply("4", 0.9), node="elsewhere"),
        ]
    )
    assert tiers.names(await tiers.climb(square)) == ["small", "medium", "large"]
    square.leave("large")
    assert tiers.names(await tiers.climb(square)) == ["small", "medium", "big"]


async def test_a_question_for_one_expert_is_asked_of_that_one_only(tiers: Any) -> None:
    pinned = Subtask(id="t1", question="what?", expert="medium")
    attempts = await tiers.climb(tiers.three(), subtask=pinned)
    assert tiers.names(attempts) == ["medium"] and tiers.answer(attempts).text == "42?"
    attempts = await tiers.climb(tiers.three(medium=Unavailable("down")), subtask=pinned)
    assert tiers.names(attempts) == ["medium"] and isinstance(attempts[-1].outcome, Failure)
    attempts = await tiers.climb(tiers.three(), subtask=Subtask(id="t1", question="what?", expert="gone"))
    failure = attempts[-1].outcome
    assert isinstance(failure, Failure) and "names expert 'gone', who cannot be asked" in failure.message
    # Also one that is not on the ladder.
    assert tiers.names(await tiers.climb(tiers.three(), subtask=pinned, experts=("small", "large"))) == ["medium"]


async def test_modality_context_and_labels_bound_the_ladder(tiers: Any) -> None:
    square = tiers.three()
    square.join(tiers.expert("eyes", tiers.reply("a cat", 0.9), tier=Tier.CLOUD, modalities=(Modality.IMAGE,)))
    image = Subtask(id="t1", question="what is it?", modality=Modality.IMAGE)
    assert tiers.names(await tiers.climb(square, subtask=image)) == ["eyes"]
    assert tiers.names(
        await tiers.climb(tiers.three(), subtask=Subtask(id="t1", question="what?", reach=Tier.EDGE))
    ) == [
        "small",
        "medium",
    ]
    assert tiers.names(
        await tiers.climb(tiers.three(), subtask=Subtask(id="t1", question="what?", reach=Tier.END))
    ) == ["small"]
