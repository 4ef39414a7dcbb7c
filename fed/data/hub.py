"""Rows from a hub through the `datasets` library, which is an extra and loaded only when it is needed."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

from agora.errors import InvalidRequest


def hub_rows(name: str, *, config: str | None = None, split: str, limit: int | None) -> Iterator[dict[str, Any]]:
    """The rows of a data set on a hub, streamed: no more is fetched than is read.

    Args:
        name: Like `nyu-mll/glue`.
        config: Part of the data set, where it has several.
        split: Like `train`.
        limit: Rows to read at most; None for all.

    Raises:
        InvalidRequest: If `datasets` is not installed, or the data set cannot be had.
    """
    try:
        library: Any = importlib.import_module("datasets")
    except ImportError:
        raise InvalidRequest(
            f"the data set {name!r} comes through the library 'datasets', which is not installed",
            hint="pip install datasets, or name a folder that holds the data",
        ) from None
    try:
        # Streaming reads plain tables; code from the hub is not run.
        rows = library.load_dataset(name, config, split=split, streaming=True)
        yield from itertools.islice(rows, limit)
    except Exception as e:  # the library raises whatever its network and file layers do
        first_line = (str(e).strip().splitlines() or [""])[0][:300]
        told = f"{name!r}{f' ({config})' if config else ''}, split {split!r}"
        raise InvalidRequest(
            f"the data set {told} cannot be had: {type(e).__name__}: {first_line}",
            hint="check its name and the network, or name a folder that holds the data",
        ) from e
