"""Top-k: the largest numbers travel, with where they were."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from fed.adapter import Spec, Vector
from fed.chain.stage import VALUES, Context, Place, check_bool, check_range
from fed.wire import Parts, Reason, Refused

GAPS: Final = "gaps"
"""Numbers left out before each one sent, in the narrowest unsigned type that holds them all."""

BITMAP: Final = "bitmap"
"""One bit for every number, lowest bit first, set where it was sent."""

GAP_TYPES: Final = (np.uint8, np.uint16, np.uint32)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """Sends the k = ⌈fraction·n⌉ numbers of largest magnitude (Aji & Heafield 2017, arXiv 1704.05021).

    Among equals those that come first are sent, so that the choice is the same everywhere. Where they were is told by
    gaps or by a bitmap, whichever takes fewer bytes: both can only tell places that rise and are all different.

    Attributes:
        fraction: Of the numbers, how many are sent, in (0, 1].
        error_feedback: Whether the client keeps what was not sent for its next update.
    """

    kind: ClassVar[str] = "top_k"
    place: ClassVar[Place] = Place.TOP_K

    fraction: float
    error_feedback: bool = True

    def __post_init__(self) -> None:
        check_range(self.kind, "fraction", self.fraction, above=0.0, most=1.0)
        check_bool(self.kind, "error_feedback", self.error_feedback)

    def count(self, size: int) -> int:
        """k of n; at least 1."""
        # Rounded first: 7 % of 100 is 7.000000000000001 in binary.
        return max(1, math.ceil(round(self.fraction * size, 6)))

    def encode(self, parts: Parts, context: Context) -> Parts:
        """Takes the largest numbers out of `parts[VALUES]`."""
        values = parts[VALUES]
        places = largest(values, self.count(values.size))
        return {**parts, VALUES: values[places], **_pack_places(places, values.size)}

    def decode(self, parts: Parts, size: int, spec: Spec) -> Parts:
        """Puts the numbers back where they were, zeros elsewhere."""
        rest = dict(parts)
        gaps, bitmap = rest.pop(GAPS, None), rest.pop(BITMAP, None)
        if (gaps is None) == (bitmap is None):
            raise Refused(Reason.TENSORS, f"top_k needs either {GAPS!r} or {BITMAP!r}; {sorted(parts)} came")
        count = self.count(size)
        if rest[VALUES].dtype != np.float32:
            raise Refused(Reason.SHAPE, f"{VALUES!r} is {rest[VALUES].dtype}; top_k sends float32")
        places = _places_of_bits(bitmap, count, size) if gaps is None else _places_of_gaps(gaps, count, size)
        values = np.zeros(size, np.float32)
        values[places] = rest[VALUES]
        return {**rest, VALUES: values}

    def payload(self, size: int, parts: Mapping[str, int], spec: Spec) -> Mapping[str, int]:
        """k numbers and the shorter way to tell places, at its worst."""
        count = self.count(size)
        width = np.dtype(_gap_type(size - count)).itemsize
        return {**parts, VALUES: 4 * count, GAPS: min(width * count, math.ceil(size / 8))}


def largest(values: Vector, count: int) -> NDArray[np.intp]:
    """Places of the `count` numbers of largest magnitude, rising; among equals the first ones.

    The cut is a value that partitioning finds for certain; which of several equal numbers it moves where is not.
    """
    if count >= values.size:
        return np.arange(values.size)
    size = np.abs(values)
    cut = np.partition(size, values.size - count)[values.size - count]
    chosen = size > cut
    missing = count - int(np.count_nonzero(chosen))
    chosen[np.flatnonzero(size == cut)[:missing]] = True
    return np.flatnonzero(chosen)


def _gap_type(most: int) -> type[np.unsignedinteger[Any]]:
    return next((kind for kind in GAP_TYPES if most <= np.iinfo(kind).max), np.uint32)


def _pack_places(places: NDArray[np.intp], size: int) -> Parts:
    gaps = np.diff(places, prepend=-1) - 1
    narrow = gaps.astype(_gap_type(int(gaps.max())))
    if narrow.nbytes <= math.ceil(size / 8):
        return {GAPS: narrow}
    chosen = np.zeros(size, np.bool_)
    chosen[places] = True
    return {BITMAP: np.packbits(chosen, bitorder="little")}


def _places_of_gaps(gaps: NDArray[Any], count: int, size: int) -> NDArray[np.intp]:
    if gaps.dtype not in GAP_TYPES or gaps.shape != (count,):
        raise Refused(
            Reason.INDEXES, f"{GAPS!r} is {gaps.dtype} of shape {gaps.shape}; expected {count} unsigned integers"
        )
    # Checked before it is summed up: a sum of so many gaps of 32 bits fits 64.
    places = np.cumsum(gaps, dtype=np.int64) + np.arange(count)
    if places[-1] >= size:
        raise Refused(Reason.INDEXES, f"a number is said to be at {int(places[-1])}; there are {size}")
    return places.astype(np.intp, copy=False)


def _places_of_bits(bitmap: NDArray[Any] | None, count: int, size: int) -> NDArray[np.intp]:
    assert bitmap is not None
    if bitmap.dtype != np.uint8 or bitmap.shape != (math.ceil(size / 8),):
        raise Refused(Reason.INDEXES, f"{BITMAP!r} is {bitmap.dtype} of shape {bitmap.shape}; expected {size} bits")
    places = np.flatnonzero(np.unpackbits(bitmap, bitorder="little"))
    if places.size != count or places[-1] >= size:
        raise Refused(
            Reason.INDEXES, f"{BITMAP!r} has {places.size} bits set, up to {places[-1:]}; expected {count} of {size}"
        )
    return places
