"""What asking each expert has taken so far: what the next question will probably cost, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from agora.errors import BackendTimeout, DeadlineExceeded
from agora.types import Answer, ExpertCard, Failure, Outcome
from graphs.spend import prompt_tokens

MEMORY: Final = 0.9
"""What an observation counts for at each further one: the last ten or so make the mean, so that an expert that became
slow is known to be within a few questions."""

LONGER: Final = 2.0
"""How much longer than it was waited for an answer that did not come is taken to need: the least that keeps the next
question, with as much time, from waiting for it in vain."""

FORGET_S: Final = 300.0
"""Seconds for which it counts how long somebody took last. Whoever is too slow for the time there is, is not asked, and
could never show that it has become quicker; a model that was still loading has by then."""

TOO_LATE: Final = frozenset({DeadlineExceeded.code, BackendTimeout.code})
"""Codes of failures that the time was too short for."""


@dataclass(slots=True)
class _Mean:
    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> None:
        self.total = self.total * MEMORY + value
        self.weight = self.weight * MEMORY + 1

    @property
    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


class Experience:
    """Decaying means over all runs of a graph. Lives in memory: a new process learns anew.

    Args:
        clock: Seconds on a clock that does not go back.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, float] = {}
        self._tokens: dict[str, _Mean] = {}
        self._seconds: dict[str, _Mean] = {}
        self._answers: dict[str, _Mean] = {}

    def saw(self, outcome: Outcome, seconds: float) -> None:
        """Takes note of what came of asking. Only answers that nobody else had paid for tell what one takes, and calls
        for which the time was too short tell that one takes longer.

        Args:
            outcome: What came of it.
            seconds: How long that took.
        """
        if isinstance(outcome, Answer) and outcome.usage.calls:
            self._tokens.setdefault(outcome.expert, _Mean()).add(outcome.usage.tokens)
            self._answers.setdefault(outcome.expert, _Mean()).add(seconds)
            self._took(outcome.expert, seconds)
        elif isinstance(outcome, Failure) and outcome.code in TOO_LATE and outcome.usage.calls and outcome.expert:
            self._took(outcome.expert, max(LONGER * seconds, self.seconds(outcome.expert) or 0.0))

    def _took(self, expert: str, seconds: float) -> None:
        self._seconds.setdefault(expert, _Mean()).add(seconds)
        self._seen[expert] = self._clock()

    def seconds(self, expert: str) -> float | None:
        """Seconds that an answer of that expert takes; None if nothing tells that, or nothing has of late."""
        return self._seconds[expert].value if self._lately(expert) else None

    def usual_seconds(self, expert: str) -> float | None:
        """Seconds that its answers took, what it was waited for in vain left out; None if there is none of late."""
        return self._answers[expert].value if expert in self._answers and self._lately(expert) else None

    def _lately(self, expert: str) -> bool:
        return expert in self._seen and self._clock() - self._seen[expert] <= FORGET_S

    def tokens(self, card: ExpertCard, chars: int) -> float:
        """Tokens that an answer takes, prompt included; never fewer than a budget must have for it to be asked.

        Args:
            card: The expert's.
            chars: Characters of the prompt.
        """
        known = self._tokens[card.name].value if card.name in self._tokens else None
        return max(prompt_tokens(chars) + 1, known or 0.0)

    def usual_cost(self, card: ExpertCard) -> float | None:
        """Money that an answer usually costs; None if that expert has not given any."""
        known = self._tokens[card.name].value if card.name in self._tokens else None
        return None if known is None else card.cost_of(1) * known

    def cost(self, card: ExpertCard, chars: int) -> float:
        """Money that an answer costs; see `tokens`."""
        return card.price_per_mtok * self.tokens(card, chars) / 1e6
