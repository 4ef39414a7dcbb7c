"""A stage of the chain that an update goes through before it leaves its client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, ClassVar, Final, Protocol, runtime_checkable

import numpy as np

from agora.errors import ConfigError
from fed.adapter import Adapter, Spec, Vector
from fed.wire import Parts

VALUES: Final = "values"
"""The tensor that holds an update's numbers, as they are or encoded."""

SEED_MASK: Final = 2**64 - 1
"""numpy takes no negative seeds."""


class Place(IntEnum):
    """Where in the chain a stage stands; a chain rises."""

    CLIP = 1
    WEIGHT = 2
    NOISE = 3
    TOP_K = 4
    INT8 = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a stage may know of the update.

    Attributes:
        start: The adapter that training started from.
        job: Whose update.
        seed: Of everything random. In a simulation the job's own. A client whose noise is to hide something from the
            server must mix in a secret, or the server, which chose the job's seed, can take the noise out again.
        examples: Rows the client trained on.
        weight: What the numbers have been multiplied by so far.
        bound: What the numbers' L2 norm is certain not to exceed; None before clipping.
    """

    start: Adapter
    job: int
    seed: int
    examples: int
    weight: float = 1.0
    bound: float | None = None

    @property
    def spec(self) -> Spec:
        """What the numbers mean."""
        return self.start.spec

    def rng(self, place: Place) -> np.random.Generator:
        """A stage's own random numbers: the same for the same seed and job, whatever other stages draw."""
        return np.random.Generator(np.random.PCG64([self.seed & SEED_MASK, self.job & SEED_MASK, int(place)]))


@runtime_checkable
class Shaper(Protocol):
    """A stage that changes numbers and leaves them numbers."""

    kind: ClassVar[str]
    place: ClassVar[Place]

    def apply(self, delta: Vector, context: Context) -> tuple[Vector, Context]:
        """The changed numbers, and what the stages after it may know. `delta` is not written to."""


@runtime_checkable
class Coder(Protocol):
    """A stage that packs numbers into fewer bytes, with loss."""

    kind: ClassVar[str]
    place: ClassVar[Place]

    @property
    def error_feedback(self) -> bool:
        """Whether the client keeps what this stage drops for its next update."""

    def count(self, size: int) -> int:
        """How many values are left of so many."""

    def encode(self, parts: Parts, context: Context) -> Parts:
        """Packs `parts[VALUES]` (shape (n,), float32) and leaves the other parts as they are."""

    def decode(self, parts: Parts, size: int, spec: Spec) -> Parts:
        """Undoes `encode`, as far as can be.

        Args:
            parts: What came; this stage takes out its own and puts back VALUES, shape (size,), float32.
            size: n of `encode`.
            spec: What the numbers mean.

        Raises:
            Refused: If the parts are not what `encode` makes.
        """

    def payload(self, size: int, parts: Mapping[str, int], spec: Spec) -> Mapping[str, int]:
        """Bytes by part after this stage, at most; `parts` has the bytes before it, `size` values among them."""


Stage = Shaper | Coder


def to_json(stage: Stage) -> dict[str, Any]:
    """A stage as the header and a configuration tell it."""
    return {"kind": stage.kind} | {f.name: getattr(stage, f.name) for f in fields(stage)}  # type: ignore[arg-type]


def check_range(kind: str, name: str, value: object, *, above: float, most: float) -> None:
    """Checks a number of a stage.

    Raises:
        ConfigError: If it is no number, or not in (above, most].
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= most:
        raise ConfigError(f"{kind}: {name} is {value!r}; it must be a number above {above:g}, at most {most:g}")


def check_bool(kind: str, name: str, value: object) -> None:
    """Checks a switch of a stage.

    Raises:
        ConfigError: If it is neither true nor false.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{kind}: {name} is {value!r}; it must be true or false")
