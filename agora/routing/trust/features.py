"""Signals as numbers that a regression can take, whatever is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

CLIP: Final = 4.0
"""Standard deviations beyond which a signal says no more: what lies further out than the data did must not decide."""

RARE: Final = 5
"""Rows that must tell a signal for it to be used, and lack it for its lack to be."""

NO_SPREAD: Final = 1e-9
"""Standard deviation, relative to the mean, below which a signal is the same everywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One signal.

    Attributes:
        name: Of the signal.
        mean: Where it was told.
        spread: Standard deviation there; above 0.
        lacks: Whether its being missing is a feature too.

    Raises:
        ValueError: If a number is out of range.
    """

    name: str
    mean: float
    spread: float
    lacks: bool

    def __post_init__(self) -> None:
        if not (self.spread > 0 and math.isfinite(self.spread) and math.isfinite(self.mean)):
            raise ValueError(f"signal {self.name!r} has mean {self.mean} and spread {self.spread}")


def width(features: Sequence[Feature]) -> int:
    """How many columns they make."""
    return sum(2 if f.lacks else 1 for f in features)


def learn_features(rows: Sequence[Mapping[str, float]]) -> tuple[Feature, ...]:
    """The signals worth using, by name: told at least `RARE` times, and not always the same (or missing) ones."""
    found = []
    for name in sorted({name for row in rows for name in row}):
        told = np.array([row[name] for row in rows if name in row and math.isfinite(row[name])], dtype=np.float64)
        if len(told) < RARE:
            continue
        # Scaled first: the square of a very large number is infinite.
        scale = max(float(np.abs(told).max()), 1e-300)
        mean, spread = float((told / scale).mean()) * scale, float((told / scale).std()) * scale
        flat = spread <= NO_SPREAD * max(abs(mean), 1e-300) or not math.isfinite(spread)
        lacks = len(rows) - len(told) >= RARE
        if not flat or lacks:
            found.append(Feature(name=name, mean=mean, spread=1.0 if flat else spread, lacks=lacks))
    return tuple(found)


def columns(features: Sequence[Feature], rows: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
    """Shape (rows, columns): each feature in standard deviations from its mean, at most `CLIP`; 0 where it is not told,
    with a further column of ones there if its lack is a feature."""
    table = np.zeros((len(rows), width(features)))
    at = 0
    for feature in features:
        for i, row in enumerate(rows):
            value = row.get(feature.name, math.nan)
            if math.isfinite(value):
                table[i, at] = min(max((value - feature.mean) / feature.spread, -CLIP), CLIP)
            elif feature.lacks:
                table[i, at + 1] = 1.0
        at += 2 if feature.lacks else 1
    return table
