"""The words that server, simulator and clients share: jobs, events and actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fed.adapter import Adapter, Vector

WHOLE = "all"
"""The one model where clients are not clustered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a client's machine and link can do, as far as told or measured.

    Attributes:
        seconds_per_step: Of one local training step.
        up_bytes_per_s: Of its link towards the server.
        down_bytes_per_s: Of its link from the server.
        round_trip_s: Of its link.
    """

    seconds_per_step: float = 1.0
    up_bytes_per_s: float = float("inf")
    down_bytes_per_s: float = float("inf")
    round_trip_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientInfo:
    """A client as the server knows it.

    Attributes:
        name: Unique in the federation.
        examples: Rows it trains on; its weight in plain averaging.
        rank: Highest LoRA rank it can train; None for the server's own.
        profile: Of its machine and link.
    """

    name: str
    examples: int = 1
    rank: int | None = None
    profile: Profile = Profile()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a client is asked to do: train so many steps from that version.

    Attributes:
        id: Unique within a run; rises.
        client: Whose it is.
        model: Which model: a cluster's name, `WHOLE` without clusters.
        version: The version of that model to start from.
        seed: Of everything random in it.
        steps: Local steps; None for the client's own setting.
        rank: LoRA rank to train at; None for the server's own.
    """

    id: int
    client: str
    model: str
    version: int
    seed: int
    steps: int | None = None
    rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What came of a job, at the client.

    Attributes:
        delta: The adapter after training minus the one it started from, shape (spec.size,) of the job's rank.
        examples: Rows the client has.
        steps: Steps taken.
        metrics: What may be told: `loss`, `loss_before`, `grad_norm`, tokens …, never data.
    """

    delta: Vector
    examples: int
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Trainer(Protocol):
    """Trains for clients: same start and same job give the same bytes, whatever was trained in between."""

    def train(self, start: Adapter, job: Job) -> Trained:
        """Trains `job.client`'s adapter on its data, from `start`."""


# Events: what happens to a server. `at` is when, in seconds on the driver's clock, and never goes back.


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A client is there and idle."""

    at: float
    client: ClientInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A client is gone; what it was doing is lost."""

    at: float
    client: str
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A client's update is here, was read and found sound. The numbers themselves stay with the driver.

    Attributes:
        norm: ‖delta‖₂.
        examples: As told in the update.
        steps: As told in the update.
        loss: The client's training loss, if told.
    """

    at: float
    job: int
    client: str
    examples: int
    steps: int
    norm: float
    loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A job came to nothing: the client failed, its link broke, or its update was unreadable."""

    at: float
    job: int
    client: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rang:
    """A timer that the server had set went off."""

    at: float
    timer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Regrouped:
    """Clients belong to other models from now on. Clients not named keep theirs.

    Attributes:
        models: Model by client.
    """

    at: float
    models: Mapping[str, str]


Event = Joined | Left | Arrived | Lost | Rang | Regrouped


# Actions: what a server wants done. The driver does them in the order given.


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign:
    """Send a job to its client. The version it starts from is kept until the job has ended."""

    job: Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Absorb:
    """Add a job's update to what the model's next version is made of.

    Attributes:
        job: Whose update.
        client: Who made it.
        model: Of which model.
        weight: c = w·discount(τ): relative weight before it is divided by the weights' sum.
        staleness: τ, versions published since the one it started from.
        discount: discount(τ), which is in the weight already: w is weight/discount. Rules divide by the sum of w, or
            staleness would not make the step smaller when all updates are equally stale.
    """

    job: int
    client: str
    model: str
    weight: float
    staleness: int
    discount: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Make a version of what was absorbed since the last one.

    Attributes:
        version: Its number.
        jobs: Whose updates are in it.
    """

    model: str
    version: int
    jobs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """An update is not used; its numbers may be dropped."""

    job: int
    client: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Tell a client to stop a job, if it can be told."""

    job: int
    client: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """No job starts from this version any more, nor will one: its numbers may be dropped."""

    model: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SetTimer:
    """Send `Rang` at that time; a timer of the same name is replaced."""

    timer: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DropTimer:
    """Forget a timer."""

    timer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The run is over."""

    why: str


Action = Assign | Absorb | Publish | Refuse | Cancel | Release | SetTimer | DropTimer | Finish
