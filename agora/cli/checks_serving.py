"""What `agora doctor` looks at of serving: API keys, the address, and the neighbours."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from agora.cli.checks import Finding
from agora.cli.text import counted
from agora.errors import AgoraError, BackendError, ConfigError, Rejected

if TYPE_CHECKING:
    from agora.config import Config, NeighbourConfig
    from agora.serve.node_card import NodeCard

RESOLVE_S: Final = 3.0
"""Seconds to look up a host name. A resolver that has it needs milliseconds."""

HEALTH_S: Final = 2.0
"""Seconds for /healthz of what listens on the port already; agora answers within a millisecond."""

HEALTH_BYTES: Final = 1_000
"""Bytes of it that are read; agora's has 15."""

MAX_NAMES: Final = 8
"""Experts of a neighbour that are named on one line."""

ANY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
"""Where to reach, from here, who listens on all addresses."""

_REQUEST_ID = re.compile(r"[0-9a-f]{16}-[0-9a-f]+")


def keys(config: Config) -> Iterator[Finding]:
    """The file of API keys; and whether there has to be one."""
    from agora.serve.keys import Keyring, Role, read_keys
    from agora.serve.node import LOOPBACK

    what, server = "server keys", config.server
    if server.keys is None:
        if server.host not in LOOPBACK:
            yield Finding(
                what=what,
                status="fail",
                detail=f"{server.host} is reachable from other machines, and no API keys are asked for",
                hint='set [server] keys = "keys.json" and type: agora keys new NAME; or host = "127.0.0.1"',
            )
        return
    try:
        Keyring(server.keys)
        found = read_keys(server.keys)
    except ConfigError as e:
        yield Finding(what=what, status="fail", detail=e.message, hint=e.hint)
        return
    theirs = sum(k.role is Role.NEIGHBOUR for k in found)
    yield Finding(
        what=what,
        status="ok" if found else "note",
        detail=f"{counted(len(found), 'key')} in {server.keys}"
        + (f", {theirs} of them for neighbours" if theirs else "" if found else ": nobody can ask"),
        hint=None if found else "type: agora keys new NAME",
    )


async def address(config: Config) -> list[Finding]:
    """Whether `agora serve` can listen where it should, or does already."""
    host, port = config.server.host, config.server.port
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        async with asyncio.timeout(RESOLVE_S):
            places = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError) as e:
        why = f"not found within {RESOLVE_S:g} s" if isinstance(e, TimeoutError) else getattr(e, "strerror", None) or e
        hint = 'set [server] host to an address of this machine, like "127.0.0.1"'
        return [Finding(what="server", status="fail", detail=f"host {host!r}: {why}", hint=hint)]
    wrong = next(filter(None, (_cannot_listen(family, where) for family, *_, where in places)), None)
    if wrong is None:
        return [Finding(what="server", status="ok", detail=f"{shown} is free")]
    if wrong.errno != errno.EADDRINUSE:
        why = (wrong.strerror or str(wrong)).lower()
        hint = "set [server] host to an address of this machine, and port to one that you may use"
        return [Finding(what="server", status="fail", detail=f"cannot listen on {shown}: {why}", hint=hint)]
    if await _is_agora(ANY_ADDRESS.get(host, host), port):
        return [Finding(what="server", status="ok", detail=f"an agora serves on {shown}")]
    hint = "end it, or set [server] port to another one"
    return [Finding(what="server", status="fail", detail=f"another program listens on {shown}", hint=hint)]


def _cannot_listen(family: int, where: Any) -> OSError | None:
    """Why nobody could listen there now."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # As servers do that listen on an IPv4 address of the same port beside it.
                s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            s.bind(where)
    except OSError as e:
        return e
    return None


async def _is_agora(host: str, port: int) -> bool:
    """Whether what listens there says that it is well, as agora does it."""
    import aiohttp

    from agora.serve.asked import REQUEST_ID

    url = f"http://[{host}]:{port}/healthz" if ":" in host else f"http://{host}:{port}/healthz"
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, ValueError):
        timeout = aiohttp.ClientTimeout(total=HEALTH_S)
        async with aiohttp.ClientSession(timeout=timeout) as http, http.get(url, allow_redirects=False) as reply:
            told = json.loads(await reply.content.read(HEALTH_BYTES))
            marked = _REQUEST_ID.fullmatch(reply.headers.get(REQUEST_ID, "")) is not None
            return marked and isinstance(told, dict) and told.get("status") == "ok"
    return False


async def neighbours(config: Config) -> list[Finding]:
    """Whether the neighbours answer, who they are and whom they offer."""
    from experts.build import missing_keys

    missing = {m.key: m.variable for m in missing_keys(config, neighbours=True)}
    found = []
    for name in config.neighbours:
        variable = missing.get(f"neighbours.{name}.api_key_env")
        found.append(_neighbour(name, config) if variable is None else _keyless(name, variable))
    return list(await asyncio.gather(*found))


async def _keyless(name: str, variable: str) -> Finding:
    return Finding(
        what=f"neighbour {name}", status="fail", detail=f"{variable} is not set", hint=f"export {variable}=…"
    )


async def _neighbour(name: str, config: Config) -> Finding:
    from agora.serve.look import Lookout
    from agora.serve.node_card import WrongCard

    what, neighbour = f"neighbour {name}", config.neighbours[name]
    clock = asyncio.get_running_loop().time
    try:
        lookout = Lookout(neighbour.url, name=name, api_key=_key_of(neighbour), node=secrets.token_hex(8))
    except AgoraError as e:
        return Finding(what=what, status="fail", detail=e.message, hint=e.hint)
    began = clock()
    try:
        card = await lookout.look()
    except WrongCard as e:
        return Finding(what=what, status="note", detail=f"{neighbour.url}: {e.message}")
    except Rejected as e:
        hint = "is that an agora?"
        if e.status in (401, 403):
            variable = neighbour.api_key_env
            hint = f"its owner makes a key: agora keys new NAME --neighbour; put it into {variable or 'api_key_env'}"
        return Finding(
            what=what,
            status="note",
            detail=f"{neighbour.url} refuses: {e.message.removeprefix(f'{name}: ')}",
            hint=hint,
        )
    except BackendError as e:
        detail = f"no card from {neighbour.url}: {e.message.removeprefix(f'{name}: ')}"
        return Finding(what=what, status="note", detail=detail, hint="is 'agora serve' running there?")
    finally:
        await lookout.aclose()
    return _of_card(what, card, seconds=clock() - began, wanted=_wanted(name, config))


def _key_of(neighbour: NeighbourConfig) -> str | None:
    return os.environ[neighbour.api_key_env] if neighbour.api_key_env else None


def _wanted(name: str, config: Config) -> tuple[str, ...]:
    """Experts of a neighbour that the configuration counts on, by their names there."""
    graph = config.graph
    named = (graph.planner_expert, graph.synthesiser_expert, *(s.expert for s in graph.subtasks))
    head = f"{name}."
    theirs = (e.removeprefix(head) for e in named if e is not None and e.startswith(head) and e not in config.experts)
    return tuple(dict.fromkeys([*(config.neighbours[name].experts or ()), *theirs]))


def _of_card(what: str, card: NodeCard, *, seconds: float, wanted: tuple[str, ...]) -> Finding:
    names = [e.name for e in card.experts or ()]
    some = ", ".join(names[:MAX_NAMES]) + (", …" if len(names) > MAX_NAMES else "")
    who = f"{card.node.name} ({card.node.version})" if card.node.version else card.node.name
    offers = f"{counted(len(names), 'expert')} ({some})" if names else "no experts"
    detail = f"{who} offers {offers}, {1000 * seconds:.0f} ms"
    lacking = [e for e in wanted if e not in names]
    problems = [*([f"nobody there is called {', '.join(lacking)}"] if lacking else []), *card.refused[:1]]
    return Finding(what=what, status="note" if problems else "ok", detail="; ".join([detail, *problems]))
