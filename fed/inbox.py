"""Which updates a server waits for, so that each is taken once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

from immutables import Map

from agora.errors import InvalidRequest
from fed.update import Expected, Update, open_update, read_update
from fed.wire import Reason, Refused

NOBODY = -1
"""Below every job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inbox:
    """The open jobs. Every method returns another inbox; one whose method raised is as it was.

    Job ids rise, so an id no higher than the last one that is not open has ended: nothing needs to be kept of it.

    Attributes:
        open: What is waited for, by job.
        last: Highest job so far.
    """

    open: Map[int, Expected] = field(default_factory=Map)
    last: int = NOBODY

    def waiting(self, expected: Expected) -> Self:
        """A job was sent out.

        Raises:
            InvalidRequest: If its id does not rise.
        """
        if expected.job <= self.last:
            raise InvalidRequest(f"job {expected.job} comes after job {self.last}; ids must rise")
        return replace(self, open=self.open.set(expected.job, expected), last=expected.job)

    def ended(self, job: int) -> Self:
        """A job came to nothing; an update of it that still comes is refused."""
        return replace(self, open=self.open.delete(job)) if job in self.open else self

    def receive(self, data: bytes) -> tuple[Update, Self]:
        """Reads an update of an open job, which is then answered.

        Raises:
            Refused: If it is damaged, or not what its job expects, or its job is unknown, answered or ended.
        """
        head, header = open_update(data)
        expected = self.open.get(header.job)
        if expected is None and header.job <= self.last:
            raise Refused(
                Reason.DUPLICATE, f"job {header.job} of {header.client!r} has ended: it was answered or given up before"
            )
        if expected is None:
            raise Refused(Reason.JOB, f"there is no job {header.job}; the last one was {self.last}")
        return read_update(data, head, header, expected), self.ended(header.job)
