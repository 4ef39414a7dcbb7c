"""The conformance suite passes for what conforms, and finds what does not."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from agora.errors import AdapterError, BackendError, BackendTimeout, Unavailable
from agora.protocols import (
    Backend,
    Capabilities,
    Chunk,
    Completion,
    ContinuationScore,
    GenerateRequest,
    Health,
    Load,
    ScoreRequest,
    Scores,
    TokenLogprob,
)
from agora.types import AdapterRef
from experts.conformance import BackendConformance
from experts.fake import FakeBackend, question_of


def reply(request: GenerateRequest) -> str:
    return f" {question_of(request)}" if request.json_schema is None else json.dumps({"ok": True})


EVERYTHING = Capabilities(
    completion=True, score=True, logprobs=True, json_schema=True, seed=True, adapters=True, max_context=512
)

TIMES: dict[str, Any] = {"latency": 0.003, "seconds_per_token": 0.0005}


class TestFake(BackendConformance):
    @pytest.fixture
    async def backend(self) -> AsyncIterator[Backend]:
        backend = FakeBackend(adapters=["med@v1"], **TIMES)
        yield backend
        await backend.aclose()

    @pytest.fixture
    def adapter(self) -> AdapterRef:
        return AdapterRef.parse("med@v1")


class TestFakeThatClaimsEverything(TestFake):
    @pytest.fixture
    async def backend(self) -> AsyncIterator[Backend]:
        backend = FakeBackend(reply, max_running=2, adapters=["med@v1"], capabilities=EVERYTHING, **TIMES)
        yield backend
        await backend.aclose()


class TestFakeThatClaimsLittle(TestFake):
    @pytest.fixture
    async def backend(self) -> AsyncIterator[Backend]:
        backend = FakeBackend(capabilities=Capabilities(chat=False, completion=True), **TIMES)
        yield backend
        await backend.aclose()


# -- Backends with one fault each, and the test that must find it


class Faulty(FakeBackend):
    """A backend that claims everything; subclasses get one thing wrong."""

    def __init__(self, *, capabilities: Capabilities = EVERYTHING) -> None:
        super().__init__(reply, adapters=["med@v1"], capabilities=capabilities, **TIMES)

    def twist(self, answer: Completion) -> Completion:
        return answer

    async def generate(self, request: GenerateRequest) -> Completion:
        return self.twist(await super().generate(request))


class CountsWrong(Faulty):
    def twist(self, answer: Completion) -> Completion:
        return replace(answer, usage=replace(answer.usage, completion_tokens=answer.usage.completion_tokens + 1))


class CountsNoPrompt(Faulty):
    def twist(self, answer: Completion) -> Completion:
        return replace(answer, usage=replace(answer.usage, prompt_tokens=3))


class CountsNoCall(Faulty):
    def twist(self, answer: Completion) -> Completion:
        return replace(answer, usage=replace(answer.usage, calls=0))


class TellsUnaskedLogprobs(Faulty):
    def twist(self, answer: Completion) -> Completion:
        return replace(answer, logprobs=answer.logprobs or (TokenLogprob(token="a", logprob=-1.0),))


class NeverSaysLength(Faulty):
    def twist(self, answer: Completion) -> Completion:
        return replace(answer, finish_reason="stop")


class Forgetful(Faulty):
    """Answers differently each time."""

    count = 0

    def twist(self, answer: Completion) -> Completion:
        self.count += 1
        return replace(answer, text=f"{answer.text} {self.count}")


class IgnoresStop(Faulty):
    async def generate(self, request: GenerateRequest) -> Completion:
        return await super().generate(replace(request, stop=()))


class LeaksStopIntoStream(Faulty):
    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        async with aclosing(super().stream(request)) as chunks:
            async for chunk in chunks:
                yield replace(chunk, text=chunk.text + request.stop[-1][:1]) if chunk.usage and request.stop else chunk


class IgnoresLimit(Faulty):
    async def generate(self, request: GenerateRequest) -> Completion:
        return await super().generate(replace(request, max_tokens=24))


class IgnoresTimeout(Faulty):
    async def generate(self, request: GenerateRequest) -> Completion:
        return await super().generate(replace(request, timeout_s=None))


class DropsLastToken(Faulty):
    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        seen = [c async for c in super().stream(request)]
        for chunk in [*seen[:-2], seen[-1]]:
            yield chunk


class EndsTwice(Faulty):
    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        async for chunk in super().stream(request):
            yield chunk
            if chunk.usage:
                yield chunk


class PositiveLogprobs(Faulty):
    def twist(self, answer: Completion) -> Completion:
        return replace(answer, logprobs=tuple(replace(t, logprob=-t.logprob, top=()) for t in answer.logprobs))


class UnsortedAlternatives(Faulty):
    def twist(self, answer: Completion) -> Completion:
        return replace(answer, logprobs=tuple(replace(t, top=t.top[::-1]) for t in answer.logprobs))


class OneLogprobMore(Faulty):
    def twist(self, answer: Completion) -> Completion:
        more = (TokenLogprob(token="<end>", logprob=-0.1),) if answer.logprobs else ()
        return replace(answer, logprobs=answer.logprobs + more)


class ScoresInOtherOrder(Faulty):
    async def score(self, request: ScoreRequest) -> Scores:
        scores = await super().score(request)
        return replace(scores, scores=scores.scores[::-1])


class ScoresOtherThanItGenerates(Faulty):
    async def score(self, request: ScoreRequest) -> Scores:
        scores = tuple(ContinuationScore(text=c, logprob=-3.0, tokens=1) for c in request.continuations)
        return replace(await super().score(request), scores=scores)


class DependsOnPlace(Faulty):
    """The first continuation gets a bonus."""

    async def score(self, request: ScoreRequest) -> Scores:
        scores = await super().score(request)
        first, *rest = scores.scores
        return replace(scores, scores=(replace(first, logprob=first.logprob / 2), *rest))


class MixesRequests(Faulty):
    """Whoever asks while another request runs gets that one's answer."""

    running: GenerateRequest | None = None

    async def generate(self, request: GenerateRequest) -> Completion:
        self.running = self.running or request
        try:
            return await super().generate(self.running)
        finally:
            self.running = None


class LosesCount(Faulty):
    """Still counts a request after it was cancelled or its stream closed."""

    @property
    def load(self) -> Load:
        return Load(running=sum(c.outcome in ("open", "cancelled", "failed") for c in self.calls))


class SwallowsCancellation(Faulty):
    async def generate(self, request: GenerateRequest) -> Completion:
        try:
            return await super().generate(request)
        except asyncio.CancelledError:
            raise Unavailable("cancelled") from None


class CancelsNeighbours(Faulty):
    async def generate(self, request: GenerateRequest) -> Completion:
        try:
            return await super().generate(request)
        except asyncio.CancelledError:
            for pause in tuple(self._pauses):
                pause.cancel()
            raise


class TakesAnyAdapter(Faulty):
    async def generate(self, request: GenerateRequest) -> Completion:
        return await super().generate(replace(request, adapter=None))


class CallsAnUnknownAdapterTransient(Faulty):
    async def generate(self, request: GenerateRequest) -> Completion:
        try:
            return await super().generate(request)
        except AdapterError as e:
            raise Unavailable(e.message) from None


class AdapterChangesNeighbours(Faulty):
    async def generate(self, request: GenerateRequest) -> Completion:
        shared = self.load.total > 0
        answer = await super().generate(request)
        return replace(answer, text=answer.text + "!") if shared else answer


class IgnoresSchema(Faulty):
    async def generate(self, request: GenerateRequest) -> Completion:
        return await super().generate(replace(request, json_schema=None))


class IgnoresSeed(Faulty):
    count = 0

    async def generate(self, request: GenerateRequest) -> Completion:
        answer = await super().generate(request)
        self.count += 1
        return replace(answer, text=f"{answer.text}{self.count}") if request.temperature else answer


class TakesWhatItDoesNotClaim(Faulty):
    def __init__(self) -> None:
        super().__init__(capabilities=replace(EVERYTHING, json_schema=False))

    async def generate(self, request: GenerateRequest) -> Completion:
        return await super().generate(replace(request, json_schema=None))


class TakesAnyLength(Faulty):
    async def generate(self, request: GenerateRequest) -> Completion:
        self._capabilities = replace(EVERYTHING, max_context=None)
        try:
            return await super().generate(request)
        finally:
            self._capabilities = EVERYTHING


class TearsCharacters(Faulty):
    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        async for chunk in super().stream(request):
            torn = chunk.text.encode()
            if chunk.text.isascii():
                yield chunk
            else:
                yield replace(chunk, text=torn[:2].decode("utf-8", "replace"))
                yield replace(chunk, text=torn[2:].decode("utf-8", "replace"))


class HealthyAfterClosing(Faulty):
    async def health(self) -> Health:
        return Health(ok=True)


class NeverHealthy(Faulty):
    async def health(self) -> Health:
        return Health(ok=False)


class AnswersAfterClosing(Faulty):
    async def aclose(self) -> None:
        pass


class ClosesOnce(Faulty):
    closed = False

    async def aclose(self) -> None:
        assert not self.closed
        self.closed = True
        await super().aclose()


SUITE = {
    "test_generates": [CountsNoCall, TellsUnaskedLogprobs],
    "test_longer_prompts_use_more_tokens": [CountsNoPrompt],
    "test_greedy_answers_repeat": [Forgetful],
    "test_stream_agrees_with_generate": [DropsLastToken, CountsWrong],
    "test_only_the_last_chunk_ends_a_stream": [EndsTwice],
    "test_max_tokens_cuts_the_answer": [IgnoresLimit, NeverSaysLength, CountsWrong],
    "test_stop_ends_the_answer_and_is_not_in_it": [IgnoresStop, LeaksStopIntoStream],
    "test_timeout_ends_the_request": [IgnoresTimeout, LosesCount],
    "test_too_long_a_prompt_is_refused": [TakesAnyLength],
    "test_same_seed_same_sample": [IgnoresSeed],
    "test_samples_within_top_p": [IgnoresSeed],
    "test_score": [ScoresInOtherOrder, DependsOnPlace],
    "test_score_agrees_with_logprobs": [ScoresOtherThanItGenerates],
    "test_json_schema": [IgnoresSchema],
    "test_answers_with_an_adapter": [AdapterChangesNeighbours],
    "test_unknown_adapter_is_an_error": [TakesAnyAdapter, CallsAnUnknownAdapterTransient],
    "test_concurrent_requests_do_not_mix": [MixesRequests, AdapterChangesNeighbours],
    "test_cancelling_frees_the_work": [LosesCount, SwallowsCancellation],
    "test_cancelling_some_leaves_the_others": [CancelsNeighbours],
    "test_closing_a_stream_frees_the_work": [LosesCount],
    "test_cancelling_a_stream_frees_the_work": [LosesCount],
    "test_unicode_survives": [TearsCharacters],
    "test_health": [NeverHealthy],
    "test_closing_twice_is_safe_and_final": [HealthyAfterClosing, AnswersAfterClosing, ClosesOnce],
    "test_closing_ends_what_runs": [AnswersAfterClosing],
}


class Strict(BackendConformance):
    settle_s = 0.05

    async def run(self, test: str, backend: Backend, **more: Any) -> None:
        """Runs one test of the suite; a skip is no verdict."""
        try:
            await getattr(self, test)(backend, **more)
        except pytest.skip.Exception as e:
            raise ValueError(f"skipped: {e}") from None


FOUND = (AssertionError, BackendError, pytest.fail.Exception, json.JSONDecodeError)


@pytest.mark.parametrize(("test", "faulty"), [(t, f) for t, fs in SUITE.items() for f in fs])
async def test_finds_the_fault(test: str, faulty: type[Faulty]) -> None:
    more = {"adapter": AdapterRef.parse("med@v1")} if test == "test_answers_with_an_adapter" else {}
    await Strict().run(test, Faulty(), **more)
    backend = faulty()
    with pytest.raises(FOUND):
        await Strict().run(test, backend, **more)
    await FakeBackend.aclose(backend)


@pytest.mark.parametrize("faulty", [PositiveLogprobs, UnsortedAlternatives, OneLogprobMore])
async def test_finds_false_logprobs(faulty: type[Faulty]) -> None:
    with pytest.raises(AssertionError):
        await Strict().run("test_logprobs", faulty(), top=3)


async def test_finds_what_is_taken_without_being_claimed() -> None:
    with pytest.raises(pytest.fail.Exception):
        await Strict().run(
            "test_what_is_not_claimed_is_unsupported", TakesWhatItDoesNotClaim(), capability="json_schema"
        )


async def test_finds_a_timeout_of_another_kind() -> None:
    class Plain(Faulty):
        async def generate(self, request: GenerateRequest) -> Completion:
            try:
                return await super().generate(request)
            except BackendTimeout:
                raise TimeoutError from None

    with pytest.raises(TimeoutError):
        await Strict().run("test_timeout_ends_the_request", Plain())


async def test_skips_name_the_capability() -> None:
    with pytest.raises(pytest.skip.Exception, match="fake does not claim 'score'"):
        await BackendConformance().test_score(FakeBackend(capabilities=Capabilities()))


def test_says_what_to_install_and_is_not_needed_to_run() -> None:
    code = "import sys; sys.modules['pytest'] = None; import experts.fake, experts.openai, experts.conformance"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "needs pytest: pip install pytest pytest-asyncio" in done.stderr
