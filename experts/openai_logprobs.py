"""Reads the two forms in which OpenAI-compatible servers tell log-probabilities: of chats, and the legacy one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

from agora.protocols import TokenLogprob
from experts.openai_wire import mended, shown

LOGPROB_SLACK: Final = 0.01
"""How far above 0 a log-probability may be and pass for 0: rounding of half-precision soft-maxes."""


def read_logprobs(value: Any, top: int) -> tuple[TokenLogprob, ...]:
    """Reads the `logprobs` of a choice.

    The chat form is `{"content": [{"token", "logprob", "top_logprobs": [{"token", "logprob"}]}]}`; the legacy one is
    `{"tokens": […], "token_logprobs": […], "top_logprobs": [{token: logprob}]}`.

    Args:
        value: What the server sent.
        top: Alternatives to keep per token. vLLM adds the sampled token to those asked for.

    Raises:
        ValueError: If it has another form, or holds what is no log-probability.
    """
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise ValueError("logprobs is not an object")
    if "tokens" in value:
        return tuple(
            TokenLogprob(token=token, logprob=checked_logprob(logprob), top=_best(others, top))
            for token, logprob, others in legacy_columns(value)
        )
    content = value.get("content")
    if content is None:
        return ()
    if not isinstance(content, list):
        raise ValueError("logprobs.content is not a list")
    return tuple(_chat_logprob(entry, top) for entry in content)


def legacy_columns(value: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """The rows (token, its log-probability or None, alternatives) of the legacy form.

    Raises:
        ValueError: If the columns are no lists of one length, or hold the wrong things.
    """
    tokens, values = value.get("tokens"), value.get("token_logprobs")
    others = value.get("top_logprobs")
    if others is None and isinstance(tokens, list):
        others = [None] * len(tokens)
    if not (isinstance(tokens, list) and isinstance(values, list) and isinstance(others, list)):
        raise ValueError("logprobs.tokens, token_logprobs and top_logprobs are not all lists")
    if not len(tokens) == len(values) == len(others):
        raise ValueError("logprobs.tokens, token_logprobs and top_logprobs differ in length")
    if not all(isinstance(t, str) for t in tokens) or not all(isinstance(o, (dict, type(None))) for o in others):
        raise ValueError("logprobs.tokens or top_logprobs holds the wrong type")
    return [(mended(t), v, o or {}) for t, v, o in zip(tokens, values, others, strict=True)]


def checked_logprob(value: Any) -> float:
    """A finite number, at most 0 (or above it by rounding, which then is 0).

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"a log-probability is no number but {shown(str(value))}")
    # `1e999` is valid JSON and reads as infinity.
    if not -math.inf < value <= LOGPROB_SLACK:
        raise ValueError(f"a log-probability is {value}; it must be a finite number, at most 0")
    return min(float(value), 0.0)


def _chat_logprob(entry: Any, top: int) -> TokenLogprob:
    token, logprob = _pair(entry)
    others = entry.get("top_logprobs") or []
    if not isinstance(others, list):
        raise ValueError("top_logprobs is not a list")
    return TokenLogprob(token=mended(token), logprob=checked_logprob(logprob), top=_best(map(_pair, others), top))


def _pair(entry: Any) -> tuple[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
        raise ValueError("a log-probability has no token")
    return entry["token"], entry.get("logprob")


def _best(others: Iterable[tuple[str, Any]] | dict[str, Any], count: int) -> tuple[tuple[str, float], ...]:
    """The likeliest alternatives, best first."""
    pairs = others.items() if isinstance(others, dict) else others
    checked = [(mended(token), checked_logprob(logprob)) for token, logprob in pairs]
    return tuple(sorted(checked, key=lambda pair: -pair[1])[:count])
