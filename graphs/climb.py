"""Asking experts for one subtask from tier to tier: the policy says whom, until it takes an answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from agora.errors import AgoraError, BackendTimeout, DeadlineExceeded, NoExpert
from agora.protocols import Embedder
from agora.routing.cascade.policy import Query
from agora.routing.takers import takers
from agora.square import Expert
from agora.types import Answer, Attempt, Failure, Subtask, Tier, Usage
from experts.passage import bounded
from graphs.call import After, internal, left_until
from graphs.climbing import Climbing, Next
from graphs.crew import Crew, not_asked
from graphs.experience import Experience
from graphs.guidance import Guidance, Guide
from graphs.ladder import ACCEPT, rungs
from graphs.patience import seconds_for
from graphs.signals import asked_with, gather, out_of_reach
from graphs.signals.gathering import DEFAULT_SAMPLES
from graphs.solver import Job
from graphs.stream_budget import StreamBudget

log = logging.getLogger(__name__)

MOST_STEPS: Final = 8
"""Experts asked in one climb that a resumed run waits for before it grants anything new. What was asked beyond them is
counted a little later; three tiers with a failure in each are 6."""

SIGNALS_SHARE: Final = 0.5
"""Share of the time that is left for an expert that asking how sure it is may take. An expert that answered and then
hangs keeps its answer so."""

AS_THEY_ARE: Final = (
    "the guarantee is for texts that leave as they are: it does not cover what is condensed or redacted"
)
"""Of a policy that was fitted to answers to whole questions."""

EMBED_TIMEOUT_S: Final = 5.0
"""Seconds that a question's vector may take; 10 ms are usual. A policy decides without it as well as it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Climb(Crew):
    """Those who can be asked, from tier to tier.

    Attributes:
        guide: Tells the policy and how far answers can be trusted.
        experts: The ladder's names, the lowest first; None for all, by tier and price, alike ones as the router has it.
        accept: Confidence at which an answer is taken while no policy was fitted.
        signals: What is asked of an expert's answers beyond what comes with them.
        samples: Answers sampled for self-consistency.
        stream: The budget for all questions.
        experience: What asking has taken so far.
        embedder: Turns questions into vectors, for policies that look at them.
        trade_off: Money that a right answer is worth to whoever asks this time; None if that was not said.
    """

    guide: Guide
    experts: tuple[str, ...] | None = None
    accept: float = ACCEPT
    signals: tuple[str, ...] = ()
    samples: int = DEFAULT_SAMPLES
    stream: StreamBudget = field(default_factory=StreamBudget)
    experience: Experience = field(default_factory=Experience)
    embedder: Embedder | None = None
    trade_off: float | None = None

    most_steps: ClassVar[int] = MOST_STEPS

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        """What is known of those who are here, and what is not."""
        known = self.guide.last
        lacking = out_of_reach(self._ladder(), self.signals)
        whole = known.certified and self.departure is not None and not known.departed
        promise = (AS_THEY_ARE,) if whole else ()
        return (*known.notes, *lacking, *promise, *self._useless(known))

    def _useless(self, known: Guidance) -> tuple[str, ...]:
        """What to say to somebody who said what a right answer is worth, where nothing goes by that."""
        if self.trade_off is None or (known.policy is not None and self.guide.chooses):
            return ()
        return (f"what a right answer is worth ({self.trade_off:g}) changes nothing: no fitted policy goes by it",)

    def weighing(self, trade_off: float) -> Climb:
        """The same, with answers that are worth so much money; see `graphs.solver.Weighing`."""
        return replace(self, guide=self.guide.weighing(trade_off), trade_off=trade_off)

    def _ladder(self) -> tuple[Expert, ...]:
        return tuple(e for e in self.square if self.experts is None or e.name in self.experts)

    async def solve(self, job: Job) -> tuple[Attempt, ...]:
        """Climbs for one subtask. Never raises an `AgoraError`: failures are values. See `Solver.solve`.

        A failed tier is left out, and the policy decides among the others. If an answer is taken that is not the last
        one that came, an attempt that repeats it, free of charge, is the last.
        """
        subtask, question = job.subtask, job.question
        ask = _Asking(self, job)
        left = left_until(job.deadline)
        try:
            if left is not None and left <= 0:
                raise DeadlineExceeded("the run's deadline passed before this was asked")
            async with asyncio.timeout(left):
                guidance = await self.guide.now()
                able = await self._able(subtask, question, guidance)
                embedding, notes = await self._embedding(question, guidance)
        except TimeoutError:
            failure = Failure.of(DeadlineExceeded("the run's deadline passed while choosing an expert"))
        except AgoraError as e:
            failure = Failure.of(e)
        except Exception as e:
            log.exception("choosing experts for subtask %s failed", subtask.id)
            failure = internal(e)
        else:
            climbing = Climbing(
                rungs=able,
                guidance=guidance,
                experience=self.experience,
                accept=self.accept,
                max_failures=self.max_attempts,
                question=question,
                notes=list(notes),
                beyond="since the question's vector is missing" if notes else None,
            )
            return await self._climb(climbing, ask, embedding)
        attempt = not_asked(failure)
        job.on_end(1, attempt, True)
        return (attempt,)

    async def _climb(
        self, climbing: Climbing, ask: _Asking, embedding: NDArray[np.float32] | None
    ) -> tuple[Attempt, ...]:
        attempts: list[Attempt] = []
        on_end = ask.job.on_end
        step = self._decide(climbing, ask, embedding)
        while step is not None and not step.take:
            number = len(attempts) + 1
            attempt = await ask(step, attempts)
            climbing.ended(attempt)
            attempt = _with_confidence(attempt, climbing)
            step = self._decide(climbing, ask, embedding)
            if step is not None and step.take and step.expert == attempt.expert:
                attempt = _taken(attempt, step, climbing)
                attempts.append(attempt)
                on_end(number, attempt, True)
                return tuple(attempts)
            attempts.append(attempt)
            on_end(number, attempt, step is None)
        if step is None:
            if not attempts:
                attempts.append(not_asked(Failure.of(NoExpert("nobody who could answer this may be asked"))))
                on_end(1, attempts[0], True)
            return tuple(attempts)
        # Somebody who was asked before the last one.
        earlier = next(a for a in attempts if a.expert == step.expert)
        assert isinstance(earlier.outcome, Answer)
        again = Attempt(
            expert=earlier.expert,
            why=f"{_what_came(attempts)}; {earlier.expert}'s answer is taken: {step.why}",
            outcome=replace(earlier.outcome, usage=Usage()),
            started_at=time.time(),
            seconds=0.0,
        )
        attempts.append(_taken(again, step, climbing))
        on_end(len(attempts), attempts[-1], True)
        return tuple(attempts)

    def _decide(self, climbing: Climbing, ask: _Asking, embedding: NDArray[np.float32] | None) -> Next | None:
        seconds = [s for s in (left_until(ask.job.deadline), self.stream.seconds_left) if s is not None]
        return climbing.next(
            Query(
                text=ask.job.question,
                embedding=embedding,
                cost_left=ask.spend.cost_left,
                seconds_left=min(seconds, default=None),
            ),
            tokens_left=ask.spend.tokens_left,
        )

    async def _able(self, subtask: Subtask, question: str, guidance: Guidance) -> tuple[tuple[Expert, ...], ...]:
        """Who can be asked, by rung."""
        able, excluded = takers(subtask, question, self.square)
        if subtask.expert is not None:
            named = [e for e in able if e.name == subtask.expert]
            if not named:
                reason = dict(excluded).get(subtask.expert, "it is not here")
                raise NoExpert(f"subtask {subtask.id!r} names expert {subtask.expert!r}, who cannot be asked: {reason}")
            return ((named[0],),)
        if self.experts is not None:
            by_name = {e.name: e for e in able}
            ladder = tuple((by_name[name],) for name in self.experts if name in by_name)
            if not ladder:
                reasons = "; ".join(f"{n}: {dict(excluded).get(n, 'not here')}" for n in self.experts)
                raise NoExpert(f"nobody on the ladder can take subtask {subtask.id!r}: {reasons}")
            return ladder
        steps = rungs(able)
        if guidance.policy is not None or all(len(step) == 1 for step in steps):
            return steps
        ranking = await self.router.rank(subtask, question, self.square)
        place = {c.expert: n for n, c in enumerate(ranking.candidates)}
        return rungs(sorted(able, key=lambda e: place.get(e.name, len(place))))

    async def _embedding(self, question: str, guidance: Guidance) -> tuple[NDArray[np.float32] | None, tuple[str, ...]]:
        if self.embedder is None or guidance.policy is None:
            return None, ()
        try:
            async with asyncio.timeout(EMBED_TIMEOUT_S):
                vector = (await self.embedder.embed([question]))[0]
        except TimeoutError:
            why = f"not within {EMBED_TIMEOUT_S:g} s"
        except Exception as e:
            log.exception("the question's vector could not be had")
            why = f"{type(e).__name__}: {e}"
        else:
            if np.isfinite(vector).all():
                return vector, ()
            why = "it is not a number"
        return None, (f"the policy decided without the question's vector: {why}",)


class _Asking:
    """Asks for one subtask, one expert after the other, each in a step that is kept."""

    def __init__(self, climb: Climb, job: Job) -> None:
        self._climb = climb
        self.job = job
        self.spend = climb.stream.joined_by(job.spend)

    async def __call__(self, step: Next, before: Sequence[Attempt]) -> Attempt:
        why = step.why
        if before and isinstance(before[-1].outcome, Failure):
            why = f"{before[-1].expert} failed; {why}"
        asked = False

        async def body() -> Attempt:
            nonlocal asked
            asked = True
            # Whoever has the name by now: the turn may have been waited for.
            expert = self._climb.square.get(step.expert)
            if expert is None:
                gone = Failure(code="no_expert", message=f"{step.expert} has left", transient=True, expert=step.expert)
                return Attempt(expert=step.expert, why=why, outcome=gone, started_at=time.time(), seconds=0.0)
            self.job.on_start(len(before) + 1, expert.name, why)
            return await self._ask(expert, why, step.sharing)

        attempt = await self.job.steps("ask", body)
        if not asked:
            # From the record: paid in an earlier leg, of which the stream's budget knows nothing.
            self.job.spend.add(attempt.outcome.usage)
        return attempt

    async def _ask(self, expert: Expert, why: str, sharing: int) -> Attempt:
        """Asks one expert, for no longer than its share of the time that is left."""
        climb, job = self._climb, self.job
        started = asyncio.get_running_loop().time()
        left, until = left_until(job.deadline), job.deadline
        given = None if left is None else seconds_for(expert.name, left, sharing, climb.experience)
        if given is not None and left is not None and given < left:
            until = started + given
        after = None
        if climb.signals:
            # What is asked for, and what it comes to: samples make one of the signals.
            what = (frozenset(climb.signals), climb.samples)
            after = After(what=what, do=lambda text, answer: self._signals(expert, text, answer, until))
        attempt = await climb.ask(
            asked_with(expert, climb.signals),
            replace(job, spend=self.spend, deadline=until),
            why=why,
            after=after,
        )
        outcome = attempt.outcome
        if isinstance(outcome, Failure) and outcome.code == DeadlineExceeded.code and until != job.deadline:
            # Its share is over, not the run's time: somebody else may still be asked.
            late = BackendTimeout(f"{expert.name} did not answer within {given:.3g} s, its share of the time left")
            failure = Failure.of(late, usage=outcome.usage)
            attempt = replace(attempt, outcome=replace(failure, expert=outcome.expert, seconds=outcome.seconds))
        climb.experience.saw(attempt.outcome, asyncio.get_running_loop().time() - started)
        return attempt

    async def _signals(self, expert: Expert, text: str, answer: Answer, deadline: float | None) -> Answer:
        reach, left = self.job.subtask.reach, left_until(deadline)
        until = None if left is None else asyncio.get_running_loop().time() + left * SIGNALS_SHARE
        # On another node the label must hold for these questions, too.
        with nullcontext() if reach is Tier.CLOUD else bounded(reach):
            gathered = await gather(
                expert,
                text,
                answer,
                self._climb.signals,
                samples=self._climb.samples,
                spend=self.spend,
                max_tokens=self.job.subtask.max_tokens,
                deadline=until,
            )
        return gathered.added_to(answer)


def _with_confidence(attempt: Attempt, climbing: Climbing) -> Attempt:
    answer = attempt.outcome
    if not isinstance(answer, Answer):
        return attempt
    return replace(attempt, outcome=replace(answer, confidence=climbing.trusted(answer)[0]))


def _taken(attempt: Attempt, step: Next, climbing: Climbing) -> Attempt:
    """The attempt whose answer is taken, with how far it can be trusted."""
    answer = attempt.outcome
    assert isinstance(answer, Answer)
    confidence, said = climbing.trusted(answer)
    if step.fitted and step.quality is not None:
        confidence, said = step.quality, ()
    notes = (*answer.notes, *climbing.answer_notes(answer.expert), *said)
    return replace(attempt, outcome=replace(answer, confidence=confidence, notes=notes))


def _what_came(attempts: Sequence[Attempt]) -> str:
    last = attempts[-1]
    if isinstance(last.outcome, Failure):
        return f"{last.expert} failed"
    return f"{last.expert} answered"
