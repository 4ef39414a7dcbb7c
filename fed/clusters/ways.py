"""The registry of ways of grouping clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Final

from agora.errors import ConfigError
from fed.adapter import Adapter
from fed.clusters.agglomerative import Agglomerative
from fed.clusters.base import Base
from fed.clusters.ifca import Assessor, Ifca
from fed.clusters.profile import ByProfile

WAYS: Final[Mapping[str, type[Base]]] = MappingProxyType({way.name: way for way in (Agglomerative, Ifca, ByProfile)})
"""By name."""


def make(
    name: str,
    initial: Adapter | Mapping[str, Adapter],
    *,
    clients: int,
    assessor: Assessor | None = None,
    **settings: Any,
) -> Base:
    """A grouping by its name, with settings by theirs, as a configuration file has them. It is good for one run.

    Args:
        name: One of `WAYS`.
        initial: What the run begins with; `ifca` may be given several, by name.
        clients: How many clients the federation has.
        assessor: Asks clients for losses; `ifca` needs one.
        settings: Fields of the way's `options_type`.

    Raises:
        ConfigError: If there is none of that name, it has no such setting, or a value is not allowed: more clusters
            than clients, for one.
    """
    if name not in WAYS:
        raise ConfigError(f"clusters are to be found by {name!r}; allowed: {', '.join(sorted(WAYS))}")
    way = WAYS[name]
    allowed = [f.name for f in fields(way.options_type)]
    if wrong := sorted(set(settings) - set(allowed)):
        raise ConfigError(f"grouping {name!r} has no setting {wrong[0]!r}; it has {', '.join(allowed)}")
    more: dict[str, Any] = {}
    if way is Ifca:
        if assessor is None:
            raise ConfigError("grouping 'ifca' goes by clients' losses", hint="give an assessor that asks for them")
        more["assessor"] = assessor
    return way(initial, clients=clients, options=way.options_type(**settings), **more)
