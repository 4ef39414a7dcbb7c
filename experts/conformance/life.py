"""Conformance: what is not claimed, adapters, many requests at once, ending early, and closing."""

from __future__ import annotations

import asyncio

import pytest

from agora.errors import BackendError, Unsupported
from agora.protocols import (
    Backend,
    Chunk,
    Completion,
    GenerateRequest,
    Health,
    Load,
    Message,
)
from agora.types import AdapterRef
from experts.conformance.base import SCHEMA, Bench, joined


class Life(Bench):
    """What holds for a backend among many callers."""

    # -- What is not claimed

    @pytest.mark.parametrize("capability", ["chat", "completion", "score", "logprobs", "json_schema", "adapters"])
    async def test_what_is_not_claimed_is_unsupported(self, backend: Backend, capability: str) -> None:
        """Asking for it gives `Unsupported`, not a silent half-answer."""
        if getattr(backend.capabilities, capability):
            pytest.skip(f"{backend.name} claims {capability!r}")
        if capability == "score":
            with pytest.raises(Unsupported):
                await backend.score(self.score_request(backend, " a", " b"))
            return
        text = self.questions[0]
        request = {
            "chat": lambda: GenerateRequest(messages=(Message(role="user", content=text),)),
            "completion": lambda: GenerateRequest(prompt=text),
            "logprobs": lambda: self.ask(backend, text, logprobs=1),
            "json_schema": lambda: self.ask(backend, text, json_schema=SCHEMA),
            "adapters": lambda: self.ask(backend, text, adapter=AdapterRef(name="any")),
        }[capability]()
        with pytest.raises(Unsupported):
            await backend.generate(request)
        with pytest.raises(Unsupported):
            await joined(backend.stream(request))
        assert backend.load == Load()

    # -- Adapters

    async def test_answers_with_an_adapter(self, backend: Backend, adapter: AdapterRef | None) -> None:
        """An adapter's answer is the same alone and beside requests without one, in every form."""
        self.needs(backend, "adapters")
        if adapter is None:
            pytest.skip("no fixture 'adapter' was given")
        plain = self.ask(backend, self.questions[0])
        adapted = self.ask(backend, self.questions[0], adapter=adapter)
        alone = [(await backend.generate(r)).text for r in (plain, adapted)]
        assert (await joined(backend.stream(adapted)))[0] == alone[1]
        if self.same_in_batch:
            together = await asyncio.gather(*(backend.generate(r) for r in (plain, adapted) * 2))
            assert [a.text for a in together] == alone * 2

    async def test_unknown_adapter_is_an_error(self, backend: Backend) -> None:
        """It is refused, not ignored, and the next request works."""
        self.needs(backend, "adapters")
        request = self.ask(backend, self.questions[0], adapter=AdapterRef.parse("no-such-adapter@v7"))
        with pytest.raises(BackendError) as refused:
            await backend.generate(request)
        assert not refused.value.transient, "asking again cannot help"
        with pytest.raises(BackendError):
            await joined(backend.stream(request))
        await self.settled(backend)

    # -- Many at once

    async def test_concurrent_requests_do_not_mix(self, backend: Backend) -> None:
        """Every greedy answer is the same alone and among others of other lengths."""
        if not self.same_in_batch:
            pytest.skip(f"{backend.name} does not answer the same alone and in a batch")
        requests = [
            self.ask(backend, question, max_tokens=limit)
            for question, limit in zip(self.questions, (self.tokens, 3, 7, self.tokens, 1, 12), strict=False)
        ]
        alone = [await backend.generate(r) for r in requests]
        together = await asyncio.gather(*(backend.generate(r) for r in requests * 2))
        assert [a.text for a in together] == [a.text for a in alone] * 2
        assert [a.usage.completion_tokens for a in together] == [a.usage.completion_tokens for a in alone] * 2
        streams = await asyncio.gather(*(joined(backend.stream(r)) for r in requests))
        assert [text for text, _ in streams] == [a.text for a in alone]

    # -- Ending early

    async def test_cancelling_frees_the_work(self, backend: Backend) -> None:
        """A cancelled request ends at once and leaves nothing behind."""
        task = asyncio.create_task(backend.generate(self.ask(backend, self.questions[0], max_tokens=200)))
        await asyncio.sleep(self.too_short_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await self.settled(backend)

    async def test_cancelling_some_leaves_the_others(self, backend: Backend) -> None:
        """Requests beside a cancelled one, running or queued, get their answers."""
        if not self.same_in_batch:
            pytest.skip(f"{backend.name} does not answer the same alone and in a batch")
        requests = [self.ask(backend, question) for question in self.questions]
        alone = [(await backend.generate(r)).text for r in requests]
        tasks = [asyncio.create_task(backend.generate(r)) for r in requests]
        await asyncio.sleep(self.too_short_s)
        for task in tasks[::2]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [o.text for o in outcomes[1::2] if isinstance(o, Completion)] == alone[1::2]
        await self.settled(backend)

    async def test_closing_a_stream_frees_the_work(self, backend: Backend) -> None:
        """A stream that is left after its first chunk ends there."""
        async with self.open_stream(backend, self.ask(backend, self.questions[0], max_tokens=200)) as chunks:
            assert isinstance(await anext(chunks), Chunk)
        await self.settled(backend)

    async def test_cancelling_a_stream_frees_the_work(self, backend: Backend) -> None:
        """A task that is cancelled while it waits for the next chunk leaves nothing behind."""
        task = asyncio.create_task(joined(backend.stream(self.ask(backend, self.questions[0], max_tokens=200))))
        await asyncio.sleep(self.too_short_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await self.settled(backend)

    # -- Its life

    async def test_health(self, backend: Backend) -> None:
        """A working backend says so."""
        health = await backend.health()
        assert isinstance(health, Health)
        assert health.ok, health.detail
        assert health.seconds >= 0

    async def test_closing_twice_is_safe_and_final(self, backend: Backend) -> None:
        """After `aclose` requests fail with an error of agora, and `health` says no."""
        await backend.generate(self.ask(backend, self.questions[0], max_tokens=1))
        await backend.aclose()
        await backend.aclose()
        with pytest.raises(BackendError):
            await backend.generate(self.ask(backend, self.questions[0], max_tokens=1))
        assert not (await backend.health()).ok

    async def test_closing_ends_what_runs(self, backend: Backend) -> None:
        """A request that is running when the backend closes fails, it does not hang."""
        task = asyncio.create_task(backend.generate(self.ask(backend, self.questions[0], max_tokens=200)))
        await asyncio.sleep(self.too_short_s)
        await backend.aclose()
        with pytest.raises(BackendError):
            async with asyncio.timeout(self.settle_s):
                await task
