"""When to ask a server again, and how long to wait before."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

from agora.errors import InvalidRequest

BASE_S: Final = 0.25
"""Longest first wait. A few times the round trip of a mobile network, so that a blip is over."""

CAP_S: Final = 8.0
"""Longest wait of its own accord; the value of the OpenAI Python client."""

RETRY_AFTER_CAP_S: Final = 60.0
"""Longest wait because the server asks for it; longer ones are told to the caller. As the OpenAI Python client."""

OVERLOADED: Final = frozenset({429, 503, 529})
"""Statuses by which a server refuses work it has not begun: rate limit, unavailable, and overloaded (Anthropic)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often and how patiently to ask again.

    Asked again is only what the model has not begun to answer: a refused connection, one that ended before any byte
    of a reply (mostly one kept alive that the server had just given up), and the statuses in `statuses`. The wait
    before try n+1 is uniform in [0, min(cap_s, base_s·2ⁿ⁻¹)]: exponential back-off with full jitter (M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015). A `Retry-After` of the server is waited out first.

    Attributes:
        tries: Most times to ask, the first one included; 1 for never again.
        base_s: Longest first wait, in seconds.
        cap_s: Longest later wait, in seconds.
        retry_after_cap_s: Longest `Retry-After` that is waited for, in seconds.
        statuses: HTTP statuses after which to ask again. Adding 500, 502 or 504 may make the model do the work twice.

    Raises:
        InvalidRequest: If a value is out of range.
    """

    tries: int = 3
    base_s: float = BASE_S
    cap_s: float = CAP_S
    retry_after_cap_s: float = RETRY_AFTER_CAP_S
    statuses: frozenset[int] = OVERLOADED

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise InvalidRequest(f"tries is {self.tries}; it must be ≥ 1")
        for name in ("base_s", "cap_s", "retry_after_cap_s"):
            if not getattr(self, name) >= 0:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must be ≥ 0 seconds")
        if odd := sorted(s for s in self.statuses if not 400 <= s <= 599):
            raise InvalidRequest(f"statuses to retry hold {odd}; allowed: 400 to 599")

    def wait(self, tried: int, rng: random.Random, after_s: float | None = None) -> float | None:
        """Seconds to wait before asking again, or None to give up.

        Args:
            tried: How often it was asked already, from 1.
            rng: Where the jitter comes from.
            after_s: What the server's `Retry-After` says, if there was one.
        """
        if tried >= self.tries or (after_s is not None and after_s > self.retry_after_cap_s):
            return None
        # The exponent is bounded: 2.0 ** 1024 would overflow.
        jitter = rng.uniform(0.0, min(self.cap_s, self.base_s * 2.0 ** min(tried - 1, 64)))
        return jitter + (after_s or 0.0)


def retry_after_s(value: str | None, *, date: str | None = None) -> float | None:
    """Reads a `Retry-After` header: seconds, or an HTTP date (RFC 9110, section 10.2.3).

    Args:
        value: The header, if there is one.
        date: The reply's own `Date` header. A date is counted from it, so that a wrong clock here does no harm.

    Returns:
        Seconds to wait, 0 for a date that has passed; None for no header, or one that says nothing readable.
    """
    if value is None:
        return None
    value = value.strip()
    try:
        seconds = float(value)
    except ValueError:
        pass
    else:
        # Some servers send fractions, which the RFC does not know; inf and nan are nonsense.
        return seconds if 0 <= seconds < float("inf") else None
    at = _timestamp(value)
    if at is None:
        return None
    now = _timestamp(date) if date is not None else None
    return max(0.0, at - (time.time() if now is None else now))


def _timestamp(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
