"""Clusters by loss: each client belongs to the cluster whose model fits its data best (IFCA).

Ghosh, Chung, Yin and Ramchandran 2020, "An Efficient Framework for Clustered Federated Learning", arXiv 2006.04088. The
client is sent every cluster's model, and only the losses, one number a model, leave it. As published, the run begins
with as many models, which must differ; where to begin matters there. Given one model, agora separates clients by their
first updates instead, so that models differ by what clients need, and lets losses decide from then on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

from agora.errors import ConfigError
from fed.adapter import Adapter, Vector
from fed.aggregate.rule import State, share, whole
from fed.clusters.agglomerative import ENOUGH, UPDATES, Agglomerative, AgglomerativeOptions
from fed.clusters.base import Base, Options
from fed.simulator.words import Published
from fed.words import ClientInfo, Job

EVERY: Final = 10
"""Versions between two assessments. As published every round assesses; each assessment sends every model to all."""

MARGIN: Final = 0.02
"""A fiftieth less loss is what a client must gain to be moved: less is within what other versions change anyway."""


class Assessor(Protocol):
    """Asks a client how well a model fits its data."""

    def loss(self, adapter: Adapter, client: str) -> float:
        """The mean loss of the adapter on the client's data; NaN if the client does not answer.

        The adapter travels to the client, and nothing but this number comes back. Must be deterministic.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class IfcaOptions(Options):
    """Of the grouping `ifca`.

    Attributes:
        every: Versions between two assessments; None for none but the first.
        updates: Updates of the one model before clients are first separated.
        enough: Share of the clients that must have made them.
        wait: Versions after which they are separated without the rest.
        margin: By what share the loss must be less in another cluster, for a client to be moved there.
    """

    every: int | None = EVERY
    updates: int = UPDATES
    enough: float = ENOUGH
    wait: int = 100
    margin: float = MARGIN

    def __post_init__(self) -> None:
        super(IfcaOptions, self).__post_init__()
        share("margin", self.margin)
        whole("wait", self.wait, least=1)


class Ifca(Base):
    """See the module. Takes what `fed.clusters.base.Base` takes, with one first version or one for each cluster.

    Args:
        initial: The first version of all, or those of the clusters.
        assessor: Asks clients for losses.
        others: As `fed.clusters.base.Base`.
    """

    name = "ifca"
    options_type: ClassVar[type[Options]] = IfcaOptions

    def __init__(self, initial: Adapter | Mapping[str, Adapter], *, assessor: Assessor, **others: Any) -> None:
        super().__init__(initial, **others)
        self.options: IfcaOptions
        self.assessor = assessor
        o, given = self.options, len(self.newest)
        self._first: Agglomerative | None = None
        if given > 1:
            if o.clusters not in (None, given):
                raise ConfigError(f"{o.clusters} clusters were asked for, and {given} first versions given")
            if given > self.clients:
                raise ConfigError(f"{given} first versions were given, for {self.clients} clients")
        else:
            settings = AgglomerativeOptions(
                clusters=o.clusters, seed=o.seed, updates=o.updates, enough=o.enough, wait=o.wait, patience=None
            )
            self._first = Agglomerative(self.newest, clients=self.clients, options=settings)
        self._due = o.every or 0
        self._names = sorted(self.newest) if given > 1 else []

    def _place(self, client: ClientInfo) -> str:
        if self._first is not None:
            # Beside this one, so that it knows who takes part.
            self._first.joins(client)
        return self._fits(client.name, None) if self._names else self.home

    def _see(self, job: Job, start: Adapter, delta: Vector) -> None:
        if self._first is not None:
            self._first.absorbed(job, start, delta)

    def _decide(self, published: Published) -> tuple[dict[str, str], dict[str, Adapter]]:
        if self._first is not None:
            return self._begin(self._first, published)
        if self.options.every is None or self.versions < self._due:
            return {}, {}
        self._due = self.versions + self.options.every
        return {c: self._fits(c, m) for c, m in sorted(self.members.items())}, {}

    def _begin(self, first: Agglomerative, published: Published) -> tuple[dict[str, str], dict[str, Adapter]]:
        found = first.regroup(published)
        if found is None:
            return {}, {}
        # It has done what it was needed for: losses decide from now on.
        self._first = None
        self._names = sorted(found.starts)
        self._due = self.versions + (self.options.every or 0)
        models = {**found.models}
        sizes = {name: list(models.values()).count(name) for name in self._names}
        largest = max(self._names, key=lambda name: sizes[name])
        for client in self.members:
            # All models are still the same, so losses would not tell where the others belong.
            models.setdefault(client, largest)
        return models, dict(found.starts)

    def _fits(self, client: str, now: str | None) -> str:
        """The model of least loss; the present one if none is less by the margin, or the client does not answer."""
        losses = {name: self.assessor.loss(self.newest[name], client) for name in self._names}
        told = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
        if not told:
            return now or self._names[0]
        best = min(told, key=lambda name: told[name])
        if now not in told:
            return best
        return best if told[best] < told[now] * (1 - self.options.margin) else now

    def _kept(self) -> set[str]:
        # Also those that nobody is in: they may fit somebody later.
        return set(self._names)

    def _save(self, state: State) -> None:
        state.facts.update(due=self._due, names=self._names, first=None)
        if self._first is not None:
            state.put("first", self._first.state())

    def _load(self, state: State) -> None:
        self._due, self._names = int(state.facts["due"]), list(state.facts["names"])
        if state.facts["first"] is None:
            self._first = None
        elif self._first is not None:
            self._first.load_state(state.within("first"))
