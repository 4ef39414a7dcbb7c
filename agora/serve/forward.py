"""Passing a request on to an expert that lives behind an OpenAI-compatible server, and its reply back, as they are."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import orjson
from aiohttp import web

from agora.errors import AgoraError, BadReply
from agora.serve.asked import Asked
from agora.serve.errors import JSON, ApiError, error_body
from agora.serve.sse import EventStream
from agora.serve.wire import HARMFUL, MAX_CHOICES, capped, shown
from agora.square import Expert
from agora.types import Usage
from experts.http_reply import Reply
from experts.openai import OpenAIBackend
from experts.replicas import ReplicaSet

LIMITS: Final = ("max_completion_tokens", "max_tokens")
"""The two names of the most tokens to generate."""

TAIL_BYTES: Final = 2_048
"""Bytes of a stream's end that are kept, to find the token counts in: they come in its last event, a few hundred."""

EVENT_STREAM: Final = "text/event-stream"


async def forward(
    asked: Asked, expert: Expert, backend: OpenAIBackend, *, through: ReplicaSet | None = None
) -> web.StreamResponse:
    """Has the server behind `backend` answer, or one of the replicas that it is one of.

    Raises:
        ApiError: 400, if a field may not be passed on.
        BackendError: If no answer comes.
    """
    try:
        payload = orjson.dumps(tailored(asked, expert, backend))
    except orjson.JSONEncodeError as e:
        # What was read can be written, unless it is nested too deep.
        raise ApiError(400, f"the body cannot be passed on: {e}", code="invalid_json") from None

    async def read(reply: Reply) -> web.StreamResponse:
        if asked.streamed:
            if reply.content_type != EVENT_STREAM:
                # Clients that wait for events would see an empty stream.
                raise BadReply(f"the reply is {reply.content_type or 'of no type'}, not a stream", backend=backend.name)
            return await _stream(asked, reply, backend)
        if reply.content_type != JSON:
            raise BadReply(f"the reply is {reply.content_type or 'of no type'}, not JSON", backend=backend.name)
        data = await reply.whole()
        asked.node.metrics.tokens(asked.model, _usage_of(data, backend))
        return web.Response(body=data, content_type=JSON)

    return await (through or backend).forward(
        asked.path, payload, read, streamed=asked.streamed, timeout_s=asked.left_s
    )


def tailored(asked: Asked, expert: Expert, backend: OpenAIBackend) -> dict[str, Any]:
    """The body as the server takes it: its own name for the model, and what belongs to the expert.

    A system message of the asker's takes the place of the expert's prompt; a temperature of the asker's that of the
    expert's; tokens are capped at what the card allows. Everything else stays as it came.

    Raises:
        ApiError: 400, if a field may not be passed on.
    """
    body = asked.body
    for field in HARMFUL.keys() & body.keys():
        value = body[field]
        if value is None or value is False or (field == "best_of" and value == 1):
            # So clients send it that write out every default: as good as left out, and so it is.
            body = {k: v for k, v in body.items() if k != field}
            continue
        raise ApiError(400, f"{field} is not passed on: {HARMFUL[field]}", code="unsupported", param=field)
    many = body.get("n")
    if many is not None and not (isinstance(many, int) and 1 <= many <= MAX_CHOICES):
        raise ApiError(400, f"n is {shown(many)}; allowed: 1 to {MAX_CHOICES}", code="invalid_value", param="n")
    body = {**body, "model": str(expert.adapter) if expert.adapter else backend.model}
    # It was heeded here; another node is told by the request's passage.
    body.pop("reach", None)
    if backend.relays:
        # The node there knows the expert; it adds what belongs to it.
        return body
    wanted = next((body[f] for f in LIMITS if body.get(f) is not None), None)
    for f in LIMITS:
        body.pop(f, None)
    if wanted is not None and (not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1):
        raise ApiError(400, f"max_tokens is {shown(wanted)}; it must be ≥ 1", code="invalid_value", param="max_tokens")
    body[backend.max_tokens_field if asked.path == "chat/completions" else "max_tokens"] = capped(wanted, expert)
    body.setdefault("temperature", expert.temperature)
    if expert.system_prompt and asked.path == "chat/completions":
        messages = body["messages"]
        if messages[0].get("role") not in ("system", "developer"):
            body["messages"] = [{"role": "system", "content": expert.system_prompt}, *messages]
    return body


async def _stream(asked: Asked, reply: Reply, backend: OpenAIBackend) -> web.StreamResponse:
    # Before anything is sent: a server that hangs after its headers, or breaks, still gets an error of its own status.
    piece = await reply.read(first=True)
    if not piece:
        raise BadReply("the stream is empty", backend=backend.name)
    asked.node.metrics.first_token(asked.model, asyncio.get_running_loop().time() - asked.began)
    # Pieces of the server's own: one may end in the middle of an event, so nothing may be put between them.
    async with EventStream(asked.request, heartbeat_s=None, headers=asked.headers) as out:
        asked.begun(out.response)
        tail = b""
        try:
            while piece:
                tail = piece[-TAIL_BYTES:] if len(piece) >= TAIL_BYTES else (tail + piece)[-TAIL_BYTES:]
                await out.send_encoded(piece)
                piece = await reply.read()
            if not tail.rstrip().endswith(b"[DONE]"):
                raise BadReply("the stream broke off before its end", backend=backend.name)
        except AgoraError as e:
            # The status is long sent: the error is told in the stream, which ends without `[DONE]`.
            await out.send_encoded(b"\n\ndata: %b\n\n" % orjson.dumps(error_body(e)))
            asked.failed(e)
        asked.node.metrics.tokens(asked.model, _usage_in(tail))
    return out.response


def _usage_of(data: bytes, backend: OpenAIBackend) -> Usage:
    """The token counts of a reply; a reply that is none (a server that is dead inside may say 200) is an error."""
    try:
        plain = orjson.loads(data)
    except orjson.JSONDecodeError:
        plain = None
    if not isinstance(plain, dict) or not isinstance(plain.get("choices"), list) or not plain["choices"]:
        raise BadReply("the reply holds no answer", backend=backend.name)
    return _usage(plain.get("usage"))


def _usage_in(tail: bytes) -> Usage:
    """The token counts in the end of a stream, if it tells them."""
    for line in reversed(tail.split(b"\n")):
        if line.startswith(b"data: {") and b'"usage"' in line:
            try:
                return _usage(orjson.loads(line[6:]).get("usage"))
            except orjson.JSONDecodeError:
                break
    return Usage()


def _usage(plain: Any) -> Usage:
    if not isinstance(plain, dict):
        return Usage()
    prompt, completion = plain.get("prompt_tokens"), plain.get("completion_tokens")
    return Usage(
        prompt_tokens=prompt if isinstance(prompt, int) and prompt > 0 else 0,
        completion_tokens=completion if isinstance(completion, int) and completion > 0 else 0,
        calls=1,
    )
