"""Reads an answer in OpenAI's wire format: whole or streamed, of a chat or in the legacy form of completions.

Source: OpenAI API reference, and vLLM's protocol where it differs. Everything a server says is checked: a reply that
breaks the format is a `BadReply` that says how.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from agora.errors import BadReply, Rejected, Unavailable
from agora.protocols import FinishReason, TokenLogprob
from agora.types import Usage
from experts.openai_logprobs import read_logprobs
from experts.openai_wire import CHARS_PER_TOKEN, error_of, mended, parse_object, shown, usage_of

FINISH_REASONS: Final[Mapping[str, FinishReason]] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "end_turn": "stop",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "repetition": "length",
}
"""What servers call the two ends that an answer can have: OpenAI, TGI, Mistral, gateways to other APIs, vLLM."""


@dataclass(slots=True)
class Part:
    """What one event of a stream, or a whole reply, adds to the answer."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


class ReplyReader:
    """Reads one answer, from one JSON object or from the events of a stream, in the chat or the legacy form.

    Args:
        backend: The backend's name, for errors.
        logprobs: How many alternatives were asked for; None if no log-probabilities were.

    Attributes:
        model: What the server says answered.
        finish_reason: Why the answer ended, once it has.
        usage: What the server says it used, if it does.
        begun: Whether the model has begun to generate, be it text, reasoning or an empty answer.
    """

    def __init__(self, *, backend: str, logprobs: int | None) -> None:
        self._backend = backend
        self._asked = logprobs
        self._id = ""
        self._high = ""
        self._parts = 0
        self._chars = 0
        self._tokens = 0
        self._reasoned = False
        self.model = ""
        self.finish_reason: FinishReason | None = None
        self.usage: Usage | None = None
        self.begun = False

    def read(self, data: str | bytes, *, whole: bool = False) -> Part:
        """Reads one event of a stream, or (`whole`) a reply that is not streamed.

        Raises:
            BadReply: If it breaks the format.
            Rejected: If it is an error for which the request is to blame, or the content was filtered.
            Unavailable: If it is an error of the server.
        """
        reply = parse_object(data, backend=self._backend)
        if reply.get("error") or reply.get("object") == "error":
            self._raise_error(reply)
        self._check_id(reply)
        if isinstance(model := reply.get("model"), str) and model:
            self.model = model
        self.usage = usage_of(reply) or self.usage
        choices = reply.get("choices")
        if choices is None and not whole:
            return Part()
        if not isinstance(choices, list):
            self._bad("the reply has no list of choices", data)
        if not choices:
            if whole:
                self._bad("the reply has no choice", data)
            return Part()  # The event that tells the usage, and the first one of some gateways.
        if len(choices) > 1 or not isinstance(choices[0], dict) or choices[0].get("index", 0) not in (0, None):
            self._bad("the reply has other choices than the one asked for", data)
        return self._read_choice(choices[0], data, whole=whole)

    def end(self) -> str:
        """Checks that the answer is complete; returns text that was held back.

        Raises:
            BadReply: If the stream ended before the answer did, or log-probabilities are missing.
        """
        if self.finish_reason is None:
            raise BadReply("the stream ended before the answer did: no finish_reason came", backend=self._backend)
        if self._asked is not None and not self._tokens and self._chars:
            raise BadReply(
                "the server left out the log-probabilities that were asked for",
                backend=self._backend,
                hint="do not claim 'logprobs' for this server",
            )
        rest, self._high = ("\ufffd" if self._high else ""), ""
        return rest

    def used(self, prompt_chars: int) -> Usage:
        """What was used: as reported, else estimated."""
        if self.usage is not None:
            return self.usage
        # Every part of a stream holds at least one token, and every token at least one character.
        completion = self._tokens or max(self._parts, math.ceil(self._chars / CHARS_PER_TOKEN))
        return Usage(prompt_tokens=math.ceil(prompt_chars / CHARS_PER_TOKEN), completion_tokens=completion, calls=1)

    def _check_id(self, reply: Mapping[str, Any]) -> None:
        # Some servers send an empty id first, or always.
        reply_id = reply.get("id")
        if isinstance(reply_id, str) and reply_id:
            if self._id and reply_id != self._id:
                raise BadReply(
                    f"the stream mixes two replies: ids {shown(self._id)} and {shown(reply_id)}",
                    backend=self._backend,
                )
            self._id = reply_id

    def _read_choice(self, choice: dict[str, Any], data: str | bytes, *, whole: bool) -> Part:
        field = "message" if whole else "delta"
        # The legacy form has its text in the choice itself; the last event of a chat may come without a delta.
        said: Any = choice if "text" in choice else choice.get(field, None if whole else {})
        if not isinstance(said, dict):
            self._bad(f"the choice has no {field}", data)
        content = said.get("text") if said is choice else said.get("content")
        self._reasoned |= any(said.get(k) for k in ("reasoning_content", "reasoning"))
        finished = self.finish_reason is not None
        reason = choice.get("finish_reason")
        if reason is not None and reason != "":
            self.finish_reason = self._finish_reason(reason, data)
        elif whole:
            self.finish_reason = "stop"  # The body came whole, so the answer did.
        if content is None:
            self._check_null(said, data, whole=whole)
            content = ""
        if not isinstance(content, str):
            self._bad(f"the text is not a string but {type(content).__name__}", data)
        if content and finished:
            self._bad("text follows the end of the answer", data)
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._asked is not None:
            try:
                logprobs = read_logprobs(choice.get("logprobs"), self._asked)
            except ValueError as e:
                self._bad(str(e), data)
        self.begun |= bool(content or logprobs or self._reasoned or self.finish_reason)
        self._parts += bool(content)
        self._chars += len(content)
        self._tokens += len(logprobs)
        return Part(text=self._mended(content), logprobs=logprobs)

    def _check_null(self, said: Mapping[str, Any], data: str | bytes, *, whole: bool) -> None:
        """No text: right in most events of a stream, and for a model that was cut while it reasoned."""
        if isinstance(refusal := said.get("refusal"), str) and refusal:
            raise Rejected(f"the model refused: {shown(refusal)}", backend=self._backend)
        if said.get("tool_calls") or said.get("function_call"):
            self._bad("the model called a tool, though it was offered none", data)
        if whole and not (self.finish_reason == "length" and self._reasoned):
            self._bad("the text of the reply is null", data)

    def _finish_reason(self, reason: Any, data: str | bytes) -> FinishReason:
        if reason == "content_filter":
            raise Rejected("the server's content filter ended the answer", backend=self._backend)
        if reason in ("abort", "error"):
            raise Unavailable(f"the server broke off the answer (finish_reason {reason!r})", backend=self._backend)
        if reason in ("tool_calls", "function_call"):
            self._bad("the model called a tool, though it was offered none", data)
        if not isinstance(reason, str) or reason.lower() not in FINISH_REASONS:
            self._bad(f"unknown finish_reason {shown(str(reason))}", data)
        return FINISH_REASONS[reason.lower()]

    def _mended(self, text: str) -> str:
        """Joins UTF-16 surrogate pairs that JSON escapes put into two events; a lone half becomes U+FFFD."""
        if not self._high and text.isascii():
            return text
        text = self._high + text
        self._high = ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._high = text[:-1], text[-1]
        return mended(text)

    def _raise_error(self, reply: dict[str, Any]) -> NoReturn:
        message, code = error_of(reply)
        text = f"the server reports an error: {message or shown(json.dumps(reply))}"
        if code.isdigit() and 400 <= int(code) < 500 and int(code) not in (408, 429):
            raise Rejected(text, backend=self._backend, status=int(code), body=json.dumps(reply)[:2000])
        raise Unavailable(text, backend=self._backend)

    def _bad(self, what: str, data: str | bytes) -> NoReturn:
        raise BadReply(f"{what}: {shown(data)}", backend=self._backend)
