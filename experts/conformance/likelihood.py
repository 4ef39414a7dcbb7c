"""Conformance: log-probabilities, scores, and structured output."""

from __future__ import annotations

import json
import math

import pytest

from agora.protocols import (
    Backend,
    GenerateRequest,
    Load,
    ScoreRequest,
    TokenLogprob,
)
from experts.conformance.base import SCHEMA, Bench, joined


class Likelihood(Bench):
    """What holds for what a backend says of its own tokens."""

    def check_logprobs(self, tokens: tuple[TokenLogprob, ...], count: int, top: int) -> None:
        """What holds for the log-probabilities of every greedy answer."""
        assert len(tokens) == count, f"{len(tokens)} log-probabilities for {count} tokens"
        for token in tokens:
            assert math.isfinite(token.logprob), token
            assert token.logprob <= 0, token
            assert len(token.top) <= top, token
            values = [logprob for _, logprob in token.top]
            assert values == sorted(values, reverse=True), f"alternatives are not sorted: {token}"
            assert sum(map(math.exp, values)) <= 1 + self.logprob_tolerance, token
            if values:
                assert token.logprob == pytest.approx(values[0], abs=self.logprob_tolerance), (
                    f"a greedy token is not its own best alternative: {token}"
                )

    @pytest.mark.parametrize("top", [0, 3])
    async def test_logprobs(self, backend: Backend, top: int) -> None:
        """One per generated token, finite and not above 0, alternatives best first, the same in a stream."""
        self.needs(backend, "logprobs")
        question, _ = await self.long_answer(backend, 1)
        request = self.ask(backend, question, logprobs=top)
        answer = await backend.generate(request)
        self.check_logprobs(answer.logprobs, answer.usage.completion_tokens, top)
        assert answer.mean_logprob is not None
        _, chunks = await joined(backend.stream(request))
        streamed = tuple(t for c in chunks for t in c.logprobs)
        assert [t.token for t in streamed] == [t.token for t in answer.logprobs]
        assert [t.logprob for t in streamed] == pytest.approx(
            [t.logprob for t in answer.logprobs], abs=self.logprob_tolerance
        )

    async def test_score(self, backend: Backend) -> None:
        """One score per continuation in the order asked, repeatable, and probabilities that order them."""
        self.needs(backend, "score")
        continuations = (" blue", " green and full of birds", " blue", " 🦜 élan")
        scores = await backend.score(self.score_request(backend, *continuations))
        assert tuple(s.text for s in scores.scores) == continuations
        for s in scores.scores:
            assert math.isfinite(s.logprob), s
            assert s.logprob <= 0, s
            assert s.tokens >= 1, s
        assert scores.scores[0].logprob == pytest.approx(scores.scores[2].logprob, abs=self.logprob_tolerance)
        probabilities = scores.probabilities()
        assert sum(probabilities) == pytest.approx(1.0)
        order = sorted(range(len(continuations)), key=lambda n: -scores.scores[n].logprob)
        assert [probabilities[n] for n in order] == sorted(probabilities, reverse=True)
        assert scores.usage.prompt_tokens > 0
        turned = await backend.score(self.score_request(backend, *continuations[::-1]))
        assert [s.logprob for s in turned.scores[::-1]] == pytest.approx(
            [s.logprob for s in scores.scores], abs=self.logprob_tolerance
        )
        assert backend.load == Load()

    async def test_score_agrees_with_logprobs(self, backend: Backend) -> None:
        """A single token scores what `generate` says of it among its alternatives for the first token."""
        self.needs(backend, "score", "logprobs", "completion")
        compared = 0
        for question in self.questions:
            answer = await backend.generate(GenerateRequest(prompt=question, max_tokens=1, logprobs=10))
            # Words only: special tokens and parts of characters have no text of their own that could be scored.
            top = {t: lp for t, lp in answer.logprobs[0].top if t[:1] == " " and t.strip().isalnum()}
            if not top:
                continue
            scores = await backend.score(ScoreRequest(prompt=question, continuations=tuple(top)))
            for s in scores.scores:
                if s.tokens == 1:
                    assert s.logprob == pytest.approx(top[s.text], abs=self.logprob_tolerance), s
                    compared += 1
        if not compared:
            pytest.skip(f"no alternative of {backend.name} is a word of one token")

    async def test_json_schema(self, backend: Backend) -> None:
        """Claimed as `json_schema`: the text is JSON of the schema."""
        self.needs(backend, "json_schema")
        answer = await backend.generate(self.ask(backend, "Is water wet?", json_schema=SCHEMA, max_tokens=64))
        if answer.finish_reason == "length":
            pytest.skip(f"{backend.name} used up its tokens before the end of the JSON")
        value = json.loads(answer.text)
        assert list(value) == ["ok"]
        assert isinstance(value["ok"], bool)
