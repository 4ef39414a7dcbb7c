"""Everything that may be looked at about questions, in numbers; what a model said counts only once it was asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agora.routing.cascade.answer_features import own_features
from agora.routing.cascade.outcomes import Outcomes
from agora.routing.cascade.policy import Query, Seen
from agora.routing.cascade.text_features import TEXT_FEATURES, text_features

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """n questions, m models.

    Attributes:
        before: What is known before anybody is asked, shape (n, d).
        own: Features of each answer, shape (n, m, f).
        same: Number of each final answer among those to the same question, equal for equal ones; −1 for none; (n, m).
        cost: Money of each answer, shape (n, m).
        seconds: Time of each answer, shape (n, m).
    """

    before: Floats
    own: Floats
    same: NDArray[np.int_]
    cost: Floats
    seconds: Floats

    @property
    def texts(self) -> int:
        """How many of the last columns of `before` are features of the text."""
        return TEXT_FEATURES

    @property
    def said(self) -> Floats:
        """What the priors say."""
        return self.before[:, : self.before.shape[1] - TEXT_FEATURES]

    def __len__(self) -> int:
        return len(self.before)

    def take(self, rows: NDArray[np.int_]) -> Evidence:
        """Some of the questions."""
        return Evidence(
            before=self.before[rows],
            own=self.own[rows],
            same=self.same[rows],
            cost=self.cost[rows],
            seconds=self.seconds[rows],
        )


def evidence_of(outcomes: Outcomes, said: Floats, names: Sequence[str]) -> Evidence:
    """The evidence of a whole table.

    Args:
        outcomes: The table.
        said: What the priors say, shape (n, ·).
        names: Signals that count, in order.
    """
    n, m = outcomes.quality.shape
    seconds = np.zeros((n, m)) if outcomes.seconds is None else outcomes.seconds
    told = {name: outcomes.signals.get(name) for name in names}
    rows = []
    for k, question in enumerate(outcomes.questions):
        seen = [
            Seen(
                model=i,
                answer=None if outcomes.answers is None else outcomes.answers[k][i],
                signals={name: float(t[k, i]) for name, t in told.items() if t is not None and np.isfinite(t[k, i])},
                cost=float(outcomes.cost[k, i]),
                seconds=float(seconds[k, i]),
            )
            for i in range(m)
        ]
        rows.append(_row(question, seen, m, names))
    return Evidence(
        before=np.column_stack([said, text_features(outcomes.questions)]),
        own=np.stack([own for own, _ in rows]),
        same=np.stack([same for _, same in rows]),
        cost=outcomes.cost,
        seconds=seconds,
    )


def evidence_so_far(query: Query, seen: Sequence[Seen], said: Floats, m: int, names: Sequence[str]) -> Evidence:
    """The evidence of one question whose answers come one by one: one row, zeros for who was not asked."""
    own, same = _row(query.text, seen, m, names)
    cost, seconds = np.zeros((1, m)), np.zeros((1, m))
    for s in seen:
        cost[0, s.model], seconds[0, s.model] = s.cost, s.seconds
    before = np.column_stack([said, text_features([query.text])])
    return Evidence(before=before, own=own[None], same=same[None], cost=cost, seconds=seconds)


def _row(question: str, seen: Sequence[Seen], m: int, names: Sequence[str]) -> tuple[Floats, NDArray[np.int_]]:
    numbers: dict[str, int] = {}
    own: Floats | None = None
    same = np.full(m, -1, dtype=np.int64)
    for s in seen:
        features = own_features(question, s, names)
        own = np.zeros((m, len(features))) if own is None else own
        own[s.model] = features
        if s.answer is not None:
            same[s.model] = numbers.setdefault(s.answer, len(numbers))
    return (np.zeros((m, 0)) if own is None else own), same
