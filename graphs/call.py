"""One call of one expert: within the run's budget, its outcome a value, and whether others may have it, too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple

from agora.errors import AgoraError, BackendError, BackendTimeout, DeadlineExceeded
from agora.network.multipath import MultipathBackend
from agora.square import Expert
from agora.types import Answer, Failure, Outcome, Subtask, Tier, Usage
from experts.passage import bounded
from graphs.spend import Spend, read_at_least, used_by_failed

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class After:
    """What is done with an answer while the text that was asked is at hand, e.g. asking how sure the expert is.

    Attributes:
        what: Stands for it: equal where the same is done.
        do: Called with the text that was asked and the answer as it came; gives the answer to go on with. It counts
            what it uses in the call's `spend` and in the answer, keeps to the deadline, and raises no `AgoraError`.
    """

    what: Hashable
    do: Callable[[str, Answer], Awaitable[Answer]]


class Called(NamedTuple):
    """What came of a call.

    Attributes:
        outcome: It.
        common: Whether anybody who had asked the same would have come to the same: not where the caller's own budget,
            time or way decided.
    """

    outcome: Outcome
    common: bool


@dataclass(slots=True, kw_only=True)
class Call:
    """One call. Whatever it uses is counted in `spend`, whoever waits for it.

    Attributes:
        expert: Who is asked.
        subtask: What for.
        text: What is asked.
        spend: What pays for it.
        deadline: Event-loop time at which the asker stops waiting, or None.
        after: What is done with the answer.
        asker: Whose question it is; None where nobody is told apart.
        begun: Whether it was made, rather than another one's outcome taken.
        paid: What of it is counted already.
    """

    expert: Expert
    subtask: Subtask
    text: str
    spend: Spend
    deadline: float | None
    after: After | None = None
    asker: str | None = None
    begun: bool = False
    paid: Usage | None = None

    @property
    def key(self) -> Hashable:
        """Equal for calls that come to the same. The backend counts by its identity: see `Once`."""
        e, s = self.expert, self.subtask
        return (
            # How soon an answer comes would tell one asker what another one asks.
            self.asker,
            e.name,
            e.node,
            id(e.backend),
            e.adapter,
            e.system_prompt,
            self.text,
            e.card.max_tokens if s.max_tokens is None else min(s.max_tokens, e.card.max_tokens),
            e.temperature,
            e.alternatives,
            s.reach,
            # Whoever wants to know how sure the expert is does not have it from one who does not ask for that.
            None if self.after is None else self.after.what,
        )

    @property
    def lasting(self) -> bool:
        """Whether the same call will come to the same later on, too, as far as can be known here.

        Not where answers are sampled; not with an adapter's alias, which stands for another version tomorrow; nor on
        another node, which does not tell which adapter answers. What may not go everywhere is not kept, either.
        """
        e = self.expert
        return (
            e.temperature == 0
            and (e.adapter is None or e.adapter.version is not None)
            and not _relays(e.backend)
            and self.subtask.reach is Tier.CLOUD
        )

    async def make(self) -> Called:
        """Makes the call. Never raises but when it is cancelled."""
        self.begun = True
        reach = self.subtask.reach
        if reach is Tier.CLOUD:
            return await self._made()
        with bounded(reach):
            return await self._made()

    async def _made(self) -> Called:
        expert, wanted = self.expert, self.subtask.max_tokens
        try:
            async with self.spend.grant(expert.card, self.chars, wanted) as most:
                # The expert is told its time so that a remote one can stop by itself; who waits holds it to that.
                answer = await expert.ask(self.text, max_tokens=most, timeout_s=left_until(self.deadline))
                self._pay(answer.usage)  # before the promise is released, or another call could have both
        except AgoraError as e:
            late = isinstance(e, BackendTimeout) and passed(self.deadline)
            usage = used_by_failed(e, expert.card, self.chars)
            self._pay(usage)
            failure = Failure.of(DeadlineExceeded(str(e)) if late else e, usage=usage)
            return Called(failure, isinstance(e, BackendError) and not isinstance(e, BackendTimeout))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled the run: the backend's own work was, e.g. since it was closed.
            return Called(
                Failure(code="unavailable", message=f"{expert.name} dropped the question", transient=True), True
            )
        except Exception as e:
            # A third-party backend may raise anything; one subtask's trouble must not end the others.
            log.exception("expert %s failed", expert.name)
            return Called(internal(e), True)
        if answer.text == "":
            message = f"{expert.name} gave an empty answer"
            return Called(Failure(code="bad_reply", message=message, transient=True, usage=answer.usage), True)
        if answer.finish_reason == "length" and most < min(wanted or most + 1, expert.card.max_tokens):
            note = f"cut short: the budget left {most} tokens for it"
            answer = replace(answer, notes=(*answer.notes, note), limited=True)
        if self.after is not None:
            answer = await self.after.do(self.text, answer)
        return Called(answer, not answer.limited)

    def broke_off(self) -> Failure:
        """The failure of a call that its asker stopped waiting for; what it has used by then is counted."""
        message = f"the run's deadline passed while {self.expert.name} was answering"
        failure = Failure.of(DeadlineExceeded(message))
        if not self.begun:
            return failure
        usage = read_at_least(self.expert.card, self.chars)
        self._pay(usage)
        return replace(failure, usage=usage)

    @property
    def chars(self) -> int:
        """Characters of the whole prompt."""
        return len(self.text) + len(self.expert.system_prompt or "")

    def _pay(self, usage: Usage) -> None:
        """Counts what the call has used in all, as far as it is not counted yet."""
        self.spend.add(usage if self.paid is None else _rest(usage, self.paid))
        self.paid = usage


def _relays(backend: object) -> bool:
    """Whether another node answers, or may: one of several ways may lead to one."""
    if getattr(backend, "relays", False):
        return True
    return isinstance(backend, MultipathBackend) and any(_relays(way.backend) for way in backend.ways)


def _rest(all_of_it: Usage, paid: Usage) -> Usage:
    return Usage(
        prompt_tokens=max(0, all_of_it.prompt_tokens - paid.prompt_tokens),
        completion_tokens=max(0, all_of_it.completion_tokens - paid.completion_tokens),
        cost=max(0.0, all_of_it.cost - paid.cost),
        calls=max(0, all_of_it.calls - paid.calls),
    )


def internal(error: Exception) -> Failure:
    """The failure that stands for an error that nobody foresaw."""
    return Failure(code="internal", message=f"{type(error).__name__}: {error}", usage=Usage())


def left_until(deadline: float | None) -> float | None:
    """Seconds until that event-loop time; None for no deadline."""
    return None if deadline is None else deadline - asyncio.get_running_loop().time()


def passed(deadline: float | None) -> bool:
    """Whether that event-loop time is over."""
    left = left_until(deadline)
    return left is not None and left <= 0


def shared(answer: Answer, note: str, seconds: float) -> Answer:
    """An answer that cost its taker nothing, with how it came about."""
    return replace(answer, usage=Usage(), seconds=seconds, notes=(*answer.notes, note))
