"""A grouping whose changes are written down."""

from __future__ import annotations

from fed.adapter import Adapter, Vector
from fed.aggregate.rule import State
from fed.clusters.base import Base
from fed.runs.journal import Journal
from fed.simulator.words import Published, Regroup
from fed.words import ClientInfo, Job


class Watched:
    """A `fed.simulator.words.Grouping` that does what another one does, and keeps a journal of who is where.

    Args:
        inner: The other one.
        journal: Gets a row when clients were moved.
    """

    def __init__(self, inner: Base, journal: Journal) -> None:
        self.inner, self._journal = inner, journal

    def joins(self, client: ClientInfo) -> str | None:
        """See `Grouping`."""
        return self.inner.joins(client)

    def absorbed(self, job: Job, start: Adapter, delta: Vector) -> None:
        """See `Grouping`."""
        self.inner.absorbed(job, start, delta)

    def regroup(self, published: Published) -> Regroup | None:
        """See `Grouping`."""
        found = self.inner.regroup(published)
        if found is not None:
            at = {"at": published.at, "model": published.model, "version": published.version}
            self._journal.add({**at, "groups": self.inner.groups()})
        return found

    def state(self) -> State:
        """See `Grouping`."""
        return self.inner.state()

    def load_state(self, state: State) -> None:
        """See `Grouping`."""
        self.inner.load_state(state)
