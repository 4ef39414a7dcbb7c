"""Asking experts labelled questions, the way they are asked in use: each outcome handed on as it comes.

What is recorded of an answer is what a policy will see of it: what it cost and how long it took, making the text ready
and asking how sure the expert is included. So an expert is asked one question at a time unless told otherwise, and
those who share a machine take turns: of eight questions at once each takes longer than it would alone, and a policy
that is to keep a deadline would leave out who is quick enough.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Final

from agora.config import Config, LlamaCppNode, LocalNode
from agora.errors import BackendTimeout, InvalidRequest, Overloaded
from agora.routing.final_answer import final_answer
from agora.routing.takers import beyond
from agora.routing.trust import Version
from agora.square import HEALTH_TIMEOUT_S, Expert, Square
from agora.types import Answer, Budget, Failure, Subtask, Tier
from experts.passage import bounded
from graphs.calibration_journal import Graded, Key
from graphs.calibration_questions import Labelled
from graphs.calibration_version import asked_for, relays
from graphs.call import After
from graphs.crew import ask_expert
from graphs.departure import Departure
from graphs.signals import asked_with, gather
from graphs.signals.counting import signals_of
from graphs.signals.gathering import DEFAULT_SAMPLES
from graphs.spend import Spend

AT_ONCE: Final = 1
"""Questions one machine is asked at once: see the module."""

ATTEMPTS: Final = 3
"""Times that a question is asked of an expert whose failure may be passing."""

FIRST_WAIT_S: Final = 0.5
"""Seconds before the second attempt, twice as many before the third."""

FULL_WAIT_S: Final = 15.0
"""The same after a server said that it is overloaded, which it says only after its backend has waited for as long as
the server wanted (`experts.retry`)."""

GIVE_UP_AFTER: Final = 10
"""Failures in a row, with nothing answered before, after which an expert is not asked any further: it is not there."""

SILENT_AFTER: Final = 3
"""The same for questions that each had their whole time, of an expert that does generate a token when asked for one.
One that does not is given up after the first: hundreds of timeouts would tell no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is asked.

    Attributes:
        questions: The questions.
        experts: Who is asked all of them that it may see, with the version each is of.
        signals: Signals to ask for besides those that come with an answer.
        samples: Answers sampled for self-consistency.
        departure: What is done to a text before it leaves this machine's tier.
        machines: What stands for the machine that answers, by expert: those with an equal one take turns. Where it is
            not told, experts with the same backend do; see `machines_of`.
        at_once: Most questions in flight on one machine. With more than one, the times of answers include waiting.
        max_parallel: Most questions in flight.
    """

    questions: Sequence[Labelled]
    experts: Mapping[str, tuple[Expert, Version]]
    signals: tuple[str, ...] = ()
    samples: int = DEFAULT_SAMPLES
    departure: Departure | None = None
    machines: Mapping[str, Hashable] = field(default_factory=dict)
    at_once: int = AT_ONCE
    max_parallel: int = 16

    @property
    def asked_for(self) -> tuple[str, ...]:
        """The signals that are asked for, told apart by all that changes them."""
        return asked_for(self.signals, self.samples)

    def key(self, question: Labelled, version: Version) -> Key:
        """Of the outcome of asking that version that question."""
        return question.key, version, self.asked_for

    def asked_of(self, name: str) -> tuple[Labelled, ...]:
        """The questions that an expert may see."""
        expert, _ = self.experts[name]
        return tuple(q for q in self.questions if beyond(expert.card, q.reach) is None)


def machines_of(experts: Iterable[Expert], config: Config | None = None) -> dict[str, Hashable]:
    """What stands for the machine that answers, by expert.

    Engines in this process share its processors; experts reached by one neighbour share its machine; and others share
    one if they share a backend.
    """
    return {e.name: _machine(e, config) for e in experts}


def _machine(expert: Expert, config: Config | None) -> Hashable:
    node = config.nodes.get(expert.node) if config is not None else None
    if isinstance(node, LocalNode | LlamaCppNode):
        return "here"
    return ("node", expert.node) if relays(expert) else id(expert.backend)


async def ask_all(order: Order, done: Collection[Key], tell: Callable[[str, Graded], None]) -> None:
    """Asks every expert every question that is not done yet and that it may see.

    Machines do not wait for each other; each expert goes through the questions in their order.

    Args:
        order: What is asked.
        done: Keys of outcomes that are there already.
        tell: Given each expert's name and outcome, failures too, as they come. What it raises ends everything.

    Raises:
        InvalidRequest: If `at_once` or `max_parallel` is below 1.
    """
    for name in ("at_once", "max_parallel"):
        if getattr(order, name) < 1:
            raise InvalidRequest(f"{name} is {getattr(order, name)}; it must be ≥ 1")
    room = asyncio.Semaphore(order.max_parallel)
    machines: dict[Hashable, _Machine] = {}
    alive: dict[int, asyncio.Task[bool]] = {}
    try:
        async with asyncio.TaskGroup() as tasks:
            asked = []
            for name, (expert, version) in order.experts.items():
                left = [q for q in order.asked_of(name) if order.key(q, version) not in done]
                if not left:
                    continue
                backend = id(expert.backend)
                if backend not in alive:
                    alive[backend] = tasks.create_task(_is_alive(expert))
                machine = machines.setdefault(order.machines.get(name, backend), _Machine(order.at_once))
                worker = _Worker(order, expert, version, left, machine, alive[backend], functools.partial(tell, name))
                asked += [tasks.create_task(worker.run(room)) for _ in range(min(order.at_once, len(left)))]
            if asked:
                await asyncio.wait(asked)
            for look in alive.values():
                # Nobody waits for it any more.
                look.cancel()
    except ExceptionGroup as group:
        # One is enough to tell: the others are mostly the same disk that is full.
        raise group.exceptions[0] from None


async def _is_alive(expert: Expert) -> bool:
    """Whether its backend generates a token, asked beside the first question: that one token does not slow it down."""
    told = await Square([expert]).health(timeout_s=HEALTH_TIMEOUT_S)
    return told[expert.name].ok


class _Machine:
    """What experts share who take turns.

    Attributes:
        turn: Held by whoever is asked.
        silent: What somebody on it said that had its whole time, while it did not generate a token either.
    """

    def __init__(self, at_once: int) -> None:
        self.turn = asyncio.Semaphore(at_once)
        self.silent = ""


class _Worker:
    """One expert's questions, which several tasks take from."""

    def __init__(
        self,
        order: Order,
        expert: Expert,
        version: Version,
        left: Sequence[Labelled],
        machine: _Machine,
        alive: asyncio.Task[bool],
        tell: Callable[[Graded], None],
    ) -> None:
        self._order = order
        self._expert = expert
        self._version = version
        self._left = iter(left)
        self._machine = machine
        self._alive = alive
        self._tell = tell
        self._failed = 0
        self._late = 0
        self._answered = False
        self._why = ""

    async def run(self, room: asyncio.Semaphore) -> None:
        for question in self._left:
            async with self._machine.turn, room:
                # Looked at here, since the turn may have been waited for.
                why = self._given_up()
                outcome = await self._one(question) if why is None else self._none(question, f"not asked: {why}")
            self._tell(outcome)

    def _given_up(self) -> str | None:
        """Why it is not asked any further; None if it is."""
        if self._answered:
            return None
        if self._machine.silent and not self._is_alive():
            return f"nothing on its machine answers: {self._machine.silent}"
        if self._late >= SILENT_AFTER or self._failed >= GIVE_UP_AFTER:
            return f"{self._failed} failures before it, the last: {self._why}"
        return None

    def _is_alive(self) -> bool:
        return self._alive.done() and not self._alive.cancelled() and self._alive.result()

    async def _one(self, question: Labelled) -> Graded:
        found = await self._asked(question)
        if isinstance(found, Graded):
            self._answered = True
            return found
        self._failed += 1
        self._why = found.message
        if found.code == BackendTimeout.code:
            self._late += 1
            if not self._answered and not self._is_alive():
                self._machine.silent = found.message
        return self._none(question, found.message)

    async def _asked(self, question: Labelled) -> Graded | Failure:
        wait = FIRST_WAIT_S
        attempt = 1
        while isinstance(found := await self._once(question), Failure):
            # Whoever let the whole time pass has had its chance: three times ten minutes would tell no more.
            if not found.transient or found.code == BackendTimeout.code or attempt == ATTEMPTS:
                break
            await asyncio.sleep(FULL_WAIT_S if found.code == Overloaded.code else wait)
            wait *= 2
            attempt += 1
        return found

    async def _once(self, question: Labelled) -> Graded | Failure:
        """Asks as `graphs.climb` does: what leaves, what is asked about the answer, and what of it is counted."""
        order, expert = self._order, self._expert
        spend = Spend(Budget())
        own = 0

        async def signals(text: str, answer: Answer) -> Answer:
            nonlocal own
            # On another node the label must hold for these questions, too.
            with nullcontext() if question.reach is Tier.CLOUD else bounded(question.reach):
                gathered = await gather(expert, text, answer, order.signals, samples=order.samples, spend=spend)
            answer = gathered.added_to(answer)
            own = answer.usage.tokens
            return answer

        clock = asyncio.get_running_loop().time
        began = clock()
        asked = await ask_expert(
            asked_with(expert, order.signals),
            Subtask(id="question", question=question.question, reach=question.reach),
            question.text,
            why="calibration",
            spend=spend,
            deadline=None,
            departure=order.departure,
            after=After(what="calibration", do=signals),
        )
        answer = asked.outcome
        if isinstance(answer, Failure):
            return answer
        return Graded(
            question=question.key,
            version=self._version,
            asked_for=order.asked_for,
            right=question.is_right(answer.text),
            answer=final_answer(answer.text),
            signals=signals_of(question.text, answer),
            cost=answer.usage.cost if math.isfinite(answer.usage.cost) else 0.0,
            seconds=clock() - began,
            # What another expert took to condense the text has another price.
            tokens=own,
            price=expert.card.price_per_mtok,
            at_once=order.at_once,
        )

    def _none(self, question: Labelled, why: str) -> Graded:
        return Graded(question=question.key, version=self._version, asked_for=self._order.asked_for, error=why)


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
