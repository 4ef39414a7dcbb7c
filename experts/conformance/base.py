"""What the tests of the conformance suite are made of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, ClassVar, cast

import pytest

from agora.protocols import Backend, Chunk, Completion, GenerateRequest, Load, Message, ScoreRequest
from agora.types import AdapterRef

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


async def joined(chunks: AsyncIterator[Chunk]) -> tuple[str, list[Chunk]]:
    """The text of a whole stream, and its chunks."""
    seen = [chunk async for chunk in chunks]
    return "".join(c.text for c in seen), seen


class Bench:
    """The backend under test, how to ask it, and what to expect of it.

    Attributes:
        questions: What is asked. Several, so that a model that ends at once on one is tried with the next.
        tokens: Tokens asked for where an answer of some length is needed.
        too_short_s: A `timeout_s` in which `tokens` tokens cannot be generated.
        settle_s: Seconds within which cancelled work must be gone.
        logprob_tolerance: How far two measurements of one log-probability may differ.
        same_in_batch: Whether greedy answers are the same alone and among others; False for servers whose
            arithmetic depends on the batch.
    """

    pytestmark: ClassVar[Any] = pytest.mark.asyncio

    questions: ClassVar[tuple[str, ...]] = (
        "Once upon a time there was a small robot who lived by the sea and",
        "List the days of the week, one after another.",
        "The quick brown fox jumps over the lazy dog, and then the dog",
        "Count from one to twenty in words, please.",
        "Why is the sky blue in the day and dark at night?",
        "A recipe for bread with four ingredients, step by step:",
    )
    tokens: ClassVar[int] = 24
    too_short_s: ClassVar[float] = 0.001
    settle_s: ClassVar[float] = 10.0
    logprob_tolerance: ClassVar[float] = 0.02
    same_in_batch: ClassVar[bool] = True

    @pytest.fixture
    def backend(self) -> Backend:
        """The backend under test; subclasses give it, and close it afterwards."""
        raise NotImplementedError("a conformance class needs a fixture 'backend'")

    @pytest.fixture
    def adapter(self) -> AdapterRef | None:
        """An adapter that the backend has, or None."""
        return None

    def ask(self, backend: Backend, text: str, **options: Any) -> GenerateRequest:
        """A greedy request in a form that the backend takes."""
        options = {"max_tokens": self.tokens, **options}
        if backend.capabilities.chat:
            return GenerateRequest(messages=(Message(role="user", content=text),), **options)
        return GenerateRequest(prompt=text, **options)

    def score_request(self, backend: Backend, *continuations: str, text: str = "The sky is") -> ScoreRequest:
        """A scoring request in a form that the backend takes."""
        if backend.capabilities.completion:
            return ScoreRequest(prompt=text, continuations=continuations)
        return ScoreRequest(messages=(Message(role="user", content=text),), continuations=continuations)

    def needs(self, backend: Backend, *capabilities: str) -> None:
        """Skips the test if the backend does not claim all of these."""
        for capability in capabilities:
            if not getattr(backend.capabilities, capability):
                pytest.skip(f"{backend.name} does not claim {capability!r}")

    async def long_answer(self, backend: Backend, at_least: int = 4) -> tuple[str, Completion]:
        """A question whose greedy answer has at least that many tokens, and the answer."""
        for question in self.questions:
            answer = await backend.generate(self.ask(backend, question))
            if answer.usage.completion_tokens >= at_least and len(answer.text.strip("\ufffd \n")) >= at_least:
                return question, answer
        pytest.skip(f"{backend.name} answers every question in fewer than {at_least} tokens")

    async def settled(self, backend: Backend) -> None:
        """Waits until the backend has nothing left to do, and checks that it still answers."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.settle_s
        # `load` is a number: a backend has no event to wait for.
        while backend.load != Load() and loop.time() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert backend.load == Load(), f"work is left {self.settle_s} s after its end: {backend.load}"
        assert (await backend.generate(self.ask(backend, self.questions[0], max_tokens=1))).usage.calls == 1

    @asynccontextmanager
    async def open_stream(self, backend: Backend, request: GenerateRequest) -> AsyncIterator[AsyncIterator[Chunk]]:
        """A stream that is closed at the end of the block, read to its end or not."""
        async with aclosing(cast(AsyncGenerator[Chunk, None], backend.stream(request))) as chunks:
            yield chunks
