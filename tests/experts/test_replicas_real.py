"""Two real vLLM servers behind one `ReplicaSet`: the second comes with the load and goes with it, and nothing is
lost."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest

from agora.errors import ModelError
from agora.protocols import GenerateRequest
from agora.scheduling.scaling import Targets
from experts.models import ModelStore
from experts.replicas import Care, ReplicaSet
from experts.vllm import VLLMBackend
from experts.vllm_launch import default_python, find_install

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

TARGETS = Targets(least=1, most=2, queue=2.0, up_after_s=1.0, down_after_s=12.0, cooldown_s=1.0)

REST_S = 4.0
"""Seconds that users rest between two bursts while the second server starts: it needs the processor more than they do,
and a burst within every `down_after_s` is enough to keep it wanted."""


async def test_a_second_server_comes_and_goes_with_the_load(tmp_path: Path) -> None:
    python = default_python()
    try:
        await find_install(python, os.environ, tmp_path)
    except ModelError as e:
        pytest.skip(f"there is no vLLM to test with: {e}")
    model = ModelStore().resolve("smollm2-135m", pull=True)

    async def start(number: int) -> VLLMBackend:
        return await VLLMBackend.start(model, python=python, max_context=512, name=f"gpu/{number}")

    replicas = await ReplicaSet.start(start, TARGETS, name="gpu", care=Care(every_s=1.0))
    try:
        grown = asyncio.Event()
        answered = [0, 0]

        async def user(n: int) -> None:
            while not grown.is_set() or answered[1] < 12:
                request = GenerateRequest(prompt=f"Once upon a time there were {n} robots who", max_tokens=12)
                answer = await replicas.generate(request)
                assert answer.usage.completion_tokens > 0
                answered[grown.is_set()] += 1
                if replicas.signal.wanted == 2 and not grown.is_set():
                    await asyncio.sleep(REST_S)

        async def watch() -> None:
            while (replicas.signal.up or 0) < 2:
                await asyncio.sleep(0.2)
            grown.set()

        async with asyncio.timeout(400.0):
            await asyncio.gather(watch(), *(user(n) for n in range(6)))
        assert answered[0] > 0 and answered[1] >= 12
        servers = {number: b for number, b in replicas.replicas.items() if isinstance(b, VLLMBackend)}
        assert len(servers) == 2
        seen = [await b.metrics() for b in servers.values()]
        assert all((m.generation_tokens or 0) > 12 for m in seen), "both did a part of it"
        pids = {number: b.pid for number, b in servers.items()}
        async with asyncio.timeout(60.0):
            while sum(psutil.pid_exists(pid or 0) for pid in pids.values()) > 1:
                await asyncio.sleep(0.2)
        (left,) = replicas.replicas
        assert psutil.pid_exists(pids[left] or 0)
        assert (await replicas.health()).ok
    finally:
        await replicas.aclose()
    assert not any(psutil.pid_exists(pid or 0) for pid in pids.values())
