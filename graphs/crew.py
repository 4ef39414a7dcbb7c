"""Asking experts for one subtask: choose, ask, and on failure ask the next best one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from agora.routing.router import Router

from agora.errors import AgoraError, BackendTimeout, BudgetExceeded, DeadlineExceeded
from agora.square import Expert, Square
from agora.types import Answer, Attempt, Failure, Outcome, Subtask, Usage
from graphs.spend import Spend

log = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 3
"""Experts asked for one subtask before it is given up: if each fails on its own one time in ten, one subtask in a
thousand stays without an answer."""

_GIVE_UP: Final = frozenset({BudgetExceeded.code, DeadlineExceeded.code})
"""Failures that no other expert can mend."""

OnStart = Callable[[int, str, str], None]
OnEnd = Callable[[int, Attempt, bool], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Those who can be asked, and how they are chosen.

    Attributes:
        square: Who is here.
        router: Ranks experts for a subtask.
        max_attempts: Experts asked for one subtask before it is given up.
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
            names = [c.expert for c in ranking.candidates][: self.max_attempts]
            experts = [e for e in map(self.square.get, names) if e is not None]
            for number, expert in enumerate(experts, 1):
                why = ranking.why(expert.name)
                if number > 1:
                    why = f"{attempts[-1].expert} failed; {why}"
                on_start(number, expert.name, why)
                attempt = await _ask(expert, subtask, question, why=why, spend=spend, deadline=deadline)
                attempts.append(attempt)
                last = isinstance(attempt.outcome, Answer) or number == len(experts) or attempt.outcome.code in _GIVE_UP
                on_end(number, attempt, last)
                if last:
                    return tuple(attempts)
            failure = Failure(code="no_expert", message=f"everyone chosen has left: {names}", transient=True)
        attempt = _not_asked(failure)
        on_end(1, attempt, True)
        return (attempt,)


async def _ask(
    expert: Expert, subtask: Subtask, question: str, *, why: str, spend: Spend, deadline: float | None
) -> Attempt:
    started_at, started = time.time(), time.monotonic()
    outcome: Outcome
    try:
        left = _left(deadline)
        # The expert is told its time so that a remote one can stop by itself; the block holds it to that.
        async with asyncio.timeout(left):
            with spend.grant(expert.card, len(question) + len(expert.system_prompt or ""), subtask.max_tokens) as most:
                outcome = await expert.ask(question, max_tokens=most, timeout_s=left)
        if outcome.text == "":
            outcome = Failure(
                code="bad_reply", message=f"{expert.name} gave an empty answer", transient=True, usage=outcome.usage
            )
    except TimeoutError:
        outcome = Failure.of(DeadlineExceeded(f"the run's deadline passed while {expert.name} was answering"))
    except BackendTimeout as e:
        outcome = Failure.of(DeadlineExceeded(str(e)) if _passed(deadline) else e)
    except AgoraError as e:
        outcome = Failure.of(e)
    except Exception as e:
        # A third-party backend may raise anything; one subtask's trouble must not end the others.
        log.exception("expert %s failed", expert.name)
        outcome = _internal(e)
    seconds = time.monotonic() - started
    if isinstance(outcome, Failure):
        outcome = replace(outcome, expert=expert.name, seconds=seconds)
    spend.add(outcome.usage)
    return Attempt(expert=expert.name, why=why, outcome=outcome, started_at=started_at, seconds=seconds)


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
