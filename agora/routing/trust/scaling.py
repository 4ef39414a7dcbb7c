"""From a score to a probability: Platt's sigmoid for few labels, isotonic regression for many."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from agora.routing.trust.logistic import fit_logistic

ISOTONIC_FROM: Final = 1_000
"""Labels from which isotonic regression is used: Niculescu-Mizil & Caruana 2005 found it to beat Platt's sigmoid from
about there, and to overfit below."""


class Scaling(Protocol):
    """A rising map from scores to probabilities."""

    kind: ClassVar[str]

    def __call__(self, score: float) -> float:
        """Probability in [0, 1]; never NaN for a finite score."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `scaling_from_dict` reads them back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Platt:
    """1 / (1 + exp(−(slope·score + offset))) (Platt 1999)."""

    kind: ClassVar[str] = "platt"
    slope: float
    offset: float

    def __call__(self, score: float) -> float:
        """Probability for that score."""
        z = self.slope * score + self.offset
        return 1 / (1 + math.exp(-z)) if z >= 0 else 1 - 1 / (1 + math.exp(min(z, 700.0)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kind": self.kind, "slope": self.slope, "offset": self.offset}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Platt:
        """Reads what `to_dict` wrote."""
        return cls(slope=float(plain["slope"]), offset=float(plain["offset"]))

    @classmethod
    def fit(cls, scores: NDArray[np.float64], right: NDArray[np.bool_]) -> Platt:
        """By maximum likelihood with Platt's own targets, (n₊+1)/(n₊+2) and 1/(n₋+2), which keep it off 0 and 1."""
        up = int(right.sum())
        down = len(right) - up
        target = np.where(right, (up + 1) / (up + 2), 1 / (down + 2))
        weights, offset = fit_logistic(scores[:, None], target, ridge=1e-6)
        # More confidence never means less: a falling slope is chance, and the score then tells nothing.
        if weights[0] <= 0:
            share = (up + 1) / (len(right) + 2)
            return cls(slope=0.0, offset=math.log(share / (1 - share)))
        return cls(slope=float(weights[0]), offset=offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class Isotonic:
    """Straight lines between points (score, probability), level beyond the ends (Zadrozny & Elkan 2002)."""

    kind: ClassVar[str] = "isotonic"
    scores: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __call__(self, score: float) -> float:
        """Probability for that score."""
        return float(np.interp(score, self.scores, self.probabilities))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kind": self.kind, "scores": list(self.scores), "probabilities": list(self.probabilities)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Isotonic:
        """Reads what `to_dict` wrote."""
        scores = tuple(float(s) for s in plain["scores"])
        probabilities = tuple(float(p) for p in plain["probabilities"])
        rising = all(a <= b for t in (scores, probabilities) for a, b in itertools.pairwise(t))
        if not scores or len(scores) != len(probabilities) or not rising or not all(0 <= p <= 1 for p in probabilities):
            raise ValueError("an isotonic map needs as many scores as probabilities, both rising, the latter in [0, 1]")
        return cls(scores=scores, probabilities=probabilities)

    @classmethod
    def fit(cls, scores: NDArray[np.float64], right: NDArray[np.bool_]) -> Isotonic:
        """Least squares under a rising order. A step of n labels that are all right says (n+1)/(n+2), not 1."""
        at, where = np.unique(scores, return_inverse=True)
        sizes = np.bincount(where).astype(np.float64)
        shares = np.bincount(where, weights=right.astype(np.float64)) / sizes
        found = isotonic_regression(shares, weights=sizes)
        level = np.asarray(found.x)
        blocks = np.asarray(found.blocks)
        labels = np.add.reduceat(sizes, blocks[:-1])
        of = np.repeat(np.arange(len(labels)), np.diff(blocks))
        size = labels[of]
        smooth = np.clip(level, 1 / (size + 2), (size + 1) / (size + 2))
        smooth = np.maximum.accumulate(smooth)
        # Only the ends of each level are needed.
        keep = np.ones(len(at), dtype=np.bool_)
        keep[1:-1] = (of[1:-1] != of[:-2]) | (of[1:-1] != of[2:])
        return cls(scores=tuple(map(float, at[keep])), probabilities=tuple(map(float, smooth[keep])))


SCALINGS: Final[Mapping[str, Callable[[Mapping[str, Any]], Scaling]]] = MappingProxyType(
    {Platt.kind: Platt.from_dict, Isotonic.kind: Isotonic.from_dict}
)
"""Readers of scalings by their kind."""


def fit_scaling(scores: NDArray[np.float64], right: NDArray[np.bool_], *, labels: int | None = None) -> Scaling:
    """Platt's sigmoid below `ISOTONIC_FROM` labels, isotonic regression from there on.

    Args:
        scores: Shape (n,).
        right: Shape (n,).
        labels: How many there are in all, where these are a part of them: what is judged must be of the same kind as
            what is used. None for n.
    """
    count = len(right) if labels is None else labels
    return Platt.fit(scores, right) if count < ISOTONIC_FROM else Isotonic.fit(scores, right)


def scaling_from_dict(plain: Mapping[str, Any]) -> Scaling:
    """Reads what `Scaling.to_dict` wrote.

    Raises:
        KeyError: If something is missing or of an unknown kind.
        ValueError: If a value is out of range.
    """
    return SCALINGS[plain["kind"]](plain)
