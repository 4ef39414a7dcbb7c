"""Which machines and links there are, and all ways from one machine to another. Links may change while it is in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Final

import networkx as nx

from agora.errors import InvalidRequest
from agora.network.path import Link, Path

MAX_PATHS: Final = 64
"""Most paths told from one machine to another: parallel links between relays multiply, and a choice among more than a
few dozen is no better. Those with fewest relays are kept."""

MAX_STEPS: Final = 20_000
"""Most links looked at in one search, some 20 ms: ten relays that all know each other and lead nowhere have 10!
ways."""


class Topology:
    """A multigraph (networkx) of machines and links: two machines may have several links between them.

    Links lead from the machine that asks to the one that is asked; answers come back the same way.

    Args:
        links: The links there are.

    Raises:
        InvalidRequest: If two links have one name.
    """

    def __init__(self, links: Iterable[Link] = ()) -> None:
        self._graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        self._links: dict[str, Link] = {}
        self._version = 0
        for link in links:
            self.join(link)

    @property
    def version(self) -> int:
        """Rises with every change: whoever keeps paths sees that they are old."""
        return self._version

    @property
    def links(self) -> tuple[Link, ...]:
        """All links, in the order they came."""
        return tuple(self._links.values())

    @property
    def machines(self) -> tuple[str, ...]:
        """All machines that a link starts from or leads to."""
        return tuple(self._graph.nodes)

    def link(self, name: str) -> Link:
        """The link of that name, as it is now.

        Raises:
            InvalidRequest: If there is none.
        """
        try:
            return self._links[name]
        except KeyError:
            raise self._no_such_link(name) from None

    def join(self, link: Link) -> None:
        """Adds a link, and its machines if they are new.

        Raises:
            InvalidRequest: If there is a link of that name.
        """
        if link.name in self._links:
            raise InvalidRequest(
                f"there are two links called {link.name!r}", hint="give each link a name of its own, or use change()"
            )
        self._graph.add_edge(link.source, link.target, key=link.name)
        self._links[link.name] = link
        self._version += 1

    def remove(self, name: str) -> Link:
        """Takes a link out: it broke, or its machine went away. Machines without links go with it.

        Returns:
            The link as it was last.

        Raises:
            InvalidRequest: If there is none of that name.
        """
        link = self.link(name)
        del self._links[name]
        self._graph.remove_edge(link.source, link.target, key=name)
        self._graph.remove_nodes_from([m for m in (link.source, link.target) if not self._graph.degree(m)])
        self._version += 1
        return link

    def change(self, name: str, /, **values: Any) -> Link:
        """Changes what a link is like (mobility), or where it leads (a hand-over).

        Args:
            name: Which link.
            values: New values of `Link`'s attributes, like `up_mbps=3.5`; its name stays.

        Returns:
            The link as it is now.

        Raises:
            InvalidRequest: If there is no such link or attribute, or a value is out of range.
        """
        old = self.link(name)
        allowed = [f.name for f in dataclasses.fields(Link) if f.name != "name"]
        if unknown := sorted(set(values) - set(allowed)):
            raise InvalidRequest(f"a link has no {unknown[0]!r} that could change; allowed: {', '.join(allowed)}")
        new = dataclasses.replace(old, **values)
        if new == old:
            return old
        if (new.source, new.target) != (old.source, old.target):
            # In one go: a version that rose by two would tell of a moment at which the link was gone.
            self._graph.remove_edge(old.source, old.target, key=name)
            self._graph.add_edge(new.source, new.target, key=name)
            self._graph.remove_nodes_from([m for m in (old.source, old.target) if not self._graph.degree(m)])
        self._links[name] = new
        self._version += 1
        return new

    def paths(self, source: str, target: str, *, max_relays: int = 2) -> tuple[Path, ...]:
        """All ways from one machine to another that pass no machine twice, the shortest first; at most `MAX_PATHS`.

        A path is called after the technologies of its links, like `v2v+5g`; where that is not unique, after their
        names.

        Args:
            source: Who asks.
            target: Who answers. The same as `source`: one path without links, called `here`.
            max_relays: Most machines in between.

        Returns:
            The paths; none if one of the machines is unknown or there is no way.

        Raises:
            InvalidRequest: If `max_relays` is negative.
        """
        if max_relays < 0:
            raise InvalidRequest(f"max_relays is {max_relays}; it must be ≥ 0")
        if source == target:
            return (Path(name="here", links=(), target=target),)
        if source not in self._graph or target not in self._graph:
            return ()
        found: list[tuple[Link, ...]] = []
        steps = _Steps(MAX_STEPS)
        for relays in range(max_relays + 1):
            for links in self._ways(source, target, relays + 1, {source}, steps):
                found.append(links)
                if len(found) == MAX_PATHS:
                    return _named(found, target)
        return _named(found, target)

    def _ways(self, source: str, target: str, hops: int, passed: set[str], steps: _Steps) -> Iterator[tuple[Link, ...]]:
        """Loop-free ways of exactly so many links.

        networkx' `all_simple_edge_paths` goes depth first: in a dense topology the first `MAX_PATHS` of it would all
        be long ones.
        """
        for _, other, name in self._graph.out_edges(source, keys=True):
            if not steps.take():
                return
            link = self._links[name]
            if hops == 1:
                if other == target:
                    yield (link,)
            elif other != target and other not in passed:
                for rest in self._ways(other, target, hops - 1, passed | {other}, steps):
                    yield (link, *rest)

    def _no_such_link(self, name: str) -> InvalidRequest:
        known = ", ".join(sorted(self._links)) or "none"
        return InvalidRequest(f"there is no link {name!r}", hint=f"links there are: {known}")


class _Steps:
    """How many steps a search may still take."""

    def __init__(self, left: int) -> None:
        self._left = left

    def take(self) -> bool:
        self._left -= 1
        return self._left >= 0


def _named(ways: list[tuple[Link, ...]], target: str) -> tuple[Path, ...]:
    short = ["+".join(link.technology.value for link in way) for way in ways]
    long = ["+".join(link.name for link in way) for way in ways]
    # A long name may be another path's short one (a link called "5g"): then every path goes by its links.
    unique = {s for s in short if short.count(s) == 1} - {n for n, s in zip(long, short, strict=True) if n != s}
    names = [s if s in unique else n for s, n in zip(short, long, strict=True)]
    if len(set(names)) < len(names):  # Links' names may hold a "+".
        names = [f"{n}#{i}" for i, n in enumerate(names, 1)]
    return tuple(Path(name=n, links=way, target=target) for n, way in zip(names, ways, strict=True))
