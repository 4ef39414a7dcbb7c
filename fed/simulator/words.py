"""What a simulation is made of and what it tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from agora.errors import ConfigError
from fed.adapter import Adapter, Vector
from fed.aggregate.rule import Rule
from fed.aggregate.rule import State as Held
from fed.chain import Chain
from fed.fleet import Fleet
from fed.pace import Pace
from fed.simulator.record import Row
from fed.state import State
from fed.words import ClientInfo, Job, Trainer

EVERY_S: Final = 30.0
"""Seconds of real time between two checkpoints: what a crash costs at most, beside the job being trained."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Published:
    """A version that was just made.

    Attributes:
        at: Virtual seconds.
        model: Of which model.
        version: Its number.
        adapter: Its numbers.
        row: What the record tells of it.
    """

    at: float
    model: str
    version: int
    adapter: Adapter
    row: Row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Regroup:
    """Clients get other models.

    Attributes:
        models: Model by client; clients not named keep theirs.
        starts: What models begin with that are not there yet; they are at version 0 then.
    """

    models: Mapping[str, str]
    starts: Mapping[str, Adapter] = field(default_factory=dict)


class Grouping(Protocol):
    """Decides which client belongs to which model while a run goes on. Must be deterministic."""

    def joins(self, client: ClientInfo) -> str | None:
        """Model of a client that is about to join; None if that is left as it is."""

    def absorbed(self, job: Job, start: Adapter, delta: Vector) -> None:
        """An update that was used."""

    def regroup(self, published: Published) -> Regroup | None:
        """Asked after every version."""

    def state(self) -> Held:
        """All that it holds, to go on later."""

    def load_state(self, state: Held) -> None:
        """Goes on where `state` was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """Where a run is saved, and how often. A run whose folder has a checkpoint goes on from it.

    Attributes:
        folder: Made if it is not there. The record is in it, too: `record.jsonl`.
        versions: Versions between two checkpoints; None to go by time.
        seconds: Seconds of real time between two checkpoints, where `versions` is None.
        stop: Asked after everything that happens; True makes a checkpoint and ends the call, not the run.
    """

    folder: Path
    versions: int | None = None
    seconds: float = EVERY_S
    stop: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        if self.versions is not None and self.versions < 1:
            raise ConfigError(f"{self.versions} versions between two checkpoints; there must be one at least")
        if not self.seconds >= 0:
            raise ConfigError(f"{self.seconds} s between two checkpoints; that must be a number from 0")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """Everything that determines a run, and who is told of it; see `fed.simulate.simulate`."""

    pace: Pace
    fleet: Fleet
    trainer: Trainer
    rule: Callable[[Adapter], Rule]
    initial: Mapping[str, Adapter]
    chain: Chain | None = None
    seed: int = 0
    own_steps: int | Mapping[str, int] = 1
    groups: Mapping[str, str] = field(default_factory=dict)
    grouping: Grouping | None = None
    federation: str = "simulation"
    about: Mapping[str, Any] = field(default_factory=dict)
    until: Callable[[Published], bool] | None = None
    observe: Callable[[Published], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """How a run ended.

    Attributes:
        why: Why it ended.
        at: Virtual seconds it took.
        adapters: The newest version of every model.
        rows: The record, one row per version.
        state: All that the server knew.
        events: Events that the server was told, in this process.
        problems: What went wrong since the last version; earlier ones are in the rows.
    """

    why: str
    at: float
    adapters: Mapping[str, Adapter]
    rows: list[Row]
    state: State
    events: int
    problems: list[str]
