"""The tree of aggregators: who is above whom, which devices belong to which, and the rules that all keep to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, Final

from agora.errors import ConfigError
from fed.hierarchy.level import Level, Link, Orphans
from fed.hierarchy.sees import View

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of an aggregator: its record is a file of that name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregator:
    """One aggregator.

    Attributes:
        name: Unique among aggregators and devices.
        level: Name of its level.
        parent: The aggregator above; None for the one at the top.
        devices: Clients that train and send their updates to it.
        up: Its link to the parent; None for that of its level.
    """

    name: str
    level: str
    parent: str | None = None
    devices: tuple[str, ...] = ()
    up: Link | None = None


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Aggregators and devices. One aggregator alone is a flat federation.

    Attributes:
        levels: From the top down. A parent is of a level further up; levels may be left out between the two.
        aggregators: In any order, which decides where nothing else does.
    """

    levels: tuple[Level, ...]
    aggregators: tuple[Aggregator, ...]

    def __post_init__(self) -> None:
        _check_names(self)
        _check_shape(self)
        for place in self.aggregators:
            _check_sees(self, place)
            _check_orphans(self, place)

    @cached_property
    def places(self) -> Mapping[str, Aggregator]:
        """Aggregators by name."""
        return {a.name: a for a in self.aggregators}

    @cached_property
    def home(self) -> Mapping[str, str]:
        """The aggregator of every device."""
        return {device: a.name for a in self.aggregators for device in a.devices}

    @cached_property
    def root(self) -> str:
        """The aggregator at the top."""
        return next(a.name for a in self.aggregators if a.parent is None)

    @cached_property
    def _children(self) -> Mapping[str, tuple[str, ...]]:
        found: dict[str, list[str]] = {a.name: [] for a in self.aggregators}
        for a in self.aggregators:
            if a.parent is not None:
                found[a.parent].append(a.name)
        return {name: tuple(children) for name, children in found.items()}

    @cached_property
    def _levels(self) -> Mapping[str, Level]:
        return {level.name: level for level in self.levels}

    def level(self, name: str) -> Level:
        """The level of an aggregator."""
        return self._levels[self.places[name].level]

    def children(self, name: str) -> tuple[str, ...]:
        """The aggregators right below one."""
        return self._children[name]

    def link(self, name: str) -> Link:
        """An aggregator's link to the one above."""
        own = self.places[name].up
        return self.level(name).up if own is None else own

    def path(self, name: str) -> tuple[str, ...]:
        """The aggregators from a device's, or from an aggregator itself, up to the top.

        Raises:
            ConfigError: If there is no such device or aggregator.
        """
        at: str | None = name if name in self.places else self.home.get(name)
        if at is None:
            raise ConfigError(f"{name!r} is neither a device nor an aggregator of this tree")
        found = []
        while at is not None:
            found.append(at)
            at = self.places[at].parent
        return tuple(found)

    def downwards(self) -> Iterator[str]:
        """Every aggregator after the one above it."""
        waiting = [self.root]
        while waiting:
            name = waiting.pop(0)
            yield name
            waiting += self.children(name)

    def below(self, name: str) -> int:
        """Devices below an aggregator, at any depth."""
        return len(self.places[name].devices) + sum(self.below(child) for child in self.children(name))

    @classmethod
    def flat(cls, level: Level, devices: Sequence[str]) -> Tree:
        """One aggregator over all devices.

        Raises:
            ConfigError: If there is no device.
        """
        return cls(
            levels=(level,), aggregators=(Aggregator(name=level.name, level=level.name, devices=tuple(devices)),)
        )

    @classmethod
    def even(cls, cloud: Level, edge: Level, devices: Sequence[str], *, edges: int) -> Tree:
        """A cloud over edges over devices, neighbours in the list under the same edge, as many each, to within one.

        Raises:
            ConfigError: If there are fewer devices than edges.
        """
        if not 1 <= edges <= len(devices):
            raise ConfigError(f"{edges} edges for {len(devices)} devices; there must be from 1 to as many")
        bounds = [round(i * len(devices) / edges) for i in range(edges + 1)]
        parts = [tuple(devices[a:b]) for a, b in pairwise(bounds)]
        found = [
            Aggregator(name=f"{edge.name}-{i}", level=edge.name, parent=cloud.name, devices=part)
            for i, part in enumerate(parts)
        ]
        return cls(levels=(cloud, edge), aggregators=(Aggregator(name=cloud.name, level=cloud.name), *found))

    @classmethod
    def from_config(cls, body: Mapping[str, Any]) -> Tree:
        """From a table of a configuration file:

            [levels.cloud]
            pace = {preset = "synchronous", cohort = 2}
            [levels.edge]
            pace = {cohort = 8, buffer = 4}
            up = {up_bytes_per_s = 1e6, down_bytes_per_s = 1e6, round_trip_s = 0.2}
            [[aggregators]]
            name = "cloud"
            level = "cloud"
            [[aggregators]]
            name = "edge-0"
            level = "edge"
            parent = "cloud"
            devices = ["client-0", "client-1"]

        Levels stand in the order of the file, from the top down.

        Raises:
            ConfigError: If a key or a value is not allowed, or the tree is none.
        """
        if wrong := sorted(set(body) - {"levels", "aggregators"}):
            raise ConfigError(f"a tree has no setting {wrong[0]!r}; allowed: levels, aggregators")
        levels, places = body.get("levels", {}), body.get("aggregators", [])
        if not isinstance(levels, Mapping) or not all(isinstance(v, Mapping) for v in levels.values()):
            raise ConfigError(f"levels are {levels!r}; they must be tables by name")
        if not isinstance(places, Sequence) or not all(isinstance(p, Mapping) for p in places):
            raise ConfigError(f"aggregators are {places!r}; they must be a list of tables")
        return cls(
            levels=tuple(Level.from_config(name, level) for name, level in levels.items()),
            aggregators=tuple(_aggregator(number, place) for number, place in enumerate(places, 1)),
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON; `from_config` reads it."""
        return {
            "levels": {level.name: level.to_json() for level in self.levels},
            "aggregators": [
                {"name": a.name, "level": a.level}
                | ({} if a.parent is None else {"parent": a.parent})
                | {"devices": list(a.devices)}
                | ({} if a.up is None else {"up": a.up.to_json()})
                for a in self.aggregators
            ],
        }


def _aggregator(number: int, body: Mapping[str, Any]) -> Aggregator:
    known = [f.name for f in fields(Aggregator)]
    called = f"aggregator {body.get('name', number)!r}"
    if wrong := sorted(set(body) - set(known)):
        raise ConfigError(f"{called} has no setting {wrong[0]!r}; allowed: {', '.join(known)}")
    for key in ("name", "level"):
        if not isinstance(body.get(key), str):
            raise ConfigError(f"{key} of {called} is {body.get(key)!r}; it must be a text")
    parent, devices, up = body.get("parent"), body.get("devices", ()), body.get("up")
    if parent is not None and not isinstance(parent, str):
        raise ConfigError(f"parent of {called} is {parent!r}; it must be a text")
    if isinstance(devices, str) or not isinstance(devices, Sequence) or not all(isinstance(d, str) for d in devices):
        raise ConfigError(f"devices of {called} are {devices!r}; they must be a list of names")
    if up is not None and not isinstance(up, Mapping):
        raise ConfigError(f"up of {called} is {up!r}; it must be a table")
    link = None if up is None else Link.from_config(up)
    return Aggregator(name=body["name"], level=body["level"], parent=parent, devices=tuple(devices), up=link)


def _check_names(tree: Tree) -> None:
    if not tree.aggregators or not tree.levels:
        raise ConfigError("a tree needs a level and an aggregator at least")
    levels = [level.name for level in tree.levels]
    names = [a.name for a in tree.aggregators]
    for what, found in (("level", levels), ("aggregator", names)):
        if twice := sorted({n for n in found if found.count(n) > 1}):
            raise ConfigError(f"{what} {twice[0]!r} is there twice; names must be unique")
    for a in tree.aggregators:
        if not NAME.fullmatch(a.name):
            raise ConfigError(
                f"an aggregator is named {a.name!r}; allowed are up to 64 letters, digits, dots, dashes and underscores"
            )
        if a.level not in levels:
            raise ConfigError(f"level of aggregator {a.name!r} is {a.level!r}; there are {', '.join(levels)}")
    under: dict[str, str] = {}
    for a in tree.aggregators:
        for device in a.devices:
            if device in under:
                raise ConfigError(
                    f"device {device!r} is under {under[device]!r} and {a.name!r}",
                    hint="a device has one aggregator; it may go to another one when that is gone, see orphans",
                )
            if device in names:
                raise ConfigError(f"{device!r} is a device of {a.name!r} and an aggregator")
            under[device] = a.name
    if unused := [name for name in levels if name not in {a.level for a in tree.aggregators}]:
        raise ConfigError(f"level {unused[0]!r} has no aggregator")


def _check_shape(tree: Tree) -> None:
    places = {a.name: a for a in tree.aggregators}
    for a in tree.aggregators:
        if a.parent is not None and a.parent not in places:
            raise ConfigError(f"parent of aggregator {a.name!r} is {a.parent!r}, which is not there")
    for a in tree.aggregators:
        seen, at = [a.name], a.parent
        while at is not None:
            if at in seen:
                circle = [*seen[seen.index(at) :], at]
                raise ConfigError(f"the aggregators form a circle: {' → '.join(circle)}")
            seen.append(at)
            at = places[at].parent
    roots = [a.name for a in tree.aggregators if a.parent is None]
    if len(roots) != 1:
        raise ConfigError(f"aggregators without a parent: {', '.join(roots)}; exactly one is at the top")
    if tree.link(roots[0]) != Link():
        raise ConfigError(f"{roots[0]!r} is at the top, and has a link upwards", hint="leave `up` out there")
    order = [level.name for level in tree.levels]
    parents = {a.parent for a in tree.aggregators}
    for a in tree.aggregators:
        if a.parent is not None and order.index(places[a.parent].level) >= order.index(a.level):
            raise ConfigError(
                f"aggregator {a.name!r} of level {a.level!r} is under {a.parent!r} of level "
                f"{places[a.parent].level!r}; levels are from the top down: {', '.join(order)}"
            )
        if not a.devices and a.name not in parents:
            raise ConfigError(f"aggregator {a.name!r} has neither devices nor aggregators below it")


def _check_sees(tree: Tree, place: Aggregator) -> None:
    sees, children = tree.level(place.name).sees, tree.children(place.name)
    told = f"{place.name!r}, of level {place.level!r},"
    if sees.what is View.COUNTS and (place.devices or place.parent is not None):
        where = "from its devices" if place.devices else "above it"
        raise ConfigError(
            f"{told} sees only counts, so that nothing would be learned {where}",
            hint="only the top of a tree, over aggregators, may see counts alone",
        )
    if sees.what is View.SUMS and len(place.devices) + len(children) < sees.least:
        raise ConfigError(
            f"{told} sees only sums of {sees.least} children, and has {len(place.devices) + len(children)}"
        )
    if place.devices and sees.behind > 1 and sees.what is View.UPDATES:
        raise ConfigError(
            f"{told} sees updates with {sees.behind} devices behind them, and has devices of its own",
            hint="let it see sums, or put an aggregator between",
        )
    if short := [child for child in children if tree.below(child) < sees.behind]:
        raise ConfigError(
            f"{told} sees updates with {sees.behind} devices behind them; below {short[0]!r} are {tree.below(short[0])}"
        )


def _check_orphans(tree: Tree, place: Aggregator) -> None:
    if tree.level(place.name).orphans is not Orphans.PARENT or place.parent is None or not place.devices:
        return
    sees = tree.level(place.parent).sees
    if sees.what is View.COUNTS or (sees.what is View.UPDATES and sees.behind > 1):
        raise ConfigError(
            f"devices of {place.name!r} would go to {place.parent!r}, which may not see a single device's update",
            hint="set orphans to 'sibling' or 'wait'",
        )
