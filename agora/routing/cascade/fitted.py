"""What came of fitting: beliefs, and the rules that validation chose, as policies that decide step by step."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agora.errors import InvalidRequest, NoExpert
from agora.routing.cascade.beliefs import Belief, Forecast
from agora.routing.cascade.evidence import Evidence, evidence_of, evidence_so_far
from agora.routing.cascade.outcomes import Outcomes
from agora.routing.cascade.policy import Ask, Decision, Policy, Query, Seen, Take
from agora.routing.cascade.priors import Prior, said_by
from agora.routing.cascade.reading import Reader
from agora.routing.cascade.replay import Board, board_of, opened
from agora.routing.cascade.rules import TAKE, Rule

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mind:
    """What was learned from outcomes, whatever rule acts on it.

    Attributes:
        models: Names, the cheapest first.
        signals: Signals that count, in order.
        priors: Estimators before anybody is asked, by kind.
        reader: What each answer is taken for by itself.
        beliefs: What is believed by who has been asked.
        mean_cost: Money of each model's answers on average, shape (m,).
        worths: What an answer may be worth, for optimal stopping, shape (L,).
        deadline: Seconds within which questions should be answered; None for no deadline.
    """

    models: tuple[str, ...]
    signals: tuple[str, ...]
    priors: Mapping[str, Prior]
    reader: Reader
    beliefs: Mapping[int, Belief]
    mean_cost: Floats
    worths: Floats
    deadline: float | None = None

    def evidence(self, outcomes: Outcomes) -> Evidence:
        """What may be looked at in a table of the same models.

        Raises:
            InvalidRequest: If the models are others.
        """
        if outcomes.models != self.models:
            raise InvalidRequest(f"outcomes of {outcomes.models}; the policy was fitted for {self.models}")
        return evidence_of(outcomes, said_by(self.priors, outcomes.questions, outcomes.embeddings), self.signals)

    def board(self, outcomes: Outcomes) -> Board:
        """A table made ready for `agora.routing.cascade.replay.play`."""
        return board_of(
            self.evidence(outcomes),
            self.reader,
            self.beliefs,
            mean_cost=self.mean_cost,
            worths=len(self.worths),
            deadline=self.deadline,
        )

    def forecast(self, query: Query, seen: Sequence[Seen]) -> tuple[int, Forecast]:
        """Who was asked, as a bit mask, and what is believed now of one question."""
        subset = 0
        for s in seen:
            if not 0 <= s.model < len(self.models) or subset >> s.model & 1:
                raise InvalidRequest(f"model {s.model} was seen; each of 0 … {len(self.models) - 1} at most once")
            subset |= 1 << s.model
        embeddings = None if query.embedding is None else query.embedding[None].astype(np.float32)
        said = said_by(self.priors, [query.text], embeddings)
        evidence = evidence_so_far(query, seen, said, len(self.models), self.signals)
        reading = self.reader.read(evidence, [s.model for s in seen])
        return subset, self.beliefs[subset].forecast(evidence, reading, self.mean_cost, len(self.worths))


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedPolicy:
    """One rule acting on what was learned.

    Attributes:
        mind: What was learned.
        rule: The rule.
    """

    mind: Mind
    rule: Rule

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, the cheapest first."""
        return self.mind.models

    def decide(self, query: Query, seen: Sequence[Seen], *, allowed: Collection[int]) -> Decision:
        """Says what to do next; see `Policy`. Models too dear or too slow for what is left are not asked.

        Raises:
            InvalidRequest: If the positions in `seen` are not the policy's, or one is there twice.
            NoExpert: If nothing is allowed and nothing was seen.
        """
        if not seen and not allowed:
            raise NoExpert("none of the policy's models may be asked", hint="widen the budget, the labels or the tiers")
        subset, forecast = self.mind.forecast(query, seen)
        permitted = np.zeros((1, len(self.models)), dtype=bool)
        permitted[0, [j for j in allowed if 0 <= j < len(self.models) and not subset >> j & 1]] = True
        open_ = permitted & self._affordable(subset, forecast, query, seen)
        if not subset and not open_.any():
            if not permitted.any():
                raise NoExpert(f"the models that may be asked are {sorted(allowed)}; the policy knows {self.models}")
            # nothing fits into what is left: whoever comes nearest, for there must be an answer
            nearest = forecast.seconds if query.seconds_left is not None else forecast.cost
            open_[0, int(np.where(permitted, nearest, np.inf).argmin())] = True
        chosen = int(self.rule.choose(subset, forecast, open_)[0])
        if chosen == TAKE and not subset:
            chosen = int(np.where(open_, forecast.quality, -np.inf).argmax())
        if chosen == TAKE:
            best = int(forecast.best[0])
            return Take(model=best, quality=float(forecast.held[0]), why=self._why_take(forecast, best, seen))
        return Ask(
            model=chosen, quality=float(forecast.quality[0, chosen]), why=self._why_ask(forecast, chosen, subset)
        )

    def _affordable(self, subset: int, forecast: Forecast, query: Query, seen: Sequence[Seen]) -> NDArray[np.bool_]:
        left = None if query.seconds_left is None else max(query.seconds_left, 0.0)
        if self.mind.deadline is not None:
            own = self.mind.deadline - sum(s.seconds for s in seen)
            left = own if left is None else min(left, own)
        open_ = opened(subset, forecast, left=None if left is None else np.array([left]))
        return open_ if query.cost_left is None else open_ & (forecast.cost <= query.cost_left)

    def _why_ask(self, forecast: Forecast, model: int, subset: int) -> str:
        before = f"the best answer so far is right with {forecast.held[0]:.2f}; " if subset else ""
        return (
            f"{self.rule.kind}: {before}{self.models[model]} is expected to be right with "
            f"{forecast.quality[0, model]:.2f} for {forecast.cost[0, model]:.3g}"
        )

    def _why_take(self, forecast: Forecast, model: int, seen: Sequence[Seen]) -> str:
        answer = next(s.answer for s in seen if s.model == model)
        backing = sum(s.answer == answer for s in seen) if answer is not None else 1
        agree = f", {backing} of {len(seen)} agree" if len(seen) > 1 else ""
        return f"{self.rule.kind}: {self.models[model]} is right with {forecast.held[0]:.2f}{agree}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPolicy:
    """Follows one policy for a share of the questions and another for the rest.

    Which one is drawn from the question's text, so that the same question is treated the same at every step.

    Attributes:
        first: Followed else.
        second: Followed for `share` of the questions.
        share: In [0, 1].
    """

    first: Policy
    second: Policy
    share: float

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, the cheapest first."""
        return self.first.models

    def decide(self, query: Query, seen: Sequence[Seen], *, allowed: Collection[int]) -> Decision:
        """Says what to do next; see `Policy`."""
        chosen = self.second if drawn(query.text) < self.share else self.first
        return chosen.decide(query, seen, allowed=allowed)


def drawn(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, uniform over texts."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vertex:
    """A rule that validation kept, with what it came to on questions it was not fitted to.

    Attributes:
        rule: The rule.
        cost: Money per question.
        quality: Mean quality.
        p95_seconds: 95th percentile of the time; None where no time was recorded.
    """

    rule: Rule
    cost: float
    quality: float
    p95_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Policies fitted to outcomes.

    Attributes:
        mind: What was learned.
        vertices: Rules kept, rising in cost and, but for noise, in quality; between neighbours one mixes at random.
        top: Rule that always asks the top tier.
        trade_off: Money that an answer's being right is worth, which `policy` goes by if it is not told; None for the
            least money at which validation is as good as the best single model.
        report: What was compared, what was picked and why; plain JSON.
    """

    mind: Mind
    vertices: tuple[Vertex, ...]
    top: Vertex
    trade_off: float | None
    report: Mapping[str, Any]

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, the cheapest first."""
        return self.mind.models

    def policy(self, *, trade_off: float | None = None) -> Policy:
        """The policy for what a right answer is worth.

        Args:
            trade_off: Money that an answer's being right is worth; None for what it was fitted for.

        Raises:
            InvalidRequest: If it is not a number above 0.
        """
        worth = self.trade_off if trade_off is None else trade_off
        if worth is not None and not (worth > 0 and np.isfinite(worth)):
            raise InvalidRequest(f"trade_off is {worth}; it must be a number above 0: what a right answer is worth")
        if worth is None:
            return self.reaching(self.top_quality)
        best = max(self.vertices, key=lambda v: v.quality * worth - v.cost)
        return LearnedPolicy(mind=self.mind, rule=best.rule)

    @property
    def top_quality(self) -> float:
        """Quality of the best single model in validation, which `policy` keeps where nothing else is said."""
        return float(max(self.report["singles"]["quality"]))

    def reaching(self, quality: float) -> Policy:
        """The cheapest policy that reached a quality in validation; the best one where none did.

        Args:
            quality: Mean quality to reach.
        """
        policies = [LearnedPolicy(mind=self.mind, rule=v.rule) for v in self.vertices]
        for i, vertex in enumerate(self.vertices):
            if vertex.quality >= quality:
                if i == 0:
                    return policies[0]
                below = self.vertices[i - 1]
                share = (quality - below.quality) / (vertex.quality - below.quality)
                return MixedPolicy(first=policies[i - 1], second=policies[i], share=share)
        return policies[-1]

    def family(self) -> tuple[Policy, ...]:
        """The policies kept, from the cheapest on, and at last the one that always asks the top tier."""
        kept = [v.rule for v in self.vertices if v.rule != self.top.rule]
        return tuple(LearnedPolicy(mind=self.mind, rule=rule) for rule in (*kept, self.top.rule))
