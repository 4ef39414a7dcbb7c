"""The policies among which the cheapest with a guarantee is looked for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agora.routing.cascade.fitted import Fitted, LearnedPolicy, MixedPolicy, Vertex, drawn
from agora.routing.cascade.outcomes import Outcomes
from agora.routing.cascade.policy import Policy
from agora.routing.cascade.replay import play
from agora.routing.cascade.rules import Single

Floats = NDArray[np.float64]

BETWEEN: Final = 3
"""Mixtures between neighbours of the fitted policies: finer steps, so that what is certified is closer to the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One policy of a family: `second` for a share of the questions, `first` for the rest.

    Attributes:
        first: The cheaper one.
        second: The dearer one.
        share: In [0, 1).
    """

    first: Vertex
    second: Vertex
    share: float

    @property
    def cost(self) -> float:
        """Money per question in validation."""
        return self.first.cost + self.share * (self.second.cost - self.first.cost)

    @property
    def quality(self) -> float:
        """Mean quality in validation."""
        return self.first.quality + self.share * (self.second.quality - self.first.quality)

    @property
    def kind(self) -> str:
        """Of the cheaper one; it leads."""
        return self.first.rule.kind

    def policy(self, fitted: Fitted) -> Policy:
        """As a policy that decides."""
        first = LearnedPolicy(mind=fitted.mind, rule=self.first.rule)
        if not self.share:
            return first
        return MixedPolicy(first=first, second=LearnedPolicy(mind=fitted.mind, rule=self.second.rule), share=self.share)


def family_of(fitted: Fitted) -> tuple[Member, ...]:
    """The policies that cost less than always asking the top tier, and mixtures of neighbours, the cheapest first.

    Cost and order are those of the fit's own validation: they must not depend on the rows that certify.
    """
    chain = [v for v in fitted.vertices if v.cost < fitted.top.cost and v.rule != fitted.top.rule]
    chain = [*sorted(chain, key=lambda v: v.cost), fitted.top]
    shares = [i / (BETWEEN + 1) for i in range(BETWEEN + 1)]
    return tuple(Member(first=a, second=b, share=share) for a, b in itertools.pairwise(chain) for share in shares)


def always_top(fitted: Fitted) -> Policy:
    """The policy that always asks the top tier."""
    return LearnedPolicy(mind=fitted.mind, rule=fitted.top.rule)


def top_of(fitted: Fitted) -> str:
    """Name of the expert that is the top tier: the dearest."""
    rule = fitted.top.rule
    assert isinstance(rule, Single)
    return fitted.models[rule.model]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the members of a family make of n questions.

    Attributes:
        losses: Shape (n, k), in [−1, 1]: quality of always asking the top tier minus that of each member; negative
            where the top tier is worse.
        cost: Shape (n, k): money.
        top_cost: Shape (n,): money of always asking the top tier.
    """

    losses: Floats
    cost: Floats
    top_cost: Floats


def judge(fitted: Fitted, members: Sequence[Member], outcomes: Outcomes) -> Judged:
    """Plays every member over questions.

    Args:
        fitted: The policies.
        members: What `family_of` gave for them.
        outcomes: Of questions that they were not fitted to.
    """
    board = fitted.mind.board(outcomes)
    rules = dict.fromkeys([fitted.top.rule, *(v.rule for m in members for v in (m.first, m.second))])
    played = {rule: play(rule, board) for rule in rules}
    quality = {rule: p.quality(outcomes.quality) for rule, p in played.items()}
    at = np.array([drawn(q) for q in outcomes.questions])
    losses, cost = np.empty((2, len(outcomes), len(members)))
    for column, member in enumerate(members):
        second, first, chosen = member.second.rule, member.first.rule, at < member.share
        losses[:, column] = quality[fitted.top.rule] - np.where(chosen, quality[second], quality[first])
        cost[:, column] = np.where(chosen, played[second].cost, played[first].cost)
    return Judged(losses=losses, cost=cost, top_cost=played[fitted.top.rule].cost)
