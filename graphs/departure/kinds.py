"""Kinds of personal data that rules can find reliably, by name.

A finder tells where in a text its kind stands. It would rather take a number too many than leave one out, and looks at
a text of any length in linear time. What no rule can tell (a name without a title, an address in prose) it does not
promise to find.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from graphs.departure.numbers import iban_end, luhn

Span = tuple[int, int]
Finder = Callable[[str], Iterator[Span]]

_MONTH: Final = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sep(?:t(?:ember)?)?|"
    r"oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DATE: Final = (
    r"(?:\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](?:\d{4}|\d{2})|"
    rf"\d{{1,2}}(?:st|nd|rd|th)?(?:\sof)?\s{_MONTH},?\s\d{{4}}|{_MONTH}\s\d{{1,2}}(?:st|nd|rd|th)?,?\s\d{{4}})"
)
_A_DATE: Final = re.compile(_DATE, re.IGNORECASE)

_BORN: Final = re.compile(
    r"(?:\bborn\b[^.;\n]{0,40}?|\bdate\sof\sbirth(?:\sis)?|\bd\.?o\.?b\.?|\bbirthday(?:\sis)?(?:\son)?|\bbirth\sdate)"
    rf"\s?[:=]?\s?(?:the\s)?(?P<it>{_DATE})(?!\d)",
    re.IGNORECASE,
)

# An address begins behind what cannot belong to it: else every letter of a long word would be tried as its beginning.
_EMAIL: Final = re.compile(r"(?<![\w.+%'-])[\w.+%'-]+@(?:[\w-]+\.)+[^\W\d_]{2,}")
_URL: Final = re.compile(r"(?<![A-Za-z0-9])(?:https?://|ftp://|www\.)[^\s<>\"'`]+", re.IGNORECASE)
_IBAN: Final = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?=[ -]?[A-Za-z0-9]{4})")
_CARD: Final = re.compile(r"(?<![\w.])\d+(?:[ -]\d+)*(?![\w])")
_IPV4: Final = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d])")
_IPV6: Final = re.compile(r"(?<![\w:.])[0-9A-Fa-f:.]{3,45}(?![\w:])")
_MAC: Final = re.compile(r"(?<![\w:-])[0-9A-Fa-f]{2}(?:[:-][0-9A-Fa-f]{2}){5}(?![\w:-])")
# Few brackets at its beginning: else every one of a long row would be tried, each up to the row's end.
_PHONE: Final = re.compile(r"(?<![\w./-])[+(]{0,3}\d+(?:(?:[ .]| ?[/-] ?| ?\(|\)[ /-]?)\d+)*")
_DIGITS: Final = re.compile(r"\d+")
_SSN: Final = re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")
_PLACE: Final = re.compile(r"(?<![\d.])(?P<lat>-?\d{1,2}\.\d{3,})\s?[,;]\s?(?P<lon>-?\d{1,3}\.\d{3,})(?!\d)")
_SECRET: Final = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----[A-Za-z0-9+/=\s]*-----END [A-Z ]*PRIVATE KEY-----"
    r"|(?<![A-Za-z0-9_-])(?:sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,})"
)
_WORD: Final = r"[^\W\d_a-z][^\W\d_]*(?:['’-][^\W\d_]+)*"
_NAME: Final = re.compile(
    r"(?:\b(?:[Mm]y|[Hh]is|[Hh]er|[Tt]he\s(?:patient|customer|client|driver)'?s?)\sname\sis\s|"
    r"\b(?:Mr|Mrs|Ms|Mx|Miss|Dr|Prof|Sir|Herr|Frau)\b\.?\s|\b[Nn]ame:\s|\b[Pp]atient:\s|\b[Dd]ear\s)"
    rf"(?P<it>{_WORD}(?:\s{_WORD}){{0,3}})"
)

MIN_CARD_DIGITS: Final = 13
MAX_CARD_DIGITS: Final = 19
"""Digits of payment cards, by ISO/IEC 7812-1 and what is issued."""

MIN_PHONE_DIGITS: Final = 7
"""Digits of the shortest telephone numbers with an area code; shorter ones look like any other number."""

MAX_PHONE_DIGITS: Final = 15
"""Digits of the longest, by ITU-T E.164."""


def _matches(pattern: re.Pattern[str]) -> Finder:
    group = "it" if "it" in pattern.groupindex else 0

    def find(text: str) -> Iterator[Span]:
        return (m.span(group) for m in pattern.finditer(text))

    return find


def _urls(text: str) -> Iterator[Span]:
    for m in _URL.finditer(text):
        # A full stop or bracket behind an address belongs to the sentence.
        end = m.start() + len(m[0].rstrip(".,;:!?)]}"))
        if end > m.start() + 4:
            yield m.start(), end


def _ibans(text: str) -> Iterator[Span]:
    at = 0
    while (m := _IBAN.search(text, at)) is not None:
        end = iban_end(text, m.start())
        if end is not None:
            yield m.start(), end
        at = end if end is not None else m.end()


def _cards(text: str) -> Iterator[Span]:
    for m in _CARD.finditer(text):
        groups = [g.span() for g in _DIGITS.finditer(text, *m.span())]
        # Another number may stand before or behind it, with nothing but a space between.
        for first in range(len(groups)):
            digits = 0
            for start, end in groups[first : first + MAX_CARD_DIGITS]:
                digits += end - start
                if digits > MAX_CARD_DIGITS:
                    break
                if digits >= MIN_CARD_DIGITS and luhn(text[groups[first][0] : end]):
                    yield groups[first][0], end


def _ips(text: str) -> Iterator[Span]:
    for pattern in (_IPV4, _IPV6):
        for m in pattern.finditer(text):
            found = m[0].rstrip(".")
            # A time of day has colons, too, and "::" stands for nobody.
            if len(found) > 2 and _is_ip(found):
                yield m.start(), m.start() + len(found)


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _phones(text: str) -> Iterator[Span]:
    for m in _PHONE.finditer(text):
        groups = [g.span() for g in _DIGITS.finditer(text, *m.span())]
        for first, (start, _) in enumerate(groups):
            begin = start
            while begin > m.start() and text[begin - 1] in "+(":
                begin -= 1
            if begin > m.start() and not text[begin - 1].isspace():
                continue  # in the middle of a number, or of a date
            if (
                end := _phone_end(
                    text, groups[first : first + MAX_PHONE_DIGITS], international="+" in text[begin:start]
                )
            ) is not None:
                yield begin, end


def _phone_end(text: str, groups: Sequence[Span], *, international: bool) -> int | None:
    """Where the telephone number ends that begins with these groups of digits; None if it is none."""
    lengths = [b - a for a, b in groups[:4]]
    american = next((n for n in ([3, 3, 4], [1, 3, 3, 4]) if lengths[: len(n)] == n), None)
    if american is not None:
        return groups[len(american) - 1][1]
    start = groups[0][0]
    # At home a number begins with 0 and an area code; "0.1234567" is a decimal.
    if not international and not (text[start] == "0" and lengths[0] >= 2):
        return None
    digits, end = 0, None
    for a, b in groups:
        if (digits := digits + b - a) > MAX_PHONE_DIGITS:
            break
        if digits >= MIN_PHONE_DIGITS:
            end = b
    if end is None or (_A_DATE.fullmatch(text, start, end) is not None and not international):
        return None
    return end


def _places(text: str) -> Iterator[Span]:
    return (m.span() for m in _PLACE.finditer(text) if abs(float(m["lat"])) <= 90 and abs(float(m["lon"])) <= 180)


KINDS: Final[Mapping[str, Finder]] = MappingProxyType(
    {
        "secret": _matches(_SECRET),
        "url": _urls,
        "email": _matches(_EMAIL),
        "iban": _ibans,
        "card": _cards,
        "mac": _matches(_MAC),
        "ip": _ips,
        "birth_date": _matches(_BORN),
        "ssn": _matches(_SSN),
        "location": _places,
        "phone": _phones,
        "name": _matches(_NAME),
    }
)
"""What finds each kind. Where two overlap, the earlier in this order has it: a whole URL rather than the address in it.

| kind | what is found |
| --- | --- |
| secret | API keys of the usual forms, JSON web tokens, private keys |
| url | web addresses |
| email | e-mail addresses |
| iban | bank accounts whose length and check digits (ISO 13616, ISO 7064) are right |
| card | payment cards whose check digit (Luhn) is right |
| mac, ip | addresses of devices, IPv4 and IPv6 |
| birth_date | dates behind "born", "date of birth" and the like |
| ssn | US social security numbers |
| location | pairs of coordinates with at least three decimals (100 m) |
| phone | telephone numbers: international, beginning with 0 and an area code, or American |
| name | names behind a title or "my name is", and wherever they stand again |
"""
