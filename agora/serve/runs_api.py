"""`/v1/runs`: runs over HTTP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any, Final

import orjson
from aiohttp import web

from agora.errors import InvalidRequest, RunNotFound
from agora.serve.asked import asker_of, read_object
from agora.serve.errors import JSON, ApiError
from agora.serve.node import NODE
from agora.serve.runs import Runs
from agora.serve.runs_schema import RunRequest
from agora.serve.sse import EventStream
from agora.serve.wire import checked
from agora.types import Budget, Tier, label_of, lowest, reach_of, to_plain
from experts.passage import reach_told
from graphs.records import RunRecord, RunStatus, StoredEvent
from graphs.run import checked_run_id

RUNS: Final = web.AppKey("runs", Runs)
"""Where the application has its runs."""

MAX_LISTED: Final = 100
"""Most runs in one list, as in OpenAI's API; `before` asks for more."""

DEFAULT_LISTED: Final = 20
"""Runs in a list whose length is not asked for, as in OpenAI's API."""

MAX_EVENTS: Final = 1_000
"""Most events in one list, and how many if that is not asked for: all of a run with a plan of 256 subtasks."""

RETRY_S: Final = 2.0
"""Seconds after which one who watches and lost the connection should come again: a restart takes some seconds."""

MAX_SEQ: Final = 2**53
"""Largest number of an event: the largest whole number that every JSON reader keeps."""

_SEQ: Final = re.compile(r"[0-9]{1,18}")

ENDED: Final = frozenset({RunStatus.DONE, RunStatus.PARTIAL, RunStatus.FAILED, RunStatus.CANCELLED})
"""Statuses of runs of which nothing more is told unless somebody asks to go on with them."""


def routes() -> list[web.RouteDef]:
    """The routes; the application needs `RUNS`, and `NODE` for the limits of bodies."""
    return [
        web.post("/v1/runs", create),
        web.get("/v1/runs", list_runs),
        web.get("/v1/runs/{id}", get),
        web.post("/v1/runs/{id}/cancel", cancel),
        web.post("/v1/runs/{id}/resume", resume),
        web.get("/v1/runs/{id}/events", events, allow_head=False),
    ]


async def create(request: web.Request) -> web.Response:
    """`POST /v1/runs`: accepts a run; it is on disk when the answer comes."""
    runs = request.app[RUNS]
    wanted = checked(RunRequest, await read_object(request, request.app[NODE]))
    name = "question" if wanted.question is not None else "input"
    told = reach_told(request.headers)
    try:
        record = await runs.create(
            wanted.asked,
            graph=wanted.graph,
            budget=Budget(**wanted.budget.model_dump()) if wanted.budget is not None else None,
            reach=lowest(reach_of(wanted.reach or Tier.CLOUD), told),
            metadata=wanted.metadata,
            run_id=wanted.id,
            asker=asker_of(request),
            trade_off=wanted.trade_off,
        )
    except InvalidRequest as e:
        raise ApiError(400, e.message, code="invalid_value", param=name, hint=e.hint) from None
    return _reply(_view(runs, record), status=202, headers={"Location": f"/v1/runs/{record.id}"})


async def list_runs(request: web.Request) -> web.Response:
    """`GET /v1/runs`: the newest runs first."""
    runs = request.app[RUNS]
    query = _query(request, "limit", "status", "before")
    limit = _number(query, "limit", DEFAULT_LISTED, MAX_LISTED)
    before = query.get("before")
    if before is not None:
        _run_id(before, "before")
    try:
        # One more than asked for tells whether there are more.
        found = await runs.list(limit=limit + 1, status=_status(query), before=before)
    except RunNotFound as e:
        raise ApiError(404, f"before: {e.message}", code=e.code, param="before") from None
    data = [_view(runs, r) for r in found[:limit]]
    return _reply({"object": "list", "data": data, "has_more": len(found) > limit})


async def get(request: web.Request) -> web.Response:
    """`GET /v1/runs/{id}`."""
    runs = request.app[RUNS]
    return _reply(_view(runs, await runs.get(_run_id(request.match_info["id"], "id"))))


async def cancel(request: web.Request) -> web.Response:
    """`POST /v1/runs/{id}/cancel`: ends a run; its work has ended when the answer comes."""
    runs = request.app[RUNS]
    return _reply(_view(runs, await runs.cancel(_run_id(request.match_info["id"], "id"))))


async def resume(request: web.Request) -> web.Response:
    """`POST /v1/runs/{id}/resume`: goes on with an interrupted or failed run."""
    runs = request.app[RUNS]
    record = await runs.resume(_run_id(request.match_info["id"], "id"))
    return _reply(_view(runs, record), status=202, headers={"Location": f"/v1/runs/{record.id}"})


async def events(request: web.Request) -> web.StreamResponse:
    """`GET /v1/runs/{id}/events`: what happened and happens, as server-sent events, or as JSON those so far."""
    runs = request.app[RUNS]
    run_id = _run_id(request.match_info["id"], "id")
    query = _query(request, "after", "limit")
    after = _after(request, query)
    limit = _number(query, "limit", MAX_EVENTS, MAX_EVENTS)
    record = await runs.get(run_id)
    accept = request.headers.get("Accept", "")
    if JSON in accept and "text/event-stream" not in accept:
        found = await runs.stored_events(run_id, after=after, limit=limit + 1)
        body = b",".join(_event(e) for e in found[:limit])
        more = b"true" if len(found) > limit else b"false"
        return web.Response(
            body=b'{"object":"list","data":[%b],"has_more":%b}' % (body, more), content_type=JSON, status=200
        )
    if after and record.status in ENDED and await runs.last_seq(run_id) <= after:
        # What tells a browser, which comes again for ever, that there is nothing more to come for.
        return web.Response(status=204)
    async with (
        EventStream(request, retry_s=RETRY_S) as out,
        aclosing(runs.watch_stored(run_id, after=after)) as stored,
    ):
        async for e in stored:
            await out.send(e.body, event=e.type, event_id=e.seq)
    return out.response


def _event(event: StoredEvent) -> bytes:
    # The body is JSON already, written by agora itself.
    return b'{"seq":%d,"type":%b,"data":%b}' % (event.seq, orjson.dumps(event.type), event.body.encode())


def _view(runs: Runs, record: RunRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "run",
        "status": str(record.status),
        "queued": runs.is_waiting(record.id),
        "question": record.question,
        "graph": record.graph,
        "created_at": record.created_at,
        "finished_at": record.finished_at,
        "budget": to_plain(record.budget),
        "reach": label_of(record.reach),
        "trade_off": record.trade_off,
        "metadata": dict(record.metadata),
        "result": record.result.to_dict() if record.result is not None else None,
        "error": record.error,
    }


def _reply(plain: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=orjson.dumps(plain), status=status, content_type=JSON, headers=headers)


def _run_id(given: str, param: str) -> str:
    try:
        return checked_run_id(given)
    except InvalidRequest as e:
        raise ApiError(400, e.message, code="invalid_value", param=param) from None


def _query(request: web.Request, *known: str) -> dict[str, str]:
    for name in request.query:
        if name not in known:
            allowed = ", ".join(known)
            raise ApiError(
                400, f"{name[:64]!r} is not known here; allowed: {allowed}", code="unknown_field", param=name[:64]
            )
        if len(request.query.getall(name)) > 1:
            raise ApiError(400, f"{name} is given twice", code="invalid_value", param=name)
    return dict(request.query)


def _number(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    given = query.get(name)
    if given is None:
        return default
    if _SEQ.fullmatch(given) is None or not 1 <= int(given) <= most:
        raise ApiError(400, f"{name} is {given[:64]!r}; allowed: 1 to {most}", code="invalid_value", param=name)
    return int(given)


def _status(query: Mapping[str, str]) -> RunStatus | None:
    given = query.get("status")
    if given is None:
        return None
    if given not in set(RunStatus):
        allowed = ", ".join(RunStatus)
        raise ApiError(400, f"status is {given[:64]!r}; allowed: {allowed}", code="invalid_value", param="status")
    return RunStatus(given)


def _after(request: web.Request, query: Mapping[str, str]) -> int:
    """Where to go on: what the browser says it has, which asks under the same URL again, else what the URL says."""
    found = []
    for name, given in (("Last-Event-ID", request.headers.get("Last-Event-ID") or None), ("after", query.get("after"))):
        if given is None:
            continue
        if _SEQ.fullmatch(given) is None or int(given) > MAX_SEQ:
            raise ApiError(
                400,
                f"{name} is {given[:64]!r}; it must be the number of an event, 0 for all of them",
                code="invalid_value",
                param=name,
            )
        found.append(int(given))
    return found[0] if found else 0
