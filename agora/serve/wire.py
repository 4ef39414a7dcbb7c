"""OpenAI's requests, checked: what `/v1/chat/completions` and `/v1/completions` take for an expert of agora's own.

For an expert behind an OpenAI-compatible server only `Envelope` is checked here; the server checks the rest itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import Repr
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from agora.protocols import MAX_STOP_STRINGS, MAX_TOP_LOGPROBS, GenerateRequest, Message, Role
from agora.serve.errors import ApiError
from agora.square import Expert
from agora.types import MAX_QUESTION_CHARS
from graphs.how import MAX_TRADE_OFF

MAX_MESSAGES: Final = 1_000
"""Messages of one chat: more than fit any context of the catalogue at 8 tokens each."""

MAX_CHOICES: Final = 8
"""Choices (`n`) of one request; every one costs as much as a request of its own."""

MAX_TOKENS: Final = 1_000_000
"""Most tokens that may be asked for: past every context there is."""

MAX_SHOWN_CHARS: Final = 80
"""Characters of a wrong value that an error shows."""

HARMFUL: Final[Mapping[str, str]] = {
    "prompt_logprobs": "it stops some servers that batch requests with adapters",
    "echo": "it stops some servers that batch requests with adapters",
    "priority": "the gateway decides who goes first",
    "request_id": "the gateway gives it; send X-Request-Id",
    "kv_transfer_params": "it is between the servers",
    "best_of": "it multiplies the work; use n",
    "use_beam_search": "it multiplies the work; use n",
}
"""Fields that are never passed on to a server, and why."""

T = TypeVar("T", bound=BaseModel)

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Content = Annotated[str, StringConstraints(max_length=MAX_QUESTION_CHARS)]


class Body(BaseModel):
    """Unknown fields refused, values of the wrong type refused rather than converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Lenient(Body):
    """A body in which a field that is unknown here may stand with null: so clients send what nobody asked them for."""

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, plain: Any) -> Any:
        if isinstance(plain, dict) and None in plain.values():
            return {k: v for k, v in plain.items() if v is not None or k in cls.model_fields}
        return plain


Empty = Annotated[list[Any], Field(max_length=0)]


class TextPart(Body):
    """A part of a message's content; this gateway's own experts read text."""

    type: Literal["text"]
    text: Content


class ChatMessage(Lenient):
    """One turn of a chat; an answer of this gateway or another can be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | Annotated[list[TextPart], Field(min_length=1, max_length=100)]
    name: Annotated[str, StringConstraints(max_length=64)] | None = None
    annotations: Empty | None = None
    tool_calls: Empty | None = None

    def plain(self) -> Message:
        """The message as backends take it."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        role: Role = "system" if self.role == "developer" else self.role
        return Message(role=role, content=text)


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Body):
    """`response_format.json_schema`."""

    name: Annotated[str, StringConstraints(max_length=64)] = "answer"
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Body):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with type "json_schema"')
        return self


Label = Literal["local", "edge", "cloud", "end"]
"""How far up a text may go, see `agora.types.reach`; `end` is another word for `local`."""


TradeOff = Annotated[float, Field(gt=0, le=MAX_TRADE_OFF)]
"""Money that a right answer is worth, for a graph that weighs the one against the other; agora's own addition."""


class BudgetBody(Body):
    """What a graph may spend; agora's own addition to OpenAI's request."""

    deadline_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    cost: Annotated[float, Field(gt=0, le=1e9)] | None = None
    tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None


class _Sampling(Lenient):
    """What chats and completions have in common. Fields that change no answer are taken, and not used.

    `reach` is agora's own addition: how far up from this machine the text may go.
    """

    model: ModelName
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: (
        Annotated[str, StringConstraints(min_length=1, max_length=1_000)]
        | Annotated[
            list[Annotated[str, StringConstraints(min_length=1, max_length=1_000)]], Field(max_length=MAX_STOP_STRINGS)
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: Annotated[str, StringConstraints(max_length=512)] | None = None
    reach: Label | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream is to end with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    store: Literal[False] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Annotated[str, StringConstraints(max_length=64)] | None = None
    safety_identifier: Annotated[str, StringConstraints(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, StringConstraints(max_length=512)] | None = None
    budget: BudgetBody | None = None
    trade_off: TradeOff | None = None

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream = true")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens asked for, by either of its two names."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def generation(self, expert: Expert, *, timeout_s: float) -> GenerateRequest:
        """The request as a backend takes it.

        Raises:
            InvalidRequest: If it cannot be asked.
        """
        messages = tuple(m.plain() for m in self.messages)
        if expert.system_prompt and messages[0].role != "system":
            messages = (Message(role="system", content=expert.system_prompt), *messages)
        return GenerateRequest(
            messages=messages,
            max_tokens=capped(self.limit, expert),
            temperature=expert.temperature if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=self.stops,
            seed=self.seed,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=self._schema(),
            adapter=expert.adapter,
            timeout_s=timeout_s,
        )

    def _schema(self) -> Mapping[str, Any] | None:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        return {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_


Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_QUESTION_CHARS)]


class CompletionRequest(_Sampling):
    """`POST /v1/completions`: raw text to go on with; the expert's system prompt has no place in it."""

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream = true")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens asked for; OpenAI's own default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    def generation(self, expert: Expert, *, timeout_s: float) -> GenerateRequest:
        """The request as a backend takes it.

        Raises:
            InvalidRequest: If it cannot be asked.
        """
        return GenerateRequest(
            prompt=self.prompt if isinstance(self.prompt, str) else self.prompt[0],
            max_tokens=capped(self.limit, expert),
            temperature=expert.temperature if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=self.stops,
            seed=self.seed,
            logprobs=self.logprobs,
            adapter=expert.adapter,
            timeout_s=timeout_s,
        )


Request = ChatRequest | CompletionRequest


def capped(wanted: int | None, expert: Expert) -> int:
    """The tokens that an expert generates for a request: what it asks for, within what the expert's card allows."""
    return expert.card.max_tokens if wanted is None else min(wanted, expert.card.max_tokens)


def checked(model: type[T], body: Mapping[str, Any]) -> T:
    """The body as a `model`.

    Raises:
        ApiError: 400, naming the first field that is wrong and what is allowed.
    """
    try:
        return model.model_validate(body)
    except ValidationError as e:
        raise refusal(e) from None


def refusal(error: ValidationError) -> ApiError:
    """What is told of a body that does not fit its model."""
    errors = error.errors(include_url=False, include_context=False)
    # Of a list that may also be text, what is wrong inside it says more than that it is no text.
    inside = [e for e in errors if not (e["type"] == "string_type" and isinstance(e["input"], list))]
    first = min(inside or errors, key=lambda e: len(e["loc"]))
    param = ".".join(
        str(p) for p in first["loc"] if not (isinstance(p, str) and p.startswith(("list[", "str", "constrained")))
    )
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: not a field that is known here", code="unknown_field", param=param)
    seen = "" if first["type"] == "missing" or not param else f", got {shown(first['input'])}"
    return ApiError(400, f"{param or 'body'}: {what}{seen}", code="invalid_value", param=param or None)


def shown(value: Any) -> str:
    """A value of a body as an error tells it: its beginning, however large it is and however deep."""
    brief = Repr()
    brief.maxstring = brief.maxother = brief.maxlong = MAX_SHOWN_CHARS
    text = brief.repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 1]}…"
