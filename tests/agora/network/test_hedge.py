"""Second copies: their share, when they may be sent, and when everything is slow."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import InvalidRequest
from agora.network.bucket import ShareBucket
from agora.network.hedge import Hedging


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# -- The bucket


async def test_extra_requests_are_never_more_than_their_share() -> None:
    bucket = ShareBucket(0.05)
    waiting = [asyncio.ensure_future(bucket.take()) for _ in range(30)]
    for n in range(1, 401):
        bucket.fill()
        await asyncio.sleep(0)
        assert bucket.taken <= 0.05 * n + 1e-9
    await asyncio.sleep(0)
    assert bucket.taken == 20
    assert [w.done() for w in waiting] == [True] * 20 + [False] * 10, "whoever has waited longest is first"
    for w in waiting:
        w.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_what_was_taken_for_nothing_is_given_on() -> None:
    bucket = ShareBucket(0.5)
    bucket.fill()
    bucket.fill()
    await bucket.take()
    waits = asyncio.ensure_future(bucket.take())
    await asyncio.sleep(0)
    assert not waits.done()
    bucket.give_back()
    await waits
    assert bucket.taken == 1


async def test_cancelling_gives_up_the_place_even_in_the_turn_in_which_it_comes() -> None:
    bucket = ShareBucket(1.0)
    first, second = asyncio.ensure_future(bucket.take()), asyncio.ensure_future(bucket.take())
    await asyncio.sleep(0)
    bucket.fill()
    first.cancel()
    await second
    assert first.cancelled() or not first.done() or first.exception() is None
    await asyncio.gather(first, return_exceptions=True)
    assert bucket.taken == 1


async def test_a_long_quiet_time_saves_up_no_more_than_the_capacity() -> None:
    bucket = ShareBucket(0.05, capacity=3)
    for _ in range(10_000):
        bucket.fill()
    assert bucket.level == 3
    waiting = [asyncio.ensure_future(bucket.take()) for _ in range(10)]
    await asyncio.sleep(0)
    assert sum(w.done() for w in waiting) == 3
    for w in waiting:
        w.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


@given(share=st.floats(0, 1), story=st.lists(st.sampled_from("fftc"), max_size=200))
def test_the_share_holds_at_every_moment(share: float, story: list[str]) -> None:
    async def main() -> None:
        bucket, waiting = ShareBucket(share), []
        for what in story:
            if what == "f":
                bucket.fill()
            elif what == "t":
                waiting.append(asyncio.ensure_future(bucket.take()))
            elif waiting:
                waiting.pop().cancel()
            await asyncio.sleep(0)
            assert 0 <= bucket.taken <= share * bucket.asked + 1e-6
        for w in waiting:
            w.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize(("share", "capacity"), [(-0.1, 20), (1.1, 20), (float("nan"), 20), (0.5, 0), (0.5, 1e400)])
def test_numbers_out_of_range_are_refused(share: float, capacity: float) -> None:
    with pytest.raises(InvalidRequest):
        ShareBucket(share, capacity=capacity)


# -- Whether all are slow


def test_a_late_copy_among_quick_ones_is_no_slow_down_of_all() -> None:
    clock = Clock()
    hedging = Hedging(clock=clock)
    late = hedging.sent("a", 1.0)
    for _ in range(10):
        other = hedging.sent("b", 1.0)
        clock.now += 0.2
        hedging.first_token(other)
    assert hedging.late_in_s(late) == pytest.approx(-1.0)
    assert not hedging.correlated(late)


def test_when_the_others_are_late_as_well_all_are_slow() -> None:
    clock = Clock()
    hedging = Hedging(clock=clock)
    late = hedging.sent("a", 1.0)
    others = [hedging.sent("b", 1.0) for _ in range(3)]
    clock.now += 0.9
    assert not hedging.correlated(late), "who is not late yet says nothing"
    clock.now += 0.2
    assert hedging.correlated(late)
    # Late ones that came count as well, and those on the same path do not.
    hedging.first_token(others[0])
    hedging.gone(others[1])
    hedging.gone(others[2])
    assert hedging.correlated(late)
    for _ in range(5):
        same = hedging.sent("a", 1.0)
        hedging.first_token(same)
    assert hedging.correlated(late)
    # Two came in time since: it is over.
    for _ in range(2):
        hedging.first_token(hedging.sent("c", 1.0))
    assert not hedging.correlated(late)


def test_what_happened_before_it_was_sent_and_on_paths_nobody_knows_says_nothing() -> None:
    clock = Clock()
    hedging = Hedging(clock=clock)
    old = hedging.sent("b", 1.0)
    clock.now += 5
    hedging.first_token(old)
    clock.now += 1
    late, new = hedging.sent("a", 1.0), hedging.sent("b", None)
    clock.now += 2
    assert not hedging.correlated(late)
    assert hedging.late_in_s(new) is None
    hedging.first_token(new)
    assert not hedging.correlated(late)


def test_one_that_hangs_is_not_slow_for_the_reason_of_others_that_are_late() -> None:
    clock = Clock()
    hedging = Hedging(clock=clock)
    hangs = hedging.sent("a", 1.0)
    slow = hedging.sent("b", 1.0)
    clock.now += 2.0
    assert hedging.correlated(hangs)
    hedging.first_token(slow)
    clock.now += 18.0
    assert not hedging.correlated(hangs), "twenty times as late as usual, where the other was twice as late"
