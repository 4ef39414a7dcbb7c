"""What an expert is at this moment, as far as that can be known: whatever changes its answers changes this."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple

from agora.config import Config, LlamaCppNode, LocalNode, OpenAINode, VllmNode
from agora.network.multipath import MultipathBackend
from agora.protocols import Backend
from agora.routing.signals import SELF_CONSISTENCY
from agora.square import Expert
from agora.types import AdapterRef, ExpertCard, Tier

SAMPLED: Final = frozenset({SELF_CONSISTENCY})
"""Signals that depend on how many answers are sampled for them."""


class MadeOf(NamedTuple):
    """What makes an expert's answers.

    Attributes:
        adapter: The adapter it answers with, `name@vN`; None for none.
        base: Name of its base model.
        settings: Stands for how it is spoken to; empty for the usual way.
    """

    adapter: str | None
    base: str
    settings: str


def made_of(expert: Expert, config: Config | None = None, *, departs: bool = True) -> MadeOf:
    """What makes an expert's answers now.

    Args:
        expert: The expert.
        config: Tells which model its node runs, and what is done to a text before it leaves; without it, or for a
            neighbour's expert, the model is the backend's own name for it.
        departs: Whether what `[vertical]` does to a text before it leaves belongs to it.
    """
    table = config.vertical if config is not None and departs and expert.card.tier is not Tier.END else None
    left = [] if table is None or not table.departure else [table.departure]
    return MadeOf(adapter=adapter_now(expert), base=_base(expert, config), settings=_settings(expert, left))


def fingerprint(expert: Expert, config: Config | None = None) -> str:
    """Stands for what makes an expert's answers, for other nodes, and tells nothing else of it.

    Of an expert on another node it is what that node said, so that it is the same however far it is told on.

    Returns:
        Hexadecimal digits; empty where another node answers that said nothing.
    """
    if relays(expert):
        return "".join(told_versions(expert.backend)[:1])
    told = [*made_of(expert, config, departs=False), expert.alternatives]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def asked_for(signals: Sequence[str], samples: int) -> tuple[str, ...]:
    """The signals that are asked for, told apart by all that changes them.

    Args:
        signals: Their names.
        samples: Answers sampled for those that need some.
    """
    return tuple(f"{name} of {samples}" if name in SAMPLED else name for name in dict.fromkeys(signals))


def adapter_now(expert: Expert) -> str | None:
    """The adapter that answers now: what a bare alias stands for, where the backend tells which adapters it has.

    A backend tells by an attribute `adapters`: a mapping or collection of `AdapterRef`. A server that was started by
    somebody else tells nothing, and its alias stays as it is written.
    """
    ref = expert.adapter
    if ref is None or ref.version is not None:
        return None if ref is None else str(ref)
    return " or ".join(sorted({_stands_for(ref, end) for end in _ends(expert.backend)}))


def aliases_now(experts: Collection[Expert]) -> tuple[tuple[str, str | None], ...]:
    """What the bare aliases among the experts' adapters stand for now; cheap enough to ask before every question."""
    return tuple((e.name, adapter_now(e)) for e in experts if e.adapter is not None and e.adapter.version is None)


def relays(expert: Expert) -> bool:
    """Whether another node answers, on every way there is."""
    return all(getattr(end, "relays", False) for end in _ends(expert.backend))


def told_versions(backend: Backend) -> tuple[str, ...]:
    """What other nodes said stands for the version of the experts there, in order."""
    told = {getattr(end, "told_version", "") for end in _ends(backend) if getattr(end, "relays", False)}
    return tuple(sorted(v for v in told if v))


def _ends(backend: Backend) -> tuple[Backend, ...]:
    """What answers at the ends of all ways."""
    if isinstance(backend, MultipathBackend):
        return tuple(end for way in backend.ways for end in _ends(way.backend))
    return (backend,)


def _stands_for(ref: AdapterRef, backend: Backend) -> str:
    """What an alias stands for on one backend: as requests find it (`experts.engine.registry`), its newest version."""
    held: Any = getattr(backend, "adapters", ())
    refs = [r for r in held if isinstance(r, AdapterRef)] if isinstance(held, Collection) else []
    if ref in refs:
        # Loaded under the bare name, which may be loaded anew with other weights: these tell them apart.
        info = held[ref] if isinstance(held, Mapping) else None
        digests = [getattr(info, name, "")[:8] for name in ("sha256", "config_sha256")]
        return f"{ref}#{'.'.join(digests)}" if all(digests) else str(ref)
    versions = [r for r in refs if r.name == ref.name and r.version is not None]
    return str(max(versions, key=lambda r: r.version or 0, default=ref))


def _settings(expert: Expert, left: Sequence[object]) -> str:
    """Stands for how an expert is spoken to; empty for the usual way. Another prompt makes other answers."""
    usual = [None, 0.0, ExpertCard(name=expert.name, description="-").max_tokens]
    told = [expert.system_prompt or None, expert.temperature, expert.card.max_tokens, *left]
    return "" if told == usual else hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]


def _base(expert: Expert, config: Config | None) -> str:
    base = _model(expert, config)
    told = told_versions(expert.backend)
    return f"{base}#{'|'.join(told)}" if told else base


def _model(expert: Expert, config: Config | None) -> str:
    node = config.nodes.get(expert.node) if config is not None and expert.name in config.experts else None
    match node:
        case LocalNode():
            assert config is not None
            return config.models[node.model].source
        case LlamaCppNode():
            return node.source
        case OpenAINode() | VllmNode():
            return node.model
        case None:
            model = getattr(expert.backend, "model", None)
            return model if isinstance(model, str) else expert.backend.name
        case _:
            return expert.node
