"""What `agora doctor` looks at on this machine: packages, models, disk, the run store, the model hub."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from agora.cli.text import size
from agora.errors import AgoraError, ModelError

if TYPE_CHECKING:
    from agora.config import Config, NodeConfig
    from experts.models import ModelInfo, ModelStore

PACKAGES: Final = ("torch", "transformers", "peft", "langgraph", "langgraph-checkpoint-sqlite", "aiohttp", "pydantic")
"""The packages whose versions explain most reports."""

EXTRAS: Final = {
    "postgres": ("langgraph-checkpoint-postgres", "psycopg"),
    "llamacpp": ("llama-cpp-python",),
}
"""Optional features and the packages they need."""

NEEDS: Final[dict[str, Callable[[Config], bool]]] = {
    "postgres": lambda config: config.store.url is not None,
    "llamacpp": lambda config: any(node.kind == "llamacpp" for node in used_nodes(config).values()),
}
"""Whether a configuration needs an extra."""

GGUF_MAGIC: Final = b"GGUF"
"""How every GGUF file begins."""

Status = Literal["ok", "note", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: What was looked at.
        status: `ok`; `note` for what agora can do without; `fail` for what keeps it from working.
        detail: What was found.
        hint: What to type.
    """

    what: str
    status: Status
    detail: str
    hint: str | None = None


async def in_thread(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Runs a check that blocks off the event loop."""
    return await asyncio.to_thread(lambda: list(check()))


def version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def used_nodes(config: Config) -> dict[str, NodeConfig]:
    """The nodes that experts are on: those that are opened."""
    return {name: config.nodes[name] for name in dict.fromkeys(e.node for e in config.experts.values())}


def versions() -> Iterator[Finding]:
    """Agora, Python, and the packages that agora stands on."""
    detail = f"{version('agora-llm') or 'not installed'}, Python {platform.python_version()} ({sys.executable})"
    yield Finding(what="agora", status="ok", detail=detail)
    found = {p: version(p) for p in PACKAGES}
    detail = ", ".join(f"{p} {v or 'missing'}" for p, v in found.items())
    missing = [p for p, v in found.items() if v is None]
    hint = f"python -m pip install {' '.join(missing)}" if missing else None
    yield Finding(what="packages", status="fail" if missing else "ok", detail=detail, hint=hint)


def extras(config: Config | None) -> Iterator[Finding]:
    """Optional features; one that the configuration needs must be there."""
    for extra, packages in EXTRAS.items():
        missing = [p for p in packages if version(p) is None]
        if not missing:
            yield Finding(what=f"extra {extra}", status="ok", detail="installed")
            continue
        needed = config is not None and NEEDS[extra](config)
        yield Finding(
            what=f"extra {extra}",
            status="fail" if needed else "note",
            detail=f"not installed ({', '.join(missing)})" + (", and the configuration needs it" if needed else ""),
            hint=f"{'' if needed else 'if you want it: '}python -m pip install 'agora-llm[{extra}]'",
        )


def torch() -> Iterator[Finding]:
    """Whether torch loads, and what it computes on."""
    try:
        import torch
    except (ImportError, OSError) as e:
        hint = "python -m pip install --force-reinstall torch"
        yield Finding(what="torch", status="fail", detail=f"cannot be imported: {e}", hint=hint)
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = torch.get_num_threads()
    yield Finding(what="torch", status="ok", detail=f"{threads} threads on {os.cpu_count()} processors, {device}")


def models(config: Config) -> Iterator[Finding]:
    """The weights that the configuration needs, and room on the disk for those that are to be fetched."""
    from experts.models import ModelStore

    try:
        store = ModelStore()
        known = {i.alias: i for i in store.list()}
    except AgoraError as e:
        yield Finding(what="models", status="fail", detail=e.message, hint=e.hint)
        return
    to_fetch: dict[str, int] = {}
    for source, gguf in _sources(config):
        found = _gguf(source, store, known.get(source)) if gguf else _folder(source, store, known.get(source))
        yield found
        if found.status == "note" and source in known:
            to_fetch[source] = known[source].disk_bytes
    needed = sum(to_fetch.values())
    folder = next(p for p in (store.cache_dir, *store.cache_dir.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    enough = free >= needed
    yield Finding(
        what="disk",
        status="ok" if enough else "fail",
        detail=f"{size(free)} free in {folder}" + (f", {size(needed)} needed" if needed else ""),
        hint=None if enough else "make room, or set AGORA_CACHE to another disk",
    )


def _sources(config: Config) -> dict[tuple[str, bool], None]:
    """What is needed, each once, and whether as GGUF."""
    from agora.config import LlamaCppNode, LocalNode, VllmNode

    found: dict[tuple[str, bool], None] = {}
    for node in used_nodes(config).values():
        if isinstance(node, LocalNode):
            found[config.models[node.model].source, False] = None
        elif isinstance(node, LlamaCppNode):
            found[node.source, True] = None
        elif isinstance(node, VllmNode) and node.url is None:
            found[node.model, False] = None
    if config.graph.router == "embedding":
        found["minilm-l6", False] = None
    return found


def _folder(source: str, store: ModelStore, info: ModelInfo | None) -> Finding:
    from experts.hub import HUB_ID

    try:
        return Finding(what=f"model {source}", status="ok", detail=str(store.path(source)))
    except AgoraError as e:
        if info is None and (HUB_ID.fullmatch(source) is None or Path(source).exists()):
            return Finding(what=f"model {source}", status="fail", detail=e.message, hint=e.hint)
        return _to_fetch(f"model {source}", e, info, hint=e.hint)


def _gguf(source: str, store: ModelStore, info: ModelInfo | None) -> Finding:
    from experts.catalogue import load_catalogue

    what = f"GGUF {source}"
    file = Path(source)
    if not source.endswith(".gguf"):
        try:
            file = store.gguf_path(source)
        except ModelError as e:
            packaged = [alias for alias, spec in load_catalogue().items() if spec.layout == "gguf"]
            if info is None or source not in packaged:
                hint = f"there is one of {', '.join(packaged)}; or name a file: ./NAME.gguf"
                return Finding(what=what, status="fail", detail=e.message, hint=hint)
            there = info.path is not None
            return _to_fetch(what, e, info, hint="'agora ask' and 'agora serve' fetch it" if there else e.hint)
    try:
        with file.open("rb") as opened:
            magic = opened.read(len(GGUF_MAGIC))
            length = os.fstat(opened.fileno()).st_size
    except OSError as e:
        hint = "see 'source' of the node; relative paths (./NAME.gguf) count from the folder of agora.toml"
        return Finding(what=what, status="fail", detail=f"{file}: {(e.strerror or str(e)).lower()}", hint=hint)
    if magic != GGUF_MAGIC:
        return Finding(what=what, status="fail", detail=f"{file} is no GGUF file", hint="fetch it again")
    return Finding(what=what, status="ok", detail=f"{file} ({size(length)})")


def _to_fetch(what: str, error: AgoraError, info: ModelInfo | None, *, hint: str | None) -> Finding:
    """A model that is fetched when it is needed."""
    much = f" ({size(info.download_bytes)} to fetch)" if info is not None else ""
    return Finding(what=what, status="note", detail=f"{error.message}{much}", hint=hint)


async def store(where: Path | str) -> list[Finding]:
    """Where runs are kept: whether it can be opened and written."""
    what = "run store"
    if isinstance(where, str):
        wrong = await _cannot_open(where)
        return [wrong or Finding(what=what, status="ok", detail=where)]
    file = where
    place = await asyncio.to_thread(_place_of, file)
    hint = None if place.writable else "mend its permissions, or set [store] path in agora.toml"
    status: Status = "ok" if place.writable else "fail"
    if place.bytes is None:
        detail = f"{file} will be made" if place.writable else f"{file} cannot be made: {place.folder} is not writable"
        return [Finding(what=what, status=status, detail=detail, hint=hint)]
    if place.writable:
        wrong = await _cannot_open(file)
        if wrong is not None:
            return [wrong]
    detail = f"{file} ({size(place.bytes)})" + ("" if place.writable else " is not writable")
    return [Finding(what=what, status=status, detail=detail, hint=hint)]


async def _cannot_open(where: Path | str) -> Finding | None:
    from graphs.store import RunStore

    try:
        async with RunStore.open(where):
            return None
    except AgoraError as e:
        return Finding(what="run store", status="fail", detail=e.message, hint=e.hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    folder: Path
    writable: bool
    bytes: int | None


def _place_of(file: Path) -> _Place:
    """Where a file is or would be: the nearest folder that exists, whether it can be written, and its size."""
    folder = next(p for p in file.parents if p.exists())
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    if not file.exists():
        return _Place(folder=folder, writable=writable, bytes=None)
    return _Place(folder=folder, writable=writable and os.access(file, os.W_OK), bytes=file.stat().st_size)


def hub() -> Iterator[Finding]:
    """Whether models can be fetched from the model hub."""
    from experts.hub import Hub

    hub = Hub()
    if hub.offline:
        yield Finding(what="model hub", status="note", detail="HF_HUB_OFFLINE forbids using it")
    elif hub.reachable():
        yield Finding(what="model hub", status="ok", detail="reachable")
    else:
        detail = "not reachable; models of the catalogue come from the package index instead"
        yield Finding(what="model hub", status="note", detail=detail)
