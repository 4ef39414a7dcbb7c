"""What is asked over a path, what is known of a server's load, and what was seen when a job was done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from agora.errors import InvalidRequest
from agora.network.path import Path

MOST: Final = 1e15
"""Most bytes, tokens or seconds: a petabyte, thirty million years. What is above is a mistake, and would overflow."""


def _check(what: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= MOST:
        raise InvalidRequest(f"{what} is {value}; it must be a number from 0 to {MOST:.0e}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one request moves and makes the other side do.

    Attributes:
        up_bytes: Bytes sent.
        down_bytes: Bytes that come back.
        prompt_tokens: Tokens the server reads.
        completion_tokens: Tokens it is expected to generate.
        deadline_s: Seconds from now within which the answer is wanted; None for no deadline.

    Raises:
        InvalidRequest: If a number is negative, NaN or above `MOST`.
    """

    up_bytes: int = 0
    down_bytes: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("up_bytes", "down_bytes", "prompt_tokens", "completion_tokens", "deadline_s"):
            _check(f"{name} of a job", getattr(self, name))

    def money(self, path: Path) -> float:
        """What its bytes cost on this path."""
        return (self.up_bytes + self.down_bytes) / 1e6 * path.price_per_mb


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLoad:
    """What a server tells about itself (vLLM's `/metrics`, a gateway's card), as plain numbers; absent if it does not.

    Attributes:
        running: Requests it computes now.
        waiting: Requests in its queue.
        prefill_tps: Prompt tokens a second for one request.
        decode_tps: Generated tokens a second for one request.

    Raises:
        InvalidRequest: If a number is negative, NaN or above `MOST`.
    """

    running: int = 0
    waiting: int = 0
    prefill_tps: float | None = None
    decode_tps: float | None = None

    def __post_init__(self) -> None:
        for name in ("running", "waiting", "prefill_tps", "decode_tps"):
            _check(f"{name} of a server's load", getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What was seen of one request on one path, whether it worked, failed or was cancelled.

    Attributes:
        path: The way it took.
        at: When it ended, in seconds of the clock that the estimates are read with.
        ok: Whether an answer came.
        up_bytes: Bytes that were sent: of a cancelled or failed request only what had gone out.
        down_bytes: Bytes that came back.
        prompt_tokens: Tokens the server read.
        completion_tokens: Tokens it generated.
        first_token_s: Seconds from sending to the first token; None if none came.
        total_s: Seconds from sending to the end.
        cancelled: Whether this side broke it off (another copy was quicker): no failure of the path.
        up_s: Seconds that the sending alone took, if the transport knows; else they are inferred from `first_token_s`.
        down_s: Seconds that the bytes of the answer were on the way, if known: not those spent generating.
        rtt_s: Round-trip time of a small packet seen along with it (a connect, a ping), if known.

    Raises:
        InvalidRequest: If a number is negative, NaN or above `MOST`.
    """

    path: Path
    at: float
    ok: bool
    up_bytes: int = 0
    down_bytes: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    total_s: float = 0.0
    cancelled: bool = False
    up_s: float | None = None
    down_s: float | None = None
    rtt_s: float | None = None

    def __post_init__(self) -> None:
        names = ("up_bytes", "down_bytes", "prompt_tokens", "completion_tokens", "first_token_s", "total_s")
        for name in (*names, "up_s", "down_s", "rtt_s"):
            _check(f"{name} of an observation on path {self.path.name!r}", getattr(self, name))
        if not math.isfinite(self.at):
            raise InvalidRequest(
                f"an observation on path {self.path.name!r} was made at {self.at}; give a clock's time"
            )
