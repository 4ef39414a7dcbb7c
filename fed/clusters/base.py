"""What every way of grouping does alike: who is in which cluster, what new models begin with, and how it is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from agora.errors import AgoraError, ConfigError, StoreError
from fed.adapter import Adapter, Spec, Vector
from fed.aggregate.rule import State, whole
from fed.clusters.names import match
from fed.simulator.words import Published, Regroup
from fed.state import info_from_json, info_to_json
from fed.words import WHOLE, ClientInfo, Job

FORMAT: Final = 1
"""Of what is saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What all ways of grouping have in common.

    Attributes:
        clusters: How many there are; None to find out.
        every: Versions, of all models together, after which clients are grouped anew; None for never.
        seed: Of all that is drawn.
    """

    clusters: int | None = None
    every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("clusters", "every"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), least=1)
        whole("seed", self.seed, least=0)


class Base:
    """A grouping for `fed.simulate.simulate`: made for one run, with the run's first version.

    Args:
        initial: The first version of the one model that all begin with, or of several by name.
        clients: How many clients the federation has.
        options: Of the class's `options_type`.
        home: Name of the one model.

    Raises:
        ConfigError: If there are more clusters than clients, or another setting cannot be.
    """

    name: ClassVar[str]
    options_type: ClassVar[type[Any]] = Options

    def __init__(
        self, initial: Adapter | Mapping[str, Adapter], *, clients: int, options: Any = None, home: str = WHOLE
    ) -> None:
        self.options = self.options_type() if options is None else options
        if not isinstance(self.options, self.options_type):
            wanted, given = self.options_type.__name__, type(options).__name__
            raise ConfigError(f"grouping {self.name!r} takes {wanted}, not {given}")
        whole("clients", clients, least=1)
        wanted = self.options.clusters
        if wanted is not None and wanted > clients:
            raise ConfigError(
                f"{wanted} clusters were asked for, of {clients} clients: a cluster would have no client",
                hint=f"take at most {clients} clusters, or leave the number to be found out",
            )
        self.newest: dict[str, Adapter] = {home: initial} if isinstance(initial, Adapter) else dict(initial)
        """The newest version of every model that has, or may get, clients."""
        if not self.newest:
            raise ConfigError("there is no model to begin with")
        self.home = next(iter(self.newest))
        self.clients = clients
        self.members: dict[str, str] = {}
        """Model by client: everybody that ever joined, in one model each."""
        self.infos: dict[str, ClientInfo] = {}
        self.versions = 0
        self._fresh = 1

    # As `Grouping` has it.

    def joins(self, client: ClientInfo) -> str | None:
        """Model of a client that is about to join; None if that is left as it is."""
        self.infos[client.name] = client
        if client.name in self.members:
            return None
        self.members[client.name] = self._place(client)
        return self.members[client.name]

    def absorbed(self, job: Job, start: Adapter, delta: Vector) -> None:
        """An update that was used."""
        if job.client in self.members:
            self._see(job, start, delta)

    def regroup(self, published: Published) -> Regroup | None:
        """Asked after every version."""
        self.versions += 1
        # Versions that jobs under way still make of a model nobody is in are of no use to anybody else.
        if published.model in self.newest:
            self.newest[published.model] = published.adapter
        wanted, starts = self._decide(published)
        moved = {client: model for client, model in wanted.items() if self.members.get(client) != model}
        if not moved:
            return None
        self.members.update(moved)
        used = {self.home, *self.members.values(), *self._kept()}
        self.newest = {name: a for name, a in (self.newest | starts).items() if name in used}
        return Regroup(models=moved, starts={n: a for n, a in starts.items() if n in self.newest})

    def groups(self) -> dict[str, list[str]]:
        """Clients by model, both sorted."""
        found: dict[str, list[str]] = {}
        for client in sorted(self.members):
            found.setdefault(self.members[client], []).append(client)
        return dict(sorted(found.items()))

    def state(self) -> State:
        """All that it holds, to go on later."""
        held = State({f"newest{n}": a.flat for n, a in enumerate(self.newest.values())}, {})
        held.facts.update(
            format=FORMAT,
            way=self.name,
            models=[[name, a.spec.rank] for name, a in self.newest.items()],
            spec=next(iter(self.newest.values())).spec.to_json(),
            home=self.home,
            members=dict(self.members),
            infos=[info_to_json(c) for c in self.infos.values()],
            versions=self.versions,
            fresh=self._fresh,
        )
        self._save(held)
        return held

    def load_state(self, state: State) -> None:
        """Goes on where `state` was asked for, in a grouping made alike.

        Raises:
            StoreError: If it is of another grouping, or damaged.
        """
        facts = state.facts
        if facts.get("way") != self.name or facts.get("format") != FORMAT:
            raise StoreError(
                f"this is the state of grouping {facts.get('way')!r}, format {facts.get('format')!r}, not of "
                f"{self.name!r}, format {FORMAT}",
                hint="go on with the configuration that the run was begun with",
            )
        try:
            spec = Spec.from_json(facts["spec"])
            self.newest = {
                name: Adapter(spec if rank == spec.rank else spec.at_rank(rank), state.arrays[f"newest{n}"])
                for n, (name, rank) in enumerate(facts["models"])
            }
            self.home = facts["home"]
            self.members = dict(facts["members"])
            self.infos = {c.name: c for c in map(info_from_json, facts["infos"])}
            self.versions, self._fresh = int(facts["versions"]), int(facts["fresh"])
            self._load(state)
        except (KeyError, TypeError, ValueError, AgoraError) as e:
            raise StoreError(f"the state of grouping {self.name!r} is damaged: {type(e).__name__}: {e}") from e

    # What groupings do each in their own way.

    def _place(self, client: ClientInfo) -> str:
        """Model of a client never seen before."""
        return self.home

    def _see(self, job: Job, start: Adapter, delta: Vector) -> None:
        """Looks at an update."""

    def _decide(self, published: Published) -> tuple[dict[str, str], dict[str, Adapter]]:
        """Model by client, as they shall be from now on, and what new models begin with."""
        raise NotImplementedError

    def _kept(self) -> set[str]:
        """Models that somebody will return to."""
        return set()

    def _save(self, state: State) -> None:
        """Adds what it holds besides."""

    def _load(self, state: State) -> None:
        """Takes what `_save` added."""

    # For those.

    def _named(
        self, groups: Sequence[Sequence[str]], before: Mapping[str, str]
    ) -> tuple[dict[str, str], dict[str, Adapter]]:
        """Gives clusters their names, and new ones the version that most of their members had.

        Args:
            groups: Members of each cluster.
            before: Cluster by client until now; those who had none had the one model.
        """
        names, self._fresh = match(groups, before, self._fresh)
        models: dict[str, str] = {}
        starts: dict[str, Adapter] = {}
        for name, members in zip(names, groups, strict=True):
            models.update(dict.fromkeys(members, name))
            if name not in self.newest:
                starts[name] = self.newest[self._parent(members, before)]
        return models, starts

    def _parent(self, members: Sequence[str], before: Mapping[str, str]) -> str:
        count: dict[str, int] = {}
        for client in members:
            model = before.get(client, self.home)
            model = model if model in self.newest else self.home
            count[model] = count.get(model, 0) + 1
        return max(sorted(count), key=lambda name: count[name])


def needed(share: float, of: int) -> int:
    """So many make that share, one at least."""
    return max(1, math.ceil(round(share * of, 6)))
