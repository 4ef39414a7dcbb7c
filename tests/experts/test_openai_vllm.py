"""`OpenAIBackend` against a real vLLM server, named by AGORA_VLLM_URL (and AGORA_VLLM_MODEL, AGORA_VLLM_ADAPTER).

python -m vllm.entrypoints.openai.api_server --model DIR --served-model-name smollm2 --enable-lora \
    --lora-modules med@v1=ADAPTER_DIR --max-model-len 2048 --enforce-eager
AGORA_VLLM_URL=http://127.0.0.1:8000 AGORA_VLLM_ADAPTER=med@v1 python -m pytest -m vllm tests/experts
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from agora.protocols import Backend, GenerateRequest, Message, ScoreRequest
from agora.types import AdapterRef
from experts.conformance import BackendConformance
from experts.openai import VLLM, OpenAIBackend

pytestmark = pytest.mark.vllm


@pytest.fixture
async def backend() -> AsyncIterator[OpenAIBackend]:
    url = os.environ.get("AGORA_VLLM_URL")
    if not url:
        pytest.skip("AGORA_VLLM_URL names no vLLM server")
    model = os.environ.get("AGORA_VLLM_MODEL", "smollm2")
    backend = OpenAIBackend(url, model, capabilities=VLLM, scorer="vllm")
    try:
        await backend.probe()
        yield backend
    finally:
        await backend.aclose()


class TestConformance(BackendConformance):
    same_in_batch = False

    @pytest.fixture
    def backend(self, backend: OpenAIBackend) -> Backend:
        return backend

    @pytest.fixture
    def adapter(self) -> AdapterRef | None:
        name = os.environ.get("AGORA_VLLM_ADAPTER")
        return AdapterRef.parse(name) if name else None


async def test_probe_finds_the_context(backend: OpenAIBackend) -> None:
    assert (backend.capabilities.max_context or 0) > 0


async def test_a_chat_is_scored_as_it_is_generated(backend: OpenAIBackend) -> None:
    messages = (Message(role="user", content="Is the sky blue? Answer yes or no."),)
    answer = await backend.generate(GenerateRequest(messages=messages, max_tokens=1, logprobs=20))
    top = {t: lp for t, lp in answer.logprobs[0].top if t.isalpha()}
    scores = await backend.score(ScoreRequest(messages=messages, continuations=tuple(top)))
    single = [s for s in scores.scores if s.tokens == 1]
    assert len(single) >= 5
    assert [s.logprob for s in single] == pytest.approx([top[s.text] for s in single], abs=0.01)


async def test_score_across_a_token_border(backend: OpenAIBackend) -> None:
    """ "under" and "underground" are other tokens: P(ground | …under) = P(underground | …) / P(under | …)."""

    async def logprob(prompt: str, continuation: str) -> float:
        return (await backend.score(ScoreRequest(prompt=prompt, continuations=(continuation,)))).scores[0].logprob

    parted = await logprob("The trains of the city go under", "ground today.")
    whole = await logprob("The trains of the city go", " underground today.")
    under = await logprob("The trains of the city go", " under")
    assert parted < 0
    assert parted == pytest.approx(whole - under, abs=0.05)


async def test_scores_beyond_ascii(backend: OpenAIBackend) -> None:
    scores = await backend.score(ScoreRequest(prompt="Ich mag 日本", continuations=("語 🦜", " und Übermut", "é")))
    assert all(s.logprob < 0 and s.tokens >= 1 for s in scores.scores)


async def test_a_cancelled_request_leaves_the_server_free(backend: OpenAIBackend) -> None:
    long = GenerateRequest(prompt="Once upon a time", max_tokens=1500)
    tasks = [asyncio.create_task(backend.generate(long)) for _ in range(4)]
    await asyncio.sleep(1.0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    # Each of the four would take a minute and more; what was cancelled must not be in the way.
    answer = await backend.generate(GenerateRequest(prompt="Hello", max_tokens=4, timeout_s=20.0))
    assert answer.usage.completion_tokens <= 4
