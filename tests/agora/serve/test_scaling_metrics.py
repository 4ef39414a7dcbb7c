"""How many replicas are wanted, as Prometheus reads it: of those started here, and of those that others start."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agora.config import parse_config
from agora.protocols import Backend, GenerateRequest
from agora.scheduling.scaling import Targets
from agora.serve.limits import Admission
from agora.serve.metrics import Metrics
from agora.serve.node import watched
from agora.square import Expert, Square
from agora.types import ExpertCard
from experts.fake import FakeBackend
from experts.replicas import ReplicaSet

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def told(metrics: Metrics) -> Samples:
    families = text_string_to_metric_families((await metrics.text()).decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def square_of(**backends: Backend) -> Square:
    return Square(
        [Expert(card=ExpertCard(name=f"e-{n}", description="x"), backend=b, node=n) for n, b in backends.items()]
    )


def admission() -> Admission:
    return Admission(running=4, waiting=4, neighbours=1)


async def test_replicas_started_here_tell_what_there_is_and_what_is_wanted() -> None:
    async def start(number: int) -> Backend:
        return FakeBackend(name=f"gpu/{number}")

    replicas = await ReplicaSet.start(start, Targets(least=2, most=3), name="gpu")
    await replicas.generate(GenerateRequest(prompt="hello"))
    samples = await told(Metrics(square_of(gpu=replicas), admission()))
    node = ("node", "gpu")
    assert samples["agora_wanted_replicas", (node,)] == 2
    assert samples["agora_scaling_requests", (node,)] == 0
    assert samples["agora_scaling_first_token_seconds", (node,)] < 1
    assert [samples["agora_replicas", (node, ("state", s))] for s in ("up", "starting", "draining")] == [2, 0, 0]
    await replicas.aclose()


@pytest.mark.looptime
async def test_for_servers_elsewhere_only_what_is_wanted_is_told() -> None:
    busy = FakeBackend(latency=100.0)
    idle = FakeBackend()
    clock = asyncio.get_running_loop().time
    targets = {"farm": Targets(most=8, queue=2.0, up_after_s=15.0)}
    metrics = Metrics(square_of(farm=busy, other=idle), admission(), targets=targets, clock=clock)
    work = [asyncio.create_task(busy.generate(GenerateRequest(prompt="hello"))) for _ in range(12)]
    seen = []
    for _ in range(4):
        await asyncio.sleep(10.0)
        samples = await told(metrics)
        assert samples["agora_scaling_requests", (("node", "farm"),)] == 12
        seen.append(samples["agora_wanted_replicas", (("node", "farm"),)])
    assert seen[0] == 1, "not at once"
    assert seen[-1] == 3, "two more at a time"
    assert not [key for key in samples if key[0] == "agora_replicas"]
    assert ("agora_wanted_replicas", (("node", "other"),)) not in samples
    await asyncio.gather(*work)


@pytest.mark.parametrize(
    ("keys", "is_watched"), [("", False), ("target_ttft_s = 1.0", True), ("max_replicas = 2", True)]
)
def test_which_nodes_are_watched(keys: str, is_watched: bool, tmp_path: Any) -> None:
    text = f'[nodes.farm]\nkind = "vllm"\nurl = "http://127.0.0.1:1/v1"\nmodel = "m"\n{keys}\n'
    text += '[experts.a]\nnode = "farm"\ndescription = "x"\n'
    assert ("farm" in watched(parse_config(text, file=tmp_path / "agora.toml"))) == is_watched


async def test_writing_out_thousands_of_experts_holds_up_nobody() -> None:
    backend = FakeBackend()
    square = Square(
        [Expert(card=ExpertCard(name=f"e{n}", description="x"), backend=backend, node="n") for n in range(2_000)]
    )
    metrics = Metrics(square, admission())
    for n in range(2_000):
        metrics.first_token(f"e{n}", 0.1)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    busy = asyncio.create_task(others())
    text = await metrics.text()
    busy.cancel()
    assert text.count(b"agora_first_token_seconds_count{") == 2_000 and b"agora_experts 2000.0" in text
    # Some 0.2 s of writing: on the event loop itself it would have had a handful of turns.
    assert turns > 100
