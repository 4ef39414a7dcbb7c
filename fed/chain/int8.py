"""Int8: a byte a number, and a scale for every block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from agora.errors import ConfigError
from fed.adapter import Spec, Vector
from fed.chain.stage import VALUES, Context, Place, check_bool
from fed.wire import Parts, Reason, Refused, check_finite

SCALES: Final = "scales"
"""Absmax/127 of each block."""

LEVELS: Final = 127
"""Whole numbers on either side of 0."""

BLOCK: Final = 256
"""Numbers that share a scale: the scales then cost 1/64 of the bytes (Dettmers et al. 2022, arXiv 2110.02861, use 2048
for states that are never added up; smaller blocks err less where magnitudes differ)."""

MAX_BLOCK: Final = 2**24
"""Largest block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """Rounds x to q·scale with q a whole number in [−127, 127], up or down by chance so that E[q·scale] = x.

    Stochastic quantisation as in QSGD (Alistarh et al. 2017, arXiv 1610.02132), with the largest magnitude of each
    block in place of the norm. After `top_k` it is the numbers chosen that make the blocks.

    Attributes:
        block: Numbers to a scale; None for one scale to each tensor, which `top_k` before it makes impossible.
        error_feedback: Whether the client keeps what rounding took for its next update.
    """

    kind: ClassVar[str] = "int8"
    place: ClassVar[Place] = Place.INT8

    block: int | None = BLOCK
    error_feedback: bool = True

    def __post_init__(self) -> None:
        whole = isinstance(self.block, int) and not isinstance(self.block, bool)
        if self.block is not None and not (whole and 1 <= self.block <= MAX_BLOCK):
            raise ConfigError(
                f"int8: block is {self.block!r}; it must be a whole number from 1 to {MAX_BLOCK}, or unset"
            )
        check_bool(self.kind, "error_feedback", self.error_feedback)

    def count(self, size: int) -> int:
        """All of them are left."""
        return size

    def encode(self, parts: Parts, context: Context) -> Parts:
        """Rounds `parts[VALUES]` with chances drawn from the context's seed."""
        values: Vector = parts[VALUES]
        starts = self._starts(values.size, context.spec)
        scales = np.maximum.reduceat(np.abs(values), starts) / np.float32(LEVELS)
        # A block whose largest number is too small to be divided by 127 in float32 becomes zero.
        with np.errstate(over="ignore"):
            inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales >= np.finfo(np.float32).tiny)
        scales[inverse == 0] = 0
        levels = values * self._spread(inverse, starts, values.size)
        levels += context.rng(self.place).random(values.size, np.float32)
        np.floor(levels, out=levels)
        np.clip(levels, -LEVELS, LEVELS, out=levels)
        return {**parts, VALUES: levels.astype(np.int8), SCALES: scales}

    def decode(self, parts: Parts, size: int, spec: Spec) -> Parts:
        """Multiplies by the scales."""
        rest = dict(parts)
        scales = rest.pop(SCALES, None)
        levels = rest[VALUES]
        starts = self._starts(size, spec)
        if levels.dtype != np.int8 or levels.shape != (size,):
            raise Refused(Reason.SHAPE, f"{VALUES!r} is {levels.dtype} of shape {levels.shape}; expected {size} int8")
        if scales is None or scales.dtype != np.float32 or scales.shape != starts.shape:
            seen = "missing" if scales is None else f"{scales.dtype} of shape {scales.shape}"
            raise Refused(Reason.TENSORS, f"{SCALES!r} is {seen}; expected {starts.size} float32")
        check_finite(scales, SCALES)
        if (scales < 0).any():
            raise Refused(Reason.ABSURD, f"a scale is {scales.min()}; it must be at least 0")
        with np.errstate(over="ignore"):
            values = levels * self._spread(scales, starts, size)
        return {**rest, VALUES: values}

    def payload(self, size: int, parts: Mapping[str, int], spec: Spec) -> Mapping[str, int]:
        """A byte a number and four a block."""
        return {**parts, VALUES: size, SCALES: 4 * self._starts(size, spec).size}

    def _starts(self, size: int, spec: Spec) -> NDArray[np.intp]:
        """Where blocks begin."""
        if self.block is not None:
            return np.arange(0, size, self.block)
        return np.array([slot.start for slot in spec.slots.values()], np.intp)

    def _spread(self, each: Vector, starts: NDArray[np.intp], size: int) -> Vector:
        """Every block's number for each of its members, shape (size,)."""
        if self.block is not None:
            return np.repeat(each, min(self.block, size))[:size]
        return np.repeat(each, np.diff(starts, append=size))
