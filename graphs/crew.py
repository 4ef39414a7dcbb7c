"""Asking experts for one subtask: choose, ask, and on failure ask the next best one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from agora.errors import (
    AdapterError,
    AgoraError,
    BackendError,
    BackendTimeout,
    BudgetExceeded,
    DeadlineExceeded,
    Overloaded,
    Rejected,
    Unavailable,
    Unsupported,
)
from agora.routing.router import Router
from agora.square import Expert, Square
from agora.types import Answer, Attempt, Failure, Outcome, Subtask, Usage
from graphs.spend import Spend, prompt_tokens

log = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 3
"""Experts asked for one subtask in one round: if each fails on its own one time in ten, one subtask in a
thousand stays without an answer."""

_NOT_READ: Final = (Unavailable, Overloaded, Rejected, Unsupported, AdapterError)
"""Errors of a backend that had no part of the prompt read: nothing was used. After any other the prompt counts."""

_OF_THE_NODE: Final = frozenset({Unavailable.code, BackendTimeout.code, Overloaded.code})
"""Failures that the other experts on the same machine are likely to share."""

OnStart = Callable[[int, str, str], None]
OnEnd = Callable[[int, Attempt, bool], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Those who can be asked, and how they are chosen.

    Attributes:
        square: Who is here.
        router: Ranks experts for a subtask.
        max_attempts: Experts asked for one subtask in one round; passing failures get a second round.
    """

    square: Square
    router: Router
    max_attempts: int = MAX_ATTEMPTS

    async def solve(
        self,
        subtask: Subtask,
        question: str,
        *,
        spend: Spend,
        deadline: float | None,
        on_start: OnStart,
        on_end: OnEnd,
    ) -> tuple[Attempt, ...]:
        """Asks for one subtask until someone answers. Never raises an `AgoraError`: failures are values.

        Args:
            subtask: What to solve.
            question: The text to ask, inputs filled in.
            spend: The run's spending.
            deadline: Event-loop time at which to stop, or None.
            on_start: Called with (number of the attempt from 1, expert, why).
            on_end: Called with (number of the attempt, the attempt, whether it was the last).

        Returns:
            All attempts, at least one; the last one's outcome counts.
        """
        attempts: list[Attempt] = []
        left = _left(deadline)
        if left is not None and left <= 0:
            attempt = _not_asked(Failure.of(DeadlineExceeded("the run's deadline passed before this was asked")))
            on_end(1, attempt, True)
            return (attempt,)
        try:
            async with asyncio.timeout(left):
                ranking = await self.router.rank(subtask, question, self.square)
        except TimeoutError:
            failure = Failure.of(DeadlineExceeded("the run's deadline passed while choosing an expert"))
        except AgoraError as e:
            failure = Failure.of(e)
        except Exception as e:
            log.exception("routing of subtask %s failed", subtask.id)
            failure = _internal(e)
        else:
            names = [c.expert for c in ranking.candidates]
            failed: set[str] = set()
            while (expert := self._next(names, failed)) is not None:
                names.remove(expert.name)
                number = len(attempts) + 1
                why = ranking.why(expert.name)
                if attempts:
                    why = f"{attempts[-1].expert} failed; {why}"
                on_start(number, expert.name, why)
                attempt = await _ask(expert, subtask, question, why=why, spend=spend, deadline=deadline)
                attempts.append(attempt)
                if isinstance(attempt.outcome, Failure) and attempt.outcome.code in _OF_THE_NODE:
                    failed.add(expert.node)
                names = _worth_asking(names, attempt.outcome, expert, self.square)
                last = number >= self.max_attempts or self._next(names, failed) is None
                on_end(number, attempt, last)
                if last:
                    return tuple(attempts)
            failure = Failure(code="no_expert", message=f"everyone chosen has left: {names}", transient=True)
        attempt = _not_asked(failure)
        on_end(1, attempt, True)
        return (attempt,)

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


async def _ask(
    expert: Expert, subtask: Subtask, question: str, *, why: str, spend: Spend, deadline: float | None
) -> Attempt:
    started_at, started = time.time(), time.monotonic()
    chars = len(question) + len(expert.system_prompt or "")
    outcome: Outcome
    counted = False
    try:
        left = _left(deadline)
        if left is not None and left <= 0:
            raise DeadlineExceeded(f"the run's deadline passed before {expert.name} was asked")
        async with asyncio.timeout(left), spend.grant(expert.card, chars, subtask.max_tokens) as most:
            # The expert is told its time so that a remote one can stop by itself; the block holds it to that.
            outcome = await expert.ask(question, max_tokens=most, timeout_s=_left(deadline))
            spend.add(outcome.usage)  # before the promise is released, or another call could have both
            counted = True
        if outcome.text == "":
            outcome = Failure(
                code="bad_reply", message=f"{expert.name} gave an empty answer", transient=True, usage=outcome.usage
            )
        elif outcome.finish_reason == "length" and most < min(subtask.max_tokens or most + 1, expert.card.max_tokens):
            outcome = replace(outcome, notes=(*outcome.notes, f"cut short: the budget left {most} tokens for it"))
    except TimeoutError:
        outcome = Failure.of(DeadlineExceeded(f"the run's deadline passed while {expert.name} was answering"))
        outcome = replace(outcome, usage=_read_at_least(expert, chars))
    except AgoraError as e:
        late = isinstance(e, BackendTimeout) and _passed(deadline)
        outcome = Failure.of(DeadlineExceeded(str(e)) if late else e)
        if isinstance(e, BackendError) and not isinstance(e, _NOT_READ):
            outcome = replace(outcome, usage=_read_at_least(expert, chars))
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Nobody cancelled the run: the backend's own work was, e.g. since it was closed.
        outcome = Failure(code="unavailable", message=f"{expert.name} dropped the question", transient=True)
    except Exception as e:
        # A third-party backend may raise anything; one subtask's trouble must not end the others.
        log.exception("expert %s failed", expert.name)
        outcome = _internal(e)
    seconds = time.monotonic() - started
    if isinstance(outcome, Failure):
        outcome = replace(outcome, expert=expert.name, seconds=seconds)
        if not counted:
            spend.add(outcome.usage)
    return Attempt(expert=expert.name, why=why, outcome=outcome, started_at=started_at, seconds=seconds)


def _read_at_least(expert: Expert, chars: int) -> Usage:
    """What a call that broke off has used as far as anybody can tell: its prompt."""
    tokens = prompt_tokens(chars)
    return Usage(prompt_tokens=tokens, cost=expert.card.cost_of(tokens), calls=1)


def missing_input(subtask: Subtask, missing: list[str]) -> Attempt:
    """The attempt that stands for a subtask that could not be asked since its inputs have no answer."""
    needs = ", ".join(missing)
    return _not_asked(Failure(code="missing_input", message=f"{subtask.id} needs {needs}, which has no answer"))


def _not_asked(failure: Failure) -> Attempt:
    return Attempt(expert=None, why="nobody was asked", outcome=failure, started_at=time.time(), seconds=0.0)


def _internal(error: Exception) -> Failure:
    return Failure(code="internal", message=f"{type(error).__name__}: {error}", usage=Usage())


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else deadline - asyncio.get_running_loop().time()


def _passed(deadline: float | None) -> bool:
    left = _left(deadline)
    return left is not None and left <= 0
