"""One step of the server under way: what changes in its state, and what it wants done."""

from __future__ import annotations

import math
from dataclasses import fields
from operator import attrgetter
from typing import Any, Final

from fed.draws import below, bits
from fed.pace import BALANCE_MOST
from fed.selection import put, take
from fed.state import GATHER, JOB, REST, Client, Model, Running, State
from fed.words import Action, Assign, Cancel, ClientInfo, DropTimer, Job, Release, SetTimer

_SEED_OF_JOB: Final = 1
_SEED_OF_CHOICE: Final = 2
"""What random bits are for, so that they differ."""

_STATE: Final = tuple(f.name for f in fields(State))
_OF_STATE, _OF_MODEL, _OF_CLIENT = (attrgetter(*(f.name for f in fields(kind))) for kind in (State, Model, Client))
_set = object.__setattr__
"""A step changes the same model and client several times. The first change makes a copy, which nobody else knows before
the step is over, and the later ones are written into that: three times as fast as copying each time."""

FASTEST_S: Final = 1e-9
"""Seconds per step that a client is taken at if it tells of less: its logarithm is needed."""


class Turn:
    """A state that is being changed. It lives within one step; `done` freezes it again.

    Args:
        state: What it was.
        at: The event's time; one that goes back, or is no finite number, is taken as the latest known.
    """

    __slots__ = (
        "_own_clients",
        "_own_models",
        "actions",
        "changed",
        "clients",
        "jobs",
        "models",
        "now",
        "pace",
        "state",
        "touched",
    )

    def __init__(self, state: State, at: float) -> None:
        self.state = state
        self.pace = state.pace
        self.clients = state.clients
        self.jobs = state.jobs
        self.models = state.models
        self.now = at if at > state.now and math.isfinite(at) else state.now
        self.changed: dict[str, Any] = {}
        self.actions: list[Action] = []
        self.touched: dict[str, None] = {}
        self._own_models: set[str] = set()
        self._own_clients: set[str] = set()

    def done(self) -> tuple[State, tuple[Action, ...]]:
        """The new state, and the actions in their order."""
        values = dict(zip(_STATE, _OF_STATE(self.state), strict=True))
        values |= self.changed
        values |= {"now": self.now, "clients": self.clients, "jobs": self.jobs, "models": self.models}
        return State(**values), tuple(self.actions)

    def get(self, field: str) -> Any:
        """One of the state's single values, as changed so far."""
        return self.changed[field] if field in self.changed else getattr(self.state, field)

    def add(self, field: str, more: float) -> None:
        """Adds to one of the state's counts or sums."""
        self.changed[field] = self.get(field) + more

    def do(self, action: Action) -> None:
        """Wants something done."""
        self.actions.append(action)

    def model(self, name: str, **changes: Any) -> Model:
        """Changes a model, and has it looked at again before the step ends."""
        found = self.models[name]
        if name not in self._own_models:
            found = Model(*_OF_MODEL(found))
            self.models = self.models.set(name, found)
            self._own_models.add(name)
        for field, value in changes.items():
            _set(found, field, value)
        self.touched[name] = None
        return found

    def client(self, name: str, **changes: Any) -> Client:
        """Changes a client."""
        found = self.clients[name]
        if name not in self._own_clients:
            found = Client(*_OF_CLIENT(found))
            self.clients = self.clients.set(name, found)
            self._own_clients.add(name)
        for field, value in changes.items():
            _set(found, field, value)
        return found

    # Who is there.

    def arrives(self, info: ClientInfo) -> None:
        """A client is there from now on; it is neither idle nor resting yet."""
        before = self.clients.get(info.name)
        model = before.model if before is not None else self.state.home
        losses = before.losses if before is not None else 0
        rest = before.rest_until if before is not None else None
        self.clients = self.clients.set(info.name, Client(info, model, True, None, losses, rest))
        self._count(info, losses, 1)

    def departs(self, name: str) -> None:
        """A client that is neither busy nor idle is gone."""
        client = self.clients[name]
        assert client.info is not None
        self._count(client.info, client.losses, -1)
        if client.rest_until is not None:
            self.do(DropTimer(timer=REST + name))
        self.client(name, present=False)

    def _count(self, info: ClientInfo, losses: int, by: int) -> None:
        self.add("present", by)
        self.add("speed", by * math.log(seconds_per_step(info)))
        if losses >= self.pace.give_up:
            self.add("failing", by)

    def idles(self, name: str) -> None:
        """A client that is present, and not busy, may be given a job, unless it still has to rest."""
        client = self.clients[name]
        if client.rest_until is not None and client.rest_until > self.now:
            self.do(SetTimer(timer=REST + name, at=client.rest_until))
            return
        model = self.models[client.model]
        fresh = model.turn % 2
        which = fresh if client.turn < model.turn else 1 - fresh
        pools, place = put(model.pools, which, name)
        self.client(name, rest_until=None, pool=which, place=place)
        self.model(client.model, pools=pools)

    def wakes(self, name: str) -> None:
        """A client's rest is over."""
        self.client(name, rest_until=None)
        self.idles(name)

    def unidles(self, name: str) -> None:
        """An idle client is so no longer."""
        client = self.clients[name]
        if client.place < 0:
            return
        pools, moved = take(self.models[client.model].pools, client.pool, client.place)
        if moved is not None:
            self.client(moved, place=client.place)
        self.client(name, place=-1)
        self.model(client.model, pools=pools)

    # Jobs.

    def assign(self, name: str) -> None:
        """Gives a job of this model to one of its idle clients; there must be one."""
        number: int = self.get("next_job")
        model = self.models[name]
        turn = model.turn if len(model.pools[model.turn % 2]) else model.turn + 1
        fresh = model.pools[turn % 2]
        who = fresh[below(len(fresh), self.state.seed, number, _SEED_OF_CHOICE)]
        self.unidles(who)
        client = self.clients[who]
        assert client.info is not None
        job = Job(
            id=number,
            client=who,
            model=name,
            version=model.version,
            # 63 bits: other generators take signed ones.
            seed=bits(self.state.seed, number, _SEED_OF_JOB) >> 1,
            steps=self._steps(client.info),
            rank=client.info.rank,
        )
        due = self.now + self.pace.job_timeout_s
        self.jobs = self.jobs.set(number, Running(job, self.now, due))
        self.client(who, job=number, turn=turn)
        held = model.held.set(job.version, model.held.get(job.version, 0) + 1)
        self.model(name, turn=turn, running=model.running + 1, held=held)
        self.changed["next_job"] = number + 1
        self.do(Assign(job=job))
        self.do(SetTimer(timer=f"{JOB}{number}", at=due))

    def _steps(self, info: ClientInfo) -> int | None:
        steps = self.pace.steps
        if steps is None or not self.pace.balanced:
            return steps
        mean = math.exp(self.get("speed") / self.get("present"))
        factor = min(max(mean / seconds_per_step(info), 1.0 / BALANCE_MOST), BALANCE_MOST)
        return max(1, round(steps * factor))

    def ends(self, job: Job) -> None:
        """A job is under way no more; its client is neither busy nor idle."""
        self.jobs = self.jobs.delete(job.id)
        self.do(DropTimer(timer=f"{JOB}{job.id}"))
        self.client(job.client, job=None)
        model = self.models[job.model]
        others = model.held[job.version] - 1
        if others:
            held = model.held.set(job.version, others)
        else:
            held = model.held.delete(job.version)
            if job.version < model.version:
                self.do(Release(model=job.model, version=job.version))
        self.model(job.model, running=model.running - 1, held=held)

    def loses(self, running: Running) -> None:
        """A job came to nothing by its client's doing; the client rests if that happens again and again."""
        job = running.job
        self.ends(job)
        losses = self.clients[job.client].losses + 1
        if losses == self.pace.give_up:
            self.add("failing", 1)
        rest = None
        if losses > 1:
            # As long as the job took: a rest then costs about as much as was lost, whatever the scale of time.
            took = max(self.now - running.since, self.pace.rest_s)
            rest = self.now + min(took * 2.0 ** min(losses - 2, 60), self.pace.rest_max_s)
        self.client(job.client, losses=losses, rest_until=rest)

    def heard(self, name: str) -> None:
        """A client has shown that it works."""
        losses = self.clients[name].losses
        if losses:
            if losses >= self.pace.give_up:
                self.add("failing", -1)
            self.client(name, losses=0)

    def cancels(self, running: Running, why: str) -> None:
        """A job is stopped, by no fault of its client."""
        job = running.job
        self.do(Cancel(job=job.id, client=job.client, why=why))
        self.ends(job)
        self.idles(job.client)

    def drop_gathering(self, name: str) -> None:
        """Waits for no more clients of a model."""
        if self.models[name].gather_at is not None:
            self.do(DropTimer(timer=GATHER + name))
            self.model(name, gather_at=None)


def seconds_per_step(info: ClientInfo) -> float:
    """What a client tells of itself, if that can be."""
    told = info.profile.seconds_per_step
    return max(told, FASTEST_S) if math.isfinite(told) else 1.0
