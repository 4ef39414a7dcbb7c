"""Discounts: exactly 1 for fresh updates, never rising, and as the paper has them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import ConfigError, InvalidRequest
from fed.staleness import DISCOUNTS, discount


@pytest.mark.parametrize("name", sorted(DISCOUNTS))
def test_a_fresh_update_weighs_exactly_one(name: str) -> None:
    assert DISCOUNTS[name](0) == 1.0


@given(name=st.sampled_from(sorted(DISCOUNTS)), staleness=st.integers(0, 10_000))
def test_later_never_weighs_more_and_never_nothing(name: str, staleness: int) -> None:
    assert 0.0 < DISCOUNTS[name](staleness + 1) <= DISCOUNTS[name](staleness) <= 1.0


def test_values_are_those_of_the_paper() -> None:
    assert DISCOUNTS["polynomial"](3) == 0.5
    assert [DISCOUNTS["hinge"](n) for n in (4, 5, 6)] == [1.0, 1 / 11, 1 / 21]
    assert DISCOUNTS["constant"](1_000) == 1.0


def test_parameters_change_the_curve() -> None:
    assert discount("polynomial", a=1.0)(3) == 0.25
    assert discount("hinge", a=1.0, b=0.0)(1) == 0.5


@pytest.mark.parametrize(
    ("name", "parameters", "why"),
    [
        ("linear", {}, "allowed: constant, hinge, polynomial"),
        ("polynomial", {"b": 1.0}, "no parameter 'b'; it has a"),
        ("constant", {"a": 1.0}, "it has none"),
        ("hinge", {"a": -1.0}, "a is -1.0"),
        ("polynomial", {"a": float("nan")}, "a is nan"),
    ],
)
def test_what_cannot_be_is_told(name: str, parameters: dict[str, float], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        discount(name, **parameters)


def test_staleness_counts_from_nothing() -> None:
    with pytest.raises(InvalidRequest, match="staleness is -1"):
        DISCOUNTS["polynomial"](-1)
