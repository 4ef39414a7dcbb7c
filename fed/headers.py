"""What a message may say besides numbers: the schemas of the two headers, and nothing else ever travels."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field

from agora.errors import AdapterError
from fed.adapter import Method, Spec
from fed.wire import NO_CHECKSUM, Reason, Refused

FORMAT: Final = 1
"""Of the messages; raised whenever an older reader would misunderstand a newer message."""

MAX_METRICS: Final = 32
"""Named numbers in an update: enough to tell how training went, too few to carry a data set."""

MAX_STAGES: Final = 8
"""Of a chain; there are five kinds, each at most once."""

MAX_COUNT: Final = 2**53
"""Highest whole number that JSON readers agree on."""

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r'^[^\x00-\x1f\x7f"\\]+$')]
"""Of a federation, client or model: anything printable but quotes and backslashes."""

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]

Told = Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT)]
"""A count that the reader judges by what it knows."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_./]{0,63}$")]

Positive = Annotated[float, Field(gt=0)]


class Header(BaseModel):
    """What both directions say."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    sha256: Digest = NO_CHECKSUM
    format: Literal[1] = FORMAT
    federation: Name
    model: Name
    version: Count


class UpdateHeader(Header):
    """What an update says of itself.

    Attributes:
        spec: Digest of the `Spec` that the numbers belong to; `base` to `scaling` say in words what differs.
        weight: What the numbers were multiplied by at the client.
        chain: What was done to the numbers, in order.
    """

    kind: Literal["update"] = "update"
    client: Name
    job: Count
    base: Annotated[str, Field(max_length=256)]
    method: Method
    rank: Count
    alpha: float
    scaling: Positive
    spec: Digest
    examples: Told
    steps: Told
    metrics: Annotated[dict[MetricName, float], Field(max_length=MAX_METRICS)]
    weight: Positive
    chain: Annotated[list[dict[str, str | bool | Told | float | None]], Field(max_length=MAX_STAGES)]


class SpecBody(BaseModel):
    """A `Spec` in a header."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    method: Method
    base: Annotated[str, Field(max_length=256)]
    shapes: list[
        tuple[Annotated[str, Field(min_length=1, max_length=512)], list[Annotated[int, Field(ge=1, le=2**40)]]]
    ]
    rank: Count
    alpha: float
    rslora: bool
    layers: list[tuple[Annotated[str, Field(min_length=1, max_length=512)], Count, Count]]

    @classmethod
    def of(cls, spec: Spec) -> Self:
        """Of a spec that is to travel."""
        return cls.model_validate_json(orjson.dumps(spec.to_json()))

    def spec(self) -> Spec:
        """The spec that it tells.

        Raises:
            Refused: If it contradicts itself.
        """
        try:
            spec = Spec.from_json(self.model_dump(mode="json"))
            wanted = spec.shapes
            if spec.method is Method.LORA:
                wanted = Spec.lora(spec.layers, rank=spec.rank, alpha=spec.alpha).shapes
        except AdapterError as e:
            raise Refused(Reason.SHAPE, str(e)) from e
        if len(spec.shapes) != len(self.shapes) or list(wanted.items()) != list(spec.shapes.items()):
            raise Refused(Reason.SHAPE, f"{len(self.shapes)} tensors are named that are not those of rank {spec.rank}")
        return spec


class VersionHeader(Header):
    """What a version sent to a client says of itself."""

    kind: Literal["version"] = "version"
    spec: SpecBody
