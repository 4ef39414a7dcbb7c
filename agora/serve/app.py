"""The gateway's application: its routes, and what happens around every request.

In this order: give the request an id, ask for its key, count it against its caller's rate, answer it, turn whatever
went wrong into one error of the right status, count and log it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import orjson
from aiohttp import web

from agora.errors import AgoraError, OutOfReach
from agora.routing.takers import beyond
from agora.serve import about, card, runs_api
from agora.serve.answer import answer
from agora.serve.asked import (
    CALLER,
    ERROR,
    HELD,
    MODEL,
    REQUEST_ID,
    STREAM,
    Asked,
    Path,
    envelope,
    label,
    read_object,
)
from agora.serve.errors import ApiError, error_body, error_response, internal_error
from agora.serve.forward import forward
from agora.serve.keys import ANYBODY, Role
from agora.serve.node import LOOPBACK, NODE, Node
from agora.serve.reason import reason
from agora.serve.runs_api import RUNS
from agora.square import Expert
from agora.types import lowest
from experts.openai import OpenAIBackend
from experts.passage import Passage, bounded, is_request_id, passing, reach_told
from experts.replicas import ReplicaSet

log = logging.getLogger(__name__)

ID: Final = web.RequestKey("id", str)

OPEN: Final = frozenset({"/healthz", "/readyz"})
"""Paths that need no key: a load balancer has none, and they tell nothing."""

LEAVING: Final = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths that are answered while the node drains."""

CLOSED_BY_CLIENT: Final = 499
"""Status that the log gives a request whose client went away before its answer, as nginx does."""

LAST_WORD_S: Final = 1.0
"""Seconds that a client may take to read on where only an error is left to tell; who needs longer reads nothing."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(node: Node) -> web.Application:
    """The application that serves a node."""
    app = web.Application(middlewares=[guard], client_max_size=node.config.server.max_body_bytes)
    app[NODE] = node
    app[RUNS] = node.runs
    app[card.NEIGHBOURS] = node.neighbours
    app[about.READINESS] = about.Readiness(node)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat),
            web.post("/v1/completions", completions),
            *about.routes(),
            *runs_api.routes(),
            *card.routes(),
        ]
    )
    return app


async def chat(request: web.Request) -> web.StreamResponse:
    """`POST /v1/chat/completions`."""
    return await _completion(request, "chat/completions")


async def completions(request: web.Request) -> web.StreamResponse:
    """`POST /v1/completions`."""
    return await _completion(request, "completions")


async def _completion(request: web.Request, path: Path) -> web.StreamResponse:
    node = request.app[NODE]
    body = await read_object(request, node)
    envelope(body, path)
    target = node.target(body["model"])
    request[MODEL] = body["model"]
    caller = request[CALLER]
    limits = node.config.server
    passage = Passage.read(request.headers, node=node.id, max_hops=limits.max_hops)
    neighbour = passage is not None or caller.role is Role.NEIGHBOUR
    reach = lowest(label(body), reach_told(request.headers))
    if isinstance(target, Expert) and (why := beyond(target.card, reach)) is not None:
        raise OutOfReach(
            f"expert {target.name!r} may not see this: {why}",
            hint="ask one within reach, or let the text go further",
        )
    began = asyncio.get_running_loop().time()
    until = began + limits.request_timeout_s
    asked = Asked(
        request=request,
        node=node,
        path=path,
        body=body,
        request_id=request[ID],
        until=until if passage is None else min(passage.deadline, until),
        began=began,
        reach=reach,
    )
    backend = target.backend if isinstance(target, Expert) else None
    if not node.admission.enter_now(backend, neighbour=neighbour):
        async with _in_time(asked):
            await node.admission.enter(backend, neighbour=neighbour)
    try:
        if isinstance(target, Expert) and isinstance(backend, OpenAIBackend) and not backend.relays:
            # A server that knows nothing of nodes: it needs no passage, and the backend keeps the time itself.
            return await forward(asked, target, backend)
        if isinstance(target, Expert) and isinstance(backend, ReplicaSet) and (one := backend.server) is not None:
            return await forward(asked, target, one, through=backend)
        if passage is None:
            passage = Passage.begin(
                node=node.id,
                max_hops=limits.max_hops,
                request_id=asked.request_id,
                timeout_s=limits.request_timeout_s,
            )
        async with _in_time(asked):
            with passing(passage), bounded(reach):
                if not isinstance(target, Expert):
                    return await reason(asked, target)
                if isinstance(backend, OpenAIBackend):
                    return await forward(asked, target, backend)
                return await answer(asked, target)
    finally:
        node.admission.leave(neighbour=neighbour)


@asynccontextmanager
async def _in_time(asked: Asked) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(asked.until) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise ApiError(
            504,
            f"no answer within {asked.until - asked.began:g} s, waiting for a place included",
            code="timeout",
            hint="ask for less, or when less is going on",
        ) from None


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What happens around every request."""
    node = request.app[NODE]
    clock = asyncio.get_running_loop().time
    began = clock()
    given = request.headers.get(REQUEST_ID, "")
    request_id = given if given and is_request_id(given) else node.request_id()
    request[ID] = request_id
    code = ""
    status = CLOSED_BY_CLIENT
    try:
        try:
            _admit(request, node)
            response = await handler(request)
        except AgoraError as e:
            response, code = await _told(request, e), e.code
        except web.HTTPException as e:
            refused = _of_router(request, e)
            response, code = error_response(refused), refused.code
            if "Allow" in e.headers:
                response.headers["Allow"] = e.headers["Allow"]
        except (asyncio.CancelledError, ConnectionResetError):
            raise
        except Exception:
            log.exception("request %s failed", request_id)
            response, code = await _told(request, internal_error(request_id)), "internal_error"
        status = response.status
        if not response.prepared:
            response.headers[REQUEST_ID] = request_id
            if node.draining or not request.content.is_eof():
                # Also what was refused before its body was read: the client must not send its next request after it.
                response.force_close()
        return response
    finally:
        if node.bodies.held and HELD in request:
            node.bodies.give(request[HELD])
        _tell(request, node, status=status, code=code or request.get(ERROR, ""), seconds=clock() - began)


async def _told(request: web.Request, error: AgoraError) -> web.StreamResponse:
    """The response that tells of `error`: one of its own, or what has begun, with the error as its last event.

    Raises:
        ConnectionResetError: If neither can be: a second head in the middle of a body would be read as part of it.
    """
    begun: web.StreamResponse | None = request.get(STREAM)
    if begun is None:
        if request.writer.output_size == 0:
            return error_response(error)
        raise ConnectionResetError("an answer has begun, in which no error can be told")
    try:
        async with asyncio.timeout(LAST_WORD_S):
            # The lines before it end an event that was cut off in its middle.
            await begun.write(b"\n\ndata: %b\n\n" % orjson.dumps(error_body(error)))
            await begun.write_eof()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the client does not read its answer") from None
    return begun


def _admit(request: web.Request, node: Node) -> None:
    """Lets a request in, or says why not.

    Raises:
        ApiError: 401 without a valid key, 403 from a web page, 429 beyond the rate, 503 while draining.
    """
    path = request.path
    if node.draining and path not in LEAVING:
        raise ApiError(503, "this node is about to end", code="draining", hint="ask another one, or later")
    if path in OPEN:
        request[CALLER] = ANYBODY
        return
    if not node.keys.required:
        _from_here(request, node)
    caller = request[CALLER] = node.keys.caller(request.headers.get("Authorization"))
    if path != card.CARD_PATH:
        # Neighbours look at the card every few seconds; refused, they would take this node for down.
        node.rate.take(caller.name)


def _from_here(request: web.Request, node: Node) -> None:
    """Without keys, whoever reaches the address may ask. A web page in the user's browser reaches it too, under a name
    of its own that it had resolved to this machine: requests under such names are refused.
    """
    host = (request.headers.get("Host") or "").strip()
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    name = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    if name.lower() not in LOOPBACK and name != node.config.server.host:
        raise ApiError(
            403,
            f"the request is for host {host[:100]!r}; without API keys only {', '.join(sorted(LOOPBACK))} are served",
            code="wrong_host",
            hint="ask for 127.0.0.1, or make API keys with 'agora keys new NAME'",
        )


def _of_router(request: web.Request, error: web.HTTPException) -> ApiError:
    if error.status == 404:
        return ApiError(
            404, f"there is nothing at {request.path[:200]!r}", code="not_found", hint="GET /openapi.json tells what is"
        )
    if error.status == 405:
        allowed = error.headers.get("Allow", "")
        return ApiError(405, f"{request.method} is not allowed here; allowed: {allowed}", code="method_not_allowed")
    return ApiError(error.status, error.reason or "refused", code="refused")


def _tell(request: web.Request, node: Node, *, status: int, code: str, seconds: float) -> None:
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "-"
    model = request.get(MODEL, "-")
    node.metrics.request(route, model, status, seconds)
    if node.log is None:
        return
    caller = request.get(CALLER)
    line = {
        "request": request[ID],
        "method": request.method,
        "route": route,
        "status": status,
        "ms": round(seconds * 1000, 1),
        "caller": caller.name if caller is not None else None,
        "model": model,
        "from": request.remote,
    }
    if code:
        line["code"] = code
    node.log.line(line)
