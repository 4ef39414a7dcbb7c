"""Random numbers by what they are for: a pure function of a seed and some keys, with no generator to carry along.

What one job draws does not depend on what was drawn before it, so a run that is resumed, or whose jobs end in another
order, draws the same. SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import hashlib
import math
from typing import Final

_MASK: Final = (1 << 64) - 1
_STEP: Final = 0x9E3779B97F4A7C15
"""2⁶⁴ over the golden ratio, the increment of SplitMix64."""


def bits(*keys: int) -> int:
    """64 random bits of these keys; their order matters."""
    found = 0
    for key in keys:
        found = (found + key * 0xD1342543DE82EF95 + _STEP) & _MASK
        found = ((found ^ (found >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        found = ((found ^ (found >> 27)) * 0x94D049BB133111EB) & _MASK
        found ^= found >> 31
    return found


def below(n: int, *keys: int) -> int:
    """A whole number from 0 to n − 1, all equally likely (to within n/2⁶⁴)."""
    return bits(*keys) % n


def uniform(*keys: int) -> float:
    """A number from [0, 1)."""
    return (bits(*keys) >> 11) * 2.0**-53


def normal(*keys: int) -> float:
    """A standard normal number, by Box and Muller."""
    radius = math.sqrt(-2.0 * math.log(1.0 - uniform(*keys, 1)))
    return radius * math.cos(2.0 * math.pi * uniform(*keys, 2))


def of_text(text: str) -> int:
    """A key that stands for a text; the same on every machine, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
