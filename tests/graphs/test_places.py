"""Who gets the next place: order, cancellation, what it is by, and that whole runs go by it."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agora.errors import InvalidRequest
from agora.routing.keywords import KeywordRouter
from agora.square import Expert, Square
from agora.types import Answer, Attempt, Budget, ExpertCard, Failure, Subtask, TaskGraph, Usage
from experts.fake import FakeBackend, question_of
from graphs.crew import Crew
from graphs.direct import run_directly
from graphs.how import How
from graphs.places import SCHEDULERS, Heft, Places, Scheduler
from graphs.plan import StaticPlanner
from graphs.synthesise import SectionsSynthesiser


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_most_urgent_is_first_and_among_equals_the_first_to_come() -> None:
    places = Places(1)
    came: list[str] = []

    async def work(name: str, urgency: float) -> None:
        async with places.at(urgency):
            came.append(name)
            await asyncio.sleep(0)

    await places.acquire()
    tasks = [asyncio.create_task(work(n, u)) for n, u in (("a", 1.0), ("b", 5.0), ("c", 1.0), ("d", 5.0), ("e", 9.0))]
    await settle()
    assert (places.free, places.waiting) == (0, 5)
    places.release()
    await asyncio.gather(*tasks)
    assert came == ["e", "b", "d", "a", "c"]
    assert (places.free, places.waiting) == (1, 0)


async def test_who_is_cancelled_after_it_was_handed_a_place_passes_it_on() -> None:
    places = Places(1)
    await places.acquire()
    first, second = (asyncio.create_task(places.acquire(u)) for u in (2.0, 1.0))
    await settle()
    places.release()  # Handed to the first, which has not run since.
    first.cancel()
    await asyncio.wait([first, second])
    assert first.cancelled()
    assert second.exception() is None
    assert places.free == 0


async def test_an_error_in_the_block_gives_the_place_back() -> None:
    places = Places(1)
    with pytest.raises(ZeroDivisionError):
        async with places.at():
            raise ZeroDivisionError
    assert places.free == 1


def test_at_least_one_place() -> None:
    with pytest.raises(InvalidRequest, match="0 places"):
        Places(0)


@settings(max_examples=60, deadline=None)
@given(most=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_whatever_is_cancelled_never_are_too_many_in_and_no_place_is_lost(most: int, seed: int) -> None:
    async def play() -> None:
        rng = random.Random(seed)
        places = Places(most)
        inside = 0
        entered = 0

        async def work(urgency: float, turns: int) -> None:
            nonlocal inside, entered
            async with places.at(urgency):
                inside += 1
                entered += 1
                assert inside <= most
                try:
                    for _ in range(turns):
                        await asyncio.sleep(0)
                finally:
                    inside -= 1

        tasks = []
        for _ in range(40):
            tasks.append(asyncio.create_task(work(rng.choice([0.0, 1.0, 2.0]), rng.randrange(3))))
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
            if rng.random() < 0.4:
                rng.choice(tasks).cancel()
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5.0)
        assert all(d is None or isinstance(d, asyncio.CancelledError) for d in done)
        assert entered >= sum(d is None for d in done)
        assert (inside, places.free, places.waiting) == (0, most, 0)

    asyncio.run(play())


def chain(prefix: str, many: int, expert: str) -> list[Subtask]:
    return [
        Subtask(
            id=f"{prefix}{n}",
            question=f"{prefix}{n}?",
            inputs=(f"{prefix}{n - 1}",) if n else (),
            expert=expert,
            max_tokens=10,
        )
        for n in range(many)
    ]


def square(backend: FakeBackend) -> Square:
    cards = [ExpertCard(name=n, description=n, max_tokens=100) for n in ("slow", "quick")]
    return Square([Expert(card=c, backend=backend) for c in cards])


def answered(expert: str, tokens: int, seconds: float) -> Attempt:
    outcome = Answer(text="x", expert=expert, usage=Usage(completion_tokens=tokens, calls=1))
    return Attempt(expert=expert, why="", outcome=outcome, started_at=0.0, seconds=seconds)


def test_urgency_is_the_longest_way_to_the_end_at_the_pace_that_was_seen() -> None:
    heft = Heft(square(FakeBackend()))
    graph = TaskGraph((*chain("a", 3, "quick"), *chain("b", 1, "slow")))
    before = heft.urgencies(graph)
    assert before["a0"] > before["a1"] > before["a2"] == before["b0"]
    for _ in range(5):
        heft.saw(answered("quick", 10, 0.1))
        heft.saw(answered("slow", 10, 10.0))
    after = heft.urgencies(graph)
    assert after["a0"] == pytest.approx(0.3)
    assert after["b0"] == pytest.approx(10.0), "one subtask of the slow one takes longer than three of the quick"
    heft.saw(Attempt(expert="slow", why="", outcome=Failure(code="x", message="x"), started_at=0.0, seconds=1e6))
    assert heft.urgencies(graph) == after, "a failure tells nothing of how fast an answer is"


def test_latest_ends_leave_time_for_what_comes_after() -> None:
    heft = Heft(square(FakeBackend()))
    ends = heft.sub_deadlines(TaskGraph((*chain("a", 4, "quick"), *chain("b", 1, "quick"))), 8.0)
    assert [ends[f"a{n}"] for n in range(4)] == pytest.approx([2.0, 4.0, 6.0, 8.0])
    assert ends["b0"] == 8.0
    with pytest.raises(InvalidRequest, match="deadline_s"):
        heft.sub_deadlines(TaskGraph(tuple(chain("a", 1, "quick"))), 0.0)


@pytest.mark.looptime
@pytest.mark.parametrize(("name", "seconds"), [("fifo", 5.0), ("heft", 4.0)])
async def test_a_run_asks_the_longest_way_first(name: str, seconds: float) -> None:
    """Two places; five subtasks alone, and three in a chain that stands last: it must begin first to end soonest."""
    backend = FakeBackend("answer", latency=1.0)
    here = square(backend)
    alone = [Subtask(id=f"b{n}", question=f"b{n}?", expert="quick", max_tokens=10) for n in range(5)]
    graph = TaskGraph((*alone, *chain("a", 3, "quick")))
    scheduler: Scheduler = SCHEDULERS[name](here)
    how = How(
        crew=Crew(square=here, router=KeywordRouter()),
        planner=StaticPlanner(graph),
        synthesiser=SectionsSynthesiser(),
        budget=Budget(),
        max_parallel=2,
        scheduler=scheduler,
    )
    result = await run_directly(how, {"question": "all of it?"}, "run", lambda event: None)
    assert result.complete
    assert result.seconds == pytest.approx(seconds, abs=0.05)
    first = question_of(next(r for r in backend.requests if hasattr(r, "max_tokens")))
    assert ("a0" in first) == (name == "heft")
