"""What a node says of itself: its models, whether it lives and is ready, its metrics, its OpenAPI document."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import orjson
from aiohttp import web

from agora.protocols import Health
from agora.serve.errors import JSON, ApiError
from agora.serve.metrics import CONTENT_TYPE
from agora.serve.node import NODE, Node
from agora.serve.openapi import document
from agora.square import Expert, Square

READY_TIMEOUT_S: Final = 10.0
"""Seconds that a look at the backends may take; one that needs longer for one token is not ready."""

READY_KEPT_S: Final = 5.0
"""Seconds that a look at the backends counts: whoever asks more often does not make them generate more tokens."""


def routes() -> list[web.RouteDef]:
    """The routes of this module."""
    return [
        web.get("/v1/models", models),
        web.get("/v1/models/{model}", model),
        web.get("/healthz", healthz),
        web.get("/readyz", readyz),
        web.get("/metrics", metrics),
        web.get("/openapi.json", openapi),
    ]


async def models(request: web.Request) -> web.Response:
    """`GET /v1/models`: the graphs and experts that can be asked."""
    node = request.app[NODE]
    return _json({"object": "list", "data": [_graph(node, g) for g in node.graphs] + [_expert(e) for e in node.square]})


async def model(request: web.Request) -> web.Response:
    """`GET /v1/models/{model}`."""
    node = request.app[NODE]
    name = request.match_info["model"]
    target = node.target(name)
    return _json(_expert(target) if isinstance(target, Expert) else _graph(node, name))


def _graph(node: Node, name: str) -> dict[str, Any]:
    graph = node.config.graph
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": node.name,
        "agora": {"kind": "graph", "graph": graph.name, "planner": graph.planner, "router": graph.router},
    }


def _expert(expert: Expert) -> dict[str, Any]:
    card = expert.card
    return {
        "id": expert.name,
        "object": "model",
        "created": 0,
        "owned_by": expert.node,
        "agora": {
            "kind": "expert",
            "description": card.description,
            "tier": str(card.tier),
            "price_per_mtok": card.price_per_mtok,
            "max_tokens": card.max_tokens,
            "context_tokens": card.context_tokens,
            "adapter": str(expert.adapter) if expert.adapter else None,
        },
    }


async def healthz(request: web.Request) -> web.Response:
    """`GET /healthz`: the process lives and its event loop turns."""
    return _json({"status": "ok"})


class Readiness:
    """Whether somebody can be asked here, looked at once for all who ask within a few seconds.

    Args:
        node: The node.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._look: asyncio.Task[dict[str, Health]] | None = None
        self._at = 0.0

    async def own(self) -> dict[str, Health]:
        """Health of the node's own experts."""
        loop = asyncio.get_running_loop()
        stale = self._look is None or (self._look.done() and loop.time() - self._at >= READY_KEPT_S)
        if stale:
            # Neighbours look after themselves: asked here, a token would go round the whole square.
            own = Square([e for e in self._node.square if not getattr(e.backend, "relays", False)])
            self._look = loop.create_task(own.health(timeout_s=READY_TIMEOUT_S))
            self._look.add_done_callback(self._looked)
        assert self._look is not None
        return await asyncio.shield(self._look)

    def _looked(self, look: asyncio.Task[dict[str, Health]]) -> None:
        self._at = look.get_loop().time()


async def readyz(request: web.Request) -> web.Response:
    """`GET /readyz`: whether questions are answered here: somebody of its experts generates a token when asked to."""
    node = request.app[NODE]
    if node.draining:
        raise ApiError(503, "this node is about to end", code="draining")
    health = await request.app[READINESS].own()
    ready = any(h.ok for h in health.values())
    return _json(
        {
            "status": "ready" if ready else "not ready",
            "experts": len(health),
            "healthy": sum(h.ok for h in health.values()),
        },
        status=200 if ready else 503,
    )


READINESS: Final = web.AppKey("readiness", Readiness)


async def metrics(request: web.Request) -> web.Response:
    """`GET /metrics`: Prometheus' text format."""
    return web.Response(body=await request.app[NODE].metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def openapi(request: web.Request) -> web.Response:
    """`GET /openapi.json`."""
    return _json(document())


def _json(value: Any, *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type=JSON)
