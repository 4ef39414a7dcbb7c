"""`agora doctor`: what is installed, what is missing, and what to type."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.text import Text

from agora.cli import checks, checks_collaboration, checks_nodes, checks_serving
from agora.cli.checks import Finding, Status, in_thread
from agora.cli.invocation import ExitCode, Invocation, of, run_async
from agora.cli.options import ConfigOption, JsonOption
from agora.cli.text import clean, counted
from agora.errors import ConfigError

if TYPE_CHECKING:
    from agora.config import Config

SIGNS: Final[dict[Status, tuple[str, str]]] = {
    "ok": ("ok  ", "green"),
    "note": ("note", "yellow"),
    "fail": ("FAIL", "bold red"),
}


def doctor(
    context: typer.Context,
    config: ConfigOption = None,
    nodes: Annotated[bool, typer.Option("--nodes", help="Also open every node and ask it for one token.")] = False,
    json: JsonOption = False,
) -> None:
    """Check this machine and the configuration; exit code 1 if something keeps agora from working."""
    invocation = of(context)
    invocation.json = json
    findings = run_async(_examine(config, nodes=nodes))
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


async def _examine(path: Path | None, *, nodes: bool) -> list[Finding]:
    from agora.cli.settings import read_config

    config: Config | None = None
    try:
        config = await asyncio.to_thread(read_config, path)
        detail = f"{config.origin}: {counted(len(config.experts), 'expert')} on {counted(len(config.nodes), 'node')}"
        read = Finding(what="configuration", status="ok", detail=detail)
    except ConfigError as e:
        read = Finding(what="configuration", status="fail", detail=e.message, hint=e.hint or "mend the file")
    # Those that wait wait together: all of it takes as long as the slowest.
    looks: list[Awaitable[list[Finding]]] = [
        in_thread(checks.versions),
        in_thread(partial(checks.extras, config)),
        in_thread(checks.torch),
    ]
    if config is not None:
        looks += [
            in_thread(partial(checks.models, config)),
            in_thread(partial(checks_nodes.keys, config)),
            checks_nodes.vllm(config),
            checks_nodes.llamacpp(config),
            checks.store(config.store.where),
            in_thread(partial(checks_serving.keys, config)),
            checks_serving.address(config),
            checks_serving.neighbours(config),
            in_thread(partial(checks_collaboration.links, config)),
        ]
    looks.append(in_thread(checks.hub))
    found = [f for many in await asyncio.gather(*looks) for f in many]
    if nodes and config is not None:
        found += await checks_nodes.nodes(config)
    return [*found[:1], read, *found[1:]]
