"""Identical questions in flight are asked once; answers are kept only where that is wanted and safe."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import looptime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agora.errors import BadReply, InvalidRequest, Unavailable
from agora.network.multipath import MultipathBackend
from agora.network.path import Link, Path, Technology
from agora.network.ways import Way
from agora.square import Expert
from agora.types import AdapterRef, Answer, Attempt, Budget, ExpertCard, Failure, Outcome, Subtask, Tier, Usage
from experts.fake import FakeBackend, Reply, question_of
from graphs.call import After
from graphs.crew import ask_expert
from graphs.departure import Departure, Redactor
from graphs.once import ENTRY_BYTES, Once
from graphs.spend import Spend

ONE = Subtask(id="t1", question="why?")


def expert(backend: Any, name: str = "wise", **more: Any) -> Expert:
    card = more.pop("card", None) or ExpertCard(name=name, description="Knows.", price_per_mtok=1e6)
    return Expert(card=card, backend=backend, **more)


async def ask(
    once: Once | None,
    who: Expert,
    text: str = "why?",
    *,
    spend: Spend | None = None,
    seconds: float | None = None,
    subtask: Subtask = ONE,
    after: After | None = None,
    asker: str | None = None,
) -> Attempt:
    deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
    return await ask_expert(
        who,
        subtask,
        text,
        why="",
        spend=spend or Spend(Budget()),
        deadline=deadline,
        once=once,
        after=after,
        asker=asker,
    )


def text_of(outcome: Outcome) -> str:
    assert isinstance(outcome, Answer), outcome
    return outcome.text


def asked(backend: FakeBackend) -> int:
    return len(backend.calls)


@pytest.mark.looptime
async def test_identical_questions_at_the_same_time_are_asked_once_and_paid_once() -> None:
    backend = FakeBackend("because", latency=1.0)
    once, who = Once(), expert(backend)
    purses = [Spend(Budget()) for _ in range(5)]
    many = await asyncio.gather(*(ask(once, who, spend=s) for s in purses))
    assert asked(backend) == 1
    assert [text_of(a.outcome) for a in many] == ["because"] * 5
    assert [s.spent.calls for s in purses] == [1, 0, 0, 0, 0]
    assert many[0].outcome.usage == purses[0].spent and purses[0].spent.cost > 0
    assert many[1].outcome.usage == Usage()
    assert isinstance(many[1].outcome, Answer) and "identical question" in many[1].outcome.notes[0]
    assert isinstance(many[0].outcome, Answer) and many[0].outcome.notes == ()
    assert (once.made, once.joined, once.in_flight) == (1, 4, 0)


@pytest.mark.looptime
async def test_one_after_the_other_they_are_asked_again() -> None:
    backend = FakeBackend("because")
    once, who = Once(), expert(backend)
    await ask(once, who)
    await ask(once, who)
    assert asked(backend) == 2


DIFFERENT: dict[str, Callable[[FakeBackend], tuple[Expert, str, Subtask]]] = {
    "text": lambda b: (expert(b), "why not?", ONE),
    "expert": lambda b: (expert(b, "other"), "why?", ONE),
    "node": lambda b: (expert(b, node="far"), "why?", ONE),
    "backend": lambda b: (expert(FakeBackend("because", latency=1.0)), "why?", ONE),
    "adapter": lambda b: (expert(b, adapter=AdapterRef(name="a", version=2)), "why?", ONE),
    "prompt": lambda b: (expert(b, system_prompt="Be brief."), "why?", ONE),
    "alternatives": lambda b: (expert(b, alternatives=5), "why?", ONE),
    "limit": lambda b: (expert(b), "why?", replace(ONE, max_tokens=3)),
    "label": lambda b: (expert(b), "why?", replace(ONE, reach=Tier.END)),
}


@pytest.mark.looptime
@pytest.mark.parametrize("what", DIFFERENT)
async def test_what_differs_in_anything_is_asked_by_itself(what: str) -> None:
    backend = FakeBackend("because", latency=1.0, adapters=["a@v1", "a@v2"])
    once = Once()
    who, text, subtask = DIFFERENT[what](backend)
    await asyncio.gather(ask(once, expert(backend)), ask(once, who, text, subtask=subtask))
    assert (once.made, once.joined) == (2, 0)


@pytest.mark.looptime
async def test_two_askers_share_nothing_in_flight_and_nothing_kept() -> None:
    backend = FakeBackend("because", latency=1.0)
    once, who = Once(cache_entries=10), expert(backend)
    loop = asyncio.get_running_loop()
    many = await asyncio.gather(*(ask(once, who, asker=a) for a in ("ann", "ben", "ann", None)))
    assert (once.made, once.joined, once.kept) == (3, 1, 3)
    assert [len(a.outcome.notes) for a in many if isinstance(a.outcome, Answer)] == [0, 0, 1, 0]
    # What was asked by somebody else takes as long as what nobody has asked.
    for asker, seconds in (("cy", 1.0), ("ben", 0.0), (None, 0.0), ("ann", 0.0)):
        began = loop.time()
        assert text_of((await ask(once, who, asker=asker)).outcome) == "because"
        assert loop.time() - began == seconds
    assert asked(backend) == 4


@pytest.mark.looptime
async def test_who_wants_signals_does_not_have_an_answer_without_them() -> None:
    def wanting(*signals: str) -> After:
        async def do(text: str, answer: Answer) -> Answer:
            return replace(answer, signals=dict.fromkeys(signals, 0.5))

        return After(what=frozenset(signals), do=do)

    for cache_entries in (0, 10):
        backend = FakeBackend("because", latency=1.0)
        once, who = Once(cache_entries=cache_entries), expert(backend)
        wanted = (None, wanting("p_true"), wanting("p_true", "verbalised"), wanting("verbalised", "p_true"))
        many = await asyncio.gather(*(ask(once, who, after=a) for a in wanted))
        got = [sorted(a.outcome.signals) for a in many if isinstance(a.outcome, Answer)]
        assert got[1:] == [["p_true"], ["p_true", "verbalised"], ["p_true", "verbalised"]]
        assert (once.made, once.joined) == (3, 1)
        again = await ask(once, who, after=wanting("p_true"))
        assert isinstance(again.outcome, Answer) and list(again.outcome.signals) == ["p_true"]
        assert once.found == (1 if cache_entries else 0)


@pytest.mark.looptime
async def test_an_answer_that_fell_short_of_the_leaders_means_is_its_own() -> None:
    async def short(text: str, answer: Answer) -> Answer:
        return replace(answer, limited=True)

    async def whole(text: str, answer: Answer) -> Answer:
        return answer

    backend = FakeBackend("because", latency=1.0)
    once, who = Once(cache_entries=10), expert(backend)
    many = await asyncio.gather(*(ask(once, who, after=After(what=1, do=do)) for do in (short, whole)))
    assert [a.outcome.limited for a in many if isinstance(a.outcome, Answer)] == [True, False]
    assert asked(backend) == 2 and once.kept == 1


@pytest.mark.looptime
async def test_sampled_answers_are_never_shared() -> None:
    backend = FakeBackend("because", latency=1.0)
    once, who = Once(cache_entries=10), expert(backend, temperature=0.7)
    await asyncio.gather(ask(once, who), ask(once, who))
    await ask(once, who)
    assert asked(backend) == 3
    assert once.kept == 0


@pytest.mark.looptime
async def test_the_work_goes_on_when_the_leader_is_cancelled() -> None:
    backend = FakeBackend("because", latency=2.0)
    once, who = Once(), expert(backend)
    purse = Spend(Budget())
    leader = asyncio.create_task(ask(once, who, spend=purse))
    await asyncio.sleep(0.5)
    follower = asyncio.create_task(ask(once, who))
    await asyncio.sleep(0.5)
    leader.cancel()
    assert text_of((await follower).outcome) == "because"
    assert leader.cancelled()
    assert [c.outcome for c in backend.calls] == ["done"]
    assert purse.spent.calls == 1, "the run that asked pays"
    assert asyncio.get_running_loop().time() == 2.0


@pytest.mark.looptime
async def test_when_the_last_one_leaves_the_work_is_cancelled_before_they_go_on() -> None:
    backend = FakeBackend("because", latency=100.0)
    once, who = Once(), expert(backend)
    many = [asyncio.create_task(ask(once, who)) for _ in range(3)]
    await asyncio.sleep(1)
    for n, task in enumerate(many):
        assert backend.calls[0].outcome != "cancelled", n
        task.cancel()
        await asyncio.wait([task])
    assert backend.calls[0].outcome == "cancelled"
    assert once.in_flight == 0


@pytest.mark.looptime
async def test_who_comes_after_the_last_one_left_starts_anew() -> None:
    backend = FakeBackend([Reply("never", latency=100.0), Reply("because", latency=1.0)])
    once, who = Once(), expert(backend)
    first = asyncio.create_task(ask(once, who))
    await asyncio.sleep(1)
    first.cancel()
    await asyncio.wait([first])
    assert text_of((await ask(once, who)).outcome) == "because"


@pytest.mark.looptime
async def test_every_waiter_keeps_its_own_deadline() -> None:
    backend = FakeBackend("because", latency=5.0)
    once, who = Once(), expert(backend)
    began = asyncio.get_running_loop().time()
    leader = asyncio.create_task(ask(once, who, seconds=30))
    await asyncio.sleep(1)
    hasty = await ask(once, who, seconds=2)
    assert isinstance(hasty.outcome, Failure) and hasty.outcome.code == "deadline"
    assert hasty.outcome.usage == Usage()
    assert asyncio.get_running_loop().time() == began + 3
    assert text_of((await leader).outcome) == "because"


@pytest.mark.looptime
async def test_when_the_leaders_time_is_up_the_others_get_their_answer_all_the_same() -> None:
    backend = FakeBackend("because", latency=5.0)
    once, who = Once(), expert(backend)
    leader = asyncio.create_task(ask(once, who, seconds=2))
    await asyncio.sleep(0)
    patient = asyncio.create_task(ask(once, who, seconds=60))
    late = (await leader).outcome
    assert isinstance(late, Failure) and late.code == "deadline"
    assert text_of((await patient).outcome) == "because"


@pytest.mark.looptime
async def test_a_backend_that_was_told_the_leaders_time_is_asked_anew_by_those_with_more() -> None:
    # A remote one stops by itself at the time it was told, which is the leader's.
    backend = FakeBackend([Reply("late", latency=5.0), Reply("because", latency=1.0)])
    once, who = Once(), expert(backend)
    purse = Spend(Budget())
    many = await asyncio.gather(ask(once, who, seconds=2), ask(once, who, seconds=60, spend=purse))
    assert isinstance(many[0].outcome, Failure)
    assert text_of(many[1].outcome) == "because"
    assert purse.spent.calls == 1


@pytest.mark.looptime
async def test_a_deadline_counts_what_was_read_once() -> None:
    backend = FakeBackend("because", latency=5.0)
    once, who = Once(), expert(backend)
    purse, other = Spend(Budget()), Spend(Budget())
    many = await asyncio.gather(ask(once, who, seconds=2, spend=purse), ask(once, who, seconds=1, spend=other))
    assert [a.outcome.usage.calls for a in many] == [1, 0]
    assert purse.spent == many[0].outcome.usage
    assert other.spent == Usage()
    assert backend.calls[0].outcome == "cancelled"


@pytest.mark.looptime
@pytest.mark.parametrize("error", [Unavailable("down"), BadReply("garbage")])
async def test_a_failure_reaches_those_who_waited_and_nobody_after(error: Exception) -> None:
    backend = FakeBackend([error, Reply("because")], latency=1.0)
    once, who = Once(cache_entries=4), expert(backend)
    many = await asyncio.gather(*(ask(once, who) for _ in range(3)))
    assert {type(a.outcome) for a in many} == {Failure}
    assert asked(backend) == 1
    assert [a.outcome.usage.calls for a in many[1:]] == [0, 0]
    assert text_of((await ask(once, who)).outcome) == "because"


@pytest.mark.looptime
async def test_a_follower_is_not_held_to_the_leaders_budget() -> None:
    backend = FakeBackend("one two three four five six", latency=1.0)
    once, who = Once(), expert(backend)
    poor, rich = Spend(Budget(tokens=45)), Spend(Budget())
    many = await asyncio.gather(ask(once, who, spend=poor), ask(once, who, spend=rich))
    first, second = many[0].outcome, many[1].outcome
    assert isinstance(first, Answer) and "cut short" in first.notes[0]
    assert text_of(second) == "one two three four five six"
    broke = Spend(Budget(tokens=5))
    many = await asyncio.gather(ask(once, who, spend=broke), ask(once, who, spend=rich))
    assert isinstance(many[0].outcome, Failure) and many[0].outcome.code == "budget"
    assert text_of(many[1].outcome) == "one two three four five six"


@pytest.mark.looptime
async def test_followers_reserve_nothing() -> None:
    backend = FakeBackend("because", latency=1.0)
    once, who = Once(), expert(backend)
    # Room for one worst case: the second would have to wait for the first, were it to reserve its own.
    purse = Spend(Budget(tokens=310))
    began = asyncio.get_running_loop().time()
    many = await asyncio.gather(ask(once, who, spend=purse), ask(once, who, spend=purse))
    assert [text_of(a.outcome) for a in many] == ["because"] * 2
    assert asyncio.get_running_loop().time() == began + 1
    assert asked(backend) == 1


@pytest.mark.looptime
async def test_a_backend_that_drops_its_work_is_a_failure_of_all() -> None:
    def drop(request: Any) -> str:
        raise asyncio.CancelledError

    once, who = Once(), expert(FakeBackend(drop))
    many = await asyncio.gather(ask(once, who), ask(once, who))
    assert [a.outcome.code for a in many if isinstance(a.outcome, Failure)] == ["unavailable"] * 2


STEPS = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from("aab"), st.one_of(st.none(), st.integers(1, 40)), st.integers(0, 60)),
    min_size=1,
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, failing=st.booleans())
def test_in_a_storm_of_cancellations_nobody_waits_in_vain_and_nothing_is_left_running(
    steps: list[tuple[int, str, int | None, int]], failing: bool
) -> None:
    """Askers come at random, leave at random, have random deadlines; every third call fails."""

    async def storm() -> None:
        backend = FakeBackend(
            lambda request: f"to {question_of(request)}",
            latency=1.0,
            failures=lambda call: BadReply("garbage") if failing and (call.index or 0) % 3 == 2 else None,
        )
        once, who = Once(), expert(backend)
        loop = asyncio.get_running_loop()
        purses: list[Spend] = []

        async def one(comes: int, text: str, deadline: int | None, leaves: int) -> Attempt | None:
            await asyncio.sleep(comes / 10 + 0.001)
            purse = Spend(Budget())
            purses.append(purse)
            task = asyncio.create_task(
                ask(once, who, text, spend=purse, seconds=None if deadline is None else deadline / 10)
            )
            began = loop.time()
            await asyncio.wait([task], timeout=leaves / 10 + 0.0005)
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()
                return None
            assert deadline is None or loop.time() <= began + deadline / 10 + 1e-6
            return task.result()

        for (_, text, _, _), attempt in zip(steps, await asyncio.gather(*(one(*s) for s in steps)), strict=True):
            if attempt is None:
                continue
            outcome = attempt.outcome
            if isinstance(outcome, Answer):
                assert outcome.text == f"to {text}"
            else:
                assert outcome.code in ("deadline", "bad_reply")
        assert once.in_flight == 0
        assert {c.outcome for c in backend.calls} <= {"done", "failed", "cancelled"}, "nothing is left running"
        # Two calls for the same text never ran at the same time, and every answer was paid by exactly one run.
        for text in "ab":
            calls = [c for c in backend.calls if c.request is not None and question_of(c.request) == text]
            spans = sorted((c.asked_s, c.ended_s or 0.0) for c in calls)
            assert all(end <= begin + 1e-9 for (_, end), (begin, _) in pairwise(spans))
        done = sum(c.outcome == "done" for c in backend.calls)
        assert done <= sum(p.spent.calls for p in purses) <= len(backend.calls)

    loop = looptime.new_event_loop()
    try:
        loop.run_until_complete(storm())
    finally:
        loop.close()


def lasting(backend: Any, **more: Any) -> Expert:
    return expert(backend, adapter=AdapterRef(name="law", version=1), **more)


async def test_kept_answers_cost_nothing_and_say_where_they_are_from() -> None:
    backend = FakeBackend("because", adapters=["law@v1"])
    once, who, purse = Once(cache_entries=10), lasting(backend), Spend(Budget())
    await ask(once, who)
    again = (await ask(once, who, spend=purse)).outcome
    assert asked(backend) == 1
    assert isinstance(again, Answer)
    assert (again.text, again.usage, again.adapter) == ("because", Usage(), "law@v1")
    assert "from the cache" in again.notes[0]
    assert purse.spent == Usage()
    once.forget()
    await ask(once, who)
    assert asked(backend) == 2


async def test_nothing_is_kept_by_default() -> None:
    once, who = Once(), expert(FakeBackend("because"))
    await ask(once, who)
    assert once.kept == 0


async def test_another_adapter_version_or_another_model_is_never_served_what_is_stale() -> None:
    once = Once(cache_entries=10)
    backend = FakeBackend(lambda r: f"by {r.adapter}", adapters=["law@v1", "law@v2"])
    assert text_of((await ask(once, lasting(backend))).outcome) == "by law@v1"
    newer = expert(backend, adapter=AdapterRef(name="law", version=2))
    assert text_of((await ask(once, newer)).outcome) == "by law@v2"
    other = FakeBackend("by another model", adapters=["law@v1"])
    assert text_of((await ask(once, lasting(other))).outcome) == "by another model"


async def test_a_backend_that_is_gone_is_not_held_nor_mistaken_for_the_one_in_its_place() -> None:
    once = Once(cache_entries=10)
    gone = []
    for n in range(20):  # sooner or later a new one gets the address of an old one
        backend = FakeBackend(f"model {n}")
        assert text_of((await ask(once, expert(backend))).outcome) == f"model {n}"
        gone.append(weakref.ref(backend))
        del backend
    gc.collect()
    assert not any(backend() for backend in gone)


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0.5},
        {"adapter": AdapterRef(name="law")},
    ],
)
async def test_what_may_come_out_otherwise_is_not_kept(more: dict[str, Any]) -> None:
    once = Once(cache_entries=10)
    await ask(once, expert(FakeBackend("because", adapters=["law@v1"]), **more))
    assert once.kept == 0


async def test_what_another_node_answers_on_one_of_several_ways_is_not_kept() -> None:
    class Neighbour(FakeBackend):
        relays = True

    link = Link(name="l", source="here", target="b", technology=Technology.WIFI)
    ways = [
        Way(path=Path(name="here", links=(), target="a"), backend=FakeBackend("because")),
        Way(path=Path(name="wifi", links=(link,), target="b"), backend=Neighbour("because")),
    ]
    for some, kept in ((ways, 0), (ways[:1], 1)):
        once = Once(cache_entries=10)
        backend = MultipathBackend(some, name="many")
        assert text_of((await ask(once, expert(backend))).outcome) == "because"
        assert once.kept == kept
    await backend.aclose()


async def test_what_is_private_is_not_kept_at_home_either() -> None:
    once, phone = Once(cache_entries=10), expert(FakeBackend("ok"))
    phone = replace(phone, card=replace(phone.card, tier=Tier.END))
    for text, kept in (("mail a@b.co", 0), ("weather?", 1)):
        attempt = await ask_expert(
            phone,
            ONE,
            text,
            why="",
            spend=Spend(Budget()),
            deadline=None,
            departure=Departure(redactor=Redactor()),
            once=once,
        )
        assert text_of(attempt.outcome) == "ok"
        assert once.kept == kept
    assert isinstance(phone.backend, FakeBackend)
    assert question_of(phone.backend.requests[0]) == "mail a@b.co"


async def test_what_may_not_go_everywhere_is_not_kept() -> None:
    once = Once(cache_entries=10)
    await ask(once, expert(FakeBackend("because")), subtask=replace(ONE, reach=Tier.EDGE))
    assert once.kept == 0


async def test_the_least_recently_used_answer_goes_first_and_bytes_are_bounded() -> None:
    backend = FakeBackend("because")
    once, who = Once(cache_entries=2), expert(backend)
    for text in ("a", "b", "a", "c", "a", "b"):
        await ask(once, who, text)
    assert asked(backend) == 4, "b had to go for c"
    assert once.kept == 2
    small = Once(cache_entries=100, cache_bytes=2 * ENTRY_BYTES + 40)
    for text in ("a", "b", "c", "d" * 2 * ENTRY_BYTES):
        await ask(small, who, text)
    assert small.kept == 2


@pytest.mark.parametrize("limits", [{"cache_entries": -1}, {"cache_bytes": -1}])
def test_limits_are_checked(limits: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match="must be ≥ 0"):
        Once(**limits)
