"""The driver of a tree: many servers, one clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from fed.adapter import Adapter
from fed.aggregate.rule import Rule
from fed.aggregate.rules import default, make
from fed.draws import bits, of_text
from fed.fleet import Move
from fed.hierarchy.level import Level, Link, Orphans
from fed.hierarchy.node import Children, Node
from fed.hierarchy.words import LevelReport, Made, TreeResult, TreeRun
from fed.simulator.clock import Clock, Kind
from fed.simulator.record import Record
from fed.simulator.words import Published, Run
from fed.words import WHOLE, ClientInfo

FOREVER: Final = 10**12
"""Seconds to wait for any client, and lost jobs in a row that make a client dead, below the top: an aggregator without
clients goes on waiting, and only the top ends a run for want of them."""

_DEVICE, _AGGREGATOR = "device:", "aggregator:"


class Grove:
    """A run of a tree under way.

    Args:
        run: What it is made of.
        records: Where each aggregator's rows go.
    """

    def __init__(self, run: TreeRun, records: Callable[[str], Record]) -> None:
        self.run, self.tree = run, run.tree
        self.clock = Clock()
        self.over: str | None = None
        self.devices: dict[str, ClientInfo] = {c.name: c for c in run.fleet.clients}
        self.alive: set[str] = set(self.devices) - run.fleet.late()
        self.host: dict[str, str] = dict(run.tree.home)
        """Whom each device was with last."""
        self.down: set[str] = set()
        self.nodes: dict[str, Node] = {name: self._node(name, records(name)) for name in run.tree.downwards()}
        # How many examples are behind an aggregator is a count, which whoever sees updates may know.
        examples = dict.fromkeys(run.tree.places, 0)
        for client in run.fleet.clients:
            for at in run.tree.path(client.name):
                examples[at] += client.examples
        for name, node in self.nodes.items():
            for child in run.tree.children(name):
                node.attach(self.nodes[child], run.tree.link(child), examples[child])

    def _node(self, name: str, record: Record) -> Node:
        run, level, top = self.run, self.tree.level(name), name == self.tree.root
        home, fleet = self.tree.home, self.run.fleet
        own = tuple(c for c in fleet.clients if home[c.name] == name)
        children = Children(run.trainer)
        of = Run(
            pace=level.pace if top else level.pace.but(linger_s=float(FOREVER), give_up=FOREVER),
            fleet=replace(
                fleet,
                clients=own,
                changes=(),
                loss_of={c.name: fleet.loss_of[c.name] for c in own if c.name in fleet.loss_of},
            ),
            trainer=children,
            rule=partial(_rule, level),
            initial={WHOLE: run.initial},
            chain=level.chain,
            seed=run.seed if top else bits(run.seed, of_text(name)) >> 1,
            own_steps=run.own_steps,
            federation=run.federation if top else f"{run.federation}/{name}",
            until=None if run.until is None else partial(self._until, name),
            observe=None if run.observe is None else partial(self._observe, name),
        )
        return Node(of, record, name=name, level=level, clock=self.clock, children=children)

    def _made(self, name: str, published: Published) -> Made:
        return Made(aggregator=name, level=self.tree.places[name].level, published=published)

    def _observe(self, name: str, published: Published) -> None:
        assert self.run.observe is not None
        self.run.observe(self._made(name, published))

    def _until(self, name: str, published: Published) -> bool:
        assert self.run.until is not None
        if self.over is None and self.run.until(self._made(name, published)):
            which = repr(published.model) if name == self.tree.root else repr(name)
            self.over = f"what was waited for has come with version {published.version} of {which}"
        # The aggregator itself goes on; the run ends with this event.
        return False

    def start(self) -> None:
        """Begins: who is there from the beginning joins, from the top down, devices first."""
        for node in self.nodes.values():
            node.dead = {name for name in node.infos if name in self.devices and name not in self.alive}
            node.open()
        for number, change in enumerate(self.run.fleet.changes):
            self.clock.set(Kind.CHANGE, f"/{_DEVICE}{number}", change.at)
        for number, change in enumerate(self.run.changes):
            self.clock.set(Kind.CHANGE, f"/{_AGGREGATOR}{number}", change.at)
        for node in self.nodes.values():
            for name in list(node.infos):
                if name not in node.dead:
                    node.change(name, Move.JOINS)

    @property
    def versions(self) -> int:
        """Made by all aggregators."""
        return sum(node.versions for node in self.nodes.values())

    def advance(self) -> bool:
        """Lets the next thing happen; False if the run is over."""
        if self.over is not None:
            return False
        found = self.clock.next()
        if found is None:
            self.over = "nothing is left to happen"
            return False
        kind, key = found
        owner, _, key = key.partition("/")
        if not owner:
            self._change(key)
        elif owner not in self.down:
            self.nodes[owner].happens(kind, key)
        self.over = self.over or self.nodes[self.tree.root].over
        return self.over is None

    # Who comes and goes.

    def _change(self, key: str) -> None:
        what, _, number = key.partition(":")
        if what + ":" == _DEVICE:
            change = self.run.fleet.changes[int(number)]
            self._device(change.client, change.what)
        else:
            change = self.run.changes[int(number)]
            self._aggregator(change.client, change.what)

    def _device(self, device: str, what: Move) -> None:
        at = self.host[device]
        if what is not Move.JOINS:
            self.alive.discard(device)
            if at not in self.down:
                self.nodes[at].change(device, what)
            return
        self.alive.add(device)
        self._place(device)

    def _aggregator(self, name: str, what: Move) -> None:
        node = self.nodes[name]
        if what is Move.JOINS:
            if name in self.down:
                self._revive(name)
            return
        if name in self.down:
            return
        self.down.add(name)
        node.halt()
        for child in node.lower.values():
            if child.above is not None and child.above.order is not None:
                child.above.ended(child.above.order[0].id, accepted=False)
        if node.parent is not None and node.parent.name not in self.down:
            node.parent.change(name, what)
        for device in self._hosted(name):
            self._place(device)

    def _revive(self, name: str) -> None:
        self.down.discard(name)
        node = self.nodes[name]
        home = [device for device, whose in self.tree.home.items() if whose == name]
        for device in home:
            if device in self.alive and self.host[device] != name and self.host[device] not in self.down:
                self.nodes[self.host[device]].change(device, Move.LEAVES)
            if device in self.alive:
                self.host[device] = name
        here = {device: device in self.alive for device in self.devices if self.tree.home[device] == name}
        node.revive(here | {child: child not in self.down for child in node.lower})
        if node.parent is not None and node.parent.name not in self.down and node.over is None:
            node.parent.change(name, Move.JOINS)
        # Whoever found nobody to go to may now.
        for at in [*sorted(self.down), name]:
            for device in self._hosted(at):
                if device not in here:
                    self._place(device)

    def _hosted(self, name: str) -> list[str]:
        """Devices that are there and were with an aggregator last, in the order of the fleet."""
        return [device for device in self.devices if device in self.alive and self.host[device] == name]

    def _place(self, device: str) -> None:
        """Brings a device to the aggregator that it belongs to now; if there is none, it waits."""
        to = self._where(device)
        if to is None:
            return
        at = self.host[device]
        if at != to and at not in self.down:
            # It may have died there and come back elsewhere.
            self.nodes[at].change(device, Move.LEAVES)
        self.host[device] = to
        node, info = self.nodes[to], self.devices[device]
        if to != self.tree.home[device]:
            node.adopt(self._moved(device, to), self.run.fleet.loss_of.get(device, self.run.fleet.loss))
            info = node.infos[device]
        node.change(info.name, Move.JOINS)

    def _where(self, device: str) -> str | None:
        home = self.tree.home[device]
        if home not in self.down:
            return home
        parent, level = self.tree.places[home].parent, self.tree.level(home)
        if parent is None or level.orphans is Orphans.WAIT:
            return None
        if level.orphans is Orphans.PARENT:
            return None if parent in self.down else parent
        others = [
            name
            for name in self.tree.children(parent)
            if name not in self.down and self.tree.level(name) == level and self.tree.places[name].devices
        ]
        return min(others, key=lambda name: self.nodes[name].state.present, default=None)

    def _moved(self, device: str, to: str) -> ClientInfo:
        """A device's card at another aggregator: at the parent's, its link goes on over that of its own aggregator."""
        info, home = self.devices[device], self.tree.home[device]
        return _through(info, self.tree.link(home)) if to == self.tree.places[home].parent else info

    def readopt(self) -> None:
        """Makes known again, after a resume, who had come from elsewhere."""
        for device in self.devices:
            to = self.host[device]
            if to != self.tree.home[device]:
                loss = self.run.fleet.loss_of.get(device, self.run.fleet.loss)
                self.nodes[to].adopt(self._moved(device, to), loss)

    def result(self) -> TreeResult:
        """How things stand."""
        return TreeResult(
            tree=self.tree,
            why=self.over or "",
            at=self.clock.now,
            adapters={name: node.rule.current for name, node in self.nodes.items()},
            rows={name: node.record.rows for name, node in self.nodes.items()},
            states={name: node.state for name, node in self.nodes.items()},
            levels=tuple(self._report(level) for level in self.tree.levels),
            events=sum(node.events for node in self.nodes.values()),
            problems={name: node.problems for name, node in self.nodes.items()},
        )

    def _report(self, level: Level) -> LevelReport:
        nodes = [node for node in self.nodes.values() if node.level.name == level.name]
        rows = [row for node in nodes for row in node.record.rows]
        updates = sum(row["updates"] for row in rows)
        stale = sum(row["staleness_mean"] * row["updates"] for row in rows)
        return LevelReport(
            level=level.name,
            aggregators=len(nodes),
            versions=len(rows),
            updates=sum(node.totals.absorbed for node in nodes),
            lost=sum(node.totals.lost for node in nodes),
            bytes_up=sum(node.totals.bytes_up for node in nodes),
            bytes_down=sum(node.totals.bytes_down for node in nodes),
            staleness_mean=stale / updates if updates else 0.0,
            staleness_max=max((row["staleness_max"] for row in rows), default=0),
            sent=sum(node.sent for node in nodes),
        )


def _rule(level: Level, initial: Adapter) -> Rule:
    name = default(initial.spec.method) if level.rule is None else level.rule
    return make(name, initial, **level.options)


def _through(info: ClientInfo, link: Link) -> ClientInfo:
    p = info.profile
    profile = replace(
        p,
        up_bytes_per_s=min(p.up_bytes_per_s, link.up_bytes_per_s),
        down_bytes_per_s=min(p.down_bytes_per_s, link.down_bytes_per_s),
        round_trip_s=p.round_trip_s + link.round_trip_s,
    )
    return replace(info, profile=profile)
