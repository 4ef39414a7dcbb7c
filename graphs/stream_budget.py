"""Keeping all questions together within a budget of money and seconds, whatever is in flight at the same time.

Neither is exceeded by more than the last call. *Money* is set aside before a call as in `graphs.spend`. The prompt may
turn out longer than thought, so a call joins others only while there is room for it beside the most that those can
cost; the last one that began can then go over by itself alone. How many *seconds* a call takes cannot be set aside for
sure: they are counted as they pass, over all calls in flight; a call joins others only while what they are expected to
take leaves room for it; and the moment the seconds are used up, all calls but the oldest one are broken off.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

from agora.errors import BudgetExceeded, InvalidRequest
from agora.types import Budget, ExpertCard, Usage
from graphs.experience import Experience
from graphs.spend import Spend, read_at_least

SECONDS_HINT: Final = "raise [vertical] stream_seconds, or start anew"
COST_HINT: Final = "raise [vertical] stream_cost, or start anew"


@dataclass(slots=True, kw_only=True)
class _Call:
    """A call in flight.

    Attributes:
        started: Event-loop time of its start.
        expected: Seconds that it is expected to take.
        timer: Breaks it off.
    """

    started: float
    expected: float
    timer: asyncio.Timeout


class StreamBudget:
    """What all runs of a graph, or of several that share it, may spend together since it was made.

    Args:
        cost: Most money; None for no limit.
        seconds: Most seconds of answering, those of calls at the same time added up; None for no limit.
        experience: What calls are expected to take.

    Attributes:
        experience: See above.

    Raises:
        InvalidRequest: If a limit is not a positive number.
    """

    def __init__(
        self, *, cost: float | None = None, seconds: float | None = None, experience: Experience | None = None
    ) -> None:
        self._money = Spend(Budget(cost=cost))
        try:
            Budget(deadline_s=seconds)
        except InvalidRequest:
            raise InvalidRequest(f"stream_seconds is {seconds!r}; it must be a positive number, or absent") from None
        self._seconds = seconds
        self.experience = experience or Experience()
        self._passed = 0.0
        self._running: list[_Call] = []
        self._changed = asyncio.Event()

    @property
    def spent(self) -> Usage:
        """True usage so far."""
        return self._money.spent

    @property
    def seconds_spent(self) -> float:
        """Seconds of answering so far, those of calls in flight included."""
        now = time.monotonic() if not self._running else asyncio.get_running_loop().time()
        return self._passed + sum(now - c.started for c in self._running)

    @property
    def cost_left(self) -> float | None:
        """Money that is neither spent nor set aside; None for no limit. Below 0 if a call went over."""
        return self._money.cost_left

    @property
    def seconds_left(self) -> float | None:
        """Seconds that have not passed; None for no limit. Below 0 if a call went over."""
        return None if self._seconds is None else self._seconds - self.seconds_spent

    def joined_by(self, run: Spend) -> Spend:
        """A run's spending that counts here as well; always the same for the same run."""
        if run.joined is None:
            run.joined = StreamSpend(run, self)
        return run.joined

    def add(self, usage: Usage) -> None:
        """Counts true usage."""
        self._money.add(usage)

    @asynccontextmanager
    async def grant(self, card: ExpertCard, prompt_chars: int, max_tokens: int | None) -> AsyncIterator[int]:
        """Lets one call be made, for as long as the block lasts; as `Spend.grant`, and within the seconds.

        Raises:
            BudgetExceeded: If nothing is left for it, or it was broken off since the seconds were used up.
        """
        want = card.max_tokens if max_tokens is None else min(max_tokens, card.max_tokens)
        expected = self.experience.seconds(card.name) or 0.0
        # Those in flight wait for nobody, so that they end, and this does.
        while self._running and not (self._money.fits(card, prompt_chars, want) and self._has_seconds(expected)):
            self._changed.clear()
            await self._changed.wait()
        if (left := self.seconds_left) is not None and left <= 0:
            raise self._used_up()
        async with AsyncExitStack() as stack:
            try:
                granted = await stack.enter_async_context(self._money.grant(card, prompt_chars, want))
            except BudgetExceeded as e:
                raise BudgetExceeded(f"the budget for all questions is used up: {e.message}", hint=COST_HINT) from None
            await stack.enter_async_context(self._timed(expected))
            yield granted

    def _has_seconds(self, expected: float) -> bool:
        """Whether those in flight are expected to leave time for a call of that many seconds."""
        left = self.seconds_left
        if left is None:
            return True
        now = asyncio.get_running_loop().time()
        return left - sum(max(0.0, c.expected - (now - c.started)) for c in self._running) > expected

    @asynccontextmanager
    async def _timed(self, expected: float) -> AsyncIterator[None]:
        clock = asyncio.get_running_loop().time
        timer = asyncio.timeout(None)
        try:
            async with timer:
                call = _Call(started=clock(), expected=expected, timer=timer)
                self._running.append(call)
                self._set_timers()
                try:
                    yield
                finally:
                    self._running.remove(call)
                    self._passed += clock() - call.started
                    self._set_timers()
                    self._changed.set()
        except TimeoutError:
            if timer.expired():
                raise self._used_up() from None
            raise

    def _set_timers(self) -> None:
        left = self.seconds_left
        if left is None or not self._running:
            return
        # Calls in flight use the seconds up together.
        end = asyncio.get_running_loop().time() + max(0.0, left) / len(self._running)
        for call in self._running:
            if not call.timer.expired():
                call.timer.reschedule(None if call is self._running[0] else end)

    def _used_up(self) -> BudgetExceeded:
        return BudgetExceeded(
            f"the {self._seconds:g} seconds of answering that all questions may take are used up", hint=SECONDS_HINT
        )


class StreamSpend(Spend):
    """A run's spending that counts in a stream's as well, and keeps within both.

    Args:
        run: The run's.
        stream: The stream's.
    """

    def __init__(self, run: Spend, stream: StreamBudget) -> None:
        self._run = run
        self._stream = stream

    @property
    def of_run(self) -> Spend:
        """The run's."""
        return self._run

    @property
    def spent(self) -> Usage:
        """The run's."""
        return self._run.spent

    @property
    def cost_left(self) -> float | None:
        """The smaller of both; None for no limit."""
        return min((c for c in (self._run.cost_left, self._stream.cost_left) if c is not None), default=None)

    @property
    def tokens_left(self) -> int | None:
        """The run's."""
        return self._run.tokens_left

    def add(self, usage: Usage) -> None:
        """Counts in both."""
        self._run.add(usage)
        self._stream.add(usage)

    @asynccontextmanager
    async def grant(self, card: ExpertCard, prompt_chars: int, max_tokens: int | None) -> AsyncIterator[int]:
        """See `Spend.grant`; first the run's promise, then the stream's, whose holders wait for nobody."""
        begun = False
        try:
            async with (
                self._run.grant(card, prompt_chars, max_tokens) as most,
                self._stream.grant(card, prompt_chars, most) as within,
            ):
                begun = True
                yield within
        except BudgetExceeded:
            if begun:
                # It was broken off, and its prompt had been read.
                self.add(read_at_least(card, prompt_chars))
            raise
