"""The OpenAPI document, made of the models that requests are checked with, so that it cannot say otherwise."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Final

from pydantic.json_schema import models_json_schema

from agora.serve.replies import (
    ChatCompletion,
    Error,
    ModelCard,
    ModelList,
    Neighbours,
    NodeCard,
    Status,
    TextCompletion,
)
from agora.serve.runs_schema import EventList, RunList, RunRequest, RunView
from agora.serve.wire import ChatRequest, CompletionRequest

REF: Final = "#/components/schemas/{model}"

REQUESTS: Final = (ChatRequest, CompletionRequest, RunRequest)
REPLIES: Final = (
    ChatCompletion,
    TextCompletion,
    ModelList,
    ModelCard,
    RunView,
    RunList,
    EventList,
    Status,
    NodeCard,
    Neighbours,
    Error,
)

ERRORS: Final[Mapping[int, str]] = {
    400: "The request is wrong; `param` names the field.",
    401: "No API key, or an unknown one.",
    403: "Without API keys: a request under a foreign host name.",
    404: "No such model, run or path.",
    408: "The body did not arrive in time.",
    409: "In conflict with what is there.",
    413: "The body is too large.",
    415: "The body is not `application/json`.",
    429: "Too many requests; `Retry-After` says when to try again.",
    500: "A bug in the gateway; its log has the request's id.",
    502: "The expert's server cannot be reached or gave no proper answer.",
    503: "Nobody can answer now, or the node is about to end.",
    504: "The time for the request was up.",
    508: "The request went in a circle, or would pass too many nodes.",
}


def _json(model: type[Any]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REF.format(model=model.__name__)}}}


_TEXT: Final = {"schema": {"type": "string"}}


def _answers(*statuses: int, good: Mapping[int, tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for s, (text, content) in good.items():
        told[str(s)] = {"description": text, "content": content} if content else {"description": text}
    for s in statuses:
        told[str(s)] = {"description": ERRORS[s], "content": _json(Error)}
        if s in (429, 503):
            told[str(s)]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return told


def _post(summary: str, operation: str, model: type[Any], *statuses: int, **good: Any) -> dict[str, Any]:
    return {
        "summary": summary,
        "operationId": operation,
        "requestBody": {"required": True, "content": _json(model)},
        "responses": _answers(*statuses, good=good["good"]),
    }


def _get(
    summary: str,
    operation: str,
    *statuses: int,
    good: Mapping[int, tuple[str, Mapping[str, Any]]],
    parameters: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    said: dict[str, Any] = {
        "summary": summary,
        "operationId": operation,
        "responses": _answers(*statuses, good=good),
    }
    if parameters:
        said["parameters"] = parameters
    return said


def _in(where: str, name: str, text: str, schema: dict[str, Any], *, required: bool = False) -> dict[str, Any]:
    return {"in": where, "name": name, "description": text, "required": required or where == "path", "schema": schema}


_ID: Final = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$"}
_RUN_ID: Final = _in("path", "id", "The run's id.", _ID)
_AFTER: Final = {"type": "integer", "minimum": 0, "maximum": 2**53}
_KEYED: Final = (400, 401, 403, 429, 500, 503)
_ANSWERED: Final = (*_KEYED, 404, 408, 413, 415, 502, 504, 508)
_STREAM: Final[dict[str, Any]] = {"text/event-stream": {}}
"""No schema: one would be taken for that of each event's data."""


def _paths() -> dict[str, Any]:
    run = {200: ("The run.", _json(RunView))}
    return {
        "/v1/chat/completions": {
            "post": _post(
                "Ask an expert or a graph",
                "chat",
                ChatRequest,
                *_ANSWERED,
                good={200: ("The answer; with `stream`, its pieces.", {**_json(ChatCompletion), **_STREAM})},
            )
        },
        "/v1/completions": {
            "post": _post(
                "Have an expert go on with a text",
                "complete",
                CompletionRequest,
                *_ANSWERED,
                good={200: ("The answer; with `stream`, its pieces.", {**_json(TextCompletion), **_STREAM})},
            )
        },
        "/v1/models": {"get": _get("Who can be asked", "models", *_KEYED, good={200: ("All.", _json(ModelList))})},
        "/v1/models/{model}": {
            "get": _get(
                "One who can be asked",
                "model",
                *_KEYED,
                404,
                good={200: ("The model.", _json(ModelCard))},
                parameters=[_in("path", "model", "Its name.", {"type": "string", "minLength": 1})],
            )
        },
        "/v1/runs": {
            "post": _post(
                "Start a run that outlives the connection",
                "create_run",
                RunRequest,
                *_KEYED,
                404,
                408,
                409,
                413,
                415,
                good={202: ("Accepted, and written down.", _json(RunView))},
            ),
            "get": _get(
                "List runs, the newest first",
                "runs",
                *_KEYED,
                404,
                good={200: ("Runs.", _json(RunList))},
                parameters=[
                    _in("query", "limit", "Most runs.", {"type": "integer", "minimum": 1, "maximum": 100}),
                    _in("query", "status", "Only runs that stand so.", {"$ref": "#/components/schemas/RunStatus"}),
                    _in("query", "before", "Only runs older than this one.", _ID),
                ],
            ),
        },
        "/v1/runs/{id}": {"get": _get("One run", "run", *_KEYED, 404, good=run, parameters=[_RUN_ID])},
        "/v1/runs/{id}/cancel": {
            "post": _get("End a run", "cancel_run", *_KEYED, 404, 409, good=run, parameters=[_RUN_ID])
        },
        "/v1/runs/{id}/resume": {
            "post": _get(
                "Go on with an interrupted run",
                "resume_run",
                *_KEYED,
                404,
                409,
                good={202: ("Accepted.", _json(RunView))},
                parameters=[_RUN_ID],
            )
        },
        "/v1/runs/{id}/events": {
            "get": _get(
                "What happened in a run, and what happens",
                "run_events",
                *_KEYED,
                404,
                good={
                    200: (
                        "Server-sent events until the run ends; as JSON, those so far.",
                        {**_STREAM, **_json(EventList)},
                    ),
                    204: ("The run has ended, and nothing comes after: do not come again.", {}),
                },
                parameters=[
                    _RUN_ID,
                    _in("query", "after", "Only events after this number.", _AFTER),
                    _in("header", "Last-Event-ID", "The same, as browsers say it.", _AFTER),
                ],
            )
        },
        "/v1/agora/card": {
            "get": _get(
                "What this node tells its neighbours",
                "card",
                *_KEYED,
                good={200: ("The card.", _json(NodeCard))},
                parameters=[_in("query", "known", "Revision that is known already.", {"type": "string"})],
            )
        },
        "/v1/agora/neighbours": {
            "get": _get("How the neighbours are", "neighbours", *_KEYED, good={200: ("All.", _json(Neighbours))})
        },
        "/healthz": {"get": _get("Whether the process lives", "healthz", 500, good={200: ("It does.", _json(Status))})},
        "/readyz": {
            "get": _get(
                "Whether questions are answered",
                "readyz",
                500,
                good={200: ("They are.", _json(Status)), 503: ("They are not.", _json(Status))},
            )
        },
        "/metrics": {
            "get": _get("Prometheus metrics", "metrics", *_KEYED, good={200: ("Metrics.", {"text/plain": _TEXT})})
        },
        "/openapi.json": {
            "get": _get(
                "This document",
                "openapi",
                *_KEYED,
                good={200: ("The document.", {"application/json": {"schema": {"type": "object"}}})},
            )
        },
    }


@functools.cache
def document() -> dict[str, Any]:
    """The document, in OpenAPI 3.1."""
    _, requests = models_json_schema([(m, "validation") for m in REQUESTS], ref_template=REF)
    _, replies = models_json_schema([(m, "serialization") for m in REPLIES], ref_template=REF)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "agora",
            "version": metadata.version("agora-llm"),
            "description": "Expert language models that reason together, in OpenAI's words where there are any.",
        },
        "paths": _paths(),
        "components": {
            "schemas": {**requests.get("$defs", {}), **replies.get("$defs", {})},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }
