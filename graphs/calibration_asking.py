"""Asking experts labelled questions: in parallel, within limits, each outcome handed on as it comes."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from agora.errors import AgoraError, BackendTimeout, InvalidRequest, Overloaded
from agora.routing.final_answer import final_answer
from agora.routing.trust import Version
from agora.square import Expert
from agora.types import Answer
from graphs.calibration_journal import Graded
from graphs.calibration_questions import Labelled
from graphs.signals import asked_with, gather
from graphs.signals.counting import signals_of

PER_EXPERT: Final = 8
"""Questions one expert is asked at once: the batch that local models decode at most of their speed."""

ATTEMPTS: Final = 3
"""Times that a question is asked of an expert whose failure may be passing."""

FIRST_WAIT_S: Final = 0.5
"""Seconds before the second attempt, twice as many before the third; a server that says how long is believed."""

LONGEST_WAIT_S: Final = 30.0
"""Most seconds that such a server is believed."""

GIVE_UP_AFTER: Final = 10
"""Failures in a row, with nothing answered before, after which an expert is not asked any further: it is not there, and
hundreds of timeouts would tell no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is asked.

    Attributes:
        questions: The questions.
        experts: Who is asked all of them, with the version each is of.
        signals: Signals to ask for besides those that come with an answer.
        samples: Answers sampled for self-consistency.
        max_parallel: Most questions in flight.
    """

    questions: Sequence[Labelled]
    experts: Mapping[str, tuple[Expert, Version]]
    signals: tuple[str, ...] = ()
    samples: int = 5
    max_parallel: int = 16


async def ask_all(
    order: Order,
    done: Collection[tuple[str, Version, tuple[str, ...]]],
    tell: Callable[[str, Graded], None],
) -> None:
    """Asks every expert every question that is not done yet.

    Experts do not wait for each other; each goes through the questions in their order.

    Args:
        order: What is asked.
        done: Keys of outcomes that are there already.
        tell: Given each expert's name and outcome, failures too, as they come. What it raises ends everything.
    """
    room = asyncio.Semaphore(order.max_parallel)
    try:
        async with asyncio.TaskGroup() as tasks:
            for name, (expert, version) in order.experts.items():
                left = [q for q in order.questions if (q.key, version, order.signals) not in done]
                worker = _Worker(order, expert, version, left, room, functools.partial(tell, name))
                for _ in range(min(PER_EXPERT, len(left))):
                    tasks.create_task(worker.run())
    except ExceptionGroup as group:
        # One is enough to tell: the others are mostly the same disk that is full.
        raise group.exceptions[0] from None


class _Worker:
    """One expert's questions, which several tasks take from."""

    def __init__(
        self,
        order: Order,
        expert: Expert,
        version: Version,
        left: Sequence[Labelled],
        room: asyncio.Semaphore,
        tell: Callable[[Graded], None],
    ) -> None:
        self._order = order
        self._expert = expert
        self._version = version
        self._left = iter(left)
        self._room = room
        self._tell = tell
        self._failed = 0
        self._answered = False
        self._why = ""

    async def run(self) -> None:
        for question in self._left:
            if not self._answered and self._failed >= GIVE_UP_AFTER:
                self._tell(self._none(question, f"not asked: {self._failed} failures before it, the last: {self._why}"))
                continue
            async with self._room:
                outcome = await self._one(question)
            if outcome.error:
                self._failed += 1
                self._why = outcome.error
            else:
                self._answered = True
            self._tell(outcome)

    async def _one(self, question: Labelled) -> Graded:
        try:
            answer = await self._answer(question.text)
        except AgoraError as e:
            return self._none(question, str(e))
        gathered = await gather(self._expert, question.text, answer, self._order.signals, samples=self._order.samples)
        # What asking for signals costs belongs to it: it is paid for every answer in use too.
        answer = gathered.added_to(answer)
        return Graded(
            question=question.key,
            version=self._version,
            asked_for=self._order.signals,
            right=question.is_right(answer.text),
            answer=final_answer(answer.text),
            signals=signals_of(question.text, answer),
            cost=answer.usage.cost if math.isfinite(answer.usage.cost) else 0.0,
            seconds=answer.seconds,
            tokens=answer.usage.tokens,
            price=self._expert.card.price_per_mtok,
        )

    async def _answer(self, text: str) -> Answer:
        wait = FIRST_WAIT_S
        for attempt in range(ATTEMPTS):
            try:
                return await asked_with(self._expert, self._order.signals).ask(text)
            except AgoraError as e:
                # Whoever let the whole time pass has had its chance: three times ten minutes would tell no more.
                if not e.transient or isinstance(e, BackendTimeout) or attempt == ATTEMPTS - 1:
                    raise
                told = e.retry_after_s if isinstance(e, Overloaded) else None
                await asyncio.sleep(min(told if told is not None else wait, LONGEST_WAIT_S))
                wait *= 2
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _none(self, question: Labelled, why: str) -> Graded:
        return Graded(question=question.key, version=self._version, asked_for=self._order.signals, error=why)


def ladder(experts: Mapping[str, Expert], named: Sequence[str] | None) -> tuple[str, ...]:
    """Who may answer, the cheapest first: those named, in that order; else all, by tier and price.

    Raises:
        InvalidRequest: If one that is named is not here, or nobody is.
    """
    if named is not None:
        if unknown := [n for n in named if n not in experts]:
            raise InvalidRequest(f"no expert {unknown[0]!r} is here; here: {', '.join(experts) or 'nobody'}")
        return tuple(dict.fromkeys(named))
    if not experts:
        raise InvalidRequest("nobody is here to be calibrated", hint="give agora.toml some [experts.NAME]")
    return tuple(sorted(experts, key=lambda n: (experts[n].card.tier.height, experts[n].card.price_per_mtok)))
