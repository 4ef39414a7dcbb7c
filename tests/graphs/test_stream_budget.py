"""The budget for all questions together holds, whatever is in flight at the same time."""

from __future__ import annotations

import asyncio
import math
import random
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from looptime import new_event_loop

from agora.errors import BudgetExceeded, InvalidRequest
from agora.square import Expert, Square
from agora.types import Answer, Budget, ExpertCard, Failure, RunResult, Tier, Usage
from experts.fake import FakeBackend, Reply
from graphs import run, vertical
from graphs.experience import Experience
from graphs.spend import Spend
from graphs.stream_budget import StreamBudget

CARD = ExpertCard(name="one", description="one", price_per_mtok=1e6, max_tokens=50)


async def call(stream: StreamBudget, seconds: float, usage: Usage | None = None, spend: Spend | None = None) -> str:
    """One call of that length; says how it ended."""
    joined = stream.joined_by(spend or Spend(Budget()))
    try:
        async with joined.grant(CARD, 10, None):
            await asyncio.sleep(seconds)
            joined.add(usage or Usage())
    except BudgetExceeded as e:
        return e.message
    return "done"


@pytest.mark.looptime
async def test_the_last_call_may_go_over_and_none_after_it() -> None:
    stream = StreamBudget(seconds=10.0)
    assert await call(stream, 8.0) == "done"
    assert await call(stream, 8.0) == "done"
    assert stream.seconds_spent == pytest.approx(16.0)
    assert "10 seconds of answering that all questions may take are used up" in await call(stream, 1.0)
    assert stream.seconds_spent == pytest.approx(16.0)


@pytest.mark.looptime
async def test_of_calls_at_the_same_time_only_the_oldest_goes_over() -> None:
    stream = StreamBudget(seconds=9.0)
    ends = await asyncio.gather(*(call(stream, 8.0) for _ in range(3)))
    # After 3 s the three have used 9 s up together; two are broken off, the oldest goes on to its 8th second.
    assert ends[0] == "done" and all("used up" in e for e in ends[1:])
    assert stream.seconds_spent == pytest.approx(8 + 3 + 3)


@pytest.mark.looptime
async def test_calls_wait_for_others_where_what_is_expected_leaves_no_room() -> None:
    experience = Experience()
    stream = StreamBudget(seconds=20.0, experience=experience)
    experience.saw(Answer(text="42", expert="one", usage=Usage(calls=1)), 8.0)
    started = asyncio.get_running_loop().time()
    ends = await asyncio.gather(*(call(stream, 8.0) for _ in range(3)))
    # Two fit at once; the third begins when one has ended, as the last.
    assert ends == ["done"] * 3
    assert asyncio.get_running_loop().time() - started == pytest.approx(16.0)
    assert stream.seconds_spent == pytest.approx(24.0)


@pytest.mark.looptime
async def test_a_cancelled_call_gives_its_place_up() -> None:
    stream = StreamBudget(seconds=10.0, cost=1000.0)
    working = asyncio.create_task(call(stream, 100.0))
    await asyncio.sleep(2.0)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert stream.seconds_left == pytest.approx(8.0)
    assert stream.cost_left == 1000.0
    assert await call(stream, 1.0) == "done"


@pytest.mark.looptime
async def test_money_is_set_aside_over_all_runs() -> None:
    stream = StreamBudget(cost=2.5 * 94)  # a call costs at most its prompt's 44 tokens and 50 more, at 1 each
    ends = await asyncio.gather(*(call(stream, 1.0, Usage(cost=94.0)) for _ in range(4)))
    assert ends.count("done") == 3  # the third with what is left of the answer's tokens
    assert any("the budget for all questions is used up" in e for e in ends)


async def test_a_run_keeps_to_its_own_budget_too() -> None:
    stream = StreamBudget(cost=1e9)
    assert "is left and asking" in await call(stream, 0.0, spend=Spend(Budget(cost=10.0)))
    spend = Spend(Budget())
    assert stream.joined_by(spend) is stream.joined_by(spend)
    await call(stream, 0.0, Usage(cost=5.0), spend=spend)
    assert spend.spent.cost == stream.spent.cost == 5.0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_limits_must_be_positive_numbers(bad: float) -> None:
    with pytest.raises(InvalidRequest, match="stream_seconds"):
        StreamBudget(seconds=bad)
    with pytest.raises(InvalidRequest):
        StreamBudget(cost=bad)


CALLS = st.lists(
    st.tuples(
        st.floats(0, 5),  # when it is asked
        st.floats(0, 8),  # seconds that it takes
        st.integers(0, 1200),  # characters of the prompt
        st.floats(0, 1),  # of the most that it can cost
        st.sampled_from([0.0, 1.0, 20.0]),  # price
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(calls=CALLS, cost=st.floats(1, 20_000), seconds=st.floats(0.5, 40))
def test_neither_money_nor_seconds_go_over_by_more_than_the_last_call(
    calls: list[tuple[float, float, int, float, float]], cost: float, seconds: float
) -> None:
    async def one(stream: StreamBudget, at: float, takes: float, chars: int, share: float, price: float) -> float:
        card = ExpertCard(name=f"p{price:g}", description="one", price_per_mtok=price * 1e6, max_tokens=50)
        await asyncio.sleep(at)
        spend = stream.joined_by(Spend(Budget()))
        true = 0.0
        try:
            async with spend.grant(card, chars, None) as most:
                await asyncio.sleep(takes)
                true = share * card.cost_of(4 * chars + 40 + most)
                spend.add(Usage(cost=true, calls=1))
        except BudgetExceeded:
            return 0.0
        return true

    async def everything() -> None:
        stream = StreamBudget(cost=cost, seconds=seconds)
        paid = await asyncio.gather(*(one(stream, *c) for c in calls))
        assert stream.spent.cost <= cost + max(paid) + 1e-6
        assert stream.seconds_spent <= seconds + max(takes for _, takes, *_ in calls) + 1e-6

    with closing(new_event_loop()) as loop:
        loop.run_until_complete(everything())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    questions=st.integers(1, 12),
    cost=st.one_of(st.none(), st.floats(10, 3000)),
    seconds=st.one_of(st.none(), st.floats(0.5, 60)),
)
def test_runs_at_the_same_time_keep_within_it_together(
    seed: int, questions: int, cost: float | None, seconds: float | None
) -> None:
    rng = random.Random(seed)
    longest = 0.0

    def expert(name: str, tier: Tier, price: float) -> Expert:
        def reply(request: object) -> Reply:
            nonlocal longest
            latency = rng.uniform(0, 6)
            longest = max(longest, latency)
            return Reply("yes it is", latency=latency, logprobs=(math.log(rng.uniform(0.2, 1)),) * 3)

        card = ExpertCard(name=name, description=name, tier=tier, price_per_mtok=price * 1e6, max_tokens=30)
        return Expert(card=card, backend=FakeBackend(reply, name=name))

    square = Square([expert("small", Tier.END, 0.0), expert("big", Tier.EDGE, 1.0), expert("huge", Tier.CLOUD, 9.0)])
    stream = StreamBudget(cost=cost, seconds=seconds)
    graph = vertical(square, stream=stream)

    async def everything() -> list[RunResult]:
        async def one(n: int) -> RunResult:
            await asyncio.sleep(rng.uniform(0, 10))
            return await run(graph, f"Is this question {n}?")

        return await asyncio.gather(*(one(n) for n in range(questions)))

    with closing(new_event_loop()) as loop:
        results = loop.run_until_complete(everything())
    calls = [a.outcome.usage for r in results for many in r.attempts.values() for a in many]
    if cost is not None:
        assert stream.spent.cost <= cost + max(u.cost for u in calls) + 1e-6
    if seconds is not None:
        assert stream.seconds_spent <= seconds + longest + 0.5
    # What the runs say was spent is what the stream has counted.
    assert sum(r.usage.cost for r in results) == pytest.approx(stream.spent.cost)
    for r in results:
        for name in r.missing:
            failure = r.outcome(name)
            assert isinstance(failure, Failure) and failure.code == "budget"


async def test_the_budget_of_a_run_too_is_exceeded_by_the_last_call_at_most_however_long_prompts_turn_out() -> None:
    spend = Spend(Budget(cost=1_000.0))
    used: list[float] = []

    async def call_once() -> None:
        try:
            async with spend.grant(CARD, 60, None):
                await asyncio.sleep(0)
                # 60 characters that are four tokens each, and not the 21 tokens in all that were thought.
                usage = Usage(prompt_tokens=240, completion_tokens=50, cost=CARD.cost_of(290), calls=1)
                used.append(usage.cost)
                spend.add(usage)
        except BudgetExceeded:
            pass

    await asyncio.gather(*(call_once() for _ in range(20)))
    assert spend.spent.cost - used[-1] <= 1_000.0 < spend.spent.cost + CARD.cost_of(290)


async def test_calls_for_which_there_is_money_whatever_their_prompts_are_made_at_the_same_time() -> None:
    spend = Spend(Budget(cost=100_000.0))
    running = most = 0

    async def call_once() -> None:
        nonlocal running, most
        async with spend.grant(CARD, 60, None):
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1

    await asyncio.gather(*(call_once() for _ in range(20)))
    assert most == 20
