"""The protocols that rooms hand each other: what a backend, an embedder and a clock must do."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, runtime_checkable

from agora.errors import InvalidRequest
from agora.types import AdapterRef, Usage, checked_question

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]

MAX_STOP_STRINGS: Final = 8
"""Stop strings in one request; OpenAI's API allows 4, vLLM any number."""

MAX_TOP_LOGPROBS: Final = 20
"""Alternatives told per generated token; the limit of OpenAI's API and of vLLM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: Role
    content: str


def _check_input(messages: tuple[Message, ...], prompt: str | None) -> None:
    if (prompt is None) == (not messages):
        raise InvalidRequest("a request needs either messages or a prompt, and not both")
    checked_question("".join(m.content for m in messages) if prompt is None else prompt, what="prompt")


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise InvalidRequest(f"{name} is {value}; it must be a positive number, or absent")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What to generate from: a chat (`messages`, the model's own template applied) or raw text (`prompt`).

    Attributes:
        messages: The turns of a chat.
        prompt: Raw text to continue; needs the capability `completion`.
        max_tokens: Most tokens to generate.
        temperature: 0 for greedy decoding.
        top_p: Nucleus sampling mass in (0, 1].
        stop: Strings that end the generation; they are not part of the text.
        seed: Same seed, same sample, where the capability `seed` is claimed.
        logprobs: None for none; n for each generated token's log-probability and its n likeliest alternatives.
        json_schema: The text must be JSON of this schema; needs the capability `json_schema`.
        adapter: LoRA adapter to answer with; needs the capability `adapters`.
        timeout_s: Seconds for the whole request, waiting in queues included.
        goes_on: Whether the last message is the beginning of the answer, to be gone on with rather than replied to;
            needs the capability `continues`.

    Raises:
        InvalidRequest: If a value is out of range.
    """

    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    json_schema: Mapping[str, Any] | None = None
    adapter: AdapterRef | None = None
    timeout_s: float | None = None
    goes_on: bool = False

    def __post_init__(self) -> None:
        _check_input(self.messages, self.prompt)
        if self.goes_on and (not self.messages or self.messages[-1].role != "assistant"):
            raise InvalidRequest("goes_on needs a chat whose last message is the assistant's")
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {self.max_tokens}; it must be ≥ 1")
        if not 0 <= self.temperature <= 2:
            raise InvalidRequest(f"temperature is {self.temperature}; allowed: 0 to 2")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p is {self.top_p}; allowed: above 0, at most 1")
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise InvalidRequest(f"stop must be at most {MAX_STOP_STRINGS} non-empty strings, got {list(self.stop)!r}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequest(f"logprobs is {self.logprobs}; allowed: 0 to {MAX_TOP_LOGPROBS}, or absent")
        _check_positive("timeout_s", self.timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """How likely is each of these continuations after this chat or text?"""

    continuations: tuple[str, ...]
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    adapter: AdapterRef | None = None
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        _check_input(self.messages, self.prompt)
        if not self.continuations or not all(self.continuations):
            raise InvalidRequest("score needs at least one continuation, and none may be empty")
        _check_positive("timeout_s", self.timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A generated token, its natural-log probability, and the likeliest alternatives (best first)."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished generation.

    Attributes:
        text: The generated text, stop string excluded.
        finish_reason: `stop` or `length`.
        usage: Tokens read and generated.
        model: What the backend says answered.
        logprobs: One per generated token, if asked for.
        first_token_s: Seconds from the request to the first token (TTFT), if known.
        seconds: Seconds from the request to the last token.
        path: The path it came by, where there were several.
        notes: What the reader should know, e.g. which paths could not be used.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    model: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    first_token_s: float | None = None
    seconds: float = 0.0
    path: str = ""
    notes: tuple[str, ...] = ()

    @property
    def mean_logprob(self) -> float | None:
        """Mean natural-log probability of the generated tokens, if they were asked for."""
        if not self.logprobs:
            return None
        return sum(t.logprob for t in self.logprobs) / len(self.logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a stream. The last one, and only it, has `finish_reason` and `usage`, and maybe `path` and `notes`."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    path: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuationScore:
    """Log-probability of one continuation: natural log, summed over its tokens."""

    text: str
    logprob: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What `score` returns: one score per continuation, in the order asked."""

    scores: tuple[ContinuationScore, ...]
    usage: Usage = field(default_factory=Usage)

    def probabilities(self) -> tuple[float, ...]:
        """Softmax over the continuations' summed log-probabilities."""
        top = max(s.logprob for s in self.scores)
        if top == -math.inf:
            return tuple(1 / len(self.scores) for _ in self.scores)
        weights = [math.exp(s.logprob - top) for s in self.scores]
        return tuple(w / sum(weights) for w in weights)

    @property
    def best(self) -> ContinuationScore:
        """The likeliest continuation."""
        return max(self.scores, key=lambda s: s.logprob)


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether a backend generated a token when asked to, and how long it took."""

    ok: bool
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests running and waiting on a backend right now, as far as this process knows."""

    running: int = 0
    waiting: int = 0

    @property
    def total(self) -> int:
        """Running and waiting together."""
        return self.running + self.waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend claims it can do. What is not claimed raises `Unsupported` when asked for.

    Attributes:
        chat: Takes `messages`.
        completion: Takes a raw `prompt`.
        score: Tells log-probabilities of given continuations.
        logprobs: Tells log-probabilities of what it generates.
        json_schema: Can be held to a JSON schema.
        seed: Same seed, same sample.
        adapters: Answers with a named LoRA adapter.
        continues: Goes on with an answer of a chat that was begun elsewhere (`GenerateRequest.goes_on`).
        max_context: Tokens of prompt and answer together, if known.
    """

    chat: bool = True
    completion: bool = False
    score: bool = False
    logprobs: bool = False
    json_schema: bool = False
    seed: bool = False
    adapters: bool = False
    continues: bool = False
    max_context: int | None = None


@runtime_checkable
class Backend(Protocol):
    """Something that generates text: a model in this process, or a server somewhere.

    Every method may raise a `BackendError`. Cancelling the awaiting task frees the work: the backend stops
    generating for it and drops it from its queue.
    """

    @property
    def name(self) -> str:
        """What to call it in errors and traces."""

    @property
    def capabilities(self) -> Capabilities:
        """What it claims to do."""

    @property
    def load(self) -> Load:
        """What it is busy with."""

    async def generate(self, request: GenerateRequest) -> Completion:
        """Generates the whole answer."""

    def stream(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Generates piece by piece; closing the iterator frees the work."""

    async def score(self, request: ScoreRequest) -> Scores:
        """Tells how likely each continuation is."""

    async def health(self) -> Health:
        """Generates one token and says whether that worked; never raises a `BackendError`."""

    async def aclose(self) -> None:
        """Ends all work and frees what it holds; safe to call twice."""


@runtime_checkable
class Embedder(Protocol):
    """Turns texts into unit vectors whose dot product says how alike they are."""

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Shape (len(texts), dim), rows of length 1."""


class Clock(Protocol):
    """Time, so that tests and simulators can have their own."""

    def now(self) -> float:
        """Seconds on a clock that never goes back."""

    async def sleep(self, seconds: float) -> None:
        """Waits that long on this clock."""
