from __future__ import annotations

import json
import math

import hypothesis.strategies as st
from hypothesis import given

from fed.simulator.clock import COMPACT_AT, Clock, Kind

times = st.sampled_from([0.0, 1.0, 1.0, 2.5, 7.0])
keys = st.sampled_from(["a", "b", "c", "d"])


@given(st.lists(st.one_of(st.tuples(st.just("set"), keys, times), st.tuples(st.sampled_from(["drop", "next"]), keys))))
def test_entries_come_in_the_order_of_time_and_replaced_ones_never(script: list[tuple[object, ...]]) -> None:
    clock, awaited, number = Clock(), {}, 0
    for what, key, *at in script:
        assert isinstance(key, str)
        # What is written and read again goes on alike.
        clock = Clock.from_json(json.loads(json.dumps(clock.to_json())))
        if what == "set":
            number += 1
            awaited[key] = (max(at[0], clock.now), number)  # type: ignore[type-var]
            clock.set(Kind.TIMER, key, at[0])  # type: ignore[arg-type]
        elif what == "drop":
            awaited.pop(key, None)
            clock.drop(Kind.TIMER, key)
        else:
            first = min(awaited, key=awaited.__getitem__, default=None)
            found = clock.next()
            assert found == (None if first is None else (Kind.TIMER, first))
            if first is not None:
                assert clock.now == awaited.pop(first)[0]
        assert len(clock) == len(awaited)


def test_what_never_comes_is_not_waited_for() -> None:
    clock = Clock()
    clock.set(Kind.ARRIVED, "1", math.inf)
    assert clock.next() is None


def test_forgotten_entries_are_cleared_away() -> None:
    clock = Clock()
    clock.set(Kind.TIMER, "kept", 1e9)
    for i in range(20 * COMPACT_AT):
        clock.set(Kind.TIMER, f"job:{i}", 600.0 + i)
        clock.drop(Kind.TIMER, f"job:{i}")
    assert len(clock._heap) <= COMPACT_AT + 3
    assert clock.next() == (Kind.TIMER, "kept")
