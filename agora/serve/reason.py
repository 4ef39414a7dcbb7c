"""Chats with a graph: many experts answer, in one OpenAI answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

import orjson
from aiohttp import web

from agora.errors import (
    AgoraError,
    BackendError,
    BackendTimeout,
    DeadlineExceeded,
    NoExpert,
    OutOfReach,
    Overloaded,
    Unavailable,
)
from agora.events import AttemptStarted, Event, Planned, RunFailed, RunFinished
from agora.serve.answer import DONE, usage_body
from agora.serve.asked import Asked
from agora.serve.errors import JSON, STATUS, ApiError, error_body
from agora.serve.sse import EventStream
from agora.serve.weighing import check_weighs
from agora.serve.wire import ChatMessage, ChatRequest, checked
from agora.types import Answer, Budget, Failure, Outcome, RunResult, Usage, checked_question
from graphs.build import Graph
from graphs.run import run, stream

NOT_APPLIED: Final = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "seed", "response_format")
"""Fields that have no meaning for an answer put together from several experts'; the answer says that they had none."""

CODES: Final[Mapping[str, type[AgoraError]]] = {
    c.code: c for c in (DeadlineExceeded, NoExpert, OutOfReach, BackendTimeout, Overloaded, Unavailable)
}
"""Errors that stand for a failure when nothing at all was answered; others are told as `BackendError`."""


MAX_RUN_ID_CHARS: Final = 128
"""Characters of a run's id, as `graphs.run` has them."""

KEPT_BACK_S: Final = 1.0
"""Seconds of a request's time that a run is not given, to tell what is answered by then; of a short time a twentieth.
Were it given all of it, the request would end first, and with it what was answered."""


async def reason(asked: Asked, graph: Graph) -> web.StreamResponse:
    """Has a graph answer the last message of a chat.

    Raises:
        ApiError: 400, if the body is wrong.
        AgoraError: If no part of it was answered.
    """
    if asked.path != "chat/completions":
        raise ApiError(
            400,
            f"{asked.model!r} is a graph, which answers chats",
            code="unsupported",
            param="model",
            hint="POST /v1/chat/completions",
        )
    body = checked(ChatRequest, asked.body)
    if body.logprobs:
        raise ApiError(
            400, "a graph's answer has no log-probabilities", code="unsupported", param="logprobs", hint="ask an expert"
        )
    question, before = question_of(body.messages)
    checked_question(question)
    budget = _budget(body, asked.left_s, asked.node.config.graph.deadline_s)
    if body.trade_off is not None:
        check_weighs(graph, asked.model)
    words = _Words(asked, body)
    wanted: dict[str, Any] = {
        "run_id": _run_id(asked),
        "budget": budget,
        "said_before": before,
        "reach": asked.reach,
        "asker": asked.asker,
        "trade_off": body.trade_off,
    }
    if body.stream:
        return await _stream(asked, words, stream(graph, question, **wanted))
    result = await run(graph, question, **wanted)
    _answered(result)
    asked.node.metrics.tokens(asked.model, result.usage)
    return web.Response(body=orjson.dumps(words.whole(result)), content_type=JSON)


def question_of(messages: Sequence[ChatMessage]) -> tuple[str, str]:
    """The question that a chat asks, its last message, and what was said before it.

    Raises:
        ApiError: 400, if the last message is not the user's.
    """
    said = [m.plain() for m in messages]
    if said[-1].role != "user":
        raise ApiError(
            400,
            f"the last message is the {said[-1].role}'s; it must be the user's",
            code="invalid_value",
            param="messages",
        )
    # Experts see one text each: instructions and what the question may refer to have to stand in it.
    parts = [m.content for m in said if m.role == "system"]
    if turns := "\n".join(f"{m.role}: {m.content}" for m in said[:-1] if m.role != "system"):
        parts.append(f"What was said before:\n{turns}")
    return said[-1].content, "\n\n".join(p for p in parts if p.strip())


def _run_id(asked: Asked) -> str:
    """What to call the run, which is kept nowhere: after the request, whose id may have more characters and kinds."""
    return f"chat-{asked.request_id.replace(':', '.')}"[:MAX_RUN_ID_CHARS]


def _budget(body: ChatRequest, left_s: float, usual: float | None) -> Budget:
    asked = body.budget
    given_s = left_s - min(KEPT_BACK_S, left_s / 20)
    deadlines = [d for d in (given_s, usual, asked.deadline_s if asked else None) if d is not None]
    return Budget(
        deadline_s=min(deadlines),
        cost=asked.cost if asked else None,
        tokens=asked.tokens if asked else None,
    )


def _answered(result: RunResult) -> None:
    """Raises the error that stands for the failures if nothing was answered."""
    outcomes = [result.outcome(s.id) for s in result.graph]
    if any(isinstance(o, Answer) for o in outcomes):
        return
    failure = next(o for o in outcomes if isinstance(o, Failure))
    kind = CODES.get(failure.code)
    if kind is None:
        raise BackendError(failure.message)
    raise kind(failure.message)


def _came(outcome: Outcome) -> dict[str, Any]:
    """Whether there is an answer; where somebody knows, how far it can be trusted and by which path it came."""
    if not isinstance(outcome, Answer):
        return {"answered": False}
    known = {"confidence": outcome.confidence, "path": outcome.path}
    return {"answered": True, **{k: v for k, v in known.items() if v is not None}}


class _Words:
    """A graph's answer in OpenAI's words, with agora's own about it under `agora`."""

    def __init__(self, asked: Asked, body: ChatRequest) -> None:
        self.include_usage = body.include_usage
        self._ignored = [f for f in NOT_APPLIED if getattr(body, f) is not None]
        self._head = {"id": f"chatcmpl-{asked.request_id}", "created": int(time.time()), "model": asked.model}

    def whole(self, result: RunResult) -> dict[str, Any]:
        message = {"role": "assistant", "content": result.text, "refusal": None}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
            "usage": usage_body(result.usage),
            "agora": self.about(result),
        }

    def about(self, result: RunResult) -> dict[str, Any]:
        """How the answer came about."""
        return {
            "run": result.run,
            "planner": result.planner,
            "subtasks": [
                {
                    "id": s.id,
                    "question": s.question,
                    "experts": [a.expert for a in result.attempts[s.id] if a.expert is not None],
                    **_came(result.outcome(s.id)),
                }
                for s in result.graph
            ],
            "missing": list(result.missing),
            "notes": list(result.notes),
            "cost": result.usage.cost,
            "not_applied": self._ignored,
        }

    def piece(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        piece = {**self._head, "object": "chat.completion.chunk", "choices": [choice], **more}
        if self.include_usage:
            piece["usage"] = None
        return piece

    def last(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage_body(usage)}


async def _stream(asked: Asked, words: _Words, events_of: AsyncGenerator[Event, None]) -> web.StreamResponse:
    """Tells how it goes on as comments, which clients of OpenAI's pass over, and then the answer."""
    async with EventStream(asked.request, headers=asked.headers) as out:
        asked.begun(out.response)
        await out.send(orjson.dumps(words.piece({"role": "assistant", "content": ""})))
        try:
            async with aclosing(events_of) as events:
                async for event in events:
                    if (line := _progress(event)) is not None:
                        await out.send_encoded(b": %b\n\n" % line.encode())
                    if isinstance(event, RunFailed):
                        raise ApiError(STATUS.get(event.code, 500), event.message, code=event.code)
                    if isinstance(event, RunFinished):
                        await _tell(asked, words, out, event.result)
        except AgoraError as e:
            await out.send(orjson.dumps(error_body(e)))
            asked.failed(e)
    return out.response


async def _tell(asked: Asked, words: _Words, out: EventStream, result: RunResult) -> None:
    asked.node.metrics.first_token(asked.model, asyncio.get_running_loop().time() - asked.began)
    asked.node.metrics.tokens(asked.model, result.usage)
    _answered(result)
    await out.send(orjson.dumps(words.piece({"content": result.text})))
    await out.send(orjson.dumps(words.piece({}, "stop", agora=words.about(result))))
    if words.include_usage:
        await out.send(orjson.dumps(words.last(result.usage)))
    await out.send(DONE)


def _progress(event: Event) -> str | None:
    if isinstance(event, Planned):
        return f"planned {len(event.graph)} subtasks"
    if isinstance(event, AttemptStarted):
        return f"{event.subtask}: asking {event.expert}"
    return None
