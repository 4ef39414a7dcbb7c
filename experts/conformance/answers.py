"""Conformance: text, its limits, and how it is sampled."""

from __future__ import annotations

import pytest

from agora.errors import BackendTimeout, InvalidRequest, Rejected
from agora.protocols import (
    Backend,
    Capabilities,
    GenerateRequest,
    Load,
    Message,
    Role,
)
from experts.conformance.base import Bench, joined


class Answers(Bench):
    """What holds for every answer."""

    # -- Words

    async def test_has_the_shape_of_a_backend(self, backend: Backend) -> None:
        """It has every method, a name, and claims at least one way of being asked."""
        assert isinstance(backend, Backend)
        assert backend.name
        assert isinstance(backend.capabilities, Capabilities)
        assert backend.capabilities.chat or backend.capabilities.completion, "neither chat nor completion is claimed"
        assert backend.load == Load(), f"a backend at rest has load {backend.load}"

    async def test_generates(self, backend: Backend) -> None:
        """An answer has text, a reason for its end, and true counts."""
        for question in self.questions:
            answer = await backend.generate(self.ask(backend, question))
            assert isinstance(answer.text, str)
            assert answer.finish_reason in ("stop", "length")
            assert answer.usage.prompt_tokens > 0
            assert 0 <= answer.usage.completion_tokens <= self.tokens
            assert answer.usage.calls == 1
            assert answer.usage.tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
            assert answer.logprobs == (), "log-probabilities that nobody asked for"
            assert answer.first_token_s is None or 0 <= answer.first_token_s <= answer.seconds
        assert backend.load == Load()

    async def test_longer_prompts_use_more_tokens(self, backend: Backend) -> None:
        """`prompt_tokens` counts the prompt."""
        short = await backend.generate(self.ask(backend, "One.", max_tokens=1))
        longer = await backend.generate(self.ask(backend, "One. " + " ".join(self.questions), max_tokens=1))
        assert longer.usage.prompt_tokens > short.usage.prompt_tokens

    async def test_greedy_answers_repeat(self, backend: Backend) -> None:
        """Temperature 0 gives the same text twice."""
        question, answer = await self.long_answer(backend, 1)
        assert (await backend.generate(self.ask(backend, question))).text == answer.text

    async def test_stream_agrees_with_generate(self, backend: Backend) -> None:
        """The chunks of a greedy stream join to the generated answer, with the same end and the same counts."""
        for question in self.questions[:3]:
            answer = await backend.generate(self.ask(backend, question))
            text, chunks = await joined(backend.stream(self.ask(backend, question)))
            assert text == answer.text
            assert chunks[-1].finish_reason == answer.finish_reason
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens
            assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens

    async def test_only_the_last_chunk_ends_a_stream(self, backend: Backend) -> None:
        """`finish_reason` and `usage` are on the last chunk and on no other."""
        _, chunks = await joined(backend.stream(self.ask(backend, self.questions[0])))
        assert chunks[-1].finish_reason in ("stop", "length")
        assert all(c.finish_reason is None and c.usage is None for c in chunks[:-1])

    async def test_takes_a_conversation(self, backend: Backend) -> None:
        """System, user and assistant turns are all taken."""
        self.needs(backend, "chat")
        turns: tuple[tuple[Role, str], ...] = (
            ("system", "Answer in one word."),
            ("user", "Sky?"),
            ("assistant", "Blue."),
            ("user", "Grass?"),
        )
        messages = tuple(Message(role=role, content=content) for role, content in turns)
        answer = await backend.generate(GenerateRequest(messages=messages, max_tokens=4))
        assert answer.usage.prompt_tokens > 0

    # -- Limits

    async def test_max_tokens_cuts_the_answer(self, backend: Backend) -> None:
        """A lower limit gives the beginning of the greedy answer, exactly that long, and says `length`."""
        question, answer = await self.long_answer(backend)
        limit = answer.usage.completion_tokens - 2
        cut = await backend.generate(self.ask(backend, question, max_tokens=limit))
        assert cut.finish_reason == "length"
        assert cut.usage.completion_tokens == limit
        assert answer.text.startswith(cut.text.rstrip("\ufffd"))

    async def test_stop_ends_the_answer_and_is_not_in_it(self, backend: Backend) -> None:
        """The answer ends before the first stop string, in `generate` and in `stream`."""
        question, answer = await self.long_answer(backend)
        visible = answer.text.rstrip("\ufffd")
        middle = len(visible) // 2
        stop = visible[middle : middle + 3].strip("\ufffd") or visible[:1]
        expected = answer.text[: answer.text.index(stop)]
        request = self.ask(backend, question, stop=("\x01never\x01", stop))
        stopped = await backend.generate(request)
        assert stop not in stopped.text
        assert stopped.text == expected
        assert stopped.finish_reason == "stop"
        text, chunks = await joined(backend.stream(request))
        assert text == expected, "the stream let a part of the stop string through, or held back too much"
        assert chunks[-1].finish_reason == "stop"

    async def test_timeout_ends_the_request(self, backend: Backend) -> None:
        """`timeout_s` gives `BackendTimeout`, in both forms, and frees the work."""
        request = self.ask(backend, self.questions[0], timeout_s=self.too_short_s)
        with pytest.raises(BackendTimeout):
            await backend.generate(request)
        await self.settled(backend)
        with pytest.raises(BackendTimeout):
            await joined(backend.stream(request))
        await self.settled(backend)

    async def test_too_long_a_prompt_is_refused(self, backend: Backend) -> None:
        """A prompt beyond `max_context` gives one clear error, and the next request works."""
        room = backend.capabilities.max_context
        if room is None or room > 16_384:
            pytest.skip(f"{backend.name} claims no 'max_context' that a test could fill")
        with pytest.raises((Rejected, InvalidRequest)) as refused:
            await backend.generate(self.ask(backend, "one two " * room, max_tokens=1))
        assert str(refused.value)
        await self.settled(backend)

    async def test_empty_prompts_cannot_be_asked(self, backend: Backend) -> None:
        """An empty request never reaches a backend."""
        for text in ("", " \n"):
            with pytest.raises(InvalidRequest):
                self.ask(backend, text)

    # -- Sampling

    async def test_same_seed_same_sample(self, backend: Backend) -> None:
        """Claimed as `seed`: a sample can be drawn again."""
        self.needs(backend, "seed")
        for seed in (1, 2):
            request = self.ask(backend, self.questions[0], temperature=1.0, seed=seed)
            assert (await backend.generate(request)).text == (await backend.generate(request)).text

    async def test_samples_within_top_p(self, backend: Backend) -> None:
        """A vanishing `top_p` leaves only the likeliest token."""
        question, answer = await self.long_answer(backend, 1)
        nucleus = await backend.generate(self.ask(backend, question, temperature=1.0, top_p=1e-6))
        assert nucleus.text == answer.text

    # -- Text of all kinds

    async def test_unicode_survives(self, backend: Backend) -> None:
        """Text of every script is taken, and what comes back is valid text, whole in a stream too."""
        for text in (
            "Übergrößenträger – ça va?",
            "日本語で答えてください。",
            "🦜👩‍👩‍👧‍👦 emoji",
            "שלום עולם",
            "a\u0301 \u200d",
        ):
            answer = await backend.generate(self.ask(backend, text))
            answer.text.encode("utf-8")
            streamed, chunks = await joined(backend.stream(self.ask(backend, text)))
            assert streamed == answer.text
            for chunk in chunks:
                chunk.text.encode("utf-8")
