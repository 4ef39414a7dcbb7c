"""Splits of a band, against grids, closed forms, conditions of optimality and a general solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from agora.errors import InvalidRequest
from agora.scheduling.bandwidth import Split, Transfer, least_slowest, least_weighted_sum

BAND = 20e6

Splitter = Callable[..., Split]


@st.composite
def cells(draw: st.DrawFn, limits: bool = True) -> list[Transfer]:
    many = draw(st.integers(1, 6))
    number = st.floats(1e3, 1e9)
    found = []
    for _ in range(many):
        least = draw(st.sampled_from([0.0, BAND / 100, BAND / 8])) if limits else 0.0
        most = draw(st.sampled_from([math.inf, BAND / 6, BAND / 3])) if limits else math.inf
        found.append(
            Transfer(
                size_bits=draw(number),
                efficiency=draw(st.floats(0.05, 8.0)),
                weight=draw(st.floats(0.1, 10.0)),
                least_hz=least,
                most_hz=most,
            )
        )
    return found


def needs(transfers: Sequence[Transfer]) -> list[float]:
    return [t.size_bits / t.efficiency for t in transfers]


def within(split: Split, transfers: Sequence[Transfer]) -> None:
    assert sum(split.hz) <= BAND * (1 + 1e-9)
    for hz, seconds, t in zip(split.hz, split.seconds, transfers, strict=True):
        assert t.least_hz * (1 - 1e-9) <= hz <= t.most_hz * (1 + 1e-9)
        assert seconds == pytest.approx(t.size_bits / (hz * t.efficiency))


def weighted(split: Split, transfers: Sequence[Transfer]) -> float:
    return sum(t.weight * s for t, s in zip(transfers, split.seconds, strict=True))


@settings(max_examples=60, deadline=None)
@given(cells(limits=False))
def test_without_limits_both_are_as_in_closed_form(transfers: list[Transfer]) -> None:
    q = needs(transfers)
    slowest = least_slowest(transfers, BAND)
    assert slowest.seconds == pytest.approx([sum(q) / BAND] * len(q), rel=1e-6)
    root = [math.sqrt(t.weight * x) for t, x in zip(transfers, q, strict=True)]
    assert least_weighted_sum(transfers, BAND).hz == pytest.approx([BAND * r / sum(root) for r in root], rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(cells())
def test_nothing_could_be_better_by_the_conditions_of_optimality(transfers: list[Transfer]) -> None:
    split = least_weighted_sum(transfers, BAND)
    within(split, transfers)
    # What a hertz more would save: equal among those at no limit, no more at the most, no less at the least.
    saves = [t.weight * q / hz**2 for t, q, hz in zip(transfers, needs(transfers), split.hz, strict=True)]
    high = [s for s, t, hz in zip(saves, transfers, split.hz, strict=True) if hz < min(t.most_hz, BAND) * (1 - 1e-6)]
    low = [s for s, t, hz in zip(saves, transfers, split.hz, strict=True) if hz > t.least_hz * (1 + 1e-6)]
    if high:
        assert sum(split.hz) == pytest.approx(BAND, rel=1e-9), "band lies idle that somebody could use"
        assert max(high) <= min(low, default=math.inf) * (1 + 1e-4)


@settings(max_examples=60, deadline=None)
@given(cells())
def test_the_slowest_could_be_faster_only_if_it_had_what_it_cannot_have(transfers: list[Transfer]) -> None:
    split = least_slowest(transfers, BAND)
    within(split, transfers)
    slowest = split.slowest_s
    # To be faster by a thousandth, all would need more than the band, or one more than the most it can use.
    faster = [max(t.least_hz, q / (slowest * 0.999)) for t, q in zip(transfers, needs(transfers), strict=True)]
    assert sum(faster) > BAND or any(f > min(t.most_hz, BAND) for f, t in zip(faster, transfers, strict=True))
    if any(hz < min(t.most_hz, BAND) * (1 - 1e-6) for hz, t in zip(split.hz, transfers, strict=True)):
        assert sum(split.hz) == pytest.approx(BAND, rel=1e-9), "band lies idle that somebody could use"


@settings(max_examples=25, deadline=None)
@given(cells().filter(lambda c: 2 <= len(c) <= 3))
def test_no_point_of_a_grid_is_better(transfers: list[Transfer]) -> None:
    best_slowest = least_slowest(transfers, BAND).slowest_s
    best_sum = weighted(least_weighted_sum(transfers, BAND), transfers)
    steps = np.linspace(0.005, 1.0, 60) * BAND
    points = np.stack(np.meshgrid(*[steps] * len(transfers)), axis=-1).reshape(-1, len(transfers))
    low, high = (np.array([getattr(t, name) for t in transfers]) for name in ("least_hz", "most_hz"))
    points = points[(points.sum(axis=1) <= BAND) & (points >= low).all(axis=1) & (points <= high).all(axis=1)]
    times = np.array(needs(transfers)) / points
    assert len(points)
    assert times.max(axis=1).min() >= best_slowest * (1 - 1e-9)
    assert (times @ np.array([t.weight for t in transfers])).min() >= best_sum * (1 - 1e-9)


@settings(max_examples=20, deadline=None)
@given(cells())
def test_a_general_solver_finds_nothing_better(transfers: list[Transfer]) -> None:
    ours = weighted(least_weighted_sum(transfers, BAND), transfers)
    q = np.array(needs(transfers)) / BAND
    w = np.array([t.weight for t in transfers])
    bounds = [(max(t.least_hz / BAND, 1e-6), min(t.most_hz / BAND, 1.0)) for t in transfers]
    found = minimize(
        lambda b: float((w * q / b).sum()) / ours,
        np.clip(np.full(len(q), 1 / len(q)), *np.array(bounds).T),
        bounds=bounds,
        constraints=[{"type": "ineq", "fun": lambda b: 1.0 - b.sum()}],
        method="SLSQP",
    )
    if found.success and found.x.sum() <= 1 + 1e-9:
        assert found.fun >= 1 - 1e-6


@pytest.mark.parametrize("split", [least_slowest, least_weighted_sum])
def test_users_out_of_reach(split: Splitter) -> None:
    transfers = [Transfer(size_bits=8e6, efficiency=2.0), Transfer(size_bits=8e6, efficiency=0.0, least_hz=1e6)]
    with pytest.raises(InvalidRequest, match=r"transfers \[1\] have efficiency 0"):
        split(transfers, BAND)
    found = split(transfers, BAND, leave_out=True)
    assert found.left_out == (1,)
    assert found.hz == (BAND, 0.0)
    assert found.seconds == (0.2, math.inf)
    assert found.slowest_s == 0.2


@pytest.mark.parametrize("split", [least_slowest, least_weighted_sum])
def test_nothing_to_move_takes_no_time(split: Splitter) -> None:
    found = split([Transfer(size_bits=0.0, efficiency=1.0), Transfer(size_bits=4e6, efficiency=1.0)], BAND)
    assert found.seconds == pytest.approx((0.0, 0.2))
    assert split([Transfer(size_bits=0.0, efficiency=0.0)], BAND).slowest_s == 0.0


@pytest.mark.parametrize("split", [least_slowest, least_weighted_sum])
@pytest.mark.parametrize(
    ("transfer", "band", "said"),
    [
        (Transfer(size_bits=1.0, efficiency=1.0), 0.0, "the band is 0.0 Hz"),
        (Transfer(size_bits=1.0, efficiency=1.0), math.nan, "the band is nan Hz"),
        (Transfer(size_bits=math.nan, efficiency=1.0), BAND, "size_bits of transfer 0 is nan"),
        (Transfer(size_bits=1.0, efficiency=-1.0), BAND, "efficiency of transfer 0 is -1.0"),
        (Transfer(size_bits=1.0, efficiency=1.0, least_hz=2 * BAND), BAND, "the least shares are"),
        (Transfer(size_bits=1.0, efficiency=1.0, least_hz=2.0, most_hz=1.0), BAND, "most_hz of transfer 0 is 1.0"),
    ],
)
def test_what_cannot_be_is_told(split: Splitter, transfer: Transfer, band: float, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        split([transfer], band)


def test_extreme_differences() -> None:
    """A sensor's few bytes beside a film: neither starves the other, and nothing overflows."""
    transfers = [Transfer(size_bits=1.0, efficiency=8.0), Transfer(size_bits=1e15, efficiency=0.01)]
    slowest = least_slowest(transfers, BAND)
    assert slowest.seconds[0] <= slowest.seconds[1] * (1 + 1e-9)
    within(slowest, transfers)
    within(least_weighted_sum(transfers, BAND), transfers)
