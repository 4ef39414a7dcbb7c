"""What an answer comes down to: its final answer, in a form in which equal answers are equal texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Final

MAX_CHARS: Final = 16_384
"""Characters of a text that are read, from its end: final answers stand last, and the time stays bounded."""

SHORT_CHARS: Final = 200
"""Characters up to which a text without a marker and without a number is a final answer itself."""

FRAGMENT_CHARS: Final = 60
"""Characters up to which a text is read as nothing but its answer: "540 meters", "(B)", "Kate Montgomery"."""

MAX_DIGITS: Final = 40
"""Digits of a number that is brought into one form; a longer one stays as it was written."""

JSON_CHARS: Final = 4_096
"""Characters of a JSON text that is compared as a whole, whatever the order of its keys."""

_ANSWER_FIELD: Final = re.compile(
    r'"(?:final_?answer|answer)"\s{0,20}:\s{0,20}(?:"((?:[^"\\]|\\.){0,2000})"|([^\s",}\]][^",}\]\n]{0,200}))',
    re.IGNORECASE,
)
_HASHES: Final = re.compile(r"#{4}[ \t]{0,20}([^\n#]{1,200})")
_BOXED: Final = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{")
_PHRASE: Final = re.compile(
    r"(?:\banswer\s{0,4}(?:is|are|=|:)|\banswer\**\s{0,4}:|\btherefore,? the result is)[\s*:$]{0,8}([^\n]{1,200})",
    re.IGNORECASE,
)
_NUMBER: Final = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?|(?<![\w.\d])-?\.\d+")
_WHOLE_NUMBER: Final = re.compile(
    r"[^\w\-.]{0,8}(-?)\s?(?:US\$|usd|[$€£¥])?\s?(-?(?:\d[\d,]*)?(?:\.\d+)?)\s?(?:%|°)?\s?[a-z .°/²³]{0,40}[^\w]{0,8}",
    re.IGNORECASE,
)
_FRACTION: Final = re.compile(r"(-?)\\?(?:frac\{(-?\d{1,20})\}\{(\d{1,20})\}|(-?\d{1,20})\s?/\s?(\d{1,20}))")
_CHOICE: Final = re.compile(r"[(\[*\s]{0,4}([A-Ja-j])(?:[)\].:*]{1,4}(?:\s.{0,200})?|\s{0,4})", re.DOTALL)
_WRAPPED: Final = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s?\{([^{}]{0,200})\}")
_NOISE: Final = re.compile(r"\\(?:left|right|displaystyle|[,;:! ])|\\\(|\\\)|\\\[|\\\]|[`*$]")
_FENCE: Final = re.compile(r"^\s*```\w{0,20}\s*|\s*```\s*$")


def final_answer(text: str) -> str | None:
    r"""Reads what a text comes to in the end.

    Looks for, in this order: an `answer` field of JSON, `#### …`, `\boxed{…}`, "the answer is …" (the last of each);
    the whole text where it is no longer than `FRAGMENT_CHARS` or is JSON; the last number in it; the text itself where
    it is short. Numbers lose currency, separators, units and trailing zeros, and 0.5, 1/2 and \frac{1}{2} are the same;
    a choice is its letter; other texts lose case, spaces and marks around them. Time is linear in at most `MAX_CHARS`.

    Args:
        text: What a model said.

    Returns:
        The final answer, or None if nothing can be read.
    """
    text = text[-MAX_CHARS:].strip()
    for reader in _READERS:
        found = reader(text)
        if found is not None and (said := _normal(found)):
            return said
    body = _FENCE.sub("", text).strip()
    if len(body) <= FRAGMENT_CHARS:
        said = _normal(body)
        numbers = _NUMBER.findall(body)
        # "that is $25,000.": words around one number; "12/25/1937" is a text
        return (
            _number(numbers[0]) if len(numbers) == 1 and said == _plain(_NOISE.sub("", body)) and " " in body else said
        )
    if (whole := _json(body)) is not None:
        return whole
    if numbers := _NUMBER.findall(body):
        return _number(numbers[-1])
    return _plain(body) if len(body) <= SHORT_CHARS else None


def _field(text: str) -> str | None:
    last = None
    for match in _ANSWER_FIELD.finditer(text):
        last = match
    if last is None:
        return None
    if last[1] is None:
        return last[2]
    try:
        return str(json.loads(f'"{last[1]}"', strict=False))
    except ValueError:
        # LaTeX in JSON is seldom escaped as it should be
        return last[1]


def _hashes(text: str) -> str | None:
    found = _HASHES.findall(text)
    return found[-1] if found else None


def _boxed(text: str) -> str | None:
    starts = [match.end() for match in _BOXED.finditer(text)]
    if not starts:
        return None
    depth = 1
    for i in range(starts[-1], min(len(text), starts[-1] + 2_000)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[starts[-1] : i]
    return None


def _phrase(text: str) -> str | None:
    found = _PHRASE.findall(text)
    if not found:
        return None
    said: str = found[-1]
    # "the answer is 18 because 9 · 2 = 18" and "the answer is 18. Then …" both say 18
    return re.split(r"(?<=[\w)\]}])\.\s|\b(?:because|since|as)\b", said, maxsplit=1)[0]


_READERS: Final[tuple[Callable[[str], str | None], ...]] = (_field, _hashes, _boxed, _phrase)


def _normal(fragment: str) -> str | None:
    """One form for what stands for the same: a number, a choice, or a plain text; None if nothing is left."""
    fragment = _NOISE.sub("", _WRAPPED.sub(r"\1", fragment[:2_000])).replace("dfrac", "frac").replace("tfrac", "frac")
    fragment = fragment.strip()
    if "=" in fragment and (right := fragment.rpartition("=")[2].strip()):
        fragment = right
    if match := _FRACTION.fullmatch(fragment.rstrip(".")):
        sign, above, below = match[1], match[2] or match[4], match[3] or match[5]
        if int(below):
            return _exact(Fraction(int(above), int(below)) * (-1 if sign else 1))
    if (match := _WHOLE_NUMBER.fullmatch(fragment)) and match[2].strip("-.,"):
        return _number(match[1] + match[2])
    if match := _CHOICE.fullmatch(fragment):
        return match[1].upper()
    whole = _json(fragment)
    return whole if whole is not None else _plain(fragment)


def _json(text: str) -> str | None:
    """A JSON object or list with sorted keys; None for anything else."""
    if len(text) > JSON_CHARS or not text.startswith(("{", "[")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _number(written: str) -> str:
    digits = written.replace(",", "").replace("--", "").rstrip(".")
    if len(digits) > MAX_DIGITS:
        return digits
    return _exact(Fraction(digits))


def _exact(value: Fraction) -> str:
    """A whole number, a decimal where at most 12 digits after the point are enough, else a fraction."""
    if value.denominator == 1:
        return str(value.numerator)
    scaled = value * 10**12
    if scaled.denominator != 1:
        return f"{value.numerator}/{value.denominator}"
    sign, digits = "-" if scaled < 0 else "", str(abs(scaled.numerator)).rjust(13, "0")
    return f"{sign}{digits[:-12]}.{digits[-12:].rstrip('0')}"


def _plain(text: str) -> str | None:
    said = " ".join(text.casefold().split()).strip(" .,;:!?\"'()[]{}<>")
    return said or None
