"""Error feedback: what an encoding dropped is kept at the client and added to its next update.

Seide et al. 2014 (1-bit SGD); Karimireddy et al. 2019, arXiv 1901.09847 (EF-SGD): p = Δ + e, send C(p), e ← p − C(p).
So the sum of all that was sent and of what is kept is the sum of all true updates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Self

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from agora.errors import AdapterError, InvalidRequest
from fed.adapter import Adapter, Spec, Vector
from fed.chain.carry import carry
from fed.headers import Count, Digest, SpecBody
from fed.wire import NO_CHECKSUM, Reason, Refused, check_finite, pack, read_head, read_header, read_parts

MAX_BYTES: Final = 2**32
"""Of a memory on disk."""

MAX_HEADER_BYTES: Final = 2**24
"""Of its header, which holds two specs."""


@dataclass(frozen=True, slots=True, eq=False)
class Residual:
    """What a client still owes a model.

    Attributes:
        start: The adapter that the numbers are a change of.
        values: Unweighted, shape (start.spec.size,).
    """

    start: Adapter
    values: Vector

    def onto(self, start: Adapter) -> Vector | None:
        """The same change of another version or rank; None if that cannot be said, and the residual is void."""
        return carry(self.values, self.start, start)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Memory:
    """A client's state of error feedback for one model. Every method returns another one.

    An update's residual counts only once the update does: until then the one before it stands. If the update is lost or
    refused, what it took from that one has never arrived, and is not forgotten; the update's own news is, as without
    error feedback.

    Attributes:
        settled: What is owed if the open job's update does not count.
        job: The open job; None if there is none.
        open: What is owed if it does.
    """

    settled: Residual | None = None
    job: int | None = None
    open: Residual | None = None

    def owed(self, start: Adapter) -> Vector | None:
        """What to add to an update trained from `start`; None if nothing.

        Raises:
            InvalidRequest: If the last update's fate is still unknown: its residual would be sent twice, or never.
        """
        if self.job is not None:
            raise InvalidRequest(
                f"job {self.job} of this client is neither accepted nor lost yet",
                hint="settle it before the next update of the same model is encoded",
            )
        return None if self.settled is None else self.settled.onto(start)

    def opened(self, job: int, residual: Residual) -> Self:
        """An update was encoded; this residual is what will be owed if it counts."""
        return replace(self, job=job, open=residual)

    def settle(self, job: int, *, accepted: bool) -> Self:
        """The update's fate. Of a job that is not open: no change, so that telling it twice does no harm."""
        if job != self.job:
            return self
        return replace(self, settled=self.open if accepted else self.settled, job=None, open=None)

    def pack(self) -> bytes:
        """For a checkpoint; same memory, same bytes."""
        residuals = {name: r for name, r in (("settled", self.settled), ("open", self.open)) if r is not None}
        parts: dict[str, NDArray[Any]] = {}
        for name, residual in residuals.items():
            parts |= {f"{name}.values": residual.values, f"{name}.start": residual.start.flat}
        header = _Header(job=self.job, settled=_body(self.settled), open=_body(self.open))
        return pack(parts, header)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Reads what `pack` wrote.

        Raises:
            Refused: If it is damaged.
        """
        header = read_header(read_head(data, most=MAX_BYTES, most_header=MAX_HEADER_BYTES), _Header)
        parts = read_parts(data)
        settled, opened = _residual(parts, "settled", header.settled), _residual(parts, "open", header.open)
        if parts or (header.job is None) != (opened is None):
            raise Refused(
                Reason.TENSORS, f"the memory of job {header.job} has tensors {sorted(parts)} too many or too few"
            )
        return cls(settled=settled, job=header.job, open=opened)


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sha256: Digest = NO_CHECKSUM
    format: Literal[1] = 1
    kind: Literal["memory"] = "memory"
    job: Count | None = None
    settled: SpecBody | None = None
    open: SpecBody | None = None


def _body(residual: Residual | None) -> SpecBody | None:
    return None if residual is None else SpecBody.of(residual.start.spec)


def _residual(parts: dict[str, NDArray[Any]], name: str, body: SpecBody | None) -> Residual | None:
    if body is None:
        return None
    spec: Spec = body.spec()
    try:
        start, values = Adapter(spec, parts.pop(f"{name}.start")), Adapter(spec, parts.pop(f"{name}.values")).flat
    except KeyError as e:
        raise Refused(Reason.TENSORS, f"the memory lacks tensor {e}") from e
    except AdapterError as e:
        raise Refused(Reason.SHAPE, str(e)) from e
    check_finite(values, "residual numbers")
    return Residual(start, values)
