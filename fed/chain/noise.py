"""Gaussian noise in proportion to how much one client can change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from agora.errors import ConfigError
from fed.adapter import Vector
from fed.chain.stage import Context, Place, check_range

MAX_MULTIPLIER: Final = 1e6
"""Highest noise multiplier; beyond it nothing of an update is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Adds N(0, (z·C)²) to every number, C the bound on the norm that clipping (and weighting) left.

    This is the noise of the Gaussian mechanism (Dwork & Roth 2014, appendix A; Abadi et al. 2016, arXiv 1607.00133). It
    accounts for nothing and promises no ε by itself: whoever composes updates into a budget reads `Clip.norm` and
    `multiplier` from the chain.

    Attributes:
        multiplier: z.
    """

    kind: ClassVar[str] = "noise"
    place: ClassVar[Place] = Place.NOISE

    multiplier: float

    def __post_init__(self) -> None:
        check_range(self.kind, "multiplier", self.multiplier, above=0.0, most=MAX_MULTIPLIER)

    def apply(self, delta: Vector, context: Context) -> tuple[Vector, Context]:
        """Adds noise drawn from the context's seed."""
        if context.bound is None:
            raise ConfigError("noise: nothing bounds the update's norm", hint="put clip before it")
        noise = context.rng(self.place).standard_normal(delta.size, np.float32)
        noise *= np.float32(self.multiplier * context.bound)
        noise += delta
        return noise, context
