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
    assert bucket.taken == 19, "eleven need 220 requests, so one less than the twenty of 400"
    assert [w.done() for w in waiting] == [True] * 19 + [False] * 11, "whoever has waited longest is first"
    for w in waiting:
        w.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_what_was_taken_for_nothing_is_given_on() -> None:
    bucket = ShareBucket(0.5)
    bucket.fill()
    bucket.fill()
    place = await bucket.take()
    waits = asyncio.ensure_future(bucket.take())
    await asyncio.sleep(0)
    assert not waits.done()
    bucket.give_back(place)
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


async def test_what_is_taken_at_once_is_taken_from_the_same_share() -> None:
    bucket = ShareBucket(0.5)
    assert not bucket.take_now()
    bucket.fill()
    bucket.fill()
    assert bucket.take_now() and not bucket.take_now()
    waits = asyncio.ensure_future(bucket.take())
    await asyncio.sleep(0)
    bucket.fill()
    bucket.fill()
    assert not bucket.take_now(), "it is whose turn it was"
    await waits
    assert bucket.taken == 2


async def test_a_long_quiet_time_saves_up_no_more_than_the_capacity() -> None:
    bucket = ShareBucket(0.05, capacity=3)
    for _ in range(10_000):
        bucket.fill()
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


@given(
    share=st.floats(0.02, 1),
    capacity=st.integers(1, 6),
    story=st.lists(st.sampled_from("fffffffffttcg"), max_size=300),
)
def test_the_share_holds_in_every_stretch_that_is_long_enough(share: float, capacity: int, story: list[str]) -> None:
    async def main() -> None:
        bucket, waiting = ShareBucket(share, capacity=capacity), []
        for what in story:
            if what == "f":
                bucket.fill()
            elif what == "t":
                waiting.append(asyncio.ensure_future(bucket.take()))
            elif what == "c" and waiting and not waiting[-1].done():
                waiting.pop().cancel()
            elif what == "g" and (taken := [w for w in waiting if w.done() and not w.cancelled()]):
                waiting.remove(taken[-1])
                bucket.give_back(taken[-1].result())
            await asyncio.sleep(0)
        places = [w.result() for w in waiting if w.done() and not w.cancelled()]
        assert len(places) == bucket.taken
        # Counted out: every stretch of requests, from its first to its last one.
        for first in range(1, bucket.asked + 1):
            for last in range(first, bucket.asked + 1):
                extra = sum(first <= p <= last for p in places)
                assert extra <= max(capacity, share * (last - first + 1) + 1e-6)
        for w in waiting:
            w.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(main())


async def test_no_stretch_of_two_hundred_requests_has_more_than_ten_second_copies() -> None:
    bucket = ShareBucket(0.05)
    for _ in range(5_000):
        bucket.fill()
    # Everything slows down: whatever comes wants a second copy.
    waiting = []
    for _ in range(1_000):
        waiting.append(asyncio.ensure_future(bucket.take()))
        bucket.fill()
        await asyncio.sleep(0)
    places = [w.result() for w in waiting if w.done()]
    assert places[9] == 5_000 + 10, "ten at once"
    assert 40 <= len(places) <= 50
    for length in (200, 250, 400, 1_000):
        most = max(sum(a <= p < a + length for p in places) for a in range(5_000, 6_001 - length))
        assert most <= 0.05 * length
    for w in waiting:
        w.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize(("share", "capacity"), [(-0.1, 20), (1.1, 20), (float("nan"), 20), (0.5, 0), (0.5, -1)])
def test_numbers_out_of_range_are_refused(share: float, capacity: int) -> None:
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


def test_who_leaves_for_a_path_that_makes_everybody_wait_waits_there_too() -> None:
    clock = Clock()
    hedging = Hedging(clock=clock)
    # It had slow times before, so that five seconds are within its own percentile.
    for _ in range(20):
        hedging.sent("b", 5.0)
    late = hedging.sent("a", 0.2)
    clock.now += 2.0
    assert not hedging.correlated(late), "a second copy may find it quick"
    assert hedging.correlated(late, leaving=True)
    for _ in range(25):
        hedging.first_token(hedging.sent("b", 5.0))
    assert not hedging.correlated(late, leaving=True), "others are answered there at once"


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
