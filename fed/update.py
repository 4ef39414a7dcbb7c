"""An update on the wire: what a client sends back for a job, and how a server reads it without trust."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Self

from pydantic import ValidationError

from agora.errors import ConfigError, InvalidRequest
from fed.adapter import Adapter, Spec, Vector
from fed.chain import Chain, Context, Memory, Sent, norm_of
from fed.headers import UpdateHeader
from fed.wire import Head, Reason, Refused, pack, read_head, read_header, read_parts
from fed.words import Arrived, Job, Trained

MAX_HEADER_BYTES: Final = 2**14
"""Of an update's header: about 700 bytes plain, below 8 KB with all metrics and the longest names."""

MAX_MESSAGE_BYTES: Final = 2**32
"""Of an update before it is known whose it is; then `max_bytes` of its spec holds."""

MAX_BYTES_PER_NUMBER: Final = 5
"""Of any chain: the most is top-k of everything, four bytes and a bit."""

MAX_STEPS: Final = 10**7
"""Steps a client may say it took where the job did not say how many."""

MAX_EXAMPLES: Final = 10**9
"""Rows a client may say it has where the server knows no better."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a client sends back for a job.

    Two updates are equal if they say the same; their numbers are not compared.

    Attributes:
        federation: Which run of which federation.
        client: Who made it.
        job: What for.
        model: Of which model: the job's cluster.
        version: The version it was trained from.
        spec: What its numbers mean.
        examples: Rows the client trained on.
        steps: Steps it took.
        metrics: What may be told, at most `headers.MAX_METRICS` finite numbers.
        sent: Its numbers and what was done to them.
        encoded_bytes: Bytes of the message it was read from; 0 at the client.
    """

    federation: str
    client: str
    job: int
    model: str
    version: int
    spec: Spec
    examples: int
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    sent: Sent = field(compare=False)
    encoded_bytes: int = field(default=0, compare=False)

    @property
    def delta(self) -> Vector:
        """The change of the adapter, shape (spec.size,), whatever the client weighed it by."""
        return self.sent.unweighted

    @cached_property
    def norm(self) -> float:
        """‖delta‖₂."""
        return norm_of(self.sent.delta) / self.sent.weight

    def arrived(self, at: float) -> Arrived:
        """The server's event."""
        return Arrived(
            at=at,
            job=self.job,
            client=self.client,
            examples=self.examples,
            steps=self.steps,
            norm=self.norm,
            loss=self.metrics.get("loss"),
        )

    @classmethod
    def of(
        cls,
        job: Job,
        trained: Trained,
        start: Adapter,
        *,
        federation: str,
        chain: Chain | None = None,
        memory: Memory | None = None,
        secret: int = 0,
    ) -> tuple[Self, Memory]:
        """What a client sends for a job it has done.

        Args:
            job: The job.
            trained: What came of it.
            start: The adapter it started from, at the job's rank.
            federation: Which run of which federation.
            chain: What to do to the numbers; None to send them as they are.
            memory: The client's for this model, None for none yet; see `Chain.apply`.
            secret: Mixed into the job's seed. Noise that shall hide something from the server needs one, since the
                server chose the seed.

        Returns:
            The update, and the memory with the job open.

        Raises:
            Refused: If training diverged, or the numbers are not the start's.
            InvalidRequest: If the memory has a job open, or nothing was trained: no rows, or no steps.
        """
        if trained.examples < 1 or trained.steps < 1:
            raise InvalidRequest(
                f"job {job.id} of {job.client!r}: {trained.steps} steps on {trained.examples} rows; none is too few"
            )
        context = Context(start=start, job=job.id, seed=job.seed ^ secret, examples=trained.examples)
        sent, memory = (chain or Chain()).apply(trained.delta, context, memory)
        update = cls(
            federation=federation,
            client=job.client,
            job=job.id,
            model=job.model,
            version=job.version,
            spec=start.spec,
            examples=trained.examples,
            steps=trained.steps,
            metrics=trained.metrics,
            sent=sent,
        )
        return update, memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a server knows of an update before it comes.

    Attributes:
        federation: Which run of which federation.
        client: Whose job it is.
        job: The job.
        model: Of which model.
        version: The version the client was sent.
        spec: That version's, at the job's rank.
        steps: Most steps it may have taken; None if the job did not say.
        examples: Most rows the client may say it has: what it said when it joined. None if unknown.
        chain: What must have been done to the numbers; None if the client may choose.
        norm: Most ‖delta‖₂ may be; None for any. That a client says it clips is no proof that it does.
    """

    federation: str
    client: str
    job: int
    model: str
    version: int
    spec: Spec
    steps: int | None = None
    examples: int | None = None
    chain: Chain | None = None
    norm: float | None = None

    @classmethod
    def of(
        cls,
        job: Job,
        spec: Spec,
        *,
        federation: str,
        examples: int | None = None,
        chain: Chain | None = None,
        norm: float | None = None,
    ) -> Self:
        """What a job's update must be."""
        return cls(
            federation=federation,
            client=job.client,
            job=job.id,
            model=job.model,
            version=job.version,
            spec=spec,
            steps=job.steps,
            examples=examples,
            chain=chain,
            norm=norm,
        )


def max_bytes(spec: Spec) -> int:
    """The longest message that an update of this spec can be: what a reader may stop at."""
    return 2 * MAX_HEADER_BYTES + MAX_BYTES_PER_NUMBER * spec.size


def encode(update: Update) -> bytes:
    """The message; same update, same bytes.

    Raises:
        InvalidRequest: If the update has what no header can tell: a metric that is not finite, too many, an odd name.
    """
    spec = update.spec
    try:
        header = UpdateHeader(
            federation=update.federation,
            client=update.client,
            job=update.job,
            model=update.model,
            version=update.version,
            base=spec.base,
            method=spec.method,
            rank=spec.rank,
            alpha=spec.alpha,
            scaling=spec.scaling,
            spec=spec.digest,
            examples=update.examples,
            steps=update.steps,
            metrics={name: float(value) for name, value in sorted(update.metrics.items())},
            weight=update.sent.weight,
            chain=update.sent.chain.to_json(),
        )
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"this update cannot be sent: {where}: {first['msg']}, not {first['input']!r}") from e
    return pack(update.sent.parts, header)


def decode(data: bytes, *, expected: Expected) -> Update:
    """Reads an update. Nothing is kept of one that is refused.

    Raises:
        Refused: If anything about it is not as it must be; `reason` says what.
    """
    head, header = open_update(data, most=max_bytes(expected.spec))
    return read_update(data, head, header, expected)


def open_update(data: bytes, *, most: int = MAX_MESSAGE_BYTES) -> tuple[Head, UpdateHeader]:
    """What an update says of itself, whole but not yet compared with anything: for finding out which job it is for.

    Raises:
        Refused: If it is oversized, cut short, damaged, or its header is not one.
    """
    head = read_head(data, most=most, most_header=MAX_HEADER_BYTES)
    return head, read_header(head, UpdateHeader)


def read_update(data: bytes, head: Head, header: UpdateHeader, expected: Expected) -> Update:
    """The update of a message that `open_update` opened.

    Raises:
        Refused: If it is not what is expected.
    """
    spec = expected.spec
    _check_identity(header, expected)
    _check_numbers(header, expected)
    if len(data) > max_bytes(spec):
        raise Refused(Reason.OVERSIZED, f"a message of {len(data)} bytes; at most {max_bytes(spec)} are allowed")
    chain = _chain(header, expected)
    if extra := sorted(name for name, count in head.counts.items() if count > spec.size):
        raise Refused(
            Reason.SHAPE, f"tensor {extra[0]!r} has {head.counts[extra[0]]} numbers; the adapter has {spec.size}"
        )
    parts = read_parts(data)
    update = Update(
        federation=header.federation,
        client=header.client,
        job=header.job,
        model=header.model,
        version=header.version,
        spec=spec,
        examples=header.examples,
        steps=header.steps,
        metrics=header.metrics,
        sent=Sent(chain, parts, chain.decode(parts, spec), header.weight),
        encoded_bytes=len(data),
    )
    if expected.norm is not None and update.norm > expected.norm:
        raise Refused(
            Reason.ABSURD, f"job {header.job}: the norm is {update.norm:g}; it may be at most {expected.norm:g}"
        )
    return update


def _check_identity(header: UpdateHeader, expected: Expected) -> None:
    spec = expected.spec
    pairs: tuple[tuple[Reason, str, Any, Any], ...] = (
        (Reason.FEDERATION, "federation", header.federation, expected.federation),
        (Reason.JOB, "job", header.job, expected.job),
        (Reason.CLIENT, "client", header.client, expected.client),
        (Reason.MODEL, "model", header.model, expected.model),
        (Reason.VERSION, "version trained from", header.version, expected.version),
        (Reason.BASE, "base model", header.base, spec.base),
        (Reason.SHAPE, "method", header.method, spec.method),
        (Reason.SHAPE, "rank", header.rank, spec.rank),
        (Reason.SHAPE, "alpha", header.alpha, spec.alpha),
        (Reason.SHAPE, "scaling", header.scaling, spec.scaling),
        (Reason.SHAPE, "digest of the tensors' names and shapes", header.spec, spec.digest),
    )
    for reason, name, seen, wanted in pairs:
        if seen != wanted:
            raise Refused(reason, f"job {expected.job}: the update's {name} is {seen!r}; expected {wanted!r}")


def _check_numbers(header: UpdateHeader, expected: Expected) -> None:
    limits = (
        ("examples", header.examples, MAX_EXAMPLES if expected.examples is None else expected.examples),
        ("steps", header.steps, MAX_STEPS if expected.steps is None else expected.steps),
    )
    for name, seen, most in limits:
        if not 1 <= seen <= most:
            raise Refused(Reason.ABSURD, f"job {expected.job}: {name} is {seen}; it must be from 1 to {most}")


def _chain(header: UpdateHeader, expected: Expected) -> Chain:
    wanted = expected.chain
    if wanted is not None:
        if header.chain != wanted.to_json():
            raise Refused(Reason.CHAIN, f"the update went through {header.chain!r}; expected {wanted.to_json()!r}")
        chain = wanted
    else:
        try:
            chain = Chain.from_config(header.chain)
        except ConfigError as e:
            raise Refused(Reason.CHAIN, str(e)) from e
    if header.weight != chain.factor(header.examples):
        raise Refused(
            Reason.ABSURD,
            f"the update says it weighs {header.weight}; its chain makes that {chain.factor(header.examples)}",
        )
    return chain
