"""From a checked configuration to a compiled graph: planner, router and synthesiser by their names."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, TypeVar

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.pregel import Pregel

from agora.config import Config, may_join
from agora.errors import ConfigError, InvalidRequest, ModelError
from agora.protocols import Embedder
from agora.routing import ROUTERS, KeywordRouter, Router
from agora.square import Square
from agora.types import Budget, Tier
from experts.embed import DEFAULT_MODEL, MiniLM
from experts.models import ModelStore
from experts.nodes import OnPull
from graphs.departure import Condenser, Departure, Extractor, Redactor, Shortener
from graphs.horizontal import horizontal
from graphs.multi_access import multi_access
from graphs.named import Named
from graphs.once import Once
from graphs.plan import Plan, Planner, make_planner
from graphs.plan_within import plan_within
from graphs.signals import SIGNALS
from graphs.stream_budget import StreamBudget
from graphs.synthesise import LLMSynthesiser, SectionsSynthesiser, Synthesiser
from graphs.vertical import vertical

T = TypeVar("T")

Graph = Pregel[Any, Any, Any, Any]


class Common:
    """What several graphs of one process have in common, e.g. one budget for all questions: made once, by name."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returned when this name was first asked for."""
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """A router that is ready. Graphs that are built with the same one share what is in `common`.

    Attributes:
        router: Ranks experts for a subtask.
        embedder: Turns questions into vectors, where there is an embedding model.
        notes: What the reader should know, e.g. that it is not the one asked for.
        common: What the graphs have in common.
    """

    router: Router
    embedder: Embedder | None = None
    notes: tuple[str, ...] = ()
    common: Common = field(default_factory=Common)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What `build_graph` made ready for whichever graph is named.

    Attributes:
        planner: Makes the task graph.
        synthesiser: Makes one answer of the parts.
        budget: What a run may spend.
        routing: The router, and what graphs of this process have in common.
        checkpointer: Where finished subtasks are kept.
    """

    planner: Planner
    synthesiser: Synthesiser
    budget: Budget
    routing: Routing
    checkpointer: BaseCheckpointSaver[Any] | None


EMBEDDING: Final = frozenset({"embedding"})
"""Routers that compare texts by an embedding model."""


def _asked(config: Config, square: Square, what: str) -> Named:
    """The expert that plans or puts together, by its name: one of a neighbour need not be here yet."""
    name = getattr(config.graph, f"{what}_expert")
    if name is None or (square.get(name) is None and not may_join(config, name)):
        allowed = ", ".join(e.name for e in square)
        raise ConfigError(
            f'{config.origin}: graph.{what}_expert: {what} "llm" needs an expert, got {name!r}; allowed: {allowed}'
        )
    return Named(square, name)


def _static_planner(config: Config, square: Square) -> Planner:
    plan = config.graph.plan
    if plan is None:
        raise ConfigError(f'{config.origin}: graph.subtasks: planner "static" needs a plan in [[graph.subtasks]]')
    return make_planner("static", plan)


def _llm_planner(config: Config, square: Square) -> Planner:
    return make_planner("llm", _asked(config, square, "planner"), experts=square)


PLANNERS: Final[Mapping[str, Callable[[Config, Square], Planner]]] = MappingProxyType(
    {
        "rules": lambda config, square: make_planner("rules"),
        "none": lambda config, square: make_planner("none"),
        "llm": _llm_planner,
        "static": _static_planner,
    }
)
"""Planners that `[graph] planner` may name."""

SYNTHESISERS: Final[Mapping[str, Callable[[Config, Square], Synthesiser]]] = MappingProxyType(
    {
        "sections": lambda config, square: SectionsSynthesiser(),
        "llm": lambda config, square: LLMSynthesiser(_asked(config, square, "synthesiser")),
    }
)
"""Synthesisers that `[graph] synthesiser` may name."""


def _horizontal(config: Config, square: Square, shared: Shared) -> Graph:
    return horizontal(
        square,
        planner=shared.planner,
        router=shared.routing.router,
        synthesiser=shared.synthesiser,
        budget=shared.budget,
        max_parallel=config.graph.max_parallel,
        max_attempts=config.graph.max_attempts,
        checkpointer=shared.checkpointer,
    )


def _multi_access(config: Config, square: Square, shared: Shared) -> Graph:
    return multi_access(
        square,
        planner=shared.planner,
        router=shared.routing.router,
        synthesiser=shared.synthesiser,
        budget=shared.budget,
        scheduler=config.multi_access.scheduler,
        max_parallel=config.graph.max_parallel,
        max_attempts=config.graph.max_attempts,
        checkpointer=shared.checkpointer,
    )


def departure_of(config: Config, square: Square) -> Departure | None:
    """What is done to a text before it leaves the end tier; None if nothing is.

    Raises:
        ConfigError: If `[vertical] redact` names no kind of personal data.
    """
    table = config.vertical
    shorteners: list[Shortener] = []
    # What matters is pulled out before the rest is written anew: an expert then condenses what is to the point.
    if table.extract is not None:
        shorteners.append(Extractor(table.extract))
    if table.condense_tokens is not None:
        ladder = [e for e in map(square.get, table.experts) if e is not None] if table.experts else list(square)
        # The cheapest expert of the end tier condenses; without one, passages are chosen by rules.
        ends = sorted((e for e in ladder if e.card.tier is Tier.END), key=lambda e: e.card.price_per_mtok)
        shorteners.append(Condenser(table.condense_tokens, expert=ends[0] if ends else None))
    try:
        redactor = Redactor(table.redact) if table.redact else None
    except InvalidRequest as e:
        raise ConfigError(f"{config.origin}: vertical.redact: {e.message}") from None
    return Departure(redactor=redactor, shorteners=shorteners) if redactor or shorteners else None


def _vertical(config: Config, square: Square, shared: Shared) -> Graph:
    # Not at the top of the file: what it reads with takes half a second to import.
    from graphs.calibrating import PolicyFolder, policy_folder

    table, common = config.vertical, shared.routing.common
    if unknown := [name for name in table.signals if name not in SIGNALS]:
        raise ConfigError(f"{config.origin}: vertical.signals: unknown {unknown}; allowed: {', '.join(SIGNALS)}")
    return vertical(
        square,
        experts=table.experts,
        trust=PolicyFolder(folder=policy_folder(config), config=config, embeds=shared.routing.embedder is not None),
        trade_off=table.trade_off,
        max_risk=table.max_risk,
        confidence=table.confidence,
        accept=table.accept,
        signals=table.signals,
        samples=table.samples,
        # One budget and one cache for answers that are waited for and for runs alike.
        stream=common.once("stream", lambda: StreamBudget(cost=table.stream_cost, seconds=table.stream_seconds)),
        departure=departure_of(config, square),
        once=common.once("once", lambda: Once(cache_entries=table.cache_entries if table.cache else 0)),
        planner=shared.planner,
        router=shared.routing.router,
        synthesiser=shared.synthesiser,
        embedder=shared.routing.embedder,
        budget=shared.budget,
        max_parallel=config.graph.max_parallel,
        max_attempts=config.graph.max_attempts,
        checkpointer=shared.checkpointer,
    )


GRAPHS: Final[Mapping[str, Callable[[Config, Square, Shared], Graph]]] = MappingProxyType(
    {
        "horizontal": _horizontal,
        "vertical": _vertical,
        "multi_access": _multi_access,
    }
)
"""Graphs that `[graph] name` may name."""


def graph_names() -> dict[str, Collection[str]]:
    """What the keys of `[graph]` that name something may say, by dotted key; for `load_config`."""
    return {
        "graph.name": tuple(GRAPHS),
        "graph.planner": tuple(PLANNERS),
        "graph.router": tuple(ROUTERS),
        "graph.synthesiser": tuple(SYNTHESISERS),
    }


class _Noted:
    """A planner whose plans carry notes that were taken before it was asked, so that every result tells them."""

    def __init__(self, planner: Planner, notes: tuple[str, ...]) -> None:
        self._planner = planner
        self._notes = notes

    @property
    def name(self) -> str:
        return self._planner.name

    @property
    def asks_nobody(self) -> bool:
        return getattr(self._planner, "asks_nobody", False)

    async def plan(self, question: str, *, timeout_s: float | None = None, budget: Budget | None = None) -> Plan:
        return await self.plan_within(question, reach=Tier.CLOUD, timeout_s=timeout_s, budget=budget)

    async def plan_within(
        self, question: str, *, reach: Tier, timeout_s: float | None = None, budget: Budget | None = None
    ) -> Plan:
        plan = await plan_within(self._planner, question, reach=reach, timeout_s=timeout_s, budget=budget)
        return dataclasses.replace(plan, notes=(*self._notes, *plan.notes))


@asynccontextmanager
async def open_router(
    config: Config, *, store: ModelStore | None = None, pull: bool = False, progress: OnPull | None = None
) -> AsyncIterator[Routing]:
    """Opens the router that a configuration names; if its model cannot be had, the one by keywords, with a note.

    Args:
        config: What `load_config` returned.
        store: Where models are; the user's if None.
        pull: Whether a model that is not on this machine may be fetched.
        progress: Told how far a fetch is, from the fetching thread.

    Raises:
        ConfigError: If there is no router of that name.
    """
    make = _named(ROUTERS, config, "router")
    if config.graph.router not in EMBEDDING:
        yield Routing(router=make(None))
        return
    try:
        embedder = await _open_embedder(store, pull, progress)
    except ModelError as e:
        hint = f" ({e.hint})" if e.hint else ""
        note = f"experts are chosen by keywords, since the embedding model cannot be had: {e.message}{hint}"
        yield Routing(router=make(None), notes=(note,))
        return
    try:
        yield Routing(router=make(embedder), embedder=embedder)
    finally:
        await embedder.aclose()


async def _open_embedder(store: ModelStore | None, pull: bool, progress: OnPull | None) -> MiniLM:
    store = store if store is not None else await asyncio.to_thread(ModelStore)
    report = functools.partial(progress, DEFAULT_MODEL) if progress is not None else None
    embedder = MiniLM(await asyncio.to_thread(store.resolve, DEFAULT_MODEL, pull=pull, progress=report), store=store)
    try:
        # Loaded now rather than in the middle of the first question.
        await embedder.embed([DEFAULT_MODEL])
    except BaseException:
        await embedder.aclose()
        raise
    return embedder


def build_graph(
    config: Config,
    square: Square,
    *,
    routing: Routing | None = None,
    checkpointer: BaseCheckpointSaver[Any] | None = None,
) -> Graph:
    """Builds the graph that a configuration describes.

    Args:
        config: What `load_config` returned.
        square: Who can be asked.
        routing: What `open_router` gave; by keywords if None.
        checkpointer: Where finished subtasks are kept.

    Raises:
        ConfigError: If the configuration names what does not exist.
    """
    routing = routing or Routing(router=KeywordRouter())
    planner = _named(PLANNERS, config, "planner")(config, square)
    limits = config.graph
    shared = Shared(
        planner=_Noted(planner, routing.notes) if routing.notes else planner,
        synthesiser=_named(SYNTHESISERS, config, "synthesiser")(config, square),
        budget=Budget(deadline_s=limits.deadline_s, cost=limits.cost, tokens=limits.tokens),
        routing=routing,
        checkpointer=checkpointer,
    )
    return _named(GRAPHS, config, "name")(config, square, shared)


def _named(registry: Mapping[str, T], config: Config, key: str) -> T:
    name = getattr(config.graph, key)
    if name not in registry:
        raise ConfigError(f'{config.origin}: graph.{key} = "{name}": allowed: {", ".join(registry)}')
    return registry[name]
