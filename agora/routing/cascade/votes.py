"""Which answer to take of several, and how the question stands: a vote weighted by how far each answer is trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from agora.routing.cascade.evidence import Evidence
from agora.routing.cascade.reading import Reading

Floats = NDArray[np.float64]

WRONG_ANSWERS: Final = 3.0
"""Wrong answers that models plausibly give to a question. An agreement weighs the more the more there are; with 3 the
vote was within 0.006 of one whose weights were fitted on GSM8K (six subsets of models), and better on MATH (five)
by up to 0.02."""


OWN_SHARE: Final = 0.3
"""How far an answer's vote follows what is read from it, and not only how often its model is right. With 1, six models
voting on GSM8K were right on 0.952 of the questions; by how often each is right alone, on 0.960."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How n questions stand after the same models were asked.

    Attributes:
        best: Whose answer to take, the cheapest of those who gave it, shape (n,); −1 if nobody was asked.
        features: What the rest depends on, shape (n, d).
        trust: Of each feature, shape (d,); see `Scaling.of`.
        guess: Which feature is the first guess at the log odds that each model is right, and the best answer in hand;
            shape (m + 1,).
    """

    best: NDArray[np.int_]
    features: Floats
    trust: Floats
    guess: NDArray[np.int_]


def stand(evidence: Evidence, reading: Reading, asked: Sequence[int], mean_cost: Floats) -> Standing:
    """Counts the votes.

    An answer a, given by the models G of those asked, has the score s_a = Σ_{i ∈ G} log(k · p_i / (1 − p_i)): the
    optimal weighted vote of independent voters (Nitzan and Paroush 1982). Here p_i is the probability that i is right:
    of its log odds the model's usual ones, and the share `OWN_SHARE` of what its answer adds to them; k is the number
    of wrong answers that are plausible. The log odds of a are s_a − log(1 + Σ_{b ≠ a} e^{s_b}).

    Args:
        evidence: Of n questions and m models.
        reading: Of the same.
        asked: Who was asked.
        mean_cost: Shape (m,).
    """
    n = len(evidence)
    if not asked:
        m = reading.before.shape[1]
        return Standing(
            best=np.full(n, -1), features=reading.before, trust=np.ones(m), guess=np.append(np.arange(m), 0)
        )
    members = list(asked)
    same = evidence.same[:, members]
    usual = reading.usual[members]
    weights = usual + OWN_SHARE * (reading.alone[:, members] - usual) + np.log(WRONG_ANSWERS)
    equal = ((same[:, :, None] == same[:, None, :]) & (same >= 0)[:, :, None]) | np.eye(len(members), dtype=bool)
    scores = np.round((equal * weights[:, None, :]).sum(axis=2), 9)
    place = scores.argmax(axis=1)
    rows = np.arange(n)
    backing = equal[rows, place]
    size = equal.sum(axis=2)
    # each camp once: it is told by its first member
    first = ~np.tril(equal, -1).any(axis=2)
    others = np.where(first & ~backing, scores, -np.inf)
    against = logsumexp(np.column_stack([np.zeros(n), others]), axis=1)
    strongest = np.maximum(others.max(axis=1), 0.0)
    top = scores[rows, place]
    odds = top - against
    features = np.column_stack(
        [
            reading.before,
            reading.alone[:, members],
            odds,
            np.tanh(odds / 2),
            np.clip(top - strongest, -8, 8),
            size[rows, place],
            np.where(backing, 0, size).max(axis=1),
            (first & (same >= 0)).sum(axis=1),
            (same < 0).sum(axis=1),
            backing,
            np.log(np.maximum(evidence.cost[:, members], 1e-12) / mean_cost[members]),
        ]
    )
    k, m = len(members), reading.before.shape[1]
    guess = np.append(np.arange(m), m + k)
    guess[members] = m + np.arange(k)
    trust = [np.full(reading.before.shape[1], BEFORE_TRUST), np.full(k, ALONE_TRUST), np.ones(7)]
    return Standing(
        best=np.asarray(members)[place],
        features=features,
        trust=np.concatenate([*trust, np.full(k, BACKING_TRUST), np.full(k, COST_TRUST)]),
        guess=guess,
    )


BEFORE_TRUST: Final = 0.5
"""Of what the question alone says, beside the vote; see `Scaling.of`. By half: the vote holds it already, through how
often each model is right on such questions. Not tuned."""

ALONE_TRUST: Final = 0.5
"""Of what each answer alone says, which is in the vote: by half, for the same reason. Not tuned."""

BACKING_TRUST: Final = 0.5
"""Of who backs the best answer, which is in the vote: by half, for the same reason. Not tuned."""

COST_TRUST: Final = 0.3
"""Of how much dearer, so longer, each answer was than is usual: it is not in the vote, but one model's long answers are
as another's short ones. The same as of a text's own features (`TEXT_TRUST`). Not tuned."""
