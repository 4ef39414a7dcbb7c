"""The driver under a virtual clock: it tells the server what happens, and does what the server wants done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from agora.errors import AdapterError, AgoraError
from fed.adapter import Adapter
from fed.aggregate.rule import Contribution, Rule
from fed.fleet import Move
from fed.server import begin, step
from fed.simulator.clock import Clock, Kind
from fed.simulator.record import Absorbed, Record, Totals, row
from fed.simulator.uplink import Came, Direct, Uplink, Wired
from fed.simulator.words import Published, Result, Run
from fed.state import JOB, State
from fed.words import (
    Absorb,
    Action,
    Arrived,
    Assign,
    Cancel,
    ClientInfo,
    DropTimer,
    Event,
    Finish,
    Job,
    Joined,
    Left,
    Lost,
    Publish,
    Rang,
    Refuse,
    Regrouped,
    Release,
    SetTimer,
)

PROBLEMS_KEPT: Final = 20
"""Problems told with a version: who has more has one that shows in twenty."""


@dataclass(slots=True, eq=False)
class Flight:
    """A job under way: what it is, what it starts from, and its message once that is sent."""

    job: Job
    start: Adapter
    message: bytes | None = None


class Simulation:
    """A run under way.

    Args:
        run: What it is made of.
        record: Where its rows go.
    """

    def __init__(self, run: Run, record: Record) -> None:
        self.run, self.record = run, record
        self.infos: dict[str, ClientInfo] = {c.name: c for c in run.fleet.clients}
        self.uplink: Uplink = (
            Direct(run.trainer) if run.chain is None else Wired(run.trainer, run.chain, run.federation)
        )
        self.clock = Clock()
        self.initial: dict[str, Adapter] = dict(run.initial)
        self.rules: dict[str, Rule] = {name: run.rule(adapter) for name, adapter in run.initial.items()}
        self.state: State
        self.flights: dict[int, Flight] = {}
        self.starts: dict[tuple[str, int], dict[int | None, Adapter]] = {}
        self.buffered: dict[str, list[Absorbed]] = {name: [] for name in self.rules}
        self.dead: set[str] = set()
        self.totals = Totals()
        self.over: str | None = None
        self.events = 0
        self.problems: list[str] = []
        self.versions = 0
        self._came: Came | None = None
        self._ringing = ""
        self._waiting: deque[Event] = deque()

    def start(self) -> None:
        """Begins: all clients that are there from the beginning join, in the order of the fleet."""
        run = self.run
        self.dead = set(run.fleet.late())
        self.state, actions = begin(run.pace, seed=run.seed, models=tuple(run.initial))
        self._do(actions)
        self._warn()
        if run.groups:
            self._tell(Regrouped(at=0.0, models=run.groups))
        for number, change in enumerate(run.fleet.changes):
            self.clock.set(Kind.CHANGE, str(number), change.at)
        for client in run.fleet.clients:
            if client.name not in self.dead:
                self._join(client)

    def _warn(self) -> None:
        run = self.run
        if slow := too_slow(run):
            name, seconds = next(iter(slow.items()))
            self._problem(
                f"{len(slow)} of {len(run.fleet.clients)} clients compute longer than job_timeout_s, "
                f"{run.pace.job_timeout_s:g} s, allows ({name!r}: {seconds:g} s): their jobs will be written off"
            )

    def advance(self) -> bool:
        """Lets the next thing happen; False if the run is over."""
        if self.over is not None:
            return False
        found = self.clock.next()
        if found is None:
            # The server always has a timer set while it waits, so this is never reached by its doing.
            self.over = "nothing is left to happen"
            return False
        self.happens(*found)
        return self.over is None

    def happens(self, kind: Kind, key: str) -> None:
        """Lets one thing happen, whose time has come."""
        _HAPPENS[kind](self, key)

    def result(self) -> Result:
        """How things stand."""
        return Result(
            why=self.over or "",
            at=self.clock.now,
            adapters={name: rule.current for name, rule in sorted(self.rules.items())},
            rows=self.record.rows,
            state=self.state,
            events=self.events,
            problems=self.problems,
        )

    # What happens.

    def _timer(self, key: str) -> None:
        self._ringing = key
        self._tell(Rang(at=self.clock.now, timer=key))
        self._ringing = ""

    def _change(self, key: str) -> None:
        change = self.run.fleet.changes[int(key)]
        self.change(change.client, change.what)

    def change(self, client: str, what: Move) -> None:
        """A client comes or goes."""
        if what is Move.JOINS:
            self.dead.discard(client)
            self._join(self.infos[client])
            return
        self.dead.add(client)
        flights = [number for number, f in self.flights.items() if f.job.client == client]
        for number in flights:
            self._stop(str(number))
        if what is Move.LEAVES:
            self.totals.lost += len(flights)
            self._tell(Left(at=self.clock.now, client=client))
            for number in flights:
                self._land(number, accepted=False)

    def _join(self, client: ClientInfo) -> None:
        grouping = self.run.grouping
        if grouping is not None and (model := grouping.joins(client)) is not None:
            self._tell(Regrouped(at=self.clock.now, models={client.name: model}))
        self._tell(Joined(at=self.clock.now, client=client))

    def _lost(self, key: str) -> None:
        self._loses(self.flights[int(key)], "it was lost on its way", problem=False)

    def _computed(self, key: str) -> None:
        flight = self.flights[int(key)]
        try:
            flight.message = self.uplink.send(flight.job, flight.start)
        except AgoraError as e:
            self._loses(flight, str(e))
            return
        back = self.run.fleet.way_back(self.infos[flight.job.client], len(flight.message))
        self.clock.set(Kind.ARRIVED, key, self.clock.now + back)

    def _arrived(self, key: str) -> None:
        flight = self.flights[int(key)]
        job, start, message = flight.job, flight.start, flight.message
        self.totals.bytes_up += self.uplink.up_bytes(start) if message is None else len(message)
        try:
            came = self.uplink.receive(job, start, self.infos[job.client], message)
        except AgoraError as e:
            self._loses(flight, str(e))
            return
        self._came = came
        self._tell(self._told(job, came))

    def _told(self, job: Job, came: Came) -> Arrived:
        """What the server is told of an update."""
        return Arrived(
            at=self.clock.now,
            job=job.id,
            client=job.client,
            examples=came.examples,
            steps=came.steps,
            norm=came.norm,
            loss=came.loss,
        )

    def _loses(self, flight: Flight, why: str, *, problem: bool = True) -> None:
        job = flight.job
        self.totals.lost += 1
        if problem:
            self._problem(f"job {job.id} of {job.client!r} came to nothing: {why}")
        self._tell(Lost(at=self.clock.now, job=job.id, client=job.client, why=why))
        self._land(job.id, accepted=False)

    def _tell(self, event: Event) -> None:
        self._waiting.append(event)
        while self._waiting:
            self.state, actions = step(self.state, self._waiting.popleft())
            self.events += 1
            self._do(actions)

    # What is to be done.

    def _do(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            _DOES[type(action)](self, action)

    def _assign(self, action: Assign) -> None:
        job = action.job
        starts = self.starts.setdefault((job.model, job.version), {})
        start = starts.get(job.rank)
        if start is None:
            rule = self.rules[job.model]
            start = starts[job.rank] = rule.start_for(rule.current, job.rank)
        self.flights[job.id] = Flight(job, start)
        self.totals.assigned += 1
        self._set_out(job, start)

    def _set_out(self, job: Job, start: Adapter) -> None:
        """Sends a job to its client."""
        fleet, size = self.run.fleet, self.uplink.down_bytes(job, start)
        self.totals.bytes_down += size
        if job.client in self.dead:
            return
        key, info = str(job.id), self.infos[job.client]
        journey = fleet.journey(info, job, steps=self._steps(job), down_bytes=size)
        if journey.lost_s is not None:
            if not journey.silent:
                self.clock.set(Kind.LOST, key, self.clock.now + journey.lost_s)
        elif self.uplink.early:
            self.clock.set(Kind.COMPUTED, key, self.clock.now + journey.computed_s)
        else:
            back = fleet.way_back(info, self.uplink.up_bytes(start))
            self.clock.set(Kind.ARRIVED, key, self.clock.now + journey.computed_s + back)

    def _steps(self, job: Job) -> int:
        return own_steps(self.run, job.client) if job.steps is None else job.steps

    def _absorb(self, action: Absorb) -> None:
        flight, came = self.flights[action.job], self._came
        assert came is not None
        try:
            self._give(action, flight, came)
        except AdapterError as e:
            self._problem(f"the update of job {action.job} by {action.client!r} was left out: {e}")
            self.totals.refused += 1
            self._land(action.job, accepted=False)
            return
        self.totals.absorbed += 1
        self.buffered[action.model].append(self._noted(action, came))
        if self.run.grouping is not None:
            self.run.grouping.absorbed(flight.job, flight.start, came.delta)
        self._land(action.job, accepted=True)

    def _give(self, action: Absorb, flight: Flight, came: Came) -> None:
        """Gives an update to the rule."""
        self.rules[action.model].absorb(
            Contribution(
                client=action.client,
                start=flight.start,
                delta=came.delta,
                weight=action.weight,
                staleness=action.staleness,
                discount=action.discount,
            )
        )

    def _noted(self, action: Absorb, came: Came) -> Absorbed:
        """What the record will tell of an update."""
        return Absorbed(action.client, action.staleness, action.weight, came.norm, came.examples, came.loss)

    def _publish(self, action: Publish) -> None:
        now = self.clock.now
        adapter = self._make(action)
        one = row(now, action.model, action.version, self.buffered[action.model], self.totals)
        self.buffered[action.model] = []
        one["notes"] = self._notes(action)
        one["problems"], self.problems = self.problems, []
        self.record.add(one)
        self.versions += 1
        published = Published(at=now, model=action.model, version=action.version, adapter=adapter, row=one)
        if self.run.observe is not None:
            self.run.observe(published)
        if self.run.until is not None and self.over is None and self.run.until(published):
            self.over = f"what was waited for has come with version {action.version} of {action.model!r}"
        if self.run.grouping is not None and (change := self.run.grouping.regroup(published)) is not None:
            for name, adapter in change.starts.items():
                if name not in self.rules:
                    self._add_model(name, adapter)
            self._waiting.append(Regrouped(at=now, models=change.models))

    def _make(self, action: Publish) -> Adapter:
        """The next version; the last one again where that would hold NaN."""
        rule = self.rules[action.model]
        try:
            return rule.publish()
        except AdapterError as e:
            self._problem(str(e))
            return rule.current

    def _notes(self, action: Publish) -> dict[str, Any]:
        """What the record tells of how a version was made."""
        return dict(self.rules[action.model].notes)

    def _add_model(self, name: str, adapter: Adapter) -> None:
        self.initial[name] = adapter
        self.rules[name] = self.run.rule(adapter)
        self.buffered[name] = []

    def _refuse(self, action: Refuse) -> None:
        self.totals.refused += 1
        self._problem(f"the update of job {action.job} by {action.client!r} was refused: {action.why}")
        self._land(action.job, accepted=False)

    def _cancel(self, action: Cancel) -> None:
        if action.job in self.flights:
            if self._ringing == f"{JOB}{action.job}":
                self.totals.lost += 1
            else:
                self.totals.cancelled += 1
            self._land(action.job, accepted=False)

    def _release(self, action: Release) -> None:
        self.starts.pop((action.model, action.version), None)

    def _set_timer(self, action: SetTimer) -> None:
        self.clock.set(Kind.TIMER, action.timer, action.at)

    def _drop_timer(self, action: DropTimer) -> None:
        self.clock.drop(Kind.TIMER, action.timer)

    def _finish(self, action: Finish) -> None:
        self.over = self.over or action.why

    def _problem(self, text: str) -> None:
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append(text)

    def _land(self, number: int, *, accepted: bool) -> None:
        """A job is over, one way or another."""
        flight = self.flights.pop(number, None)
        if flight is not None:
            self._stop(str(number))
            self.uplink.settle(flight.job, accepted=accepted)

    def _stop(self, key: str) -> None:
        for kind in (Kind.ARRIVED, Kind.LOST, Kind.COMPUTED):
            self.clock.drop(kind, key)


def own_steps(run: Run, client: str) -> int:
    """Steps of a client's jobs where the pace leaves them to it."""
    own = run.own_steps
    return own if isinstance(own, int) else own.get(client, 1)


def too_slow(run: Run) -> dict[str, float]:
    """Clients that cannot do a job before it is written off: the seconds that they compute, by name."""
    if run.pace.balanced:
        return {}
    took = {c.name: (run.pace.steps or own_steps(run, c.name)) * c.profile.seconds_per_step for c in run.fleet.clients}
    return {name: seconds for name, seconds in took.items() if seconds > run.pace.job_timeout_s}


_HAPPENS: Final[Mapping[Kind, Callable[[Simulation, str], None]]] = {
    Kind.TIMER: Simulation._timer,
    Kind.CHANGE: Simulation._change,
    Kind.LOST: Simulation._lost,
    Kind.COMPUTED: Simulation._computed,
    Kind.ARRIVED: Simulation._arrived,
}

_DOES: Final[Mapping[type, Callable[[Simulation, Any], None]]] = {
    Assign: Simulation._assign,
    Absorb: Simulation._absorb,
    Publish: Simulation._publish,
    Refuse: Simulation._refuse,
    Cancel: Simulation._cancel,
    Release: Simulation._release,
    SetTimer: Simulation._set_timer,
    DropTimer: Simulation._drop_timer,
    Finish: Simulation._finish,
}
