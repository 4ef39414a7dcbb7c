"""A router that stands in for another one that fails: a run must not end because an embedding model is missing."""

from __future__ import annotations

import dataclasses
import logging

from agora.errors import AgoraError, NoExpert
from agora.routing.router import Ranking, Router
from agora.square import Square
from agora.types import Subtask

log = logging.getLogger(__name__)


class FallbackRouter:
    """Ranks by the first router; where that fails, by the second, and every explanation says so.

    Args:
        first: The one to use.
        second: The one that stands in; it should need nothing that can be missing.
    """

    def __init__(self, first: Router, second: Router) -> None:
        self._first = first
        self._second = second
        self._told = ""

    async def rank(self, subtask: Subtask, question: str, square: Square) -> Ranking:
        """Ranks the experts for one subtask.

        Raises:
            NoExpert: If nobody can take it.
        """
        try:
            return await self._first.rank(subtask, question, square)
        except NoExpert:
            raise
        except AgoraError as e:
            if str(e) != self._told:
                self._told = str(e)
                log.warning("routing falls back to its second way: %s", e)
            ranking = await self._second.rank(subtask, question, square)
            return dataclasses.replace(ranking, note=f"fell back to {ranking.basis}: {e}")
