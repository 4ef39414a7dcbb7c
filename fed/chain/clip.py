"""Clipping: no client moves the model further than the norm allows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np

from fed.adapter import Vector
from fed.chain.stage import Context, Place, check_bool, check_range

SHRINK: Final = 1.0 - 2.0**-22
"""Keeps a clipped norm at or below its bound after rounding to float32, which adds at most one part in 2²⁴."""

MAX_NORM: Final = 1e18
"""Highest norm: squares of more do not fit float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Scales an update down to an L2 norm: Δ·min(1, C/‖Δ‖₂) (Abadi et al. 2016, arXiv 1607.00133).

    Attributes:
        norm: C.
        per_tensor: Clip each of T tensors to C/√T instead of the whole to C, so that one large tensor does not shrink
            the others; the whole stays within C (McMahan et al. 2018, arXiv 1710.06963, "per-layer clipping").
    """

    kind: ClassVar[str] = "clip"
    place: ClassVar[Place] = Place.CLIP

    norm: float
    per_tensor: bool = False

    def __post_init__(self) -> None:
        check_range(self.kind, "norm", self.norm, above=0.0, most=MAX_NORM)
        check_bool(self.kind, "per_tensor", self.per_tensor)

    def apply(self, delta: Vector, context: Context) -> tuple[Vector, Context]:
        """Clips; an update within the bound is left as it is, to the bit."""
        context = replace(context, bound=self.norm * context.weight)
        if not self.per_tensor:
            return _clip(delta, self.norm), context
        slots = context.spec.slots.values()
        bound = self.norm / math.sqrt(len(slots))
        return np.concatenate([_clip(delta[s.start : s.start + s.size], bound) for s in slots]), context


def norm_of(delta: Vector) -> float:
    """‖delta‖₂, summed in float64: it neither overflows nor depends on how many threads BLAS has."""
    return math.sqrt(float(np.square(delta, dtype=np.float64).sum()))


def _clip(delta: Vector, bound: float) -> Vector:
    norm = norm_of(delta)
    if norm <= bound:
        return delta
    return (delta * np.float64(bound / norm * SHRINK)).astype(np.float32)
