"""Scores continuations on a server that echoes a prompt with its tokens' log-probabilities.

A prompt and a continuation are sent as one text with `echo` and one token to generate (the least that every server
takes; the way of EleutherAI's lm-evaluation-harness). The continuation's tokens are found from the end of the echo.
Where a token spans the border, or tokens are told so that they do not join to the text, the prompt is echoed alone
too; with p the tokens of the prompt, f those of the full text and k the length of their common beginning,

    log P(continuation | prompt) = Σ_{i≥k} log P(f_i) − Σ_{i≥k} log P(p_i)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from agora.errors import BadReply, Unsupported
from agora.protocols import ContinuationScore, Message, ScoreRequest, Scores
from agora.types import Usage
from experts.http_reply import Patience
from experts.openai_http import Http
from experts.openai_logprobs import checked_logprob, legacy_columns
from experts.openai_wire import COMPLETIONS, estimated_tokens, parse_object, shown, usage_of

CLAIM_HINT: Final = "do not claim 'score' for this server"

ChatTemplate = Callable[[Sequence[Message]], str]
"""Writes a chat as the raw text that the model reads, up to where its answer begins."""


@dataclass(frozen=True, slots=True)
class Echo:
    """One text as the server read it: its tokens and their log-probabilities; None for the first token."""

    tokens: list[str]
    logprobs: list[float | None]

    def total(self, start: int) -> float:
        """Sum of the log-probabilities from a token on."""
        return sum(lp for lp in self.logprobs[start:] if lp is not None)


class EchoScorer:
    """Scores over `/v1/completions`.

    Args:
        http: The server.
        backend: The backend's name, for errors.
        model: The server's name for the model.
        chat_template: Writes a chat as text; None if chats cannot be scored.
        extra: Fields added to every body; None as a value removes a field.
    """

    def __init__(
        self,
        http: Http,
        *,
        backend: str,
        model: str,
        chat_template: ChatTemplate | None,
        extra: Mapping[str, Any],
    ) -> None:
        self._http = http
        self._backend = backend
        self._model = model
        self._template = chat_template
        self._extra = extra

    async def score(self, request: ScoreRequest, patience: Patience) -> Scores:
        """Scores every continuation.

        Raises:
            Unsupported: If a chat is to be scored and there is no template for it.
            BadReply: If the server does not echo, or not with log-probabilities.
            BackendError: As `Http.post` does.
        """
        model = self._model if request.adapter is None else str(request.adapter)
        templated = request.prompt is None
        prompt = self._written(request.messages) if request.prompt is None else request.prompt
        texts = [prompt + c for c in request.continuations]
        echoes, usage = await self._echo(texts, model, patience, templated=templated)
        starts = [border(e.tokens, c) for e, c in zip(echoes, request.continuations, strict=True)]
        alone: Echo | None = None
        if None in starts:
            (alone,), more = await self._echo([prompt], model, patience, templated=templated)
            usage = replace(usage + more, calls=1)
        scores = []
        for continuation, echo, start in zip(request.continuations, echoes, starts, strict=True):
            logprob = echo.total(start) if start is not None else 0.0
            if start is None:
                assert alone is not None
                start = common_beginning(alone.tokens, echo.tokens)
                logprob = min(0.0, echo.total(start) - alone.total(start))
            if not 0 < start < len(echo.tokens):
                raise BadReply(
                    f"the echo does not hold the continuation {shown(continuation)}",
                    backend=self._backend,
                    hint=CLAIM_HINT,
                )
            scores.append(ContinuationScore(text=continuation, logprob=logprob, tokens=len(echo.tokens) - start))
        return Scores(scores=tuple(scores), usage=usage)

    async def _echo(
        self, texts: list[str], model: str, patience: Patience, *, templated: bool
    ) -> tuple[list[Echo], Usage]:
        body: dict[str, Any] = {
            "model": model,
            "prompt": texts,
            "max_tokens": 1,
            "temperature": 0.0,
            "echo": True,
            "logprobs": 1,
            "stream": False,
        }
        if templated:
            body["add_special_tokens"] = False  # The template has written them already.
        body |= self._extra
        async with await self._http.post(
            COMPLETIONS, {k: v for k, v in body.items() if v is not None}, patience
        ) as reply:
            data = await reply.whole()
        found = parse_object(data, backend=self._backend)
        choices = choices_by_index(found, len(texts), data, backend=self._backend)
        used = usage_of(found)
        generated = _generated(used, len(texts))
        try:
            echoes = [_echo_of(c.get("logprobs"), generated) for c in choices]
        except ValueError as e:
            raise BadReply(f"{e}: {shown(data)}", backend=self._backend, hint=CLAIM_HINT) from None
        prompt_tokens = used.prompt_tokens if used is not None else sum(map(estimated_tokens, texts))
        return echoes, Usage(prompt_tokens=prompt_tokens, completion_tokens=generated * len(texts), calls=1)

    def _written(self, messages: Sequence[Message]) -> str:
        if self._template is None:
            raise Unsupported(
                "a chat cannot be scored without the model's chat template",
                backend=self._backend,
                hint="give chat_template, or score a raw prompt",
            )
        return self._template(messages)


def choices_by_index(reply: Mapping[str, Any], count: int, data: bytes, *, backend: str) -> list[Mapping[str, Any]]:
    """The choices of a reply to several prompts, in the order of the prompts.

    Raises:
        BadReply: If there is not exactly one for each.
    """
    choices = reply.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise BadReply(f"the reply has no list of choices: {shown(data)}", backend=backend)
    by_index = {c.get("index"): c for c in choices}
    if len(choices) != count or set(by_index) != set(range(count)):
        raise BadReply(f"the reply has {len(choices)} choices for {count} prompts: {shown(data)}", backend=backend)
    return [by_index[n] for n in range(count)]


def border(tokens: Sequence[str], continuation: str) -> int | None:
    """Where the continuation begins among the tokens of a text that ends with it; None if no token begins there."""
    left = len(continuation)
    for n in range(len(tokens) - 1, -1, -1):
        left -= len(tokens[n])
        if left <= 0:
            return n if left == 0 and "".join(tokens[n:]) == continuation else None
    return None


def common_beginning(one: Sequence[object], other: Sequence[object]) -> int:
    """How many tokens two texts share at their beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _generated(used: Usage | None, texts: int) -> int:
    """Tokens generated after each text: the one that was asked for, unless the server says that it made none."""
    return 0 if used is not None and used.completion_tokens == 0 else 1


def _echo_of(logprobs: Any, generated: int) -> Echo:
    if not isinstance(logprobs, dict):
        raise ValueError("the server told no log-probabilities of the prompt")
    rows = legacy_columns(logprobs)
    rows = rows[: len(rows) - generated]
    if not rows:
        raise ValueError("the server did not echo the prompt")
    # Nothing comes before the first token, so it has no log-probability; some servers leave it out, some say 0.
    return Echo(
        tokens=[token for token, _, _ in rows],
        logprobs=[None if n == 0 else checked_logprob(value) for n, (_, value, _) in enumerate(rows)],
    )
