"""Whom a subtask is asked of next when a machine fails."""

from __future__ import annotations

import pytest

from agora.errors import AgoraError, BackendTimeout, BadReply, Overloaded, Rejected, Unavailable
from agora.protocols import GenerateRequest
from agora.routing import Candidate, Ranking
from agora.square import Expert, Square
from agora.types import Answer, Attempt, Budget, ExpertCard, Subtask
from experts.fake import FakeBackend, Replies
from graphs.crew import Crew
from graphs.solver import Job
from graphs.spend import Spend


class InOrder:
    """Ranks by the order in which the experts came."""

    async def rank(self, subtask: Subtask, question: str, square: Square) -> Ranking:
        return Ranking(
            candidates=tuple(
                Candidate(expert=e.name, similarity=0.5, load=0, price=0.0, score=-n) for n, e in enumerate(square)
            )
        )


def expert(name: str, node: str, replies: Replies = "yes") -> Expert:
    card = ExpertCard(name=name, description="Knows.")
    return Expert(card=card, backend=FakeBackend(replies, name=name), node=node)


async def solve(square: Square, max_attempts: int = 3) -> tuple[tuple[Attempt, ...], list[bool]]:
    lasts: list[bool] = []
    attempts = await Crew(square=square, router=InOrder(), max_attempts=max_attempts).solve(
        Job(
            subtask=Subtask(id="t1", question="what?"),
            question="what?",
            spend=Spend(Budget()),
            deadline=None,
            on_start=lambda n, expert, why: None,
            on_end=lambda n, attempt, last: lasts.append(last),
        )
    )
    return attempts, lasts


def asked(attempts: tuple[Attempt, ...]) -> list[str | None]:
    return [a.expert for a in attempts]


@pytest.mark.parametrize("error", [Unavailable("down"), BackendTimeout("late"), Overloaded("full")])
async def test_after_a_machine_failed_another_one_is_asked(error: AgoraError) -> None:
    square = Square([expert("c.law", "c", error), expert("c.tax", "c", error), expert("b.law", "b")])
    attempts, lasts = await solve(square, max_attempts=2)
    assert asked(attempts) == ["c.law", "b.law"]
    assert isinstance(attempts[-1].outcome, Answer)
    assert lasts == [False, True]


@pytest.mark.parametrize("error", [BadReply("garbage"), Rejected("no")])
async def test_a_failure_of_the_expert_alone_says_nothing_of_its_machine(error: AgoraError) -> None:
    square = Square([expert("c.law", "c", error), expert("c.tax", "c"), expert("b.law", "b")])
    assert asked((await solve(square))[0]) == ["c.law", "c.tax"]


async def test_where_there_is_no_other_machine_the_next_best_on_it_is_asked() -> None:
    down = Unavailable("down")
    square = Square([expert("c.law", "c", down), expert("c.tax", "c", down), expert("c.art", "c")])
    attempts, lasts = await solve(square)
    assert asked(attempts) == ["c.law", "c.tax", "c.art"]
    assert lasts == [False, False, True]


async def test_who_has_left_meanwhile_is_not_asked() -> None:
    square = Square()

    def leaves(request: GenerateRequest) -> str:
        square.leave("c.tax")
        raise BadReply("garbage")

    for e in (expert("c.law", "c", leaves), expert("c.tax", "c"), expert("c.art", "c")):
        square.join(e)
    assert asked((await solve(square))[0]) == ["c.law", "c.art"]


async def test_no_more_experts_are_asked_than_allowed() -> None:
    down = Unavailable("down")
    square = Square([expert(f"e{n}", f"n{n}", down) for n in range(5)])
    attempts, lasts = await solve(square, max_attempts=2)
    assert asked(attempts) == ["e0", "e1"]
    assert lasts == [False, True]
