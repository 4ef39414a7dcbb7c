from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import InvalidRequest
from fed.adapter import Adapter, Method, Spec
from fed.inbox import Inbox
from fed.update import Expected, Update, encode
from fed.wire import Reason, Refused
from fed.words import Job, Trained

SPEC = Spec(method=Method.DENSE, shapes={"w": (4,)})


def job(number: int) -> Job:
    return Job(id=number, client=f"c{number % 3}", model="all", version=0, seed=0)


def expected(number: int) -> Expected:
    return Expected.of(job(number), SPEC, federation="f")


def message(number: int, **changes: object) -> bytes:
    trained = Trained(delta=np.full(4, number, np.float32), examples=1, steps=1)
    update, _ = Update.of(job(number), trained, Adapter.zeros(SPEC), federation="f")
    return encode(replace(update, **changes))  # type: ignore[arg-type]


def reason(inbox: Inbox, data: bytes) -> Reason:
    with pytest.raises(Refused) as caught:
        inbox.receive(data)
    return caught.value.reason


def test_an_update_is_taken_once() -> None:
    inbox = Inbox().waiting(expected(1)).waiting(expected(2))
    update, after = inbox.receive(message(1))
    assert update.job == 1 and set(after.open) == {2}
    assert reason(after, message(1)) is Reason.DUPLICATE
    assert reason(after, message(1, examples=2)) is Reason.DUPLICATE
    assert set(inbox.open) == {1, 2}


def test_a_replay_of_another_run_is_refused() -> None:
    inbox = Inbox().waiting(expected(1))
    assert reason(inbox, message(1, federation="last week")) is Reason.FEDERATION


def test_jobs_that_were_never_given_or_given_up() -> None:
    inbox = Inbox().waiting(expected(1)).waiting(expected(5)).ended(1)
    assert reason(inbox, message(1)) is Reason.DUPLICATE
    assert reason(inbox, message(3)) is Reason.DUPLICATE
    assert reason(inbox, message(6)) is Reason.JOB
    assert inbox.receive(message(5))[0].job == 5


def test_a_refused_update_leaves_the_job_open_for_the_true_one() -> None:
    inbox = Inbox().waiting(expected(1))
    broken = message(1)[:-1] + b"\xff"
    assert reason(inbox, broken) is Reason.CHECKSUM
    assert reason(inbox, message(1, client="c2")) is Reason.CLIENT
    assert reason(inbox, message(1)[:-1]) is Reason.TRUNCATED
    update, _ = inbox.receive(message(1))
    np.testing.assert_array_equal(update.delta, np.ones(4, np.float32))


def test_ids_must_rise() -> None:
    inbox = Inbox().waiting(expected(3))
    for number in (3, 2):
        with pytest.raises(InvalidRequest, match="must rise"):
            inbox.waiting(expected(number))


@given(st.lists(st.integers(0, 9), max_size=30), st.sets(st.integers(0, 9)))
def test_whatever_comes_in_whatever_order_each_open_job_is_answered_once(
    arrivals: list[int], given_up: set[int]
) -> None:
    inbox = Inbox()
    for number in range(8):
        inbox = inbox.waiting(expected(number))
    for number in given_up:
        inbox = inbox.ended(number)
    taken = []
    for number in arrivals:
        try:
            update, inbox = inbox.receive(message(number))
            taken.append(update.job)
        except Refused as e:
            assert e.reason is (Reason.JOB if number > 7 else Reason.DUPLICATE)
    first = dict.fromkeys(n for n in arrivals if n <= 7 and n not in given_up)
    assert taken == list(first)
