"""A node: everything behind one gateway, opened together and closed together."""

from __future__ import annotations

import asyncio
import itertools
import logging
import platform
import re
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Final

from aiohttp import web

from agora.config import Config
from agora.errors import ConfigError
from agora.scheduling.scaling import Targets
from agora.serve.errors import ApiError
from agora.serve.keys import Keyring
from agora.serve.limits import Admission, Bodies, Rate
from agora.serve.log import JsonLog
from agora.serve.metrics import Metrics
from agora.serve.neighbours import Neighbours
from agora.serve.runs import Runs
from agora.square import Expert, Square
from experts.build import check_keys, follow_tiers, open_square
from experts.models import ModelStore
from experts.nodes import OnPull, scaling_targets
from graphs.build import Graph, build_graph, open_router
from graphs.calibration_version import fingerprint
from graphs.store import RunStore

log = logging.getLogger(__name__)

GRAPH: Final = "agora"
"""The model name that stands for the configured graph."""

LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
"""Addresses that only this machine reaches."""


@dataclass(kw_only=True, eq=False)
class Node:
    """What the handlers of one gateway share.

    Attributes:
        config: The configuration.
        id: Made anew at every start; what tells nodes apart whatever they are called.
        name: What its neighbours call it.
        square: Who can be asked: its own experts and those of its neighbours.
        graphs: Graphs that can be asked, by the model name that stands for them.
        runs: Runs that outlive the connection that asked for them.
        neighbours: The nodes it works with.
        keys: Who may ask.
        admission: How many at once.
        rate: How many in a minute.
        bodies: Bytes of bodies.
        metrics: What it counts.
        log: Where requests are logged, if they are.
        draining: Whether it is about to end and takes nothing new.
    """

    config: Config
    id: str
    name: str
    square: Square
    graphs: Mapping[str, Graph]
    runs: Runs
    neighbours: Neighbours
    keys: Keyring
    admission: Admission
    rate: Rate
    bodies: Bodies = field(default_factory=Bodies)
    metrics: Metrics
    log: JsonLog | None = None
    draining: bool = False
    _requests: Iterator[int] = field(default_factory=itertools.count)

    def request_id(self) -> str:
        """A new name for a request: the node's id, so that it is this node's alone, and a number."""
        return f"{self.id}-{next(self._requests):x}"

    def target(self, model: str) -> Expert | Graph:
        """What answers for a model name.

        Raises:
            ApiError: 404, if nothing does.
        """
        found = self.square.get(model) or self.graphs.get(model)
        if found is None:
            some = ", ".join([*self.graphs, *(e.name for e in self.square)][:20])
            raise ApiError(
                404,
                f"model {model[:100]!r} is not served here; served: {some}",
                code="model_not_found",
                param="model",
                hint="GET /v1/models lists them",
            )
        return found


NODE: Final = web.AppKey("node", Node)


def watched(config: Config) -> dict[str, Targets]:
    """What is aimed at, by node. Where this process starts and stops the servers, that is told by their backend."""
    aimed_at = {name: scaling_targets(node) for name, node in config.nodes.items()}
    return {name: targets for name, targets in aimed_at.items() if targets is not None}


def node_name(config: Config) -> str:
    """What a node is called: as configured, else by the machine's host name."""
    return config.server.name or re.sub(r"[^A-Za-z0-9_-]", "-", platform.node().partition(".")[0]).strip("-_") or "node"


@asynccontextmanager
async def open_node(
    config: Config,
    *,
    host: str | None = None,
    store: ModelStore | None = None,
    pull: bool = False,
    progress: OnPull | None = None,
    requests: JsonLog | None = None,
) -> AsyncIterator[Node]:
    """Opens a node: run store, experts, router, graphs, neighbours; and goes on with runs that a crash left behind.

    Args:
        config: What `load_config` returned.
        host: Address it will listen on, if not the configured one.
        store: Where models are; the user's if None.
        pull: Whether models that are not on this machine may be fetched.
        progress: Told how far each fetch is.
        requests: Where requests are logged.

    Raises:
        ConfigError: If it would listen to other machines without asking for keys, or an expert has a graph's name.
        AgoraError: If anything of it cannot be opened.
    """
    server = config.server
    host = host or server.host
    keys = Keyring(server.keys)
    if not keys.required and host not in LOOPBACK:
        raise ConfigError(
            f"{config.origin}: server.host = {host!r} is reachable from other machines, and no API keys are asked for",
            hint="make a key with 'agora keys new NAME' and set [server] keys, or listen on 127.0.0.1",
        )
    if taken := {GRAPH, config.graph.name} & set(config.experts):
        raise ConfigError(f"{config.origin}: experts may not be called {sorted(taken)}: so the graph is called")
    check_keys(config, neighbours=True)
    async with AsyncExitStack() as stack:
        run_store = await stack.enter_async_context(RunStore.open(config.store.where))
        square = await open_square(config, store=store, pull=pull, progress=progress)
        stack.push_async_callback(square.aclose)
        routing = await stack.enter_async_context(open_router(config, store=store, pull=pull, progress=progress))
        for note in routing.notes:
            log.warning("%s", note)
        # Answers that are waited for on the connection need no checkpoint; runs do.
        graph = build_graph(config, square, routing=routing)
        lasting = build_graph(config, square, routing=routing, checkpointer=run_store.checkpointer)
        admission = Admission(
            running=server.max_running,
            waiting=server.max_waiting,
            neighbours=int(server.max_running * server.neighbour_share),
        )
        node_id = secrets.token_hex(8)
        runs = Runs(
            run_store,
            {config.graph.name: lasting, GRAPH: lasting},
            default_graph=config.graph.name,
            max_runs=server.max_runs,
            config=config,
        )
        neighbours = Neighbours(
            square,
            config.neighbours,
            node_id=node_id,
            node_name=node_name(config),
            max_hops=server.max_hops,
            made_of=lambda expert: fingerprint(expert, config),
            tier=server.tier,
            on_tiers=partial(follow_tiers, config, square),
        )
        node = Node(
            config=config,
            id=node_id,
            name=node_name(config),
            square=square,
            graphs=MappingProxyType({GRAPH: graph, config.graph.name: graph}),
            runs=runs,
            neighbours=neighbours,
            keys=keys,
            admission=admission,
            rate=Rate(server.requests_per_minute, clock=asyncio.get_running_loop().time),
            metrics=Metrics(square, admission, targets=watched(config)),
            log=requests,
        )
        await neighbours.start()
        stack.push_async_callback(neighbours.aclose)
        await runs.start()
        stack.push_async_callback(runs.aclose, 0.0)
        yield node
