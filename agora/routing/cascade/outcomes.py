"""What several models made of the same questions: what policies are fitted to and judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from agora.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """A table of n questions and m models.

    Attributes:
        models: Their names, the cheapest first.
        questions: The texts.
        quality: Shape (n, m), in [0, 1]: how right each answer was; 0 or 1 where it is right or wrong.
        cost: Shape (n, m): money of each answer.
        seconds: Shape (n, m): time of each answer; None where it was not recorded.
        answers: For each question the models' final answers, in a form in which equal answers are equal texts, None
            for one that cannot be read; None where no answers were recorded.
        signals: By name, shape (n, m): what tells how far an answer can be trusted; NaN where not told.
        embeddings: Shape (n, dim), unit rows; None where there are none.

    Raises:
        InvalidRequest: If shapes differ, a number is out of range, or there is nothing.
    """

    models: tuple[str, ...]
    questions: tuple[str, ...]
    quality: NDArray[np.float64]
    cost: NDArray[np.float64]
    seconds: NDArray[np.float64] | None = None
    answers: tuple[tuple[str | None, ...], ...] | None = None
    signals: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    embeddings: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        n, m = len(self.questions), len(self.models)
        if n < 1 or m < 1:
            raise InvalidRequest(f"outcomes of {n} questions and {m} models; at least one of each is needed")
        tables = {"quality": self.quality, "cost": self.cost, "seconds": self.seconds, **self.signals}
        for name, table in tables.items():
            if table is not None and table.shape != (n, m):
                raise InvalidRequest(f"{name} of the outcomes has shape {table.shape}; it must be {(n, m)}")
        for name in ("quality", "cost", "seconds"):
            table = tables[name]
            if table is not None and not (np.isfinite(table).all() and (table >= 0).all()):
                raise InvalidRequest(f"{name} of the outcomes must be numbers ≥ 0, without gaps")
        if (self.quality > 1).any():
            raise InvalidRequest(f"quality of the outcomes goes up to {self.quality.max():g}; it must be at most 1")
        if self.answers is not None and (len(self.answers) != n or any(len(row) != m for row in self.answers)):
            raise InvalidRequest(f"answers of the outcomes must be {n} rows of {m}")
        if self.embeddings is not None and (self.embeddings.ndim != 2 or len(self.embeddings) != n):
            raise InvalidRequest(f"embeddings of the outcomes have shape {self.embeddings.shape}; {n} rows are needed")

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, rows: Sequence[int] | NDArray[np.int_]) -> Outcomes:
        """Some of the questions, in that order."""
        index = np.asarray(rows, dtype=np.int64)
        return Outcomes(
            models=self.models,
            questions=tuple(self.questions[i] for i in index),
            quality=self.quality[index],
            cost=self.cost[index],
            seconds=None if self.seconds is None else self.seconds[index],
            answers=None if self.answers is None else tuple(self.answers[i] for i in index),
            signals={name: table[index] for name, table in self.signals.items()},
            embeddings=None if self.embeddings is None else self.embeddings[index],
        )
