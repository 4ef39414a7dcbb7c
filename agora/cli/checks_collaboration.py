"""What `agora doctor` looks at of vertical and multi-access collaboration: the links, and the fitted policy."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil

from agora.cli.checks import Finding
from agora.cli.text import counted

if TYPE_CHECKING:
    from agora.config import Config


def own_addresses() -> frozenset[str]:
    """The IP addresses of this machine's interfaces."""
    found = set()
    for many in psutil.net_if_addrs().values():
        for one in many:
            try:
                found.add(str(ipaddress.ip_address(one.address.partition("%")[0])))
            except ValueError:
                continue  # an address of the link layer
    return frozenset(found)


def links(config: Config) -> Iterator[Finding]:
    """Whether the links go out by interfaces that are here, and lead to somebody."""
    what = "links"
    if not config.links:
        if config.graph.name == "multi_access" and not any(e.also for e in config.experts.values()):
            yield Finding(
                what=what,
                status="note",
                detail='graph "multi_access" has one way to every expert: there are no [links.NAME] and no "also"',
                hint="describe a second way in [links.NAME], or name a second node with also = [...]",
            )
        return
    here, wrong = own_addresses(), []
    for name, link in config.links.items():
        if link.local_address is None:
            continue
        try:
            known = str(ipaddress.ip_address(link.local_address)) in here
        except ValueError:
            known = False
        if not known:
            wrong.append(f"links.{name}.local_address = {link.local_address!r}")
    if wrong:
        yield Finding(
            what=what,
            status="fail",
            detail=f"not an address of this machine: {', '.join(wrong)}",
            hint=f"this machine has {', '.join(sorted(here))}",
        )
        return
    from agora.errors import ConfigError
    from experts.paths import played_of

    try:
        played_of(config)
    except ConfigError as e:
        yield Finding(what=what, status="fail", detail=e.message, hint=e.hint)
        return
    used = {n for e in config.experts.values() for n in (e.node, *e.also)}
    used |= {link.source for link in config.links.values()}
    idle = [name for name, link in config.links.items() if link.target not in used]
    yield Finding(
        what=what,
        status="note" if idle else "ok",
        detail=counted(len(config.links), "link")
        + (f"; nobody is asked over {', '.join(idle)}: no expert is on its target" if idle else ""),
        hint="name its target in an expert's node or also" if idle else None,
    )
