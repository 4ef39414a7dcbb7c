"""What a node tells of itself."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from agora.serve.openapi import document
from agora.square import Expert
from agora.types import ExpertCard
from experts.retry import Retry
from experts.vllm import VLLMBackend


async def test_models_are_graphs_and_experts(gateway: Any) -> None:
    _, body = await gateway.get("/v1/models")
    kinds = {m["id"]: m["agora"]["kind"] for m in body["data"]}
    assert kinds == {
        "agora": "graph",
        "horizontal": "graph",
        **dict.fromkeys(("one", "slow", "down", "full", "dull"), "expert"),
    }
    status, one = await gateway.get("/v1/models/one")
    assert status == 200
    assert one in body["data"]
    assert "calculator" not in str(body)
    assert (await gateway.get("/v1/models/nobody"))[0] == 404


async def test_a_node_is_ready_while_somebody_answers(start: Any) -> None:
    gateway = await start()
    status, body = await gateway.get("/readyz")
    assert (status, body["status"]) == (200, "ready")
    assert (body["experts"], body["healthy"]) == (5, 2)
    nobody = await start(
        experts="""
[nodes.down]
kind = "fake"
fail = "unavailable"
[experts.down]
node = "down"
description = "absence"
[graph]
router = "keywords"
"""
    )
    status, body = await nobody.get("/readyz")
    assert (status, body["status"]) == (503, "not ready")
    assert (await nobody.get("/healthz"))[0] == 200


async def test_metrics_can_be_read_by_prometheus(gateway: Any) -> None:
    await gateway.chat("one")
    await gateway.chat("nobody")
    async with gateway.http.get(f"{gateway.url}/metrics") as reply:
        families = {f.name: f for f in text_string_to_metric_families(await reply.text())}
    requests = {(s.labels["model"], s.labels["status"]): s.value for s in families["agora_requests"].samples}
    # A name that is not served is not kept: whoever asks could fill the memory with them.
    assert requests[("one", "200")] == 1
    assert requests[("-", "404")] == 1
    assert families["agora_request_seconds"].samples
    assert {s.labels["of"] for s in families["agora_requests_now"].samples} == {"all", "neighbours"}
    assert families["agora_experts"].samples[0].value == 5


async def test_every_route_is_in_the_document_and_the_other_way_round(gateway: Any) -> None:
    _, told = await gateway.get("/openapi.json")
    assert told == document()
    from agora.serve.app import make_app

    app = make_app(gateway.node)
    served = {
        (r.resource.canonical, r.method.lower()) for r in app.router.routes() if r.resource and r.method != "HEAD"
    }
    assert {(path, method) for path, item in told["paths"].items() for method in item} == served


async def test_the_document_has_no_loose_ends(gateway: Any) -> None:
    told = document()

    def refs(value: Any) -> set[str]:
        if isinstance(value, dict):
            own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
            return own.union(*map(refs, value.values()))
        return set().union(*map(refs, value)) if isinstance(value, list) else set()

    schemas = told["components"]["schemas"]
    assert {r.removeprefix("#/components/schemas/") for r in refs(told)} <= set(schemas)


async def test_what_vllm_servers_tell_is_told_on(gateway: Any) -> None:
    async def metrics(request: web.Request) -> web.Response:
        return web.Response(
            text=(
                'vllm:num_requests_running{engine="0"} 3.0\n'
                'vllm:num_requests_waiting{engine="0"} 5.0\n'
                'vllm:kv_cache_usage_perc{engine="0"} 0.25\n'
            )
        )

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        for name, port in (("up", runner.addresses[0][1]), ("gone", 9)):
            backend = VLLMBackend.attach(f"http://127.0.0.1:{port}", "m", name=name, retry=Retry(tries=1))
            card = ExpertCard(name=f"{name}-expert", description=name)
            gateway.node.square.join(Expert(card=card, backend=backend, node=name))
        async with gateway.http.get(f"{gateway.url}/metrics") as reply:
            assert reply.status == 200
            families = {f.name: f for f in text_string_to_metric_families(await reply.text())}
        told = {n: f.samples for n, f in families.items() if n.startswith("agora_vllm_")}
        assert {n: [(s.labels["node"], s.value) for s in samples] for n, samples in told.items() if samples} == {
            "agora_vllm_running": [("up", 3.0)],
            "agora_vllm_waiting": [("up", 5.0)],
            "agora_vllm_cache_use": [("up", 0.25)],
        }
    finally:
        await runner.cleanup()
