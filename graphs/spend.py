"""Keeping a run within its budget of money and tokens while several calls are in flight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from agora.errors import AdapterError, BackendError, BudgetExceeded, Overloaded, Rejected, Unavailable, Unsupported
from agora.types import Budget, ExpertCard, Usage

CHARS_PER_TOKEN: Final = 3.0
"""Characters that make one prompt token, on the low side: English measures 4–4.5 with the catalogue's tokenizers, and
a reservation that is too large only makes a run careful, while one too small would let it overspend."""

UNLIMITED: Final = 1 << 40
"""More tokens than any budget: what a call may take where nothing limits it."""

CALL_TOKENS: Final = 40
"""Tokens of a prompt besides its text: what chat templates put around it. SmolLM2's is 31 for a chat without a system
prompt (it brings its own), Qwen2.5's 30, and 10 with one."""


MOST_TOKENS_PER_CHAR: Final = 4
"""Tokens of one character at most: it has up to 4 bytes in UTF-8, and byte-level tokenizers make no more than one token
of a byte."""


def most_cost(card: ExpertCard, chars: int, generated: int) -> float:
    """Money that a call with a prompt of that many characters can cost at most, whatever they are."""
    return card.cost_of(MOST_TOKENS_PER_CHAR * chars + CALL_TOKENS + generated)


def prompt_tokens(chars: int) -> int:
    """What a prompt of that many characters may take, on the high side."""
    return int(chars / CHARS_PER_TOKEN) + 1 + CALL_TOKENS


_NOT_READ: Final = (Unavailable, Overloaded, Rejected, Unsupported, AdapterError)
"""Errors of a backend that had no part of the prompt read: nothing was used. After any other the prompt counts."""


def read_at_least(card: ExpertCard, chars: int) -> Usage:
    """What a call that broke off has used as far as anybody can tell: its prompt of that many characters."""
    tokens = prompt_tokens(chars)
    return Usage(prompt_tokens=tokens, cost=card.cost_of(tokens), calls=1)


def used_by_failed(error: Exception, card: ExpertCard, chars: int) -> Usage:
    """What a call with a prompt of that many characters has used that ended in this error."""
    read = isinstance(error, BackendError) and not isinstance(error, _NOT_READ)
    return read_at_least(card, chars) if read else Usage()


class Spend:
    """What a run has spent and what it has promised to calls in flight.

    Before a call, its worst case (prompt and all the tokens it may generate) is set aside; after it, the true usage
    counts instead. So the sum of true usages stays within the budget, but for a prompt that was longer than thought.
    A call joins others only while there is money for it beside the most that those can cost, whatever their prompts
    turn out to be: the last one that began can then go over, by itself alone.

    Args:
        budget: What the run may spend.

    Attributes:
        joined: This spending together with that of a stream of runs, where it counts in one.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._spent = Usage()
        self._promised: dict[object, tuple[int, float]] = {}
        self._most: dict[object, float] = {}
        self._released = asyncio.Event()
        self.joined: Spend | None = None

    @property
    def spent(self) -> Usage:
        """True usage so far."""
        return self._spent

    @property
    def of_run(self) -> Spend:
        """The run's own spending, where this is that together with a stream's."""
        return self

    @property
    def tokens_left(self) -> int | None:
        """Tokens that are neither used nor promised; None for no limit."""
        return self._left()[0]

    @property
    def cost_left(self) -> float | None:
        """Money that is neither spent nor promised; None for no limit."""
        return self._left()[1]

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
        while self._promised and not self.fits(card, prompt_chars, want):
            self._released.clear()
            await self._released.wait()
        allowed = min(want, self._room(card) - prompt)
        if allowed < 1:
            raise self._exceeded(card, prompt)
        call = object()
        self._promised[call] = (prompt + allowed, card.cost_of(prompt + allowed))
        self._most[call] = most_cost(card, prompt_chars, allowed)
        try:
            yield allowed
        finally:
            del self._promised[call], self._most[call]
            self._released.set()

    def fits(self, card: ExpertCard, prompt_chars: int, want: int) -> bool:
        """Whether a call can be paid in full beside those in flight, even if they cost the most they can.

        Args:
            card: Who is asked.
            prompt_chars: Characters of the prompt.
            want: Tokens that it may generate.
        """
        tokens = prompt_tokens(prompt_chars) + want
        if self._room(card) < tokens:
            return False
        limit = self._budget.cost
        return limit is None or limit - self._spent.cost - sum(self._most.values()) >= card.cost_of(tokens)

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
