"""Weighting at the client, where the server shall not need to know by what, or adds without multiplying."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np

from agora.errors import ConfigError
from fed.adapter import Vector
from fed.chain.stage import Context, Place, check_range

EXAMPLES: Final = "examples"

MAX_FACTOR: Final = 1e9
"""Highest factor; more examples than that no client has, and an update times that still fits float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """Multiplies an update by the client's examples, or by a factor.

    The header tells the factor, so that nobody weighs twice: `Sent.unweighted` is the update without it.

    Attributes:
        by: `"examples"`, or the factor.
    """

    kind: ClassVar[str] = "weight"
    place: ClassVar[Place] = Place.WEIGHT

    by: str | float = EXAMPLES

    def __post_init__(self) -> None:
        if isinstance(self.by, str):
            if self.by != EXAMPLES:
                raise ConfigError(f"weight: by is {self.by!r}; it must be {EXAMPLES!r} or a number above 0")
        else:
            check_range(self.kind, "by", self.by, above=0.0, most=MAX_FACTOR)

    def factor(self, examples: int) -> float:
        """What an update of a client with so many examples is multiplied by."""
        return float(examples if isinstance(self.by, str) else self.by)

    def apply(self, delta: Vector, context: Context) -> tuple[Vector, Context]:
        """Multiplies; a bound on the norm grows with it."""
        factor = self.factor(context.examples)
        check_range(self.kind, "examples", factor, above=0.0, most=MAX_FACTOR)
        bound = None if context.bound is None else context.bound * factor
        context = replace(context, weight=context.weight * factor, bound=bound)
        return delta if factor == 1.0 else delta * np.float32(factor), context
