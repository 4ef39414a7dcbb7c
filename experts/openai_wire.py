"""OpenAI's wire format: what a request looks like as JSON, and the small parts that all replies share.

Source: OpenAI API reference (chat completions; legacy completions), and vLLM's protocol where it differs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NoReturn

from agora.errors import BadReply
from agora.protocols import GenerateRequest, Message
from agora.types import Usage

MaxTokensField = Literal["max_tokens", "max_completion_tokens"]

CHAT: Final = "chat/completions"
COMPLETIONS: Final = "completions"

CONTINUE: Final[Mapping[str, bool]] = {"continue_final_message": True, "add_generation_prompt": False}
"""By which vLLM goes on with the last message of a chat; OpenAI has no such thing."""

CHARS_PER_TOKEN: Final = 4
"""For servers that count no tokens: OpenAI's rule of thumb for English text."""

SHOWN_CHARS: Final = 80
"""Characters of a bad reply that its error shows."""

MAX_COUNTED_TOKENS: Final = 10**9
"""Larger counts are not believed: no model reads or writes a billion tokens in one request, and sums of such counts
must fit into the 64 bits of a run's checkpoint."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")


# Python's own parser takes NaN and Infinity, which JSON does not have.
_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)


def messages_body(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The turns of a chat, as the API takes them."""
    return [{"role": m.role, "content": m.content} for m in messages]


def generate_body(
    request: GenerateRequest,
    *,
    model: str,
    streamed: bool,
    seed: bool,
    include_usage: bool,
    max_tokens_field: MaxTokensField,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """The JSON body of a request.

    Args:
        request: What to generate.
        model: The server's name for the model; an adapter of the request is sent in its place, as vLLM serves LoRA.
        streamed: Whether the reply is to be streamed.
        seed: Whether the server takes a seed.
        include_usage: Whether to ask for `usage` at the end of a stream.
        max_tokens_field: What the server calls the limit of a chat.
        extra: Fields added last; a value of None removes the field.
    """
    chat = request.prompt is None
    body: dict[str, Any] = {"model": model if request.adapter is None else str(request.adapter)}
    if chat:
        body["messages"] = messages_body(request.messages)
    else:
        body["prompt"] = request.prompt
    body[max_tokens_field if chat else "max_tokens"] = request.max_tokens
    body["temperature"] = request.temperature
    if request.top_p != 1.0:
        body["top_p"] = request.top_p
    if request.stop:
        body["stop"] = list(request.stop)
    if request.seed is not None and seed:
        body["seed"] = request.seed
    if request.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.logprobs} if chat else {"logprobs": request.logprobs}
    if request.json_schema is not None:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": dict(request.json_schema), "strict": True},
        }
    if request.goes_on:
        body |= CONTINUE
    body["stream"] = streamed
    if streamed and include_usage:
        body["stream_options"] = {"include_usage": True}
    body |= extra
    return {k: v for k, v in body.items() if v is not None}


def shown(text: str | bytes) -> str:
    """The beginning of something bad, on one line, for an error."""
    head = text[: SHOWN_CHARS * 4]
    if isinstance(head, bytes):
        head = head.decode("utf-8", "replace")
    line = " ".join(head.split())
    return repr(line[:SHOWN_CHARS] + ("…" if len(line) > SHOWN_CHARS or len(head) < len(text) else ""))


def parse_json(data: str | bytes, *, backend: str) -> Any:
    """Strict JSON.

    Raises:
        BadReply: On anything else: cut or wrong JSON, invalid UTF-8, NaN, or nesting without end.
    """
    try:
        return _DECODER.decode(data.decode("utf-8") if isinstance(data, bytes) else data)
    except RecursionError:
        raise BadReply("the reply's JSON is nested too deeply", backend=backend) from None
    except ValueError as e:
        raise BadReply(f"the reply is not valid JSON ({e}): {shown(data)}", backend=backend) from None


def parse_object(data: str | bytes, *, backend: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadReply: On anything else.
    """
    value = parse_json(data, backend=backend)
    if not isinstance(value, dict):
        raise BadReply(f"the reply is not a JSON object: {shown(data)}", backend=backend)
    return value


def error_of(reply: Any) -> tuple[str, str]:
    """The message and the code of a server's error, empty where there is none.

    Known forms: `{"error": {"message", "code", "type"}}`, `{"error": "…"}`, `{"message": …}`, `{"detail": …}`.
    """
    if not isinstance(reply, Mapping):
        return "", ""
    error = reply.get("error") or reply
    if isinstance(error, str):
        return error, ""
    if not isinstance(error, Mapping):
        return "", ""
    message = next((error[k] for k in ("message", "detail", "msg") if error.get(k)), "")
    code = next((error[k] for k in ("code", "type") if isinstance(error.get(k), (str, int))), "")
    return message if isinstance(message, str) else json.dumps(message), str(code)


def usage_of(reply: Mapping[str, Any]) -> Usage | None:
    """The tokens that a reply reports; None if it reports none, or nonsense."""
    usage = reply.get("usage")
    if not isinstance(usage, Mapping):
        return None
    counts = [usage.get("prompt_tokens"), usage.get("completion_tokens", 0)]
    prompt, completion = (c if _is_count(c) else None for c in counts)
    if prompt is None or completion is None:
        return None
    return Usage(prompt_tokens=prompt, completion_tokens=completion, calls=1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNTED_TOKENS


def estimated_tokens(text: str) -> int:
    """A guess at the tokens of a text, for servers that do not tell."""
    return math.ceil(len(text) / CHARS_PER_TOKEN)


def mended(text: str) -> str:
    """Valid Unicode: surrogate pairs joined, lone halves replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
