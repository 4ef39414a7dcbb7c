"""Which events of a resumed run tell something new: its finished subtasks are told again from the checkpoint."""

from __future__ import annotations

from typing import Final

from agora.events import AttemptEnded, Event, Planned, RunState, apply
from graphs.store import RunStore

PAGE: Final = 128
"""Events read from the store at once: a hundred answers, some hundred kilobytes."""


class News:
    """Knows what the earlier legs of one run have told; nothing, unless it is shown to it."""

    def __init__(self) -> None:
        self._told: RunState | None = None

    async def read(self, store: RunStore, run_id: str) -> None:
        """Reads what the store has of the run; raises `StoreError`."""
        after = 0
        while page := await store.events(run_id, after=after, limit=PAGE):
            for _, event in page:
                self._told = apply(self._told or RunState(), event)
            after = page[-1][0]

    def is_news(self, event: Event) -> bool:
        """Whether nothing has told this before."""
        if self._told is None:
            return True
        before, self._told = self._told, apply(self._told, event)
        return self._told is not before or not isinstance(event, (Planned, AttemptEnded))
