from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fed.share import capped

windows = st.lists(st.tuples(st.sampled_from("abcde"), st.floats(0.01, 100.0)), min_size=1, max_size=30)


@given(window=windows, cap=st.floats(0.01, 1.0))
def test_nobody_has_more_than_the_cap_and_only_those_above_are_cut(window: list[tuple[str, float]], cap: float) -> None:
    names = {name for name, _ in window}
    raw = {n: sum(w for name, w in window if name == n) for n in names}
    factors = {n: capped(window, n, cap) for n in names}
    scaled = {n: raw[n] * factors[n] for n in names}
    allowed = max(cap, 1 / len(names))
    total = sum(scaled.values())
    assert all(0 < f <= 1 for f in factors.values())
    assert all(s <= allowed * total * (1 + 1e-6) for s in scaled.values())
    for n, factor in factors.items():
        # Nobody is cut more than needed: who is cut is at the cap, or as low as the lowest where the cap is 1/n.
        assert factor == 1 or scaled[n] == pytest.approx(min(allowed * total, max(scaled.values())), rel=1e-6)


def test_a_client_alone_is_never_scaled() -> None:
    assert capped([("a", 3.0), ("a", 9.0)], "a", 0.1) == 1.0


def test_by_hand() -> None:
    # 6, 2 and 2: half of the whole is 4, so the first is cut to 4 of 8.
    window = [("a", 6.0), ("b", 2.0), ("c", 2.0)]
    assert capped(window, "a", 0.5) == pytest.approx(4 / 6)
    assert capped(window, "b", 0.5) == 1.0
