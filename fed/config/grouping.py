"""`[clusters]`: a way of grouping clients, by its name, with its own settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from agora.config.problems import Problem, nearest, shown
from fed.clusters.ways import WAYS
from fed.config.settings import ClusterSettings
from fed.config.tables import Wrong, read


def read_clusters(given: object, clients: int | None, *, folder: Path) -> ClusterSettings:
    """The table as settings.

    Args:
        given: What the file has.
        clients: How many clients there are to be; None if only the data tells.
        folder: What relative paths count from.

    Raises:
        Wrong: If a key or a value is not allowed, or there are more clusters than clients.
    """
    key = ("clusters",)
    if not isinstance(given, Mapping):
        raise Wrong([Problem(key=key, text="must be a table, written [clusters]", value=shown(given))])
    settings = dict(given)
    kind = settings.pop("kind", "agglomerative")
    if not isinstance(kind, str) or kind not in WAYS:
        raise Wrong([Problem(key=(*key, "kind"), text=nearest(str(kind), WAYS), value=shown(kind))])
    options = read(WAYS[kind].options_type, settings, key, folder=folder)
    wanted = getattr(options, "clusters", None)
    if wanted is not None and clients is not None and wanted > clients:
        text = f"more clusters than clients; allowed: up to {clients}"
        raise Wrong([Problem(key=(*key, "clusters"), text=text, value=shown(wanted))])
    return ClusterSettings(kind=kind, settings={f.name: getattr(options, f.name) for f in fields(options)})
