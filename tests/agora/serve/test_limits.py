"""Admission, rates and bodies."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.protocols import Load
from agora.serve.errors import ApiError
from agora.serve.limits import Admission, Bodies, Rate


@dataclass
class Busy:
    """As much of a backend as admission looks at."""

    load: Load = field(default_factory=Load)


async def enter(admission: Admission, *, neighbour: bool = False, backend: Any = None) -> None:
    if not admission.enter_now(backend, neighbour=neighbour):
        await admission.enter(backend, neighbour=neighbour)


async def test_who_finds_no_place_waits_for_one_in_order() -> None:
    admission = Admission(running=1, waiting=2, neighbours=1)
    await enter(admission)
    done: list[int] = []

    async def work(n: int) -> None:
        await enter(admission)
        done.append(n)
        admission.leave(neighbour=False)

    tasks = [asyncio.create_task(work(n)) for n in range(2)]
    await asyncio.sleep(0)
    assert admission.load == Load(running=1, waiting=2)
    with pytest.raises(ApiError) as refused:
        await enter(admission)
    assert refused.value.status == 429
    admission.leave(neighbour=False)
    await asyncio.gather(*tasks)
    assert done == [0, 1]
    assert admission.load.total == 0


async def test_neighbours_get_no_more_than_their_share_and_none_of_the_nodes_own_places() -> None:
    admission = Admission(running=2, waiting=10, neighbours=2)
    for _ in range(2):
        await enter(admission, neighbour=True)
    third = asyncio.create_task(enter(admission, neighbour=True))
    await asyncio.sleep(0)
    assert admission.neighbours == Load(running=2, waiting=1)
    for _ in range(2):
        await asyncio.wait_for(enter(admission), 1)
    assert admission.load == Load(running=4, waiting=1)
    admission.leave(neighbour=False)
    await asyncio.sleep(0)
    assert not third.done()
    admission.leave(neighbour=True)
    await asyncio.wait_for(third, 1)


async def test_neighbours_are_let_in_while_the_nodes_own_work_waits() -> None:
    """Else nodes full of graphs, whose subtasks wait for places on each other, would wait for ever."""
    admission = Admission(running=1, waiting=10, neighbours=1)
    await enter(admission)
    waiting = asyncio.create_task(enter(admission))
    await asyncio.sleep(0)
    await asyncio.wait_for(enter(admission, neighbour=True), 1)
    assert admission.neighbours == Load(running=1)
    assert not waiting.done()
    admission.leave(neighbour=False)
    await asyncio.wait_for(waiting, 1)
    assert admission.load == Load(running=2)


async def test_neighbours_wait_while_their_expert_has_a_queue() -> None:
    """Otherwise they would fill the expert's own queue, which knows no classes."""
    admission = Admission(running=8, waiting=10, neighbours=4)
    backend = Busy(Load(running=4, waiting=1))
    asked = asyncio.create_task(enter(admission, neighbour=True, backend=backend))
    other = asyncio.create_task(enter(admission, neighbour=True, backend=Busy()))
    await asyncio.wait_for(other, 1)
    await asyncio.sleep(0.1)
    assert not asked.done()
    backend.load = Load(running=4)
    await asyncio.wait_for(asked, 1)


async def test_idle_is_when_nothing_is_left() -> None:
    admission = Admission(running=2, waiting=2, neighbours=1)
    await asyncio.wait_for(admission.idle(), 1)
    await enter(admission)
    idle = asyncio.create_task(admission.idle())
    await asyncio.sleep(0)
    assert not idle.done()
    admission.leave(neighbour=False)
    await asyncio.wait_for(idle, 1)


@given(st.lists(st.tuples(st.sampled_from(["own", "theirs", "cancel", "leave"]), st.integers(0, 100)), max_size=60))
def test_the_counts_hold_whatever_happens(steps: list[tuple[str, int]]) -> None:
    async def play() -> None:
        admission = Admission(running=3, waiting=4, neighbours=2)
        tasks: list[tuple[asyncio.Task[None], bool]] = []
        for what, n in steps:
            if what in ("own", "theirs"):
                neighbour = what == "theirs"
                tasks.append((asyncio.create_task(enter(admission, neighbour=neighbour)), neighbour))
            elif tasks:
                task, neighbour = tasks.pop(n % len(tasks))
                if what == "cancel":
                    task.cancel()
                await asyncio.wait([task])
                if not task.cancelled() and task.exception() is None:
                    admission.leave(neighbour=neighbour)
                if what == "leave" and not task.done():
                    raise AssertionError
            await asyncio.sleep(0)
            load, theirs = admission.load, admission.neighbours
            assert 0 <= theirs.running <= 2
            assert 0 <= load.running - theirs.running <= 3
            # Nobody waits beside a free place, but for neighbours beyond their share.
            own_waiting = load.waiting - theirs.waiting
            assert not (own_waiting and load.running - theirs.running < 3)
            assert not (theirs.waiting and theirs.running < 2)
        for task, _ in tasks:
            task.cancel()
        for task, neighbour in tasks:
            await asyncio.wait([task])
            if not task.cancelled() and task.exception() is None:
                admission.leave(neighbour=neighbour)
        assert admission.load.total == 0
        assert admission.neighbours.total == 0

    async def bounded() -> None:
        # A step may wait for a place that only a later one frees: those end here.
        try:
            await asyncio.wait_for(play(), 0.05)
        except TimeoutError:
            pass
        finally:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)

    asyncio.run(bounded())


def test_a_minutes_requests_come_back_steadily() -> None:
    now = 0.0
    rate = Rate(60, clock=lambda: now)
    for _ in range(60):
        rate.take("me")
    with pytest.raises(ApiError) as refused:
        rate.take("me")
    assert refused.value.status == 429
    assert refused.value.retry_after_s == 1
    rate.take("you")
    now = 1.0
    rate.take("me")
    with pytest.raises(ApiError):
        rate.take("me")
    now = 1e6
    for _ in range(60):
        rate.take("me")


def test_bodies_are_bounded_together_but_one_is_always_read() -> None:
    bodies = Bodies(100)
    bodies.take(500)
    with pytest.raises(ApiError) as refused:
        bodies.take(1)
    assert refused.value.status == 429
    bodies.give(500)
    first = bodies.take(60)
    bodies.take(40)
    with pytest.raises(ApiError):
        bodies.take(61, instead_of=first)
    assert bodies.held == 100
    assert bodies.take(10, instead_of=first) == 10
    assert bodies.held == 50


async def test_it_is_idle_when_nobody_waits_either() -> None:
    """A neighbour's work that waits for a busy expert was taken in, too: a drain waits for it."""
    admission = Admission(running=2, waiting=2, neighbours=2)
    busy = Busy(Load(running=1, waiting=1))
    answered = asyncio.create_task(enter(admission, neighbour=True, backend=busy))
    given_up = asyncio.create_task(enter(admission, neighbour=True, backend=busy))
    await asyncio.sleep(0)
    idle = asyncio.create_task(admission.idle())
    await asyncio.sleep(0.02)
    assert not idle.done()
    given_up.cancel()
    await asyncio.sleep(0.02)
    assert not idle.done()
    busy.load = Load(running=1)
    await asyncio.wait_for(answered, 1)
    assert not idle.done()
    admission.leave(neighbour=True)
    await asyncio.wait_for(idle, 1)


async def test_a_flood_from_neighbours_holds_up_no_request_of_the_nodes_own(start: Any) -> None:
    """Sixty requests of 0.1 s on two places take 3 s; one of the node's own is answered after two of them at most."""
    gateway = await start(
        experts="""
[nodes.busy]
kind = "fake"
reply = "done"
latency_s = 0.1
max_running = 2

[experts.one]
node = "busy"
description = "everything"

[graph]
router = "keywords"
"""
    )
    theirs = {"Agora-Hops": "1", "Agora-Path": "0123456789abcdef"}
    body = {"model": "one", "messages": [{"role": "user", "content": "hi"}]}
    flood = [asyncio.ensure_future(gateway.post("/v1/chat/completions", body, **theirs)) for _ in range(60)]
    while gateway.node.admission.neighbours.total < 60:
        await asyncio.sleep(0.01)
    for model in ("one", "agora"):
        status, _ = await gateway.chat(model)
        assert status == 200
    left = sum(not f.done() for f in flood)
    assert left > 40
    assert {status for status, _ in await asyncio.gather(*flood)} == {200}
