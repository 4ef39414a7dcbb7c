"""From a checked configuration to a compiled graph: planner, router and synthesiser by their names."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeVar

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.pregel import Pregel

from agora.config import Config, may_join
from agora.errors import ConfigError, ModelError
from agora.routing import ROUTERS, KeywordRouter, Router
from agora.square import Square
from agora.types import Budget
from experts.embed import DEFAULT_MODEL, MiniLM
from experts.models import ModelStore
from experts.nodes import OnPull
from graphs.horizontal import horizontal
from graphs.named import Named
from graphs.plan import Plan, Planner, make_planner
from graphs.synthesise import LLMSynthesiser, SectionsSynthesiser, Synthesiser

T = TypeVar("T")

Graph = Pregel[Any, Any, Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """A router that is ready.

    Attributes:
        router: Ranks experts for a subtask.
        notes: What the reader should know, e.g. that it is not the one asked for.
    """

    router: Router
    notes: tuple[str, ...] = ()


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

GRAPHS: Final[Mapping[str, Callable[..., Graph]]] = MappingProxyType({"horizontal": horizontal})
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

    async def plan(self, question: str, *, timeout_s: float | None = None, budget: Budget | None = None) -> Plan:
        plan = await self._planner.plan(question, timeout_s=timeout_s, budget=budget)
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
        yield Routing(router=make(embedder))
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
    return _named(GRAPHS, config, "name")(
        square,
        planner=_Noted(planner, routing.notes) if routing.notes else planner,
        router=routing.router,
        synthesiser=_named(SYNTHESISERS, config, "synthesiser")(config, square),
        budget=Budget(deadline_s=limits.deadline_s, cost=limits.cost, tokens=limits.tokens),
        max_parallel=limits.max_parallel,
        max_attempts=limits.max_attempts,
        checkpointer=checkpointer,
    )


def _named(registry: Mapping[str, T], config: Config, key: str) -> T:
    name = getattr(config.graph, key)
    if name not in registry:
        raise ConfigError(f'{config.origin}: graph.{key} = "{name}": allowed: {", ".join(registry)}')
    return registry[name]
