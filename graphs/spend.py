"""Keeping a run within its budget of money and tokens while several calls are in flight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from agora.errors import BudgetExceeded
from agora.types import Budget, ExpertCard, Usage

CHARS_PER_TOKEN: Final = 3.0
"""Characters that make one prompt token, on the low side: English measures 4–4.5 with the catalogue's tokenizers, and
a reservation that is too large only makes a run careful, while one too small would let it overspend."""

UNLIMITED: Final = 1 << 40
"""More tokens than any budget: what a call may take where nothing limits it."""

CALL_TOKENS: Final = 40
"""Tokens of a prompt besides its text: what chat templates put around it. SmolLM2's is 31 for a chat without a system
prompt (it brings its own), Qwen2.5's 30, and 10 with one."""


def prompt_tokens(chars: int) -> int:
    """What a prompt of that many characters may take, on the high side."""
    return int(chars / CHARS_PER_TOKEN) + 1 + CALL_TOKENS


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
        self._promised: dict[object, tuple[int, float]] = {}
        self._released = asyncio.Event()

    @property
    def spent(self) -> Usage:
        """True usage so far."""
        return self._spent

    def add(self, usage: Usage) -> None:
        """Counts true usage, e.g. of a call that was made before the run was resumed."""
        self._spent += usage

    @asynccontextmanager
    async def grant(self, card: ExpertCard, prompt_chars: int, max_tokens: int | None) -> AsyncIterator[int]:
        """Sets aside what one call may cost, for as long as the block lasts.

        Where the budget is short only because of what other calls may still cost, waits for one of them to end: most
        cost less than their worst case.

        Args:
            card: Who is asked; its price and token limit count.
            prompt_chars: Characters of the prompt.
            max_tokens: Most tokens the caller wants, or None for the card's limit.

        Yields:
            The most tokens the call may generate within the budget.

        Raises:
            BudgetExceeded: If not even one token is left for it.
        """
        prompt = prompt_tokens(prompt_chars)
        want = card.max_tokens if max_tokens is None else min(max_tokens, card.max_tokens)
        while (allowed := min(want, self._room(card) - prompt)) < want and self._promised:
            self._released.clear()
            await self._released.wait()
        if allowed < 1:
            raise self._exceeded(card, prompt)
        call = object()
        self._promised[call] = (prompt + allowed, card.cost_of(prompt + allowed))
        try:
            yield allowed
        finally:
            del self._promised[call]
            self._released.set()

    def _room(self, card: ExpertCard) -> int:
        """Tokens that a call to this expert may take now, prompt and generated together."""
        tokens, cost = self._left()
        room = UNLIMITED if tokens is None else tokens
        if cost is not None and card.price_per_mtok > 0:
            room = min(room, int(cost / card.price_per_mtok * 1e6))
        return room

    def _left(self) -> tuple[int | None, float | None]:
        tokens, cost = self._budget.tokens, self._budget.cost
        promised = list(self._promised.values())
        return (
            None if tokens is None else tokens - self._spent.tokens - sum(t for t, _ in promised),
            None if cost is None else cost - self._spent.cost - sum(c for _, c in promised),
        )

    def _exceeded(self, card: ExpertCard, prompt: int) -> BudgetExceeded:
        tokens, cost = self._left()
        if tokens is not None and tokens <= prompt:
            return BudgetExceeded(
                f"{max(tokens, 0)} of {self._budget.tokens} tokens are left, the prompt alone needs about {prompt}",
                hint="raise the token budget",
            )
        assert cost is not None
        return BudgetExceeded(
            f"{max(cost, 0.0):.6g} of {self._budget.cost:.6g} is left and asking {card.name!r} costs at least "
            f"{card.cost_of(prompt + 1):.6g}",
            hint="raise the cost budget or allow cheaper experts",
        )
