"""Climbing while experts and what is known of them come and go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agora.routing.cascade.policy import Query
from agora.square import Expert
from agora.types import Answer, Attempt, Failure, Tier
from experts.fake import Reply
from graphs.climbing import Climbing
from graphs.experience import Experience
from graphs.guidance import Guidance, Known


def test_an_answer_of_someone_who_has_left_is_better_than_none(tiers: Any) -> None:
    # As when a run goes on that was interrupted, and the others fail.
    (medium,) = (e for e in tiers.three() if e.name == "medium")
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


async def test_what_is_known_is_looked_up_again_when_someone_joins(tiers: Any) -> None:
    square = tiers.three()
    asked: list[list[str]] = []

    def load(here: Sequence[Expert]) -> Known:
        asked.append([e.name for e in here])
        return tiers.Told({e.name: lambda signals: 0.1 for e in here})

    crew = tiers.climber(square, trust=load)
    await tiers.climb(square, crew=crew)
    await tiers.climb(square, crew=crew)
    assert len(asked) == 1
    square.join(tiers.expert("huge", tiers.reply("42", 0.9), tier=Tier.CLOUD, price_per_mtok=99.0))
    attempts = await tiers.climb(square, crew=crew)
    assert len(asked) == 2 and tiers.names(attempts)[-1] == "huge"


async def test_what_cannot_be_read_is_as_if_it_were_not_there(tiers: Any) -> None:
    def load(here: Sequence[Expert]) -> Known:
        raise OSError("disk on fire")

    crew = tiers.climber(tiers.three(), trust=load)
    assert tiers.names(await tiers.climb(tiers.three(), crew=crew)) == ["small", "medium", "large"]
    assert "what was calibrated cannot be read: OSError: disk on fire" in crew.notes


async def test_who_left_meanwhile_is_passed_over(tiers: Any) -> None:
    square = tiers.three()

    def leaves(request: Any) -> Reply:
        square.leave("medium")
        return tiers.reply("41", 0.5)

    square.leave("small")
    square.join(tiers.expert("small", leaves))
    attempts = await tiers.climb(square)
    assert tiers.names(attempts) == ["small", "medium", "large"]
    assert isinstance(attempts[1].outcome, Failure) and "has left" in attempts[1].outcome.message
