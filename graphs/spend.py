"""Keeping a run within its budget of money and tokens while several calls are in flight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from agora.errors import BudgetExceeded
from agora.types import Budget, ExpertCard, Usage

CHARS_PER_TOKEN: Final = 3.0
"""Characters that make one prompt token, on the low side: English measures 4–4.5 with the catalogue's tokenizers, and
a reservation that is too large only makes a run careful, while one too small would let it overspend."""


class Spend:
    """What a run has spent and what it has promised to calls in flight.

    Before a call, its worst case (prompt and all the tokens it may generate) is set aside; after it, the true usage
    counts instead. So the sum of true usages stays within the budget, but for a prompt that was longer than thought.

    Args:
        budget: What the run may spend.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._spent = Usage()
        self._promised_tokens = 0
        self._promised_cost = 0.0

    @property
    def spent(self) -> Usage:
        """True usage so far."""
        return self._spent

    def add(self, usage: Usage) -> None:
        """Counts true usage, e.g. of a call that was made before the run was resumed."""
        self._spent += usage

    @contextmanager
    def grant(self, card: ExpertCard, prompt_chars: int, max_tokens: int | None) -> Iterator[int]:
        """Sets aside what one call may cost, for as long as the block lasts.

        Args:
            card: Who is asked; its price and token limit count.
            prompt_chars: Characters of the prompt.
            max_tokens: Most tokens the caller wants, or None for the card's limit.

        Yields:
            The most tokens the call may generate within the budget.

        Raises:
            BudgetExceeded: If not even one token is left for it.
        """
        prompt = int(prompt_chars / CHARS_PER_TOKEN) + 1
        want = card.max_tokens if max_tokens is None else min(max_tokens, card.max_tokens)
        allowed = want
        if self._budget.tokens is not None:
            left = self._budget.tokens - self._spent.tokens - self._promised_tokens
            allowed = min(allowed, left - prompt)
            if allowed < 1:
                raise BudgetExceeded(
                    f"{max(left, 0)} of {self._budget.tokens} tokens are left, the prompt alone needs about {prompt}",
                    hint="raise the token budget",
                )
        if self._budget.cost is not None and card.price_per_mtok > 0:
            money = self._budget.cost - self._spent.cost - self._promised_cost
            allowed = min(allowed, int(money / card.price_per_mtok * 1e6) - prompt)
            if allowed < 1:
                raise BudgetExceeded(
                    f"{max(money, 0.0):.6g} of {self._budget.cost:.6g} is left and asking {card.name!r} costs at least "
                    f"{card.cost_of(prompt + 1):.6g}",
                    hint="raise the cost budget or allow cheaper experts",
                )
        tokens, cost = prompt + allowed, card.cost_of(prompt + allowed)
        self._promised_tokens += tokens
        self._promised_cost += cost
        try:
            yield allowed
        finally:
            self._promised_tokens -= tokens
            self._promised_cost -= cost
