"""What a question's text shows at a glance: its length, its numbers, its form, its words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

MAX_CHARS: Final = 8_192
"""Characters of a question that are looked at: some 2,000 tokens, of which the kind of a question shows. It bounds the
time that one takes."""

WORDS: Final = 2**15
"""Columns into which words and pairs of words are hashed: some hundred times as many as a question has words, so that
few fall together. Not tuned."""

TEXT_FEATURES: Final = 17
"""Columns of `text_features`."""

_NUMBER: Final = re.compile(r"\d[\d,]*(?:\.\d+)?")
_WORD: Final = re.compile(r"[a-z]+")
_CUES: Final = tuple(
    frozenset(cues.split())
    for cues in (
        "if then when unless",
        "each every per times twice half third double",
        "more less fewer than remaining left rest",
        "not except false incorrect least",
        "find compute calculate evaluate many much",
    )
)


def numbers_in(text: str) -> list[float]:
    """The numbers that are written in digits, at most 200 of them."""
    found = []
    for match in _NUMBER.finditer(text[:MAX_CHARS]):
        digits = match[0].replace(",", "")
        if len(digits) <= 40:
            found.append(float(digits))
        if len(found) == 200:
            break
    return found


def text_features(texts: Sequence[str]) -> NDArray[np.float64]:
    """Cheap features of questions, shape (n, 17), finite: sizes and counts on a log scale, and cues."""
    return np.array([_row(text[:MAX_CHARS]) for text in texts], dtype=np.float64)


def _row(text: str) -> list[float]:
    numbers = numbers_in(text)
    words, lower = text.split(), text.lower()
    said = _WORD.findall(lower)
    counts = [
        len(text),
        len(words),
        len(numbers),
        len(set(numbers)),
        sum(n != int(n) for n in numbers if n < 1e15),
        max(numbers, default=0.0),
        numbers[0] if numbers else 0.0,
        text.count("%") + lower.count("percent"),
        text.count("$"),
        text.count("\\") + text.count("^"),
        text.count("\n"),
        text.count(".") + text.count("?"),
        *(sum(map(cue.__contains__, said)) for cue in _CUES),
    ]
    return [float(np.log1p(count)) for count in counts]


def word_counts(texts: Sequence[str]) -> csr_matrix:
    """Words and pairs of neighbouring words, hashed: 1 + log of how often each occurs; shape (n, `WORDS`)."""
    # scikit-learn takes a second to import
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(n_features=WORDS, ngram_range=(1, 2), alternate_sign=False, norm=None)
    counts = hashing.transform([text[:MAX_CHARS] for text in texts])
    counts.data = 1 + np.log(counts.data)
    return counts


def weighed(counts: csr_matrix, rarity: NDArray[np.float64]) -> csr_matrix:
    """Counts times each word's weight, unit rows; of shape (n, `WORDS`) and (`WORDS`,)."""
    from sklearn.preprocessing import normalize

    return normalize(counts.multiply(rarity).tocsr())
