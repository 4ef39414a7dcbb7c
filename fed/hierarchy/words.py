"""What a run of a tree is made of and what it tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agora.errors import ConfigError
from fed.adapter import Adapter
from fed.fleet import Change, Fleet
from fed.hierarchy.tree import Tree
from fed.simulator.record import Row
from fed.simulator.words import Published
from fed.state import State
from fed.words import Trainer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Made:
    """A version that an aggregator just made.

    Attributes:
        aggregator: Its name.
        level: Its level's name.
        published: The version.
    """

    aggregator: str
    level: str
    published: Published


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeRun:
    """Everything that determines a run, and who is told of it; see `fed.hierarchy.simulate_tree`."""

    tree: Tree
    fleet: Fleet
    trainer: Trainer
    initial: Adapter
    seed: int = 0
    own_steps: int | Mapping[str, int] = 1
    changes: tuple[Change, ...] = ()
    federation: str = "simulation"
    about: Mapping[str, Any] = field(default_factory=dict)
    until: Callable[[Made], bool] | None = None
    observe: Callable[[Made], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelReport:
    """What a level did in a run, all its aggregators together.

    Attributes:
        level: Its name.
        aggregators: How many.
        versions: Versions made.
        updates: Updates used.
        lost: Jobs that came to nothing.
        bytes_up: Come from its children: over the links below it.
        bytes_down: Sent to its children.
        staleness_mean: Of the updates in its versions.
        staleness_max: Of them.
        sent: Updates sent to the level above.
    """

    level: str
    aggregators: int
    versions: int
    updates: int
    lost: int
    bytes_up: int
    bytes_down: int
    staleness_mean: float
    staleness_max: int
    sent: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeResult:
    """How a run ended.

    Attributes:
        tree: What ran.
        why: Why it ended.
        at: Virtual seconds it took.
        adapters: The newest version of every aggregator.
        rows: The record of every aggregator, one row per version. What they tell of an aggregator's `above` are the
            version from above that its own rests on, and the updates it had sent.
        states: All that the servers knew.
        levels: A report per level, from the top down.
        events: Events that the servers were told, in this process.
        problems: What went wrong since the last version, by aggregator; earlier ones are in the rows.
    """

    tree: Tree
    why: str
    at: float
    adapters: Mapping[str, Adapter]
    rows: Mapping[str, list[Row]]
    states: Mapping[str, State]
    levels: tuple[LevelReport, ...]
    events: int
    problems: Mapping[str, list[str]]

    @property
    def adapter(self) -> Adapter:
        """The newest version at the top."""
        return self.adapters[self.tree.root]

    def seen_by(self, name: str) -> dict[str, Adapter]:
        """What may be mixed for a device or an aggregator (`fed.hierarchy.mix`): adapters by level, the top first.

        Raises:
            ConfigError: If there is no such device or aggregator.
        """
        path = reversed(self.tree.path(name))
        return {self.tree.places[a].level: self.adapters[a] for a in path}

    def level(self, name: str) -> LevelReport:
        """The report of a level.

        Raises:
            ConfigError: If there is none of that name.
        """
        for report in self.levels:
            if report.level == name:
                return report
        raise ConfigError(f"there is no level {name!r}; allowed: {', '.join(r.level for r in self.levels)}")
