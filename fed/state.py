"""What a server knows: clients, jobs and models. Frozen, without any tensor, and the same again after JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from immutables import Map

from agora.errors import StoreError
from fed.pace import Pace
from fed.selection import Pools, pools_from_json, pools_to_json
from fed.words import ClientInfo, Job, Profile, SetTimer

FORMAT: Final = 1
"""Of the JSON."""

ALONE: Final = "alone"
LIMIT: Final = "limit"
JOB: Final = "job:"
REST: Final = "rest:"
ROUND: Final = "round:"
GATHER: Final = "gather:"
"""Names of timers; those that end in a colon are followed by a job, a client or a model."""


@dataclass(frozen=True, slots=True)
class Client:
    """A client. One that is present is busy (`job`), resting (`rest_until`) or idle (in one of its model's pools).

    Attributes:
        info: What it told of itself; None for one that was given a model before it joined.
        model: Whose jobs it gets.
        present: Whether it is there.
        job: What it is doing.
        losses: Jobs lost in a row.
        rest_until: When it may get jobs again.
        pool: Which of the pools it is in.
        place: Where in it; -1 for nowhere.
        turn: In which turn of its model's pools it was last chosen.
    """

    info: ClientInfo | None
    model: str
    present: bool = False
    job: int | None = None
    losses: int = 0
    rest_until: float | None = None
    pool: int = 0
    place: int = -1
    turn: int = -1


@dataclass(frozen=True, slots=True)
class Running:
    """A job under way: since when, and when it is written off, in seconds."""

    job: Job
    since: float
    due: float


@dataclass(frozen=True, slots=True)
class Model:
    """A model: one of several where clients are clustered.

    Attributes:
        version: The newest.
        buffer: Jobs absorbed since.
        running: Jobs under way.
        held: Jobs under way by the version they started from.
        pools: Its idle clients.
        turn: How often everybody idle had been chosen.
        opened: Whether jobs may be given out, because enough clients came or were waited for.
        gather_at: When waiting for clients ends.
        round_at: When a version is made of less than a buffer.
        due: Whether that time has come.
        window: The last updates: client, and weight before the cap on shares.
    """

    version: int = 0
    buffer: tuple[int, ...] = ()
    running: int = 0
    held: Map[int, int] = field(default_factory=Map)
    pools: Pools = field(default_factory=lambda: (Map(), Map()))
    turn: int = 0
    opened: bool = False
    gather_at: float | None = None
    round_at: float | None = None
    due: bool = False
    window: tuple[tuple[str, float], ...] = ()

    @property
    def idle(self) -> int:
        """Clients that could be given a job now."""
        return len(self.pools[0]) + len(self.pools[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that a server knows.

    Attributes:
        pace: How it goes about it.
        seed: Of its choices and its jobs' seeds.
        home: Model of clients that were given no other.
        now: The latest time it was told, in seconds.
        clients: By name; those that left are kept, with their losses.
        jobs: Those under way, by id.
        models: By name.
        next_job: The next job's id: so many were given out.
        published: Versions made, of all models.
        present: Clients that are there.
        failing: How many of them count as dead.
        speed: Σ log(seconds per step) of those that are there.
        alone_at: When waiting for any client ends.
        limit_at: When the run ends.
        finished: Why it ended; None while it goes on.
    """

    pace: Pace
    seed: int
    home: str
    now: float
    clients: Map[str, Client] = field(default_factory=Map)
    jobs: Map[int, Running] = field(default_factory=Map)
    models: Map[str, Model] = field(default_factory=Map)
    next_job: int = 0
    published: int = 0
    present: int = 0
    failing: int = 0
    speed: float = 0.0
    alone_at: float | None = None
    limit_at: float | None = None
    finished: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON; `from_json` makes an equal state of it, that goes on in the same way."""
        return {
            "format": FORMAT,
            "pace": self.pace.to_json(),
            "seed": self.seed,
            "home": self.home,
            "now": self.now,
            "clients": [_client_to_json(name, self.clients[name]) for name in sorted(self.clients)],
            "jobs": [_running_to_json(self.jobs[i]) for i in sorted(self.jobs)],
            "models": {name: _model_to_json(self.models[name]) for name in sorted(self.models)},
            "next_job": self.next_job,
            "published": self.published,
            "present": self.present,
            "failing": self.failing,
            "speed": self.speed,
            "alone_at": self.alone_at,
            "limit_at": self.limit_at,
            "finished": self.finished,
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> State:
        """Reads what `to_json` wrote.

        Raises:
            StoreError: If it is something else, or of another format.
        """
        if body.get("format") != FORMAT:
            raise StoreError(f"the server's state has format {body.get('format')!r}; this version reads {FORMAT}")
        try:
            plain = {key: body[key] for key in _PLAIN}
            return cls(
                pace=Pace.from_json(body["pace"]),
                clients=Map([_client_from_json(c) for c in body["clients"]]),
                jobs=Map([(r.job.id, r) for r in map(_running_from_json, body["jobs"])]),
                models=Map([(name, _model_from_json(m)) for name, m in body["models"].items()]),
                **plain,
            )
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise StoreError(f"the server's state cannot be read: {type(e).__name__}: {e}") from e


_PLAIN: Final = (
    *("seed", "home", "now", "next_job", "published", "present", "failing", "speed", "alone_at", "limit_at"),
    "finished",
)


def timers(state: State) -> tuple[SetTimer, ...]:
    """The timers that are set, for a driver that takes up a saved state and kept no list of its own."""
    return pending(state) if state.finished is None else ()


def pending(state: State) -> tuple[SetTimer, ...]:
    """The timers that a state has set, its end disregarded."""
    found: list[tuple[str, float | None]] = [(ALONE, state.alone_at), (LIMIT, state.limit_at)]
    found += [(f"{JOB}{i}", state.jobs[i].due) for i in sorted(state.jobs)]
    found += [(f"{REST}{n}", c.rest_until) for n, c in sorted(state.clients.items()) if c.present]
    found += [(f"{GATHER}{n}", m.gather_at) for n, m in sorted(state.models.items())]
    found += [(f"{ROUND}{n}", m.round_at) for n, m in sorted(state.models.items())]
    return tuple(SetTimer(timer=name, at=at) for name, at in found if at is not None)


def job_to_json(job: Job) -> list[Any]:
    """A job as a JSON list."""
    return [job.id, job.client, job.model, job.version, job.seed, job.steps, job.rank]


def job_from_json(body: list[Any]) -> Job:
    """Reads what `job_to_json` wrote."""
    number, client, model, version, seed, steps, rank = body
    return Job(id=number, client=client, model=model, version=version, seed=seed, steps=steps, rank=rank)


def info_to_json(info: ClientInfo) -> list[Any]:
    """A client's card as a JSON list; infinite bandwidth, which JSON lacks, as text."""
    p = info.profile
    numbers = (p.seconds_per_step, p.up_bytes_per_s, p.down_bytes_per_s, p.round_trip_s)
    return [info.name, info.examples, info.rank, *(str(float(n)) for n in numbers)]


def info_from_json(body: list[Any]) -> ClientInfo:
    """Reads what `info_to_json` wrote."""
    name, examples, rank, step, up, down, trip = body
    profile = Profile(
        seconds_per_step=float(step), up_bytes_per_s=float(up), down_bytes_per_s=float(down), round_trip_s=float(trip)
    )
    return ClientInfo(name=name, examples=examples, rank=rank, profile=profile)


def _client_to_json(name: str, c: Client) -> list[Any]:
    info = None if c.info is None else info_to_json(c.info)
    return [name, info, c.model, c.present, c.job, c.losses, c.rest_until, c.pool, c.place, c.turn]


def _client_from_json(body: list[Any]) -> tuple[str, Client]:
    name, info, *rest = body
    return name, Client(None if info is None else info_from_json(info), *rest)


def _running_to_json(running: Running) -> list[Any]:
    return [job_to_json(running.job), running.since, running.due]


def _running_from_json(body: list[Any]) -> Running:
    job, since, due = body
    return Running(job_from_json(job), since, due)


def _model_to_json(m: Model) -> dict[str, Any]:
    return {
        "version": m.version,
        "buffer": list(m.buffer),
        "running": m.running,
        "held": [[v, m.held[v]] for v in sorted(m.held)],
        "pools": pools_to_json(m.pools),
        "turn": m.turn,
        "opened": m.opened,
        "gather_at": m.gather_at,
        "round_at": m.round_at,
        "due": m.due,
        "window": [list(entry) for entry in m.window],
    }


def _model_from_json(body: Mapping[str, Any]) -> Model:
    return Model(
        version=body["version"],
        buffer=tuple(body["buffer"]),
        running=body["running"],
        held=Map([(v, n) for v, n in body["held"]]),
        pools=pools_from_json(body["pools"]),
        turn=body["turn"],
        opened=body["opened"],
        gather_at=body["gather_at"],
        round_at=body["round_at"],
        due=body["due"],
        window=tuple((client, weight) for client, weight in body["window"]),
    )
