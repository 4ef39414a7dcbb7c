"""What asking each expert has taken so far: what the next question will probably cost, and how long it will take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from agora.types import Answer, ExpertCard, Outcome
from graphs.spend import prompt_tokens

MEMORY: Final = 0.9
"""What an observation counts for at each further one: the last ten or so make the mean, so that an expert that became
slow is known to be within a few questions."""


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
    """Decaying means over all runs of a graph. Lives in memory: a new process learns anew."""

    def __init__(self) -> None:
        self._tokens: dict[str, _Mean] = {}
        self._seconds: dict[str, _Mean] = {}

    def saw(self, outcome: Outcome, seconds: float) -> None:
        """Takes note of what came of asking. Only answers that nobody else had paid for tell what one takes.

        Args:
            outcome: What came of it.
            seconds: How long that took.
        """
        if isinstance(outcome, Answer) and outcome.usage.calls:
            self._tokens.setdefault(outcome.expert, _Mean()).add(outcome.usage.tokens)
            self._seconds.setdefault(outcome.expert, _Mean()).add(seconds)

    def seconds(self, expert: str) -> float | None:
        """Seconds that an answer of that expert takes; None if it has not given any."""
        return self._seconds[expert].value if expert in self._seconds else None

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
