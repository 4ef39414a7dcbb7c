from __future__ import annotations

import random
from typing import Any

import pytest

from agora.errors import InvalidRequest
from experts.retry import Retry, retry_after_s


def test_jitter_is_full_bounded_and_seeded() -> None:
    retry = Retry(tries=100, base_s=0.5, cap_s=4.0)
    waits = [retry.wait(tried, random.Random(tried)) for tried in range(1, 100)]
    assert waits == [retry.wait(tried, random.Random(tried)) for tried in range(1, 100)]
    for tried, wait in enumerate(waits, 1):
        assert wait is not None
        assert 0 <= wait <= min(4.0, 0.5 * 2 ** (tried - 1))
    assert retry.wait(100, random.Random(0)) is None
    spread = [retry.wait(50, random.Random(n)) or 0.0 for n in range(200)]
    assert min(spread) < 0.4
    assert max(spread) > 3.6
    assert Retry(tries=5000).wait(4000, random.Random(0)) is not None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("7", 7.0),
        (" 0.5 ", 0.5),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
        ("-3", None),
        ("soon", None),
        ("inf", None),
        ("nan", None),
        ("", None),
        (None, None),
        ("Wed, 99 Oct 99999 07:28:30 GMT", None),
    ],
)
def test_retry_after_is_read(value: str | None, expected: float | None) -> None:
    assert retry_after_s(value, date="Wed, 21 Oct 2015 07:28:00 GMT") == expected


def test_retry_after_date_without_the_servers_clock() -> None:
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert (retry_after_s("Wed, 21 Oct 2099 07:28:00 GMT") or 0) > 1e6


@pytest.mark.parametrize("options", [{"tries": 0}, {"base_s": -1.0}, {"cap_s": float("nan")}, {"statuses": {200}}])
def test_impossible_retries_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Retry(**options)


def test_a_retry_after_that_is_too_long_is_given_up() -> None:
    rng = random.Random(0)
    assert Retry(retry_after_cap_s=5).wait(1, rng, after_s=6) is None
    wait = Retry(base_s=0.5, retry_after_cap_s=5).wait(1, rng, after_s=5)
    assert wait is not None
    assert 5 <= wait <= 5.5
