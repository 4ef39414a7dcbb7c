"""Asking an expert something about an answer of its own, within budget and time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from agora.errors import AgoraError, BackendTimeout, BudgetExceeded, DeadlineExceeded
from agora.protocols import Completion, GenerateRequest, Message, ScoreRequest, Scores
from agora.square import Expert
from agora.types import Usage
from graphs.call import passed
from graphs.spend import Spend, read_at_least, used_by_failed


class NoSignal(Exception):
    """A signal cannot be had; says why."""


@dataclass(slots=True, kw_only=True)
class Asking:
    """An answer, and who is asked about it. Counts what that uses.

    Attributes:
        expert: Who answered.
        question: What it was asked.
        answer: What it answered.
        told: Signals that came with the answer.
        samples: Answers to sample, where a signal needs some.
        max_tokens: Most tokens of a sampled answer; the card's limit if None or larger.
        spend: What the calls are paid from.
        deadline: Event-loop time at which to stop; None for no deadline.
        usage: What was used so far.
        limited: Whether something could not be asked, or not in full, for want of time or money.
    """

    expert: Expert
    question: str
    answer: str
    told: Mapping[str, float]
    samples: int
    max_tokens: int | None
    spend: Spend
    deadline: float | None
    usage: Usage = field(default_factory=Usage)
    limited: bool = False

    def about_it(self, words: str) -> tuple[tuple[Message, ...], str | None]:
        """Messages, or else a prompt, that say `words` after the question and the answer."""
        asked = self.expert.request(self.question)
        if asked.prompt is not None:
            return (), f"{asked.prompt} {self.answer}\n\n{words}"
        answer = Message(role="assistant", content=self.answer)
        return (*asked.messages, answer, Message(role="user", content=words)), None

    async def generate(self, request: GenerateRequest) -> Completion:
        """Generates, paid from the budget.

        Raises:
            NoSignal: If that cannot be done.
        """
        chars, begun = _chars(request), False
        try:
            left = self._left()
            async with asyncio.timeout(left), self.spend.grant(self.expert.card, chars, request.max_tokens) as most:
                begun = True
                # Told what is left after the grant, which may have been waited for.
                done = await self.expert.backend.generate(replace(request, max_tokens=most, timeout_s=self._left()))
                self._count(done.usage)
                self.limited |= done.finish_reason == "length" and most < request.max_tokens
                return done
        except (AgoraError, TimeoutError) as e:
            raise self._none(e, chars, begun) from e

    async def score(self, request: ScoreRequest) -> Scores:
        """Scores, paid from the budget.

        Raises:
            NoSignal: If that cannot be done.
        """
        chars, begun = _chars(request) + max(len(c) for c in request.continuations), False
        try:
            async with asyncio.timeout(self._left()), self.spend.grant(self.expert.card, chars, 1):
                begun = True
                scores = await self.expert.backend.score(replace(request, timeout_s=self._left()))
                self._count(scores.usage)
                return scores
        except (AgoraError, TimeoutError) as e:
            raise self._none(e, chars, begun) from e

    def _left(self) -> float | None:
        if self.deadline is None:
            return None
        left = self.deadline - asyncio.get_running_loop().time()
        if left <= 0:
            raise DeadlineExceeded("there is no time left for it")
        return left

    def _count(self, usage: Usage) -> None:
        # As for an answer: what the links took, where they take money, is in the backend's own figure.
        cost = self.expert.card.cost_of(usage.tokens) + usage.cost
        usage = replace(usage, cost=cost, calls=max(1, usage.calls))
        self.usage += usage
        self.spend.add(usage)

    def _none(self, error: Exception, chars: int, begun: bool) -> NoSignal:
        usage = used_by_failed(error, self.expert.card, chars)
        if isinstance(error, TimeoutError):
            error = DeadlineExceeded("there was no time left for it")
            usage = read_at_least(self.expert.card, chars) if begun else Usage()
        self.usage += usage
        self.spend.add(usage)
        # A server that lets its own time pass, while there is more here, does so when it is calibrated, too.
        out_of_time = isinstance(error, BackendTimeout) and passed(self.deadline)
        self.limited |= out_of_time or isinstance(error, (BudgetExceeded, DeadlineExceeded))
        return NoSignal(error.message if isinstance(error, AgoraError) else str(error))


def _chars(request: GenerateRequest | ScoreRequest) -> int:
    return len(request.prompt or "") + sum(len(m.content) for m in request.messages)
