"""Scores continuations on a vLLM server, token by token, without `prompt_logprobs`.

A continuation's token f_i has the log-probability that the model gives it as the next token after f_0 … f_{i−1}. vLLM
tells that for chosen tokens (`logprob_token_ids`) while it generates one token, so a score is a generation of one
token after each beginning. Continuations share beginnings: scoring n labels of one token each reads the prompt once,
where `echo` reads it n times; longer ones find their beginnings in the server's prefix cache. Measured with
SmolLM2-135M on 2 CPU cores, a prompt of 73 tokens: two labels of one token 0.22 s (echo 0.56 s), two continuations of
4 and 5 tokens 1.4 s (echo 0.62 s; the CPU build caches no prefix this short), the same values to four decimals.

Echo must not be used on a vLLM server with LoRA: `prompt_logprobs` maps adapters by sequence where it should by token,
which gives wrong numbers for adapters of `lm_head` and, in the CPU build (0.32), ends the engine as soon as two
requests meet in a batch. Source: vLLM issues 16668 and 51594, and tried.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from agora.errors import BadReply, Rejected
from agora.protocols import ContinuationScore, Message, ScoreRequest, Scores
from agora.types import Usage
from experts.http_reply import Patience
from experts.openai_http import Http
from experts.openai_logprobs import checked_logprob
from experts.openai_score import ChatTemplate, choices_by_index, common_beginning
from experts.openai_wire import COMPLETIONS, messages_body, parse_object, shown, usage_of

MAX_IDS: Final = 128
"""Tokens told per request: `MAX_LOGPROB_TOKEN_IDS` of vLLM."""

MAX_BEGINNINGS: Final = 64
"""Beginnings sent in one request; a batch that a small server still takes in one step."""

Ids = tuple[int, ...]
Wanted = tuple[Ids, int]
"""A beginning, and the token after it whose log-probability is wanted."""


class VllmScorer:
    """Scores over vLLM's `/tokenize` and `/v1/completions`.

    Args:
        http: The server.
        backend: The backend's name, for errors.
        model: The server's name for the model.
        chat_template: Writes a chat as text; None to have the server do it.
        extra: Fields added to every body of `/v1/completions`; None as a value removes a field.
    """

    def __init__(
        self, http: Http, *, backend: str, model: str, chat_template: ChatTemplate | None, extra: Mapping[str, Any]
    ) -> None:
        self._http = http
        self._backend = backend
        self._model = model
        self._template = chat_template
        self._extra = extra

    async def score(self, request: ScoreRequest, patience: Patience) -> Scores:
        """Scores every continuation.

        Raises:
            Rejected: If a continuation changes the very first token, before which there is nothing to start from.
            BadReply: If the server does not tell what it was asked.
            BackendError: As `Http.post` does.
        """
        model = self._model if request.adapter is None else str(request.adapter)
        special = request.prompt is not None  # A chat template has written the special tokens already.
        prompt = (
            request.prompt if request.prompt is not None else await self._written(request.messages, model, patience)
        )
        texts = dict.fromkeys([prompt, *(prompt + c for c in request.continuations)])
        ids = dict(zip(texts, await self._tokenized(texts, model, patience, special=special), strict=True))
        before = ids[prompt]
        starts = {c: common_beginning(before, ids[prompt + c]) for c in request.continuations}
        if merged := [c for c, start in starts.items() if start == 0]:
            raise Rejected(
                f"continuation {shown(merged[0])} changes the first token of the prompt",
                backend=self._backend,
                hint="put more text before it",
            )
        wanted: dict[Wanted, None] = {}
        for continuation, start in starts.items():
            for full in (ids[prompt + continuation], before):
                wanted.update({(full[:i], full[i]): None for i in range(start, len(full))})
        told, usage = await self._ask(list(wanted), model, patience)

        def total(full: Ids, start: int) -> float:
            return sum(told[full[:i], full[i]] for i in range(start, len(full)))

        return Scores(
            scores=tuple(
                ContinuationScore(
                    text=c,
                    # The prompt's own tokens from `start` on are there only if one of them spans the border.
                    logprob=min(0.0, total(ids[prompt + c], starts[c]) - total(before, starts[c])),
                    tokens=max(1, len(ids[prompt + c]) - starts[c]),
                )
                for c in request.continuations
            ),
            usage=usage,
        )

    async def _ask(self, wanted: Sequence[Wanted], model: str, patience: Patience) -> tuple[dict[Wanted, float], Usage]:
        told: dict[Wanted, float] = {}
        prompt_tokens = completion_tokens = 0
        for batch in batches(wanted):
            beginnings = list(dict.fromkeys(b for b, _ in batch))
            body = {
                "model": model,
                "prompt": [list(b) for b in beginnings],
                "max_tokens": 1,
                "temperature": 0.0,
                "logprobs": 1,
                "logprob_token_ids": sorted({token for _, token in batch}),
                "return_tokens_as_token_ids": True,
                "stream": False,
                **self._extra,
            }
            body = {k: v for k, v in body.items() if v is not None}
            async with await self._http.post(COMPLETIONS, body, patience) as reply:
                data = await reply.whole()
            found = parse_object(data, backend=self._backend)
            rows = choices_by_index(found, len(beginnings), data, backend=self._backend)
            row_of = dict(zip(beginnings, rows, strict=True))
            for beginning, token in batch:
                told[beginning, token] = self._told(row_of[beginning], token, data)
            used = usage_of(found) or Usage(prompt_tokens=sum(map(len, beginnings)), completion_tokens=len(beginnings))
            prompt_tokens += used.prompt_tokens
            completion_tokens += used.completion_tokens
        return told, Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, calls=1)

    def _told(self, choice: Mapping[str, Any], token: int, data: bytes) -> float:
        try:
            value = choice["logprobs"]["top_logprobs"][0][f"token_id:{token}"]
        except (KeyError, IndexError, TypeError):
            raise BadReply(
                f"the server did not tell the log-probability of token {token}: {shown(data)}",
                backend=self._backend,
                hint="use a vLLM that knows logprob_token_ids, or scorer='echo'",
            ) from None
        try:
            return checked_logprob(value)
        except ValueError as e:
            raise BadReply(f"{e}: {shown(data)}", backend=self._backend) from None

    async def _tokenized(
        self, texts: Mapping[str, None], model: str, patience: Patience, *, special: bool
    ) -> list[Ids]:
        async def one(text: str) -> Ids:
            body = {"model": model, "prompt": text, "add_special_tokens": special}
            return self._ids(await self._field("tokenize", body, "tokens", patience))

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(text)) for text in texts]
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _written(self, messages: Sequence[Message], model: str, patience: Patience) -> str:
        if self._template is not None:
            return self._template(messages)
        body = {"model": model, "messages": messages_body(messages), "add_generation_prompt": True}
        ids = self._ids(await self._field("tokenize", body, "tokens", patience))
        text = await self._field("detokenize", {"model": model, "tokens": ids}, "prompt", patience)
        if not isinstance(text, str):
            raise BadReply("/detokenize gave no text", backend=self._backend)
        return text

    def _ids(self, tokens: Any) -> Ids:
        if not isinstance(tokens, list) or not all(isinstance(t, int) for t in tokens):
            raise BadReply("/tokenize gave no list of token ids", backend=self._backend)
        return tuple(tokens)

    async def _field(self, path: str, body: Mapping[str, Any], field: str, patience: Patience) -> Any:
        async with await self._http.post(path, body, patience, root=True) as reply:
            return parse_object(await reply.whole(), backend=self._backend).get(field)


def batches(wanted: Sequence[Wanted]) -> list[list[Wanted]]:
    """Parts what is wanted into requests of at most `MAX_BEGINNINGS` beginnings and `MAX_IDS` tokens."""
    parts: list[list[Wanted]] = []
    beginnings: set[Ids] = set()
    tokens: set[int] = set()
    for beginning, token in wanted:
        beginnings.add(beginning)
        tokens.add(token)
        if not parts or len(beginnings) > MAX_BEGINNINGS or len(tokens) > MAX_IDS:
            parts.append([])
            beginnings, tokens = {beginning}, {token}
        parts[-1].append((beginning, token))
    return parts
