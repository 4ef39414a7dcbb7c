"""Refuses, in one place and in the same words, what a backend does not claim to do."""

from __future__ import annotations

from agora.errors import Unsupported
from agora.protocols import Capabilities, GenerateRequest, ScoreRequest


def refuse_unclaimed(request: GenerateRequest | ScoreRequest, claimed: Capabilities, *, backend: str) -> None:
    """Checks a request against a backend's capabilities.

    A `seed` without that capability is let through: it is a wish, and asks for nothing that could be missing from
    the reply.

    Args:
        request: What is asked.
        claimed: What the backend claims.
        backend: Its name, for the error.

    Raises:
        Unsupported: If the request needs a capability that is not claimed.
    """
    needed = {
        "chat": bool(request.messages),
        "completion": request.prompt is not None,
        "adapters": request.adapter is not None,
    }
    if isinstance(request, ScoreRequest):
        needed["score"] = True
    else:
        needed["logprobs"] = request.logprobs is not None
        needed["json_schema"] = request.json_schema is not None
        needed["continues"] = request.goes_on
    missing = [what for what, is_needed in needed.items() if is_needed and not getattr(claimed, what)]
    if missing:
        raise Unsupported(
            f"this request needs {' and '.join(missing)}, which the backend does not claim",
            backend=backend,
            hint="ask another backend, or leave it out",
        )
