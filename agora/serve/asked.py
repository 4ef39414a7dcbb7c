"""One request to answer: who asks, what for, by when; and the reading of its body."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import orjson
from aiohttp import web

from agora.errors import AgoraError, DeadlineExceeded, InvalidRequest
from agora.serve.errors import JSON, ApiError
from agora.serve.keys import ANYBODY, Caller
from agora.serve.node import Node
from agora.serve.wire import shown
from agora.types import Tier, reach_of

Path = Literal["chat/completions", "completions"]

CALLER: Final = web.RequestKey("caller", Caller)
"""Key of a request under which whoever sent it is kept."""

MODEL: Final = web.RequestKey("model", str)
"""Key of a request under which the model that it names is kept for log and metrics, once it is known to be served."""

ERROR: Final = web.RequestKey("error", str)
"""Key of a request under which the code of an error is kept that came after the status had been sent."""

STREAM: Final = web.RequestKey("stream", web.StreamResponse)
"""Key of a request under which its answer is kept once it has begun in pieces: an error can then only be told in it."""

HELD: Final = web.RequestKey("held", int)
"""Key of a request under which the bytes are kept that are set aside for its body, until it is answered."""

REQUEST_ID: Final = "X-Request-Id"
"""Header that names a request, given by the client or here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request for an answer.

    Attributes:
        request: The HTTP request.
        node: Who is asked.
        path: Which endpoint.
        body: Its JSON body, an object with a `model`.
        request_id: What to call it in logs and answers.
        until: Event-loop time by which it must be answered.
        began: Event-loop time at which it came.
        reach: The highest tier whose machines may see it.
    """

    request: web.Request
    node: Node
    path: Path
    body: dict[str, Any]
    request_id: str
    until: float
    began: float
    reach: Tier = Tier.CLOUD

    @property
    def asker(self) -> str | None:
        """Whose question it is."""
        return asker_of(self.request)

    @property
    def model(self) -> str:
        """The model it names."""
        return str(self.body["model"])

    @property
    def streamed(self) -> bool:
        """Whether the answer is to come in pieces."""
        return self.body.get("stream") is True

    @property
    def headers(self) -> dict[str, str]:
        """Headers of an answer in pieces; those of others are added when they are sent."""
        return {REQUEST_ID: self.request_id}

    def begun(self, response: web.StreamResponse) -> None:
        """Notes that an answer in pieces has begun; whatever goes wrong from now on is told in it."""
        self.request[STREAM] = response

    def failed(self, error: AgoraError) -> None:
        """Notes an error that came after the status had been sent, for log and metrics."""
        self.request[ERROR] = error.code

    @property
    def left_s(self) -> float:
        """Seconds that are left for it.

        Raises:
            DeadlineExceeded: If none are.
        """
        left = self.until - asyncio.get_running_loop().time()
        if left <= 0:
            raise DeadlineExceeded("the time for this request is up", hint="give it more, or ask when less is going on")
        return left


def asker_of(request: web.Request) -> str | None:
    """Who must not learn from an answer, or from how soon it comes, what others ask; None without API keys, where
    nobody is told apart."""
    caller = request.get(CALLER, ANYBODY)
    return None if caller is ANYBODY else caller.name


async def read_object(request: web.Request, node: Node) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        ApiError: 400, 408, 413, 415 or 429: it is none, comes too slowly, is too large, of another type, or too many
            are being read.
    """
    limit = node.config.server.max_body_bytes
    if request.headers.get("Content-Type") != JSON and request.content_type != JSON:
        # Also what keeps a web page in the user's browser from asking: it would need leave for this type.
        raise ApiError(
            415,
            f"the body is {request.content_type!r}; it must be {JSON}",
            code="unsupported_media_type",
            hint=f"send the header 'Content-Type: {JSON}'",
        )
    # What came with the head, as small ones do, is here already: nothing to wait for or to set aside.
    try:
        data = await (request.read() if request.content.is_eof() else _arriving(request, node, limit))
    except web.HTTPRequestEntityTooLarge as e:
        raise _too_large(None, limit) from e
    except web.RequestPayloadError:
        raise ApiError(
            400,
            f"the body cannot be read; its Content-Encoding is {request.headers.get('Content-Encoding', '')[:100]!r}",
            code="invalid_body",
            hint="send it as it is, or as gzip or deflate",
        ) from None
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as e:
        raise ApiError(400, f"the body is not valid JSON: {e}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(body).__name__}", code="invalid_json")
    return body


async def _arriving(request: web.Request, node: Node, limit: int) -> bytes:
    """A body that is on its way, in bounded time and space."""
    length = request.content_length
    if length is not None and length > limit:
        raise _too_large(length, limit)
    # Kept until the request is answered, in which it may wait long. How large it unpacks to is not known before.
    certain = length is not None and "Content-Encoding" not in request.headers
    request[HELD] = node.bodies.take(length if certain and length is not None else limit)
    try:
        async with asyncio.timeout(node.config.server.body_timeout_s):
            data = await request.read()
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {node.config.server.body_timeout_s:g} s",
            code="body_timeout",
        ) from None
    request[HELD] = node.bodies.take(len(data), instead_of=request[HELD])
    return data


def _too_large(length: int | None, limit: int) -> ApiError:
    seen = f"has {length:,} bytes" if length is not None else "is too large"
    return ApiError(413, f"the body {seen}; at most {limit:,} are allowed", code="body_too_large", hint="shorten it")


def envelope(body: Mapping[str, Any], path: Path) -> None:
    """Checks what every request must have, whoever answers it.

    Raises:
        ApiError: 400, naming the field.
    """
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise _wrong("model", "must be the name of a model", model, "model" in body)
    if not isinstance(body.get("stream"), bool | None):
        raise _wrong("stream", "must be true or false", body["stream"], True)
    if path == "chat/completions":
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise _wrong("messages", "must be a list of at least one message", messages, "messages" in body)
    elif "prompt" not in body:
        raise _wrong("prompt", "must be text", None, False)


def label(body: Mapping[str, Any]) -> Tier:
    """How far up a request may go, by its field `reach`; anywhere if it has none.

    Raises:
        ApiError: 400, naming the field and the labels there are.
    """
    given = body.get("reach")
    if given is None:
        return Tier.CLOUD
    try:
        return reach_of(given)
    except InvalidRequest as e:
        raise ApiError(400, e.message, code="invalid_value", param="reach", hint=e.hint) from None


def _wrong(param: str, must: str, value: Any, there: bool) -> ApiError:
    seen = f"got {shown(value)}" if there else "and is missing"
    return ApiError(400, f"{param} {must}, {seen}", code="invalid_value", param=param)
