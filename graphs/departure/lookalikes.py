"""A text as rules read it: typographic spaces, hyphens and digits in their plain forms, without what nobody sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

_SPACES: Final = "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_HYPHENS: Final = "\u2010\u2011\u2012\u2013\u2212\ufe58\ufe63"
_ZEROS: Final = (0x660, 0x6F0, 0x966, 0x9E6, 0xA66, 0xAE6, 0xB66, 0xBE6, 0xC66, 0xCE6, 0xD66, 0xE50, 0xED0)
"""Where the ten digits of a script begin: Arabic, Persian, those of India, Thai, Lao."""

_PLAIN: Final[Mapping[int, str]] = {
    **{ord(c): " " for c in _SPACES},
    **{ord(c): "-" for c in _HYPHENS},
    **{0xFEE0 + n: chr(n) for n in range(0x21, 0x7F)},  # full-width forms
    **{zero + n: str(n) for zero in _ZEROS for n in range(10)},
    0xFE6B: "@",
}

_UNSEEN: Final = frozenset("\u00ad\u034f\u061c\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff")
_DIRECTIONS: Final = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))
_ACCENTS: Final = frozenset(map(chr, range(0x300, 0x370)))
"""Marks upon the letter before them: left out, so that they end no word; they belong to what is found."""


def plain(text: str) -> tuple[str, Sequence[int]]:
    """The text in plain forms.

    Returns:
        It; and where each of its characters stands in the text given, with the text's length behind the last.
    """
    unseen = (_UNSEEN | _DIRECTIONS | _ACCENTS) & set(text)
    if not unseen:
        return text.translate(_PLAIN), range(len(text) + 1)
    at = [i for i, c in enumerate(text) if c not in unseen]
    return "".join(text[i] for i in at).translate(_PLAIN), [*at, len(text)]


def end_of(text: str, end: int) -> int:
    """The end of what was found in a text, with the marks upon its last letter."""
    while end < len(text) and text[end] in _ACCENTS:
        end += 1
    return end
