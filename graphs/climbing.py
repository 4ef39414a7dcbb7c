"""One question's climb: who was asked, what is left, and what a policy says to do next, by names, not positions."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from agora.errors import BudgetExceeded, DeadlineExceeded
from agora.routing.cascade.policy import Ask, Decision, Policy, Query, Seen, Take
from agora.routing.final_answer import final_answer
from agora.square import Expert
from agora.types import Answer, Attempt, Failure
from graphs.crew import OF_THE_NODE
from graphs.experience import LONGER, Experience
from graphs.guidance import Guidance
from graphs.ladder import AlwaysTop, UpTheLadder, probability
from graphs.patience import seconds_for
from graphs.signals.counting import signals_of
from graphs.spend import prompt_tokens

log = logging.getLogger(__name__)

UNKNOWN: Final = "nothing tells how far this answer can be trusted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Next:
    """What to do next.

    Attributes:
        take: Whether an answer is taken, rather than asked for.
        expert: Whose, or of whom.
        quality: Probability in [0, 1] that it is right; None where nothing tells.
        why: In words a person can check.
        fitted: Whether a fitted policy says so.
        sharing: Among how many that may still be asked the time left is to be divided; see `graphs.patience`.
    """

    take: bool
    expert: str
    quality: float | None
    why: str
    fitted: bool
    sharing: int = 1


@dataclass(slots=True, kw_only=True)
class Climbing:
    """The state of one climb. Asks nobody itself.

    Attributes:
        rungs: Who can be asked for this question, by rung, the lowest first.
        question: What they are asked.
        guidance: What is known of them.
        experience: What asking them takes.
        accept: Confidence at which an answer is taken while no policy was fitted.
        max_failures: Experts that may fail before those left are not asked any more.
        answers: What was answered, in order.
        failures: Who failed, and how, in order.
        ruled_out: Who was not asked since the budget or the time left does not allow it, and why.
        notes: What the reader of the answer should know.
        missed: Whom the policy would ask next, did budget and time allow it.
        beyond: Why a guarantee does not cover this question; None while it does.
    """

    rungs: Sequence[Sequence[Expert]]
    guidance: Guidance
    experience: Experience
    accept: float
    max_failures: int
    question: str
    answers: dict[str, tuple[Answer, float]] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    ruled_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missed: str | None = None
    beyond: str | None = None
    _failed_policy: bool = False

    @property
    def experts(self) -> dict[str, Expert]:
        """Who can be asked for this question, by name, the lowest first."""
        return {e.name: e for rung in self.rungs for e in rung}

    def ended(self, attempt: Attempt) -> None:
        """Takes note of how an attempt ended."""
        assert attempt.expert is not None
        if isinstance(attempt.outcome, Answer):
            self.answers[attempt.expert] = (attempt.outcome, attempt.seconds)
        else:
            self.failures[attempt.expert] = attempt.outcome

    def next(self, query: Query, *, tokens_left: int | None) -> Next | None:
        """What to do next; None if nobody can be asked and nobody has answered.

        Args:
            query: The question, with what is left for it.
            tokens_left: Tokens that are left for it; None for any number.
        """
        allowed = self._allowed(query, tokens_left)
        if not allowed and not self.answers:
            return None
        found = self._decide(query, allowed)
        if found is None:
            # Only those have answered who are no longer here, as after an interruption: that is better than nothing.
            last = next(reversed(self.answers))
            return Next(take=True, expert=last, quality=None, why="nobody else can be asked", fitted=False)
        self._compare(query, allowed, found)
        return found if found.take else replace(found, sharing=self._sharing(found.expert, allowed))

    def _decide(self, query: Query, allowed: Sequence[str]) -> Next | None:
        policy = self._fitted()
        if policy is not None and (found := self._decided(policy, query, allowed, fitted=True)) is not None:
            return found
        return self._decided(self._plain(), query, allowed, fitted=False)

    def _compare(self, query: Query, allowed: Sequence[str], found: Next) -> None:
        """Whom the policy would ask, did budget and time allow it: an answer that is taken tells of that. A guarantee
        is for the policy that decides without such limits, so that any other decision is not covered."""
        limited = query.cost_left is not None or query.seconds_left is not None
        certified = self.guidance.certified and limited and self.beyond is None
        if not certified and not (found.take and self.ruled_out):
            return
        without = replace(query, cost_left=None, seconds_left=None)
        notes, failed = list(self.notes), self._failed_policy
        wanted = self._decide(without, (*allowed, *self.ruled_out))
        # This was only a thought: what it came upon is no news of the answer.
        self.notes, self._failed_policy = notes, failed
        if wanted is None:
            return
        if found.take and not wanted.take and wanted.expert in self.ruled_out:
            self.missed = wanted.expert
        if certified and (wanted.take, wanted.expert) != (found.take, found.expert):
            self.beyond = "since money or time was short"

    def _allowed(self, query: Query, tokens_left: int | None) -> tuple[str, ...]:
        failures = list(self.failures.values())
        if len(failures) >= self.max_failures or any(f.code == DeadlineExceeded.code for f in failures):
            return ()
        open_ = [e for e in self.experts.values() if e.name not in self.answers and e.name not in self.failures]
        # Whoever was too dear leaves only those that cost less.
        over = [n for n, f in self.failures.items() if f.code == BudgetExceeded.code and n in self.experts]
        dear = [self.experts[n].card.price_per_mtok for n in over]
        open_ = [e for e in open_ if not dear or e.card.price_per_mtok < min(dear)]
        fitting = []
        for expert in open_:
            reason = self._too_much(expert, query, tokens_left)
            if reason is None:
                fitting.append(expert)
                self.ruled_out.pop(expert.name, None)
            else:
                self.ruled_out[expert.name] = reason
        self._leave_out_the_silent(fitting, query.seconds_left)
        if not fitting and not self.answers and not self.failures:
            # What is expected may be wrong; and if not, asking says precisely what is lacking.
            fitting = open_[:1]
        down = {self.experts[n].node for n, f in self.failures.items() if f.code in OF_THE_NODE and n in self.experts}
        elsewhere = [e for e in fitting if e.node not in down]
        return tuple(e.name for e in (elsewhere or fitting))

    def _leave_out_the_silent(self, fitting: list[Expert], seconds_left: float | None) -> None:
        """Takes out those who gave no answer in as much time as their share would be now, from the lowest up: who is
        left has more for it."""
        if seconds_left is None:
            return
        for expert in tuple(fitting):
            taken = self.experience.seconds(expert.name)
            if taken is None or self.experience.usual_seconds(expert.name) is not None:
                continue
            sharing = self._sharing(expert.name, [e.name for e in fitting])
            share = seconds_for(expert.name, seconds_left, sharing, self.experience)
            if taken > share:
                fitting.remove(expert)
                self.ruled_out[expert.name] = (
                    f"it has given no answer yet, in up to {taken / LONGER:.3g} s, and {share:.3g} s would be its share"
                )

    def _sharing(self, name: str, allowed: Sequence[str]) -> int:
        """Among how many the time left is to be divided when this one is asked: no more than may still fail."""
        height = {e.name: n for n, rung in enumerate(self.rungs) for e in rung}
        policy = self._fitted()
        asked = [n for n in allowed if n in height and (policy is None or n in policy.models)]
        rungs = {height[n] for n in (*asked, name)}
        most = min(len(rungs), self.max_failures - len(self.failures))
        # With nobody above it, those that are left would only stand in for it.
        return min(most, 2) if height[name] == max(rungs) else max(most, 1)

    def _too_much(self, expert: Expert, query: Query, tokens_left: int | None) -> str | None:
        seconds = self.experience.seconds(expert.name)
        if query.seconds_left is not None and seconds is not None and seconds > query.seconds_left:
            return f"it takes about {seconds:.3g} s, and {max(query.seconds_left, 0):.3g} s are left"
        chars = self._chars(expert)
        cost = self.experience.cost(expert.card, chars)
        if query.cost_left is not None and cost > query.cost_left:
            return f"it costs about {cost:.3g}, and {max(query.cost_left, 0):.3g} is left"
        if tokens_left is not None and prompt_tokens(chars) >= tokens_left:
            return f"its prompt needs about {prompt_tokens(chars)} tokens, and {max(tokens_left, 0)} are left"
        return None

    def _fitted(self) -> Policy | None:
        """The fitted policy, where it is of use for this question."""
        policy = self.guidance.policy
        if policy is None or self.guidance.only_top or self._failed_policy:
            return None
        return policy if any(name in self.experts for name in policy.models) else None

    def _plain(self) -> Policy:
        names = tuple(self.experts)
        if self.guidance.only_top:
            return AlwaysTop(models=names, confidence=self.guidance.confidence)
        return UpTheLadder(
            models=names,
            rung=tuple(n for n, rung in enumerate(self.rungs) for _ in rung),
            accept=self.accept,
            confidence=self.guidance.confidence,
        )

    def _decided(self, policy: Policy, query: Query, allowed: Sequence[str], *, fitted: bool) -> Next | None:
        """What a policy says; None if it knows none of those who could be asked or taken, or fails."""
        models = policy.models
        place = {name: n for n, name in enumerate(models)}
        seen = [
            Seen(
                model=place[name],
                answer=final_answer(answer.text),
                signals=signals_of(query.text, answer),
                cost=self._cost(answer),
                seconds=seconds,
            )
            for name, (answer, seconds) in self.answers.items()
            if name in place
        ]
        known = frozenset(place[name] for name in allowed if name in place)
        if not known and not seen:
            return None
        try:
            decision = policy.decide(query, seen, allowed=known)
            return self._named(decision, models, known, {s.model for s in seen}, fitted)
        except Exception as e:
            log.exception("the policy failed")
            self._failed_policy = True
            self.notes.append(f"the policy failed ({type(e).__name__}: {e}): one tier was asked after the other")
            return None

    def _cost(self, answer: Answer) -> float:
        """What an answer cost, or would have where somebody else had paid for it: for policies a low cost tells of a
        short answer."""
        expert = self.experts.get(answer.expert)
        if answer.usage.calls or expert is None:
            return answer.usage.cost
        usual = self.experience.usual_cost(expert.card)
        return self.experience.cost(expert.card, self._chars(expert)) if usual is None else usual

    def _chars(self, expert: Expert) -> int:
        return len(self.question) + len(expert.system_prompt or "")

    def _named(
        self, decision: Decision, models: Sequence[str], allowed: frozenset[int], seen: set[int], fitted: bool
    ) -> Next:
        may = seen if isinstance(decision, Take) else allowed
        if not isinstance(decision, (Ask, Take)) or decision.model not in may:
            raise ValueError(f"it decided {decision!r} where {sorted(allowed)} may be asked and {sorted(seen)} taken")
        if not math.isfinite(decision.quality):
            self.notes.append(f"the policy gave {models[decision.model]} a quality of {decision.quality}: not used")
        return Next(
            take=isinstance(decision, Take),
            expert=models[decision.model],
            quality=probability(decision.quality),
            why=decision.why,
            fitted=fitted,
        )

    def answer_notes(self, taken: str) -> tuple[str, ...]:
        """What the reader should know of the answer that is taken: who could not be asked, and what is not known."""
        order = list(self.experts)
        below = order[: order.index(taken)] if taken in order else []
        failed = [f"{n} could not be asked: {f.message}" for n, f in self.failures.items() if n not in below]
        left_out = [] if self.missed is None else [f"{self.missed} was not asked: {self.ruled_out[self.missed]}"]
        beyond = self._beyond() if self.guidance.certified else None
        promise = [] if beyond is None else [f"the guarantee does not cover this answer, {beyond}"]
        return (*self.notes, *failed, *left_out, *promise)

    def _beyond(self) -> str | None:
        """Why a guarantee does not cover this question; None if it does."""
        policy = self.guidance.policy
        unable = policy is not None and any(name not in self.experts for name in policy.models)
        if self.failures or self.missed is not None or unable:
            return "since not everybody could be asked"
        if self._failed_policy:
            return "since the policy failed"
        if self.beyond is None and (short := [n for n, (answer, _) in self.answers.items() if answer.limited]):
            return f"since time or money was short for {short[0]}'s answer or for what tells how sure it is"
        return self.beyond

    def trusted(self, answer: Answer) -> tuple[float | None, tuple[str, ...]]:
        """An answer's confidence on its own, and what must be said of it."""
        trust = self.guidance.confidence(answer.expert, signals_of(self.question, answer))
        if trust is None:
            return None, (UNKNOWN,)
        if trust.source is None:
            return trust.value, ()
        return trust.value, (f"its confidence of {trust.value:.2f} is not calibrated: it is {_SOURCES[trust.source]}",)


_SOURCES: Final[Mapping[str, str]] = {
    "self_consistency": "the share of sampled answers that agree with it",
    "p_true": "the probability with which the expert calls it true",
    "verbalised": "what the expert says of itself",
    "mean_logprob": "the mean probability of its words",
}
