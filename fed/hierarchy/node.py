"""One aggregator of a tree: a simulated server for its children, and a client of the one above."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agora.errors import AdapterError
from fed.adapter import Adapter
from fed.aggregate.rule import Base, Contribution
from fed.draws import of_text, uniform
from fed.fleet import Move
from fed.hierarchy.above import Above
from fed.hierarchy.gate import Counts, Gate, Part
from fed.hierarchy.level import Level, Link
from fed.hierarchy.sees import View
from fed.server import begin
from fed.simulator.clock import Clock, Kind
from fed.simulator.record import Absorbed, Record
from fed.simulator.run import Flight, Simulation
from fed.simulator.uplink import HEADER_BYTES, Came
from fed.simulator.words import Run
from fed.state import timers
from fed.words import WHOLE, Absorb, Action, Arrived, ClientInfo, Job, Joined, Left, Profile, Publish, Trained, Trainer

_LOSS_ABOVE = 7
"""What is drawn, so that draws differ from the fleet's."""


class Shared(Clock):
    """An aggregator's part of the one clock.

    Args:
        clock: The one clock.
        owner: The aggregator's name.
    """

    def __init__(self, clock: Clock, owner: str) -> None:
        super().__init__()
        self._clock, self._owner = clock, owner

    @property
    def now(self) -> float:
        """Seconds."""
        return self._clock.now

    @now.setter
    def now(self, value: float) -> None:
        """Time is the one clock's."""

    def set(self, kind: Kind, key: str, at: float) -> None:
        """See `Clock.set`."""
        self._clock.set(kind, f"{self._owner}/{key}", at)

    def drop(self, kind: Kind, key: str) -> None:
        """See `Clock.drop`."""
        self._clock.drop(kind, f"{self._owner}/{key}")


class Children:
    """Who trains for an aggregator: devices do, and aggregators below tell what they have learned.

    Args:
        trainer: Trains for devices.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.node: Node

    def train(self, start: Adapter, job: Job) -> Trained:
        """See `Trainer`."""
        lower = self.node.lower.get(job.client)
        trained = self.trainer.train(start, job) if lower is None else lower.up.trained(job)
        return self.node.gate.outbound(trained)


class Node(Simulation):
    """See the module. For devices it is what a flat simulation is, to the byte.

    A job of an aggregator below is `COMPUTED` when its order has come down; its update is then sent when that
    aggregator is ready.

    Args:
        run: What the simulation of this aggregator is made of; its trainer is `children`.
        record: Where its rows go.
        name: Of the aggregator.
        level: Of the aggregator.
        clock: The one clock.
        children: Who trains for it.
    """

    def __init__(self, run: Run, record: Record, *, name: str, level: Level, clock: Clock, children: Children) -> None:
        super().__init__(run, record)
        self.name, self.level = name, level
        self.clock = Shared(clock, name)
        children.node = self
        if level.sees.what is View.COUNTS:
            self.uplink = Counts(children)
        self.gate = Gate(level.sees, run.pace.weighting, run.initial[WHOLE].spec)
        self.lower: dict[str, Node] = {}
        self.links: dict[str, Link] = {}
        self.parent: Node | None = None
        self.above: Above | None = None
        self.sent = 0

    @property
    def rule(self) -> Base:
        """Its rule."""
        rule = self.rules[WHOLE]
        assert isinstance(rule, Base)
        return rule

    @property
    def up(self) -> Above:
        """What it knows of the level above; there must be one."""
        assert self.above is not None
        return self.above

    def attach(self, lower: Node, link: Link, examples: int) -> None:
        """Puts an aggregator below this one."""
        lower.parent = self
        lower.above = Above(
            base=lower.rule.current,
            every=lower.level.every,
            behind=self.level.sees.behind,
            blind=self.level.sees.what is View.COUNTS,
        )
        profile = Profile(
            up_bytes_per_s=link.up_bytes_per_s, down_bytes_per_s=link.down_bytes_per_s, round_trip_s=link.round_trip_s
        )
        self.infos[lower.name] = ClientInfo(name=lower.name, examples=examples, profile=profile)
        self.lower[lower.name], self.links[lower.name] = lower, link

    def adopt(self, device: ClientInfo, loss: float) -> None:
        """Makes a device known that is to come from another aggregator."""
        if device.name in self.infos:
            return
        self.infos[device.name] = device
        fleet = self.run.fleet
        grown = replace(fleet, clients=(*fleet.clients, device), loss_of={**fleet.loss_of, device.name: loss})
        self.run = replace(self.run, fleet=grown)

    # Its beginning and its end.

    def open(self) -> None:
        """Begins, with nobody there yet."""
        self.state, actions = begin(self.run.pace, seed=self.run.seed, models=tuple(self.run.initial))
        self._do(actions)
        self._warn()

    def halt(self) -> None:
        """Is gone, with all that was on its way to it."""
        for number in self.flights:
            self._stop(str(number))

    def revive(self, here: Mapping[str, bool]) -> None:
        """Is back, with what it had stored. Its jobs are lost, whoever is there joins again.

        Args:
            here: Its own devices and the aggregators below it, and whether they are there.
        """
        for timer in timers(self.state):
            self.clock.set(Kind.TIMER, timer.timer, timer.at)
        for name in sorted(n for n, c in self.state.clients.items() if c.present):
            self._tell(Left(at=self.clock.now, client=name, why="the aggregator was gone"))
        for number in list(self.flights):
            self._land(number, accepted=False)
        self.dead = {name for name in self.infos if not here.get(name, False)}
        for name, there in here.items():
            if there:
                self._join(self.infos[name])

    def _join(self, client: ClientInfo) -> None:
        self._tell(Joined(at=self.clock.now, client=self.gate.joined(client)))

    # Below.

    def happens(self, kind: Kind, key: str) -> None:
        """Lets one thing happen, whose time has come."""
        lower = self.lower.get(self.flights[int(key)].job.client) if kind is Kind.COMPUTED else None
        if lower is None:
            super().happens(kind, key)
            return
        flight = self.flights[int(key)]
        lower.up.ordered(flight.job, flight.start)
        lower.offer()

    def _set_out(self, job: Job, start: Adapter) -> None:
        lower = self.lower.get(job.client)
        if lower is None:
            super()._set_out(job, start)
            return
        # Who has the version already is only told to go on.
        size = HEADER_BYTES if lower.up.have == job.version else self.uplink.down_bytes(job, start)
        self.totals.bytes_down += size
        if job.client not in self.dead:
            profile = self.infos[job.client].profile
            seconds = profile.round_trip_s / 2 + size / profile.down_bytes_per_s
            self.clock.set(Kind.COMPUTED, str(job.id), self.clock.now + seconds)

    def comes(self, job: Job) -> None:
        """An aggregator below sends the update of a job."""
        key, name = str(job.id), job.client
        loss = self.links[name].loss
        if loss and uniform(self.run.fleet.seed, job.id, of_text(name), _LOSS_ABOVE) < loss:
            self.clock.set(Kind.LOST, key, self.clock.now + self.links[name].round_trip_s)
        elif self.uplink.early:
            super().happens(Kind.COMPUTED, key)
        else:
            size = self.uplink.up_bytes(self.flights[job.id].start)
            self.clock.set(Kind.ARRIVED, key, self.clock.now + self.run.fleet.way_back(self.infos[name], size))

    def _told(self, job: Job, came: Came) -> Arrived:
        return self.gate.arrived(super()._told(job, came))

    def _noted(self, action: Absorb, came: Came) -> Absorbed:
        return self.gate.noted(super()._noted(action, came))

    def _loses(self, flight: Flight, why: str, *, problem: bool = True) -> None:
        super()._loses(flight, self.gate.why(why), problem=problem)

    def _give(self, action: Absorb, flight: Flight, came: Came) -> None:
        lower = self.lower.get(action.client)
        part = Part(
            job=action.job,
            child=action.client,
            examples=came.examples,
            devices=1 if lower is None else lower.up.behind_out(),
            loss=came.loss,
        )
        contribution = Contribution(
            client=action.client,
            start=flight.start,
            delta=came.delta,
            weight=action.weight,
            staleness=action.staleness,
            discount=action.discount,
        )
        self.gate.absorb(self.rule, contribution, part)

    def _land(self, number: int, *, accepted: bool) -> None:
        flight = self.flights.get(number)
        super()._land(number, accepted=accepted)
        if flight is not None and flight.job.client in self.lower:
            self.lower[flight.job.client].up.ended(number, accepted=accepted)

    # Its own versions.

    def _make(self, action: Publish) -> Adapter:
        parts: tuple[Part, ...] = ()
        try:
            parts = self.gate.release(self.rule)
            self.rule.publish()
        except AdapterError as e:
            for part in parts or self.gate.dropped():
                if part.child in self.lower:
                    self.lower[part.child].up.dropped(part.job)
            parts = ()
            self._problem(self.gate.why(str(e)))
        for part in parts:
            if part.child in self.lower:
                self.lower[part.child].up.included(part.job, action.version)
        if self.above is not None:
            self._take_in(self.above, parts)
        return self.rule.current

    def _take_in(self, above: Above, parts: tuple[Part, ...]) -> None:
        above.grew(parts)
        move = above.taking()
        if move:
            try:
                self.rule.shift(move)
                above.taken()
            except AdapterError as e:
                self._problem(f"version {above.have} from above could not be taken in: {e}")

    def _notes(self, action: Publish) -> dict[str, Any]:
        notes = super()._notes(action)
        if self.gate.norm is not None:
            notes["norm"] = self.gate.norm
        if self.above is not None:
            notes |= {"above": self.above.version, "sent": self.sent}
        return notes

    # Above.

    def offer(self) -> None:
        """Sends an update up, if one is due."""
        parent, above = self.parent, self.above
        if parent is None or above is None or not above.ready or self.over is not None:
            return
        try:
            job = above.pack(self.rule)
        except AdapterError as e:
            self._problem(f"no update could be made for the level above: {e}")
            return
        self.sent += 1
        parent.comes(job)

    def _do(self, actions: tuple[Action, ...]) -> None:
        super()._do(actions)
        if any(isinstance(action, Publish) for action in actions):
            self.offer()
        if self.over is not None and self.parent is not None and self.name not in self.parent.dead:
            self.parent.change(self.name, Move.LEAVES)
