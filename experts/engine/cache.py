"""Keys and values of the rows in a batch, in preallocated memory that is written in place.

Rows live in *lanes*. A lane holds rows of up to `capacity` tokens; capacities double from lane to lane, so a row never
takes more than twice the memory it needs, and one long row does not make the short ones pay for its length. Within a
lane the rows are kept side by side without holes: decoding all of them is one attention call over one slice.

The idea of separating the memory of a sequence from its place in the batch is that of PagedAttention (Kwon et al.,
2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention"); lanes of whole rows are its
coarse form that needs no kernel of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

LANE_TOKENS: Final = 256
"""Tokens a row of the smallest lane holds: most chats fit, and 16 such rows of a 135M model take 190 MB."""

KEEP_BYTES: Final = 256 * 2**20
"""An empty lane up to this size keeps its memory for the next rows; mapping it anew costs as much as a decode step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What one token needs.

    Attributes:
        layers: Attention layers of the model.
        heads: Key-value heads of a layer.
        dim: Numbers in one head's key, and in its value.
        dtype: Of the model's activations.
        device: Where the model runs.
    """

    layers: int
    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return 2 * self.layers * self.heads * self.dim * self.dtype.itemsize


class Place:
    """Where a row's keys and values are, and how many tokens of it are there."""

    __slots__ = ("lane", "length", "slot")

    def __init__(self, lane: Lane, slot: int) -> None:
        self.lane = lane
        self.slot = slot
        self.length = 0


class Lane:
    """Rows of up to `capacity` tokens, in slots 0, 1, 2 … without holes.

    Args:
        shape: What one token needs.
        capacity: Tokens a row holds.
    """

    def __init__(self, shape: CacheShape, capacity: int) -> None:
        self.capacity = capacity
        self.places: list[Place] = []
        self.keys: list[Tensor] = []
        """Per layer: (slots, capacity, heads, dim)."""
        self.values: list[Tensor] = []
        """Per layer: (slots, capacity, heads, dim)."""
        self._shape = shape
        self._data: Tensor | None = None
        # How much of each slot has been written. What lies past a row's end is masked, but a masked NaN still poisons
        # (0 · NaN = NaN), so a slot is cleaned before another row gets it.
        self._written: list[int] = []

    @property
    def bytes(self) -> int:
        """Bytes of memory held."""
        return 0 if self._data is None else self._data.numel() * self._data.element_size()

    def add(self) -> Place:
        """Takes the next slot, empty."""
        slot = len(self.places)
        if slot == len(self._written):
            self._grow(max(1, 2 * slot))
        self._clean(slot, 0)
        place = Place(self, slot)
        self.places.append(place)
        return place

    def remove(self, place: Place) -> None:
        """Gives up a slot; the last row moves into the hole."""
        last = self.places.pop()
        if last is not place:
            self._copy(last, self, place.slot)
            last.slot = place.slot
            self.places[place.slot] = last
        if not self.places and self.bytes > KEEP_BYTES:
            self._data = None
            self._written, self.keys, self.values = [], [], []

    def move_here(self, place: Place) -> None:
        """Takes over a row from another lane."""
        here = self.add()
        try:
            self._copy(place, self, here.slot)
        except Exception:
            self.remove(here)
            raise
        old = Place(place.lane, place.slot)
        place.lane.places[place.slot] = old
        self.places[here.slot] = place
        place.lane, place.slot = self, here.slot
        old.lane.remove(old)

    def wrote(self, slot: int, end: int) -> None:
        """Notes that tokens of a slot up to `end` hold data."""
        self._written[slot] = max(self._written[slot], end)

    def _copy(self, source: Place, lane: Lane, slot: int) -> None:
        lane._clean(slot, source.length)
        assert lane._data is not None and source.lane._data is not None
        lane._data[:, :, slot, : source.length] = source.lane._data[:, :, source.slot, : source.length]
        lane._written[slot] = source.length

    def _clean(self, slot: int, start: int) -> None:
        end = self._written[slot]
        if end > start:
            assert self._data is not None
            self._data[:, :, slot, start:end] = 0
            self._written[slot] = start

    def _grow(self, slots: int) -> None:
        s = self._shape
        # An inference tensor could not be changed outside inference mode, and rows come and go there too.
        with torch.inference_mode(False):
            data = torch.zeros((s.layers, 2, slots, self.capacity, s.heads, s.dim), dtype=s.dtype, device=s.device)
        if self._data is not None:
            data[:, :, : len(self._written)] = self._data
        self._data = data
        self._written += [0] * (slots - len(self._written))
        self.keys = [data[layer, 0] for layer in range(s.layers)]
        self.values = [data[layer, 1] for layer in range(s.layers)]


class SlotCache:
    """All lanes.

    Args:
        shape: What one token needs.
        lane_tokens: Tokens a row of the smallest lane holds.
    """

    def __init__(self, shape: CacheShape, *, lane_tokens: int = LANE_TOKENS) -> None:
        self.shape = shape
        self._smallest = lane_tokens
        self._lanes: dict[int, Lane] = {}

    @property
    def bytes(self) -> int:
        """Bytes of memory held."""
        return sum(lane.bytes for lane in self._lanes.values())

    def cost(self, tokens: int) -> int:
        """Bytes that a row of so many tokens takes."""
        return self._capacity(tokens) * self.shape.bytes_per_token

    def open(self, tokens: int) -> Place:
        """A place for a new row whose next chunk has so many tokens."""
        return self._lane(tokens).add()

    def reserve(self, place: Place, tokens: int) -> None:
        """Makes sure that the row can grow to so many tokens in all, moving it to a wider lane if need be."""
        if tokens > place.lane.capacity:
            self._lane(tokens).move_here(place)
        place.lane.wrote(place.slot, tokens)

    def close(self, place: Place) -> None:
        """Frees a row's place."""
        place.lane.remove(place)

    def _lane(self, tokens: int) -> Lane:
        capacity = self._capacity(tokens)
        if capacity not in self._lanes:
            self._lanes[capacity] = Lane(self.shape, capacity)
        return self._lanes[capacity]

    def _capacity(self, tokens: int) -> int:
        capacity = self._smallest
        while capacity < tokens:
            capacity *= 2
        return capacity
