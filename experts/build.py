"""From a checked configuration to a square: opens every node, and lets the experts in."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from agora.config import Config, OpenAINode, VllmNode
from agora.errors import ConfigError
from agora.protocols import Backend
from agora.square import Expert, Square
from agora.types import AdapterRef, ExpertCard, Modality, Tier, highest
from experts.models import ModelStore
from experts.nodes import OnPull, Opening
from experts.paths import open_backends
from experts.ready import ready_experts

T = TypeVar("T")


def ready_names() -> tuple[str, ...]:
    """The names that `ready = "…"` may say."""
    return tuple(ready_experts())


async def open_square(
    config: Config,
    *,
    store: ModelStore | None = None,
    pull: bool = False,
    progress: OnPull | None = None,
    environment: Mapping[str, str] | None = None,
) -> Square:
    """Opens all nodes that experts are on, and the paths to them, at the same time, and lets the experts in.

    Args:
        config: What `load_config` returned.
        store: Where models are; the user's if None.
        pull: Whether models that are not on this machine may be fetched.
        progress: Told how far each fetch is, from the fetching threads.
        environment: Where API keys are looked up; that of the process if None.

    Returns:
        The square. Closing it closes the nodes.

    Raises:
        ConfigError: If the configuration names what is not there: a ready expert, an environment variable, a path.
        ModelError: If a model cannot be found, fetched or loaded.
        AdapterError: If an adapter cannot be loaded.
    """
    environment = os.environ if environment is None else environment
    cards = expert_cards(config)
    check_keys(config, environment=environment)
    opening = Opening(
        config=config,
        store=store if store is not None else await asyncio.to_thread(ModelStore),
        pull=pull,
        on_pull=progress,
        environment=environment,
    )
    backends = await open_backends(config, opening)
    return Square([_expert(config, card, backends[card.name]) for card in cards])


def expert_cards(config: Config) -> tuple[ExpertCard, ...]:
    """The cards of the configured experts; no node is opened.

    Raises:
        ConfigError: If one stands on a ready expert that does not exist.
    """
    ready = {name: r.card for name, r in ready_experts().items()}
    unknown = [f'experts.{n}.ready = "{e.ready}"' for n, e in config.experts.items() if e.ready not in (None, *ready)]
    if unknown:
        raise ConfigError(f"{config.origin}: {', '.join(unknown)}: allowed: {', '.join(ready)}")
    cards = []
    for name, e in config.experts.items():
        base = ready[e.ready] if e.ready is not None else None
        cards.append(
            ExpertCard(
                name=name,
                description=e.description or (base.description if base else ""),
                examples=_first(e.examples, base.examples if base else ()),
                keywords=_first(e.keywords, base.keywords if base else ()),
                # The highest that may come to see a question: what may not go there is not asked at all.
                tier=highest_tier(config, name),
                modalities=_first(e.modalities, base.modalities if base else (Modality.TEXT,)),
                price_per_mtok=e.price_per_mtok,
                max_tokens=e.max_tokens,
            )
        )
    return tuple(cards)


def highest_tier(config: Config, name: str, told: Mapping[str, Tier] = MappingProxyType({})) -> Tier:
    """How far up a question to an expert may get: the highest tier of all machines that may answer it or pass it on.

    Whom a neighbour asks in turn is not known here. But the label of the question goes with it, and the neighbour
    keeps to that by its own configuration.

    Args:
        config: What `load_config` returned.
        name: The expert's name.
        told: Where neighbours stand as far as they told, by their names here. One whose tier is neither configured nor
            told counts as the cloud.
    """
    e = config.experts[name]
    machines = {e.node, *e.also}
    # A link from a neighbour is a way through it, wherever the request comes to it from.
    relays = [link for link in config.links.values() if link.source in config.neighbours]
    while more := {link.source for link in relays if link.target in machines} - machines:
        machines |= more
    nodes = [config.nodes[m].tier for m in machines if m in config.nodes]
    others = [config.neighbours[m].tier or told.get(m, Tier.CLOUD) for m in machines if m in config.neighbours]
    return highest(*nodes, *others)


def follow_tiers(config: Config, square: Square, told: Mapping[str, Tier]) -> None:
    """Takes in where neighbours say that they stand: for the experts that may be asked over them.

    Args:
        config: What the square was opened with.
        square: Who is here.
        told: As for `highest_tier`.
    """
    for name in config.experts:
        expert, tier = square.get(name), highest_tier(config, name, told)
        if expert is not None and expert.card.tier is not tier:
            square.recard(dataclasses.replace(expert.card, tier=tier))


def system_prompt_of(config: Config, name: str) -> str | None:
    """What a configured expert is told before every question."""
    e = config.experts[name]
    if e.system_prompt is not None or e.ready is None:
        return e.system_prompt
    return ready_experts()[e.ready].system_prompt


def check_keys(config: Config, *, environment: Mapping[str, str] | None = None, neighbours: bool = False) -> None:
    """Checks that the API keys which a configuration names are set, all of them at once, before anything is opened.

    Args:
        config: What `load_config` returned.
        environment: Where API keys are looked up; that of the process if None.
        neighbours: Whether those for all neighbours are needed, not only those of nodes and neighbours that experts are
            asked on.

    Raises:
        ConfigError: If some are not; it names each.
    """
    if missing := [m.text for m in missing_keys(config, environment=environment, neighbours=neighbours)]:
        raise ConfigError(
            f"{config.origin}: {'; '.join(missing)}", hint="set it to the API key that you got for that server"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingKey:
    """An API key that a configuration names and that is not set.

    Attributes:
        key: Where the configuration names it, like `nodes.cloud.api_key_env`.
        variable: The environment variable that should hold it.
    """

    key: str
    variable: str

    @property
    def text(self) -> str:
        """What is wrong, in words."""
        return f"{self.key}: the environment variable {self.variable} is not set"


def missing_keys(
    config: Config, *, environment: Mapping[str, str] | None = None, neighbours: bool = False
) -> tuple[MissingKey, ...]:
    """The API keys that `check_keys` would miss."""
    environment = os.environ if environment is None else environment
    named: dict[str, str | None] = {}
    asked = dict.fromkeys(name for e in config.experts.values() for name in (e.node, *e.also))
    for name in asked:
        node = config.nodes.get(name)
        if isinstance(node, OpenAINode | VllmNode):
            named[f"nodes.{name}"] = node.api_key_env
    relays = {link.source for link in config.links.values()}
    for name, neighbour in config.neighbours.items():
        if neighbours or name in asked or name in relays:
            named[f"neighbours.{name}"] = neighbour.api_key_env
    return tuple(
        MissingKey(key=f"{key}.api_key_env", variable=variable)
        for key, variable in named.items()
        if variable and not environment.get(variable)
    )


def _expert(config: Config, card: ExpertCard, backend: Backend) -> Expert:
    e = config.experts[card.name]
    return Expert(
        card=dataclasses.replace(card, context_tokens=backend.capabilities.max_context),
        backend=backend,
        system_prompt=system_prompt_of(config, card.name),
        adapter=AdapterRef.parse(e.adapter.name) if e.adapter else None,
        temperature=e.temperature,
        node=e.node,
    )


def _first(chosen: T | None, otherwise: T) -> T:
    return otherwise if chosen is None else chosen
