"""Answers of agora's own backends in OpenAI's words, whole or as a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Final, cast

import orjson
from aiohttp import web

from agora.errors import AgoraError
from agora.protocols import Chunk, Completion, TokenLogprob
from agora.serve.asked import Asked
from agora.serve.errors import JSON, error_body
from agora.serve.sse import EventStream
from agora.serve.wire import ChatRequest, CompletionRequest, Request, checked
from agora.square import Expert
from agora.types import Usage

DONE: Final = "[DONE]"
"""What ends every stream that came to its end."""


async def answer(asked: Asked, expert: Expert) -> web.StreamResponse:
    """Has the expert's own backend answer.

    Raises:
        ApiError: 400, if the body is wrong.
        AgoraError: If there is no answer.
    """
    chat = asked.path == "chat/completions"
    body: Request = checked(ChatRequest, asked.body) if chat else checked(CompletionRequest, asked.body)
    request = body.generation(expert, timeout_s=asked.left_s)
    words = Words(asked, body)
    if body.stream:
        chunks = expert.backend.stream(request)
        return await stream(asked, words, chunks)
    done = await expert.backend.generate(request)
    asked.node.metrics.tokens(asked.model, done.usage)
    return web.Response(body=orjson.dumps(words.whole(done)), content_type=JSON)


class Words:
    """Puts the answer to one request into OpenAI's words.

    Args:
        asked: The request.
        body: Its checked body.
    """

    def __init__(self, asked: Asked, body: Request) -> None:
        self.chat = isinstance(body, ChatRequest)
        self.include_usage = body.include_usage
        self._logprobs = body.logprobs is not None and body.logprobs is not False
        self._top = (body.top_logprobs or 0) if isinstance(body, ChatRequest) else (body.logprobs or 0)
        kind = "chatcmpl" if self.chat else "cmpl"
        self._head = {
            "id": f"{kind}-{asked.request_id}",
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": asked.model,
        }
        self._offset = 0

    def whole(self, done: Completion) -> dict[str, Any]:
        """A whole answer."""
        choice: dict[str, Any] = {
            "index": 0,
            "logprobs": self._logprobs_of(done.logprobs),
            "finish_reason": done.finish_reason,
        }
        if self.chat:
            choice["message"] = {"role": "assistant", "content": done.text, "refusal": None}
        else:
            choice["text"] = done.text
        return {**self._head, "choices": [choice], "usage": usage_body(done.usage), **_way_of(done)}

    def first(self) -> dict[str, Any] | None:
        """What a stream begins with: in a chat, who speaks."""
        return self._piece({"delta": {"role": "assistant", "content": ""}}) if self.chat else None

    def piece(self, chunk: Chunk) -> dict[str, Any] | None:
        """A piece of a stream; None if there is nothing in it to tell."""
        if not chunk.text and not chunk.logprobs and chunk.finish_reason is None:
            return None
        said: dict[str, Any] = {"text": chunk.text}
        if self.chat:
            said = {"delta": {"content": chunk.text} if chunk.text or chunk.finish_reason is None else {}}
        return {**self._piece(said, chunk.logprobs, chunk.finish_reason), **_way_of(chunk)}

    def last(self, usage: Usage) -> dict[str, Any] | None:
        """The token counts at a stream's end, if they were asked for."""
        if not self.include_usage:
            return None
        return {**self._head, "object": self._object, "choices": [], "usage": usage_body(usage)}

    @property
    def _object(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _piece(
        self, said: dict[str, Any], logprobs: tuple[TokenLogprob, ...] = (), finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, **said, "logprobs": self._logprobs_of(logprobs), "finish_reason": finish_reason}
        piece: dict[str, Any] = {**self._head, "object": self._object, "choices": [choice]}
        if self.include_usage:
            piece["usage"] = None
        return piece

    def _logprobs_of(self, tokens: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        if not self._logprobs or not tokens:
            return None
        if self.chat:
            return {"content": [self._token(t) for t in tokens], "refusal": None}
        offsets = []
        for t in tokens:
            offsets.append(self._offset)
            self._offset += len(t.token)
        return {
            "tokens": [t.token for t in tokens],
            "token_logprobs": [_number(t.logprob) for t in tokens],
            "top_logprobs": [{s: _number(lp) for s, lp in t.top[: self._top]} for t in tokens] if self._top else None,
            "text_offset": offsets,
        }

    def _token(self, token: TokenLogprob) -> dict[str, Any]:
        return {
            **_scored(token.token, token.logprob),
            "top_logprobs": [_scored(s, lp) for s, lp in token.top[: self._top]],
        }


def _way_of(answer: Completion | Chunk) -> dict[str, Any]:
    """agora's own words about an answer that came by one of several paths."""
    if not answer.path and not answer.notes:
        return {}
    return {"agora": {"path": answer.path or None, "notes": list(answer.notes)}}


async def stream(asked: Asked, words: Words, chunks: AsyncIterator[Chunk]) -> web.StreamResponse:
    """Sends a backend's chunks as they come.

    An error before the first of them is raised, and so has its proper status; a later one is told in the stream.

    Raises:
        AgoraError: If there is no answer.
    """
    # Backends write theirs as generators, which closing makes them free the work at once.
    async with aclosing(cast(AsyncGenerator[Chunk, None], chunks)) as iterator:
        begun: Chunk | None = await anext(iterator, None)
        asked.node.metrics.first_token(asked.model, asyncio.get_running_loop().time() - asked.began)
        async with EventStream(asked.request, headers=asked.headers) as out:
            asked.begun(out.response)
            await _send(out, words.first())
            usage = Usage()
            try:
                while begun is not None:
                    await _send(out, words.piece(begun))
                    usage = begun.usage or usage
                    begun = await anext(iterator, None)
            except AgoraError as e:
                await out.send(orjson.dumps(error_body(e)))
                asked.failed(e)
            else:
                await _send(out, words.last(usage))
                await out.send(DONE)
            asked.node.metrics.tokens(asked.model, usage)
    return out.response


async def _send(out: EventStream, piece: dict[str, Any] | None) -> None:
    if piece is not None:
        await out.send(orjson.dumps(piece))


def usage_body(usage: Usage) -> dict[str, int]:
    """Token counts in OpenAI's words."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.tokens,
    }


def _scored(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": _number(logprob), "bytes": list(token.encode("utf-8", "replace"))}


def _number(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999.0 for what cannot be."""
    return max(logprob, -9999.0)
