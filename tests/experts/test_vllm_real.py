"""`VLLMBackend` on a real vLLM, started from `.venv-vllm` (`make vllm`) or the interpreter in AGORA_VLLM_PYTHON.

One server is started for all tests, on a thread with an event loop of its own; tests attach to it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from agora.errors import AdapterError, ModelError, Unavailable
from agora.protocols import Backend, GenerateRequest, Message, ScoreRequest
from agora.types import AdapterRef
from experts.conformance import BackendConformance
from experts.models import ModelStore
from experts.vllm import VLLMBackend
from experts.vllm_launch import default_python, find_install
from experts.vllm_supervisor import Supervision

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

T = TypeVar("T")

MED = AdapterRef.parse("med@v1")
LAW = AdapterRef.parse("law@v1")

ONCE = "Once upon a time there was a small robot who lived by the sea and"


@dataclass
class Running:
    """The server, and the thread it is looked after on."""

    backend: VLLMBackend
    loop: asyncio.AbstractEventLoop
    started_s: float
    key: str = field(repr=False)

    async def there(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits something on the thread of the server."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    @property
    def processes(self) -> list[psutil.Process]:
        leader = psutil.Process(self.backend.pid)
        return [leader, *leader.children(recursive=True)]

    @property
    def engine(self) -> psutil.Process:
        return next(p for p in self.processes if "EngineCore" in "".join(p.cmdline()))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return ModelStore().resolve("smollm2-135m", pull=True)


def write_adapter(folder: Path, model: Path, seed: int) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft asks transformers for old names
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[AdapterRef, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {ref: write_adapter(root / ref.name, smollm2, seed) for seed, ref in enumerate((MED, LAW))}


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = default_python()
    try:
        asyncio.run(find_install(python, os.environ, tmp_path_factory.mktemp("elsewhere")))
    except ModelError as e:
        pytest.skip(f"there is no vLLM to test with: {e}")
    return python


@pytest.fixture(scope="session")
def server(smollm2: Path, adapters: dict[AdapterRef, Path], python: Path) -> Iterator[Running]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="vllm-server")
    thread.start()

    def run(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    try:
        began = time.monotonic()
        backend = run(
            VLLMBackend.start(
                smollm2, python=python, max_context=2048, adapters=True, supervision=Supervision(check_every_s=5.0)
            )
        )
        try:
            started = time.monotonic() - began
            run(backend.load_adapter(MED, adapters[MED]))
            key = psutil.Process(backend.pid).environ()["VLLM_API_KEY"]
            running = Running(backend, loop, started, key)
            yield running
            processes = running.processes
        finally:
            run(backend.aclose())
        assert len(processes) >= 2
        assert not [p for p in processes if p.is_running()], "a process of vLLM outlived the backend"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
async def backend(server: Running) -> AsyncIterator[VLLMBackend]:
    backend = VLLMBackend.attach(server.backend.url, server.backend.model, api_key=server.key)
    await backend.probe()
    yield backend
    await backend.aclose()


class TestConformance(BackendConformance):
    same_in_batch = False  # vLLM's arithmetic depends on the batch.

    @pytest.fixture
    def backend(self, backend: VLLMBackend) -> Backend:
        return backend

    @pytest.fixture
    def adapter(self) -> AdapterRef:
        return MED


async def test_probe_finds_what_it_can_do(backend: VLLMBackend) -> None:
    assert backend.capabilities.max_context == 2048
    assert backend.capabilities.chat


async def test_a_chat_is_scored_as_it_is_generated(backend: VLLMBackend) -> None:
    messages = (Message(role="user", content="Is the sky blue? Answer yes or no."),)
    answer = await backend.generate(GenerateRequest(messages=messages, max_tokens=1, logprobs=20))
    top = {t: lp for t, lp in answer.logprobs[0].top if t.isalpha()}
    scores = await backend.score(ScoreRequest(messages=messages, continuations=tuple(top)))
    single = [s for s in scores.scores if s.tokens == 1]
    assert len(single) >= 5
    assert [s.logprob for s in single] == pytest.approx([top[s.text] for s in single], abs=0.01)


async def test_score_across_a_token_border(backend: VLLMBackend) -> None:
    """ "under" and "underground" are other tokens: P(ground | …under) = P(underground | …) / P(under | …)."""

    async def logprob(prompt: str, continuation: str) -> float:
        return (await backend.score(ScoreRequest(prompt=prompt, continuations=(continuation,)))).scores[0].logprob

    parted = await logprob("The trains of the city go under", "ground today.")
    whole = await logprob("The trains of the city go", " underground today.")
    under = await logprob("The trains of the city go", " under")
    assert parted < 0
    assert parted == pytest.approx(whole - under, abs=0.05)


async def test_scores_beyond_ascii(backend: VLLMBackend) -> None:
    scores = await backend.score(ScoreRequest(prompt="Ich mag 日本", continuations=("語 🦜", " und Übermut", "é")))
    assert all(s.logprob < 0 and s.tokens >= 1 for s in scores.scores)


async def test_a_cancelled_request_leaves_the_server_free(backend: VLLMBackend) -> None:
    long = GenerateRequest(prompt="Once upon a time", max_tokens=1500)
    tasks = [asyncio.create_task(backend.generate(long)) for _ in range(4)]
    await asyncio.sleep(1.0)
    busy = await backend.metrics()
    assert (busy.running or 0) + (busy.waiting or 0) == 4
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    # Each of the four would take a minute and more; what was cancelled must not be in the way.
    answer = await backend.generate(GenerateRequest(prompt="Hello", max_tokens=4, timeout_s=20.0))
    assert answer.usage.completion_tokens <= 4
    assert (await backend.metrics()).running == 0


async def test_metrics_count_what_is_asked(backend: VLLMBackend) -> None:
    before = await backend.metrics()
    answer = await backend.generate(GenerateRequest(prompt=ONCE, max_tokens=8))
    after = await backend.metrics()
    assert before.first_token is not None and after.first_token is not None
    # A look of the supervisor's may fall between: it reads one token and generates one.
    looks = after.first_token.count - before.first_token.count - 1
    assert looks in (0, 1)
    assert before.prompt_tokens is not None and after.prompt_tokens is not None
    assert after.prompt_tokens - before.prompt_tokens == answer.usage.prompt_tokens + looks
    assert before.generation_tokens is not None and after.generation_tokens is not None
    assert after.generation_tokens - before.generation_tokens == answer.usage.completion_tokens + looks
    assert 0 < (after.first_token.mean or 0) < 60
    low, high = after.first_token.quantile(0.1), after.first_token.quantile(0.9)
    assert low is not None and high is not None and 0 < low <= high < 60
    assert after.cache_use is not None and after.cache_use < 0.1
    assert (after.running or 0) + (after.waiting or 0) <= 1


async def test_adapters_come_and_go_and_answer_differently(server: Running, adapters: dict[AdapterRef, Path]) -> None:
    backend, there = server.backend, server.there
    asked = GenerateRequest(prompt=ONCE, max_tokens=4, adapter=LAW)

    async def scores() -> list[float]:
        """How likely the same words are without an adapter and with each."""
        requests = [ScoreRequest(prompt=ONCE, continuations=(" its friends",), adapter=a) for a in (None, MED, LAW)]
        return [(await there(backend.score(r))).scores[0].logprob for r in requests]

    with pytest.raises(AdapterError, match="does not serve adapter 'law@v1'"):
        await there(backend.generate(asked))
    await there(backend.load_adapter(LAW, adapters[LAW]))
    assert await there(backend.served_adapters()) == ("law@v1", "med@v1")
    base, med, law = await scores()
    assert min(abs(base - med), abs(base - law), abs(med - law)) > 0.05
    with pytest.raises(AdapterError, match="other weights"):
        await there(backend.load_adapter(LAW, adapters[MED]))
    assert await scores() == pytest.approx([base, med, law], abs=0.02)
    await there(backend.unload_adapter(LAW))
    with pytest.raises(AdapterError, match="does not serve adapter 'law@v1'"):
        await there(backend.generate(asked))
    assert (await there(backend.generate(GenerateRequest(prompt=ONCE, max_tokens=4, adapter=MED)))).text


async def test_attached_an_adapter_it_cannot_take_is_refused(
    backend: VLLMBackend, adapters: dict[AdapterRef, Path], tmp_path: Path
) -> None:
    """The server's own words, and it lives on."""
    import json

    from safetensors.numpy import load_file, save_file

    odd = shutil.copytree(adapters[LAW], tmp_path / "odd")
    config = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps(config | {"r": 64}))
    weights = load_file(odd / "adapter_model.safetensors")
    save_file({k: w.repeat(8, axis=int("lora_B" in k)) for k, w in weights.items()}, odd / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"refused by the server: .*rank 64"):
        await backend.load_adapter(AdapterRef.parse("odd@v1"), odd)
    assert (await backend.generate(GenerateRequest(prompt="Hello", max_tokens=1))).usage.calls == 1


async def test_the_key_is_not_on_the_command_line(server: Running) -> None:
    assert len(server.key) >= 32
    assert not [a for p in server.processes for a in p.cmdline() if server.key in a]


async def test_a_dead_engine_is_noticed_and_the_server_comes_back(server: Running) -> None:
    """Killed without a word, it is started again on the same port, with the adapter it had."""
    backend, there = server.backend, server.there
    request = GenerateRequest(prompt=ONCE, max_tokens=12, adapter=MED)
    before = (await there(backend.generate(request))).text
    old, url = server.processes, backend.url
    under_way = asyncio.create_task(there(backend.generate(GenerateRequest(prompt=ONCE, max_tokens=1000))))
    await asyncio.sleep(1.0)
    server.engine.send_signal(signal.SIGKILL)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(under_way, 30.0)
    async with asyncio.timeout(60.0):
        while backend.state and backend.state.phase == "up":
            await asyncio.sleep(0.1)
    with pytest.raises(Unavailable, match="the vLLM server is down since"):
        await there(backend.generate(request))
    assert not (await there(backend.health())).ok
    async with asyncio.timeout(300.0):
        while backend.state and backend.state.phase != "up":
            await asyncio.sleep(0.5)
    assert backend.url == url
    assert backend.state is not None and backend.state.restarts == 1
    assert (await there(backend.generate(request))).text == before
    assert not [p for p in old if p.is_running()]
