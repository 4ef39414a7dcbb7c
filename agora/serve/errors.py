"""Errors over HTTP: which status each of agora's errors has, and OpenAI's shape of a body.

{"error": {"message": "…", "type": "invalid_request_error", "param": null, "code": "model_not_found"}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import orjson
from aiohttp import web

from agora.errors import AgoraError, Overloaded, Rejected

JSON: Final = "application/json"

STATUS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "invalid_request": 400,
        "invalid_plan": 400,
        "unsupported": 400,
        "budget": 400,
        "run_not_found": 404,
        "loop_detected": 508,
        "too_many_hops": 508,
        "store": 503,
        "no_expert": 503,
        "out_of_reach": 400,
        "overloaded": 429,
        "deadline": 504,
        "timeout": 504,
        "unavailable": 502,
        "bad_reply": 502,
        "rejected": 502,
        "adapter": 502,
        "backend": 502,
    }
)
"""HTTP status by `AgoraError.code`; whatever is not here is this server's own fault: 500."""

PASSED_ON: Final = frozenset({400, 404, 409, 413, 415, 422})
"""Statuses of a server behind this one that say something of the request itself, and so are the asker's to see. Others
(401, 403: the gateway's own key was refused) are not."""

TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
)
"""OpenAI's `type` by status; other 4xx are `invalid_request_error`, 5xx `server_error`."""

RETRY_AFTER_S: Final = 1
"""Seconds told in `Retry-After` where nothing better is known: a place comes free when any request in flight ends."""


class ApiError(AgoraError):
    """A request that the gateway itself refuses.

    Args:
        status: HTTP status.
        message: What was wrong, the value seen, what is allowed.
        code: Stable word for programs.
        param: The field of the body that is wrong.
        retry_after_s: Seconds after which it may be tried again.
        hint: What to do next.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after_s: float | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


def status_of(error: AgoraError) -> int:
    """The HTTP status that tells of `error`."""
    if isinstance(error, ApiError):
        return error.status
    if isinstance(error, Rejected) and error.status in PASSED_ON:
        return error.status or 502
    return STATUS.get(error.code, 500)


def error_body(error: AgoraError) -> dict[str, Any]:
    """The body that tells of `error`, in OpenAI's shape."""
    status = status_of(error)
    return {
        "error": {
            "message": str(error),
            "type": TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
            "param": getattr(error, "param", None),
            "code": error.code,
        }
    }


def error_response(error: AgoraError) -> web.Response:
    """The response that tells of `error`, with `Retry-After` where waiting helps."""
    status = status_of(error)
    headers: dict[str, str] = {}
    after = getattr(error, "retry_after_s", None)
    if status in (429, 503) or (isinstance(error, Overloaded) and after is not None):
        headers["Retry-After"] = str(max(1, math.ceil(RETRY_AFTER_S if after is None else after)))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(body=orjson.dumps(error_body(error)), status=status, content_type=JSON, headers=headers)


def internal_error(request_id: str) -> AgoraError:
    """What is told of a bug: nothing but where to look for it."""
    return ApiError(
        500, f"an error inside the gateway; its log tells more under request {request_id}", code="internal_error"
    )
