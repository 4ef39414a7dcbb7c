"""Opens the backends of configured experts: one node, or every path to the machines that answer.

An expert of a node without links, and without `also`, is asked on that node and nothing is chosen. Any other is a
`MultipathBackend` over all ways there are: each link from here to one of its machines, a machine without links as it
is, and neighbours that pass requests on (relays), which must have an expert of the same name.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import ipaddress
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Final

from agora.config import Config, FakeNode, LlamaCppNode, LocalNode, NodeConfig, OpenAINode, VllmNode
from agora.config.collaboration import HERE, LinkConfig
from agora.errors import BackendError, ConfigError, InvalidRequest, LoopDetected, Unavailable
from agora.network.choice import Chooser
from agora.network.estimates import Estimates
from agora.network.jobs import ServerLoad
from agora.network.mobility import Played, PlayedTopology
from agora.network.multipath import MultipathBackend, loop_time
from agora.network.path import Link, Path, Technology
from agora.network.topology import Topology
from agora.network.trace_files import read_trace
from agora.network.ways import Way
from agora.protocols import Backend, Capabilities, Chunk, Completion, GenerateRequest, ScoreRequest, Scores
from experts.neighbour import RETRY, TIMEOUT_S, Line, NeighbourBackend
from experts.nodes import OPENERS, Opening
from experts.openai_http import normal_url
from experts.passage import new_node_id
from experts.slots import Slots
from experts.vllm_client import VllmClient

LOOP_STATUS: Final = "HTTP 508:"
"""How the error of a gateway begins that a request would go in a circle from (RFC 5842, section 7.2)."""

LOAD_EVERY_S: Final = 2.0
"""Seconds between two looks at what a vLLM server tells of itself: it decides some tens of requests in that time."""

LOAD_KEPT_S: Final = 10.0
"""Seconds after which what it told is out of date."""


TRACE_HINT: Final = "columns: t_s, in seconds and rising, and down_mbps, up_mbps or both, or mbps for both ways alike"
"""What a link's trace must look like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One way from here to an expert.

    Attributes:
        path: The path.
        machine: Where the request is sent: a node, or a neighbour that answers or passes it on.
        link: The link by which it goes out; None for whichever the operating system takes.
    """

    path: Path
    machine: str
    link: str | None


def topology_of(config: Config) -> Topology:
    """The configured links as a topology."""
    return Topology(
        Link(
            name=name,
            source=c.source,
            target=c.target,
            technology=Technology(c.technology),
            up_mbps=c.up_mbps,
            down_mbps=c.down_mbps,
            rtt_s=None if c.rtt_ms is None else c.rtt_ms / 1000,
            price_per_mb=c.price_per_mb,
            availability=c.availability,
        )
        for name, c in config.links.items()
    )


def played_of(config: Config) -> dict[str, Played]:
    """The traces that configured links follow, by the links' names. Reads files: not for the event loop.

    Raises:
        ConfigError: If a file cannot be played.
    """
    played = {}
    for name, link in config.links.items():
        if link.trace is None:
            continue
        try:
            down, up = read_trace(link.trace)
        except InvalidRequest as e:
            raise ConfigError(f"{config.origin}: links.{name}.trace: {e.message}", hint=e.hint or TRACE_HINT) from None
        played[name] = Played(down=down, up=up, loop=link.trace_loop, speed=link.trace_speed)
    return played


def routes_of(config: Config, expert: str, topology: Topology) -> tuple[Route, ...]:
    """All ways to an expert, those of its own node first.

    A relay is asked for the expert and finds the rest of the way itself. So of several paths that begin with the same
    link, and lead to the same machine, only the shortest is a way of its own.

    Raises:
        ConfigError: If the configuration names a way that cannot be.
    """
    e = config.experts[expert]
    targets = (e.node, *e.also)
    found: dict[tuple[str | None, str], Route] = {}
    for target in targets:
        if target in config.nodes and target in config.neighbours:
            raise ConfigError(
                f"{config.origin}: experts.{expert}: {target!r} is both a node and a neighbour",
                hint="give one of them another name",
            )
        _check_adapter(config, expert, target)
        paths = topology.paths(HERE, target, max_relays=config.multi_access.max_relays) if target != HERE else ()
        if not paths:
            _reachable(config, expert, target)
            found[None, target] = Route(path=Path(name=target, links=(), target=target), machine=target, link=None)
        for path in paths:
            first = path.links[0]
            _check_link(config, first.name)
            name = path.name if len(targets) == 1 else f"{target}.{path.name}"
            route = Route(path=dataclasses.replace(path, name=name), machine=first.target, link=first.name)
            found.setdefault((first.name, first.target), route)
    return tuple(found.values())


def is_plain(routes: Sequence[Route]) -> bool:
    """Whether there is nothing to choose or to watch: one machine of this process's own opening, without links."""
    return len(routes) == 1 and routes[0].link is None


async def open_backends(config: Config, opening: Opening) -> dict[str, Backend]:
    """Opens the backends of all experts, at the same time; what several share is opened once.

    Args:
        config: What `load_config` returned.
        opening: What is needed to open nodes.

    Returns:
        Backends by the experts' names.

    Raises:
        ConfigError: If a link or an address cannot be.
        AgoraError: If a node cannot be opened; what was opened is closed again.
    """
    topology = topology_of(config)
    if any(link.trace is not None for link in config.links.values()):
        topology = PlayedTopology(topology.links, await asyncio.to_thread(played_of, config), loop_time)
    routes = {name: routes_of(config, name, topology) for name in config.experts}
    openers = _Openers(config, opening)
    keys = {name: tuple(openers.key(r, name) for r in many) for name, many in routes.items()}
    opened = await _open_all({key: openers.opener(key) for many in keys.values() for key in many})
    estimates, shared = Estimates(loop_time), {}
    settings = config.multi_access
    chooser = Chooser(
        loop_time,
        seconds_per_money=settings.seconds_per_money,
        on_time=settings.on_time,
        explore=settings.explore,
    )
    backends: dict[str, Backend] = {}
    for name, many in routes.items():
        if is_plain(many):
            backends[name] = opened[keys[name][0]]
            continue
        price = config.experts[name].price_per_mtok
        same = (keys[name], tuple(r.path for r in many), price)
        if same not in shared:
            ways = [
                Way(path=r.path, backend=opened[k], price_per_mtok=price, load=_load_of(opened[k]))
                for r, k in zip(many, keys[name], strict=True)
            ]
            shared[same] = MultipathBackend(
                ways,
                name=name,
                estimates=estimates,
                chooser=chooser,
                topology=topology,
                hedge=settings.hedge,
                hedge_share=settings.hedge_share,
            )
        backends[name] = shared[same]
    return backends


class Relay(NeighbourBackend):
    """An expert of a neighbour that is known from the configuration alone, which may pass the request on.

    The neighbour knows the expert: its adapter is the one configured there.
    """

    async def generate(self, request: GenerateRequest) -> Completion:
        """As `NeighbourBackend.generate`; `LoopDetected` also where a machine further on says so."""
        with _loops():
            return await super().generate(dataclasses.replace(request, adapter=None))

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """As `NeighbourBackend.stream`; `LoopDetected` also where a machine further on says so."""
        with _loops():
            async with aclosing(super().stream(dataclasses.replace(request, adapter=None))) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def score(self, request: ScoreRequest) -> Scores:
        """As `NeighbourBackend.score`; `LoopDetected` also where a machine further on says so."""
        with _loops():
            return await super().score(dataclasses.replace(request, adapter=None))


Key = tuple[str, str | None, str | None]
"""What tells connections apart: the machine, the link that is taken, and at a neighbour the expert."""


class _Openers:
    """How each connection is opened."""

    def __init__(self, config: Config, opening: Opening) -> None:
        self._config = config
        self._opening = opening
        self._node_id = new_node_id()
        self._slots: dict[str, Slots] = {}

    def key(self, route: Route, expert: str) -> Key:
        """What the connection of a route is known by."""
        if route.machine in self._config.neighbours:
            return route.machine, route.link, expert
        # Scripted answers come over no connection: the script is the same whichever link is said to lead there.
        scripted = isinstance(self._config.nodes[route.machine], FakeNode)
        return route.machine, None if scripted else route.link, None

    def opener(self, key: Key) -> Callable[[], Awaitable[Backend]]:
        """What opens a connection."""
        machine, link, expert = key
        if expert is not None:
            return functools.partial(self._relay, machine, link, expert)
        node = self._config.nodes[machine]
        if link is None:
            return functools.partial(OPENERS[node.kind], machine, node, self._opening)
        return functools.partial(self._over, machine, node, link)

    async def _over(self, machine: str, node: NodeConfig, link: str) -> Backend:
        said = self._config.links[link]
        if said.url is not None:
            node = node.model_copy(update={"url": said.url})
        assert isinstance(node, OpenAINode | VllmNode)
        slots = self._slots.setdefault(machine, Slots(node.max_running, node.max_waiting, owner=machine))
        # Another path is tried before the same one is tried for long.
        opening = dataclasses.replace(
            self._opening, label=f"{machine}/{link}", local_address=said.local_address, slots=slots, retry=RETRY
        )
        return await OPENERS[node.kind](machine, node, opening)

    async def _relay(self, machine: str, link: str | None, expert: str) -> Backend:
        neighbour = self._config.neighbours[machine]
        said = None if link is None else self._config.links[link]
        key = self._opening.environment.get(neighbour.api_key_env) if neighbour.api_key_env else None
        slots = self._slots.setdefault(machine, Slots(neighbour.max_running, owner=machine))
        return Relay(
            str(said.url if said is not None and said.url is not None else neighbour.url),
            expert,
            name=f"{machine}.{expert}" if link is None else f"{machine}.{expert}/{link}",
            line=Line(node=self._node_id, max_hops=self._config.server.max_hops, slots=slots),
            # Not its id, which it tells nobody who does not ask: but one machine more it is.
            way=(machine,),
            capabilities=Capabilities(adapters=True),
            api_key=key,
            timeout_s=neighbour.timeout_s or TIMEOUT_S,
            local_address=None if said is None else said.local_address,
        )


class _VllmLoad:
    """What a vLLM server tells of itself, looked at now and then while it is asked for."""

    def __init__(self, server: VllmClient) -> None:
        self._server = server
        self._told: ServerLoad | None = None
        self._told_at = self._looked_at = -LOAD_KEPT_S
        self._look: asyncio.Task[None] | None = None

    def __call__(self) -> ServerLoad | None:
        """What it told last, if that is not out of date."""
        now = loop_time()
        if self._look is None and now - self._looked_at >= LOAD_EVERY_S:
            self._looked_at = now
            self._look = asyncio.get_running_loop().create_task(self._ask())
        return self._told if now - self._told_at < LOAD_KEPT_S else None

    async def _ask(self) -> None:
        try:
            told = await self._server.metrics()
        except BackendError:
            return  # Then what is observed must do.
        finally:
            self._look = None
        if told.running is not None:
            self._told = ServerLoad(running=told.running, waiting=told.waiting or 0)
            self._told_at = loop_time()


def _load_of(backend: Backend) -> Callable[[], ServerLoad | None] | None:
    return _VllmLoad(backend) if isinstance(backend, VllmClient) else None


@contextmanager
def _loops() -> Iterator[None]:
    try:
        yield
    except Unavailable as e:
        if LOOP_STATUS in e.message:
            raise LoopDetected(e.message, hint=e.hint) from None
        raise


def _reachable(config: Config, expert: str, target: str) -> None:
    """A machine to which no links lead is asked as it is; one whose links all begin elsewhere is not meant so."""
    if into := [name for name, link in config.links.items() if link.target == target]:
        raise ConfigError(
            f"{config.origin}: links.{into[0]}: no path of links leads from {HERE!r} to {target!r}, which expert "
            f"{expert!r} is on, with at most {config.multi_access.max_relays} relays",
            hint=f"add a link with target = {target!r} from {HERE!r}, or a link to the source of this one",
        )


def _check_adapter(config: Config, expert: str, target: str) -> None:
    """An expert's adapter must be one that each of its nodes can have; its own node's is checked with the file."""
    adapter, node = config.experts[expert].adapter, config.nodes.get(target)
    if adapter is None or node is None or target == config.experts[expert].node:
        return
    where = f"{config.origin}: experts.{expert}"
    if isinstance(node, LlamaCppNode):
        raise ConfigError(f'{where}.also: node {target!r} is of kind "llamacpp", which has no adapters')
    started = isinstance(node, LocalNode) or (isinstance(node, VllmNode) and node.url is None)
    if started and adapter.folder is None:
        raise ConfigError(f"{where}.adapter.folder is required: node {target!r}, in also, loads it on this machine")
    if isinstance(node, OpenAINode) and not node.adapters:
        raise ConfigError(
            f"{where}.also: node {target!r} does not claim adapters",
            hint="add capabilities = { adapters = true } to it, if it has them",
        )


def _check_link(config: Config, name: str) -> None:
    """What a link that goes out from here says must be something that can be done."""
    link: LinkConfig = config.links[name]
    where = f"{config.origin}: links.{name}"
    if link.local_address is not None:
        try:
            ipaddress.ip_address(link.local_address)
        except ValueError:
            raise ConfigError(
                f"{where}.local_address = {link.local_address!r} is no IP address", hint="like 192.168.1.20"
            ) from None
    if link.url is not None:
        try:
            normal_url(link.url)
        except InvalidRequest as e:
            raise ConfigError(f"{where}.url: {e.message}", hint=e.hint) from None
    node = config.nodes.get(link.target)
    if node is None:
        return
    remote = isinstance(node, OpenAINode) or (isinstance(node, VllmNode) and node.url is not None)
    if isinstance(node, FakeNode):
        for key in ("url", "local_address"):
            if getattr(link, key) is not None:
                raise ConfigError(f"{where}.{key}: node {link.target!r} is scripted, and listens nowhere")
    elif not remote:
        raise ConfigError(
            f"{where}.target: node {link.target!r} is of kind {node.kind!r} on this machine; links lead to others",
            hint="take the link out, or give the url of a server that somebody runs elsewhere",
        )


async def _open_all(openers: Mapping[Key, Callable[[], Awaitable[Backend]]]) -> dict[Key, Backend]:
    tasks = {key: asyncio.ensure_future(opener()) for key, opener in openers.items()}
    try:
        await asyncio.gather(*tasks.values())
    except BaseException:
        # Also when cancelled: what has been opened, or is just being opened, is closed again.
        for t in tasks.values():
            t.cancel()
        opened = await asyncio.gather(*tasks.values(), return_exceptions=True)
        await asyncio.gather(*(b.aclose() for b in opened if not isinstance(b, BaseException)))
        raise
    return {key: t.result() for key, t in tasks.items()}
