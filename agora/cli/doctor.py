"""`agora doctor`: what is installed, what is missing, and what to type."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer
from rich.text import Text

from agora.cli.invocation import ExitCode, Invocation, of, run_async
from agora.cli.options import ConfigOption, JsonOption
from agora.cli.text import clean, counted, size
from agora.errors import AgoraError, ConfigError

if TYPE_CHECKING:
    from agora.config import Config

PACKAGES: Final = ("torch", "transformers", "peft", "langgraph", "langgraph-checkpoint-sqlite", "aiohttp", "pydantic")
"""The packages whose versions explain most reports."""

EXTRAS: Final = {"postgres": ("langgraph-checkpoint-postgres", "psycopg")}
"""Optional features and the packages they need."""

Status = Literal["ok", "note", "fail"]

SIGNS: Final[dict[Status, tuple[str, str]]] = {
    "ok": ("ok  ", "green"),
    "note": ("note", "yellow"),
    "fail": ("FAIL", "bold red"),
}


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


def doctor(
    context: typer.Context,
    config: ConfigOption = None,
    nodes: Annotated[bool, typer.Option("--nodes", help="Also open every node and ask it for one token.")] = False,
    json: JsonOption = False,
) -> None:
    """Check this machine and the configuration; exit code 1 if something keeps agora from working."""
    invocation = of(context)
    invocation.json = json
    findings = run_async(_examine(invocation, config, nodes=nodes))
    failed = any(f.status == "fail" for f in findings)
    if json:
        invocation.print_json({"ok": not failed, "findings": [asdict(f) for f in findings]})
    else:
        _tell(invocation, findings)
    raise typer.Exit(ExitCode.ERROR if failed else ExitCode.OK)


def _tell(invocation: Invocation, findings: list[Finding]) -> None:
    for f in findings:
        sign, style = SIGNS[f.status]
        first, *rest = clean(f.detail).splitlines() or [""]
        invocation.say(Text(f"{sign}  ", style=style).append(f"{f.what}: {first}", style="default"))
        for line in rest:
            invocation.say(Text(f"      {line}"))
        if f.hint:
            invocation.say(Text(f"      → {clean(f.hint)}", style="dim"))


async def _examine(invocation: Invocation, path: Path | None, *, nodes: bool) -> list[Finding]:
    from agora.cli.settings import read_config

    config: Config | None = None
    try:
        config = await asyncio.to_thread(read_config, path)
        detail = f"{config.origin}: {counted(len(config.experts), 'expert')} on {counted(len(config.nodes), 'node')}"
        read = Finding(what="configuration", status="ok", detail=detail)
    except ConfigError as e:
        read = Finding(what="configuration", status="fail", detail=e.message, hint=e.hint or "mend the file")
    checks: list[Awaitable[list[Finding]]] = [_in_thread(_versions), _in_thread(_extras), _in_thread(_torch)]
    if config is not None:
        known = config
        checks += [
            _in_thread(lambda: _models(known)),
            _in_thread(lambda: _keys(known)),
            _store(known.store.where),
        ]
    checks.append(_in_thread(_hub))
    found = [f for many in await asyncio.gather(*checks) for f in many]
    if nodes and config is not None:
        found += await _nodes(invocation, config)
    return [*found[:1], read, *found[1:]]


async def _in_thread(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    return await asyncio.to_thread(lambda: list(check()))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    detail = f"{_version('agora-llm') or 'not installed'}, Python {platform.python_version()} ({sys.executable})"
    yield Finding(what="agora", status="ok", detail=detail)
    found = {p: _version(p) for p in PACKAGES}
    detail = ", ".join(f"{p} {v or 'missing'}" for p, v in found.items())
    missing = [p for p, v in found.items() if v is None]
    hint = f"python -m pip install {' '.join(missing)}" if missing else None
    yield Finding(what="packages", status="fail" if missing else "ok", detail=detail, hint=hint)


def _extras() -> Iterator[Finding]:
    for extra, packages in EXTRAS.items():
        missing = [p for p in packages if _version(p) is None]
        yield Finding(
            what=f"extra {extra}",
            status="note" if missing else "ok",
            detail=f"not installed ({', '.join(missing)})" if missing else "installed",
            hint=f"if you want it: python -m pip install 'agora-llm[{extra}]'" if missing else None,
        )


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as e:
        hint = "python -m pip install --force-reinstall torch"
        yield Finding(what="torch", status="fail", detail=f"cannot be imported: {e}", hint=hint)
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = torch.get_num_threads()
    yield Finding(what="torch", status="ok", detail=f"{threads} threads on {os.cpu_count()} processors, {device}")


def _models(config: Config) -> Iterator[Finding]:
    from agora.config import LocalNode
    from experts.models import ModelStore

    try:
        store = ModelStore()
        known = {i.alias: i for i in store.list()}
    except AgoraError as e:
        yield Finding(what="models", status="fail", detail=e.message, hint=e.hint)
        return
    used = [config.nodes[name] for name in dict.fromkeys(e.node for e in config.experts.values())]
    sources = dict.fromkeys(config.models[n.model].source for n in used if isinstance(n, LocalNode))
    needed = 0
    for source in [*sources, *(["minilm-l6"] if config.graph.router == "embedding" else [])]:
        what = f"model {source}"
        try:
            yield Finding(what=what, status="ok", detail=str(store.path(source)))
        except AgoraError as e:
            info = known.get(source)
            size_text = f" ({size(info.download_bytes)} to fetch)" if info else ""
            needed += info.disk_bytes if info else 0
            yield Finding(what=what, status="note", detail=f"{e.message}{size_text}", hint=e.hint)
    folder = next(p for p in (store.cache_dir, *store.cache_dir.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    enough = free >= needed
    yield Finding(
        what="disk",
        status="ok" if enough else "fail",
        detail=f"{size(free)} free in {folder}" + (f", {size(needed)} needed" if needed else ""),
        hint=None if enough else "make room, or set AGORA_CACHE to another disk",
    )


def _keys(config: Config) -> Iterator[Finding]:
    from agora.config import OpenAINode

    for name, node in config.nodes.items():
        if isinstance(node, OpenAINode) and node.api_key_env:
            there = bool(os.environ.get(node.api_key_env))
            yield Finding(
                what=f"node {name}",
                status="ok" if there else "fail",
                detail=f"{node.api_key_env} is {'set' if there else 'not set'}",
                hint=None if there else f"export {node.api_key_env}=…",
            )


async def _store(where: Path | str) -> list[Finding]:
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


def _hub() -> Iterator[Finding]:
    from experts.hub import Hub

    hub = Hub()
    if hub.offline:
        yield Finding(what="model hub", status="note", detail="HF_HUB_OFFLINE forbids using it")
    elif hub.reachable():
        yield Finding(what="model hub", status="ok", detail="reachable")
    else:
        detail = "not reachable; models of the catalogue come from the package index instead"
        yield Finding(what="model hub", status="note", detail=detail)


async def _nodes(invocation: Invocation, config: Config) -> list[Finding]:
    from experts.build import open_square

    try:
        square = await open_square(config, pull=False)
    except AgoraError as e:
        return [Finding(what="nodes", status="fail", detail=e.message, hint=e.hint)]
    try:
        health = await square.health()
    finally:
        await square.aclose()
    by_node = {e.node: health[e.name] for e in square}
    return [
        Finding(
            what=f"node {name}",
            status="ok" if h.ok else "fail",
            detail=f"generated a token in {h.seconds:.2f} s" if h.ok else h.detail or "generated nothing",
            hint=None if h.ok else f"see [nodes.{name}] in {config.origin}",
        )
        for name, h in by_node.items()
    ]
