"""The words a `FakeBackend`'s script is written in, and what they come to for one request."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from agora.errors import BackendError, InvalidRequest
from agora.protocols import FinishReason, GenerateRequest, ScoreRequest, TokenLogprob
from agora.types import Usage

TOKEN_LOGPROB: Final = -0.5
"""Log-probability of every unscripted token. Round, so that sums can be checked by hand."""

_TOKEN = re.compile(r"\s*\S+|\s+")


@dataclass(frozen=True, slots=True)
class Reply:
    """One scripted reply, where a plain string says too little.

    Attributes:
        text: What is answered, before `max_tokens` and `stop` cut it.
        finish_reason: Overrides the reason that follows from the cuts.
        logprobs: Log-probability of each token of `text`; tokens beyond it get `TOKEN_LOGPROB`.
        latency: Seconds to the first token, instead of the backend's.
        cut_after: The reply breaks off with `BadReply` after that many chunks.
        usage: What is reported as used, instead of the true count.
    """

    text: str
    finish_reason: FinishReason | None = None
    logprobs: tuple[float, ...] = ()
    latency: float | None = None
    cut_after: int | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Hang:
    """In place of a reply: nothing ever comes. Ends by time-out, cancellation or `aclose`."""


Fault = Exception | type[BackendError] | Hang
"""What goes wrong: an error (or a class of errors) to raise, or a hang."""

Scripted = str | Reply | Fault
"""One reply, or what happens in its place."""

ReplyFunction = Callable[[GenerateRequest], Scripted | Awaitable[Scripted]]

Replies = Scripted | ReplyFunction | Mapping[str, Scripted | ReplyFunction] | Sequence[Scripted | ReplyFunction]
"""Where replies come from; see `FakeBackend`."""

AnyRequest = GenerateRequest | ScoreRequest

Latency = float | Sequence[float] | Callable[[AnyRequest], float]

ScoreFunction = Callable[[ScoreRequest], Sequence[float] | Fault]


@dataclass(slots=True)
class Call:
    """What was asked of the backend, and what became of it. Times are on the event loop's clock, in seconds.

    Attributes:
        kind: Which method was called.
        request: What was asked; None for `health`.
        index: Its place among the calls that ask for something, from 0; None for `health`.
        asked_s: When it was asked.
        started_s: When it left the queue, if it did.
        ended_s: When it ended, if it has.
        outcome: How it ended.
        text: The text it was given so far.
        error: What it was raised.
    """

    kind: Literal["generate", "stream", "score", "health"]
    request: AnyRequest | None
    index: int | None
    asked_s: float
    started_s: float | None = None
    ended_s: float | None = None
    outcome: Literal["open", "done", "failed", "cancelled"] = "open"
    text: str = ""
    error: BaseException | None = None


def tokens_of(text: str) -> list[str]:
    """The tokens of `text`: words, each with the white space before it. Joined they give `text` again."""
    return _TOKEN.findall(text)


def question_of(request: AnyRequest) -> str:
    """What a request asks: its prompt, or the last thing the user said."""
    if request.prompt is not None:
        return request.prompt
    users = [m.content for m in request.messages if m.role == "user"]
    return users[-1] if users else request.messages[-1].content


def echo(request: GenerateRequest) -> str:
    """The default reply: the question."""
    return question_of(request)


def checked_seconds(seconds: float) -> float:
    """Returns `seconds` if a script may wait that long; raises `InvalidRequest` if not."""
    if not seconds >= 0:
        raise InvalidRequest(f"a scripted time is {seconds} s; it must be ≥ 0")
    return seconds


def cut(reply: Reply, request: GenerateRequest) -> tuple[list[str], FinishReason]:
    """The tokens that `max_tokens` and `stop` leave, and why the reply ended."""
    tokens = tokens_of(reply.text)
    finish_reason: FinishReason = "stop"
    if len(tokens) > request.max_tokens:
        tokens, finish_reason = tokens[: request.max_tokens], "length"
    text = "".join(tokens)
    if stops := [at for s in request.stop if (at := text.find(s)) >= 0]:
        tokens, finish_reason = tokens_of(text[: min(stops)]), "stop"
    return tokens, reply.finish_reason or finish_reason


def token_logprobs(reply: Reply, tokens: Sequence[str], top: int | None) -> tuple[TokenLogprob, ...]:
    """One per token; its n alternatives are the token itself, then `token~1` one nat lower, and so on."""
    if top is None:
        return ()
    values = [*reply.logprobs[: len(tokens)], *[TOKEN_LOGPROB] * (len(tokens) - len(reply.logprobs))]
    return tuple(
        TokenLogprob(token=t, logprob=v, top=tuple((f"{t}~{k}" if k else t, v - k) for k in range(top)))
        for t, v in zip(tokens, values, strict=True)
    )


def prompt_tokens_of(request: AnyRequest) -> int:
    """Tokens of everything said so far; a chat template costs none."""
    texts = [request.prompt] if request.prompt is not None else [m.content for m in request.messages]
    return sum(len(tokens_of(t)) for t in texts)


def usage_of(request: GenerateRequest, tokens: Sequence[str]) -> Usage:
    """What one call used."""
    return Usage(prompt_tokens=prompt_tokens_of(request), completion_tokens=len(tokens), calls=1)
