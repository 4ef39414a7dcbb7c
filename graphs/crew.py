"""Asking experts for one subtask: choose, ask, and on failure ask the next best one."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from agora.errors import (
    AgoraError,
    BackendTimeout,
    BudgetExceeded,
    DeadlineExceeded,
    OutOfReach,
    Overloaded,
    Unavailable,
)
from agora.routing.router import Router
from agora.routing.takers import beyond
from agora.square import Expert, Square
from agora.types import Answer, Attempt, Failure, Outcome, Subtask, Tier
from graphs.call import After, Call, internal, left_until, passed
from graphs.departure import Departure, Prepared
from graphs.once import Once
from graphs.solver import Job
from graphs.spend import Spend

__all__ = [
    "MAX_ATTEMPTS",
    "After",
    "Crew",
    "ask_expert",
    "internal",
    "left_until",
    "missing_input",
    "not_asked",
    "passed",
]

log = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 3
"""Experts asked for one subtask in one round: if each fails on its own one time in ten, one subtask in a
thousand stays without an answer."""

OF_THE_NODE: Final = frozenset({Unavailable.code, BackendTimeout.code, Overloaded.code})
"""Failures that the other experts on the same machine are likely to share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Those who can be asked, and how they are chosen.

    Attributes:
        square: Who is here.
        router: Ranks experts for a subtask.
        max_attempts: Experts asked for one subtask in one round; passing failures get a second round.
        departure: What is done to a text before it leaves this machine's tier.
        once: Makes identical calls once.
    """

    square: Square
    router: Router
    max_attempts: int = MAX_ATTEMPTS
    departure: Departure | None = None
    once: Once | None = None

    most_steps: ClassVar[int] = 0
    notes: ClassVar[tuple[str, ...]] = ()

    async def solve(self, job: Job) -> tuple[Attempt, ...]:
        """Asks for one subtask until someone answers. Never raises an `AgoraError`: failures are values.

        Args:
            job: The subtask, and within what to solve it. Its steps are not used: a solution is kept as a whole.

        Returns:
            All attempts, at least one; the last one's outcome counts.
        """
        subtask = job.subtask
        attempts: list[Attempt] = []
        left = left_until(job.deadline)
        if left is not None and left <= 0:
            attempt = not_asked(Failure.of(DeadlineExceeded("the run's deadline passed before this was asked")))
            job.on_end(1, attempt, True)
            return (attempt,)
        try:
            async with asyncio.timeout(left):
                ranking = await self.router.rank(subtask, job.question, self.square)
        except TimeoutError:
            failure = Failure.of(DeadlineExceeded("the run's deadline passed while choosing an expert"))
        except AgoraError as e:
            failure = Failure.of(e)
        except Exception as e:
            log.exception("routing of subtask %s failed", subtask.id)
            failure = internal(e)
        else:
            names = [c.expert for c in ranking.candidates]
            failed: set[str] = set()
            while (expert := self._next(names, failed)) is not None:
                names.remove(expert.name)
                number = len(attempts) + 1
                why = ranking.why(expert.name)
                if attempts:
                    why = f"{attempts[-1].expert} failed; {why}"
                job.on_start(number, expert.name, why)
                attempt = await self.ask(expert, job, why=why)
                attempts.append(attempt)
                if isinstance(attempt.outcome, Failure) and attempt.outcome.code in OF_THE_NODE:
                    failed.add(expert.node)
                names = _worth_asking(names, attempt.outcome, expert, self.square)
                last = number >= self.max_attempts or self._next(names, failed) is None
                job.on_end(number, attempt, last)
                if last:
                    return tuple(attempts)
            failure = Failure(code="no_expert", message=f"everyone chosen has left: {names}", transient=True)
        attempt = not_asked(failure)
        job.on_end(1, attempt, True)
        return (attempt,)

    async def ask(self, expert: Expert, job: Job, *, why: str, after: After | None = None) -> Attempt:
        """Asks one expert once, the way this crew does; see `ask_expert`."""
        return await ask_expert(
            expert,
            job.subtask,
            job.question,
            why=why,
            spend=job.spend,
            deadline=job.deadline,
            departure=self.departure,
            once=self.once,
            after=after,
            asker=job.asker,
        )

    def _next(self, names: list[str], failed: set[str]) -> Expert | None:
        """The best who is still here; one on a machine that has just failed only when there is nobody else."""
        here = [e for e in map(self.square.get, names) if e is not None]
        return next((e for e in here if e.node not in failed), here[0] if here else None)


def _worth_asking(others: list[str], outcome: Outcome, asked: Expert, square: Square) -> list[str]:
    """Those of the others who may do better than the one who was just asked."""
    if isinstance(outcome, Answer) or outcome.code == DeadlineExceeded.code:
        return []
    if outcome.code == BudgetExceeded.code:
        here = [e for e in map(square.get, others) if e is not None]
        return [e.name for e in here if e.card.price_per_mtok < asked.card.price_per_mtok]
    return others


async def ask_expert(
    expert: Expert,
    subtask: Subtask,
    question: str,
    *,
    why: str,
    spend: Spend,
    deadline: float | None,
    departure: Departure | None = None,
    once: Once | None = None,
    after: After | None = None,
    asker: str | None = None,
) -> Attempt:
    """Asks one expert once, within budget and deadline. Never raises an `AgoraError`: failures are values.

    This is the one way by which a subtask's text leaves; the label on it is looked at once more before it does.

    Args:
        expert: Whom to ask.
        subtask: What for.
        question: The text to ask.
        why: Why this expert, for the attempt.
        spend: The run's spending; what the call used is counted in it.
        deadline: Event-loop time at which to stop, or None.
        departure: What is done to a text before it leaves this machine's tier.
        once: Makes identical calls once.
        after: What is done with the answer.
        asker: Whose question it is; see `Job`.
    """
    started_at, started = time.time(), time.monotonic()
    call = Call(expert=expert, subtask=subtask, text=question, spend=spend, deadline=deadline, after=after, asker=asker)
    outcome: Outcome
    prepared: Prepared | None = None
    try:
        if (reason := beyond(expert.card, subtask.reach)) is not None:
            raise OutOfReach(f"{expert.name} was not asked: {reason}")
        left = left_until(deadline)
        if left is not None and left <= 0:
            raise DeadlineExceeded(f"the run's deadline passed before {expert.name} was asked")
        async with asyncio.timeout(left):
            private = False
            if departure is not None and expert.card.tier is not Tier.END:
                prepared = await departure.prepare(question, expert, spend=spend, deadline=deadline)
                call.text, private = prepared.text, prepared.private
            elif departure is not None and once is not None and once.keeps:
                # It may be shown here as it is, and is no less private for that.
                private = bool((await departure.redact(question, spend=spend)).replaced)
            outcome = (await call.make()).outcome if once is None else await once.ask(call, private=private)
    except TimeoutError:
        outcome = call.broke_off()
    except AgoraError as e:
        outcome = Failure.of(e)
    except Exception as e:
        log.exception("preparing a question for %s failed", expert.name)
        outcome = internal(e)
    if prepared is not None:
        outcome = prepared.returned(outcome)
    seconds = time.monotonic() - started
    if isinstance(outcome, Failure):
        outcome = replace(outcome, expert=expert.name, seconds=seconds)
    return Attempt(expert=expert.name, why=why, outcome=outcome, started_at=started_at, seconds=seconds)


def missing_input(subtask: Subtask, missing: list[str]) -> Attempt:
    """The attempt that stands for a subtask that could not be asked since its inputs have no answer."""
    needs = ", ".join(missing)
    return not_asked(Failure(code="missing_input", message=f"{subtask.id} needs {needs}, which has no answer"))


def not_asked(failure: Failure) -> Attempt:
    """The attempt that stands for a subtask that nobody was asked."""
    return Attempt(expert=None, why="nobody was asked", outcome=failure, started_at=time.time(), seconds=0.0)
