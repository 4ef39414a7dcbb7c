"""Which of llama.cpp's sequences a row of the batch has.

All sequences share one memory of so many cells (llama.cpp's *unified* cache), a cell holding one token of any of them.
A token that several continuations follow is one cell that belongs to several sequences, so a prompt is read and kept
once for all of them.
"""

from __future__ import annotations

from typing import Any, Final

from agora.errors import Overloaded
from experts.engine.cache import CacheShape, Lane, Place, SlotCache

MAX_BRANCHES: Final = 8
"""Continuations of one scoring read side by side; most multiple-choice questions have 4 or 5."""

SPARE_BRANCHES: Final = 32
"""Sequences for continuations beyond one per row, shared by all scorings: five of them at full width."""

URGENT: Final = 8
"""Sequences for health probes that come on top of a full batch."""


class SequencePlace(Place):
    """A row's sequences, and how much of it is in memory.

    Attributes:
        seqs: Their ids; a generation has one, a scoring as many as continuations are read side by side.
        written: Tokens of the row in llama.cpp's memory; more than `length` after a row has dropped some.
    """

    __slots__ = ("seqs", "written")

    def __init__(self, lane: Lane, slot: int, seqs: tuple[int, ...]) -> None:
        super().__init__(lane, slot)
        self.seqs = seqs
        self.written = 0


class Sequences(SlotCache):
    """Hands out sequences in the place of slots. Its unit of memory is the cell: one token.

    Args:
        shape: What one token needs.
        api: llama.cpp.
        memory: The context's memory.
        rows: Most rows at once, besides urgent ones.
        max_context: Tokens a row holds.
    """

    def __init__(self, shape: CacheShape, *, api: Any, memory: Any, rows: int, max_context: int) -> None:
        super().__init__(shape, lane_tokens=max_context)
        self._api = api
        self._memory = memory
        # Never grown: it only says how long a row may get.
        self._row = Lane(shape, max_context)
        self._free = list(range(count_for(rows)))[::-1]
        self._spare = SPARE_BRANCHES
        self._places: dict[int, SequencePlace] = {}

    def cost(self, tokens: int) -> int:
        """Cells that a row of so many tokens takes."""
        return tokens

    def open(self, tokens: int) -> SequencePlace:
        """A place for a new row."""
        return self.open_branches(1)

    def open_branches(self, wanted: int) -> SequencePlace:
        """A place for a row that would like so many sequences; it gets at least one.

        Raises:
            Overloaded: If there is none left, which only urgent rows can come to.
        """
        if not self._free:
            raise Overloaded("too many health probes at once", hint="probe less often")
        more = min(wanted - 1, MAX_BRANCHES - 1, self._spare)
        self._spare -= more
        seqs = tuple(self._free.pop() for _ in range(1 + more))
        place = self._places[seqs[0]] = SequencePlace(self._row, seqs[0], seqs)
        return place

    def at(self, slot: int) -> SequencePlace:
        """The place whose first sequence this is."""
        return self._places[slot]

    def reserve(self, place: Place, tokens: int) -> None:
        """Does nothing: the batch lets in no more rows than there are cells for."""

    def cut(self, place: SequencePlace, tokens: int) -> None:
        """Forgets what a row has in memory beyond its first tokens."""
        for seq in place.seqs:
            self._api.llama_memory_seq_rm(self._memory, seq, tokens, -1)
        place.written = tokens

    def close(self, place: Place) -> None:
        """Frees a row's sequences."""
        assert isinstance(place, SequencePlace)
        self.cut(place, 0)
        del self._places[place.slot]
        self._free += place.seqs
        self._spare += len(place.seqs) - 1


def count_for(rows: int) -> int:
    """Sequences that so many rows need."""
    return rows + URGENT + SPARE_BRANCHES
