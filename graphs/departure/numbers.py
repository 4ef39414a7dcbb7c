"""Check digits of bank accounts and payment cards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_LENGTHS = """
AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 ES24 FI18
FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20
LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24
SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30
"""
IBAN_LENGTHS: Final[Mapping[str, int]] = {e[:2]: int(e[2:]) for e in _LENGTHS.split()}
"""Characters of an IBAN by country, from the registry that SWIFT keeps for ISO 13616."""

_SEPARATORS: Final = " -"
_PART = re.compile(r"[A-Za-z0-9]")


def luhn(text: str) -> bool:
    """Whether the digits in a text end in the right check digit (ISO/IEC 7812-1, annex B)."""
    digits = [int(c) for c in text if c.isdecimal() and c.isascii()]
    doubled = [d if n % 2 == 0 else d * 2 - 9 * (d > 4) for n, d in enumerate(reversed(digits))]
    return any(digits) and sum(doubled) % 10 == 0


def iban_end(text: str, start: int) -> int | None:
    """Where the IBAN that begins at `start` ends; None if there is none.

    Letters of either case, with or without single spaces or hyphens between.
    """
    length = IBAN_LENGTHS.get(text[start : start + 2].upper())
    if length is None:
        return None
    found, at = "", start
    while len(found) < length:
        if at >= len(text):
            return None
        if _PART.match(text, at):
            found += text[at]
        elif not (text[at] in _SEPARATORS and found and text[at - 1] not in _SEPARATORS):
            return None
        at += 1
    return at if iban_right(found) else None


def iban_right(account: str) -> bool:
    """Whether the check digits of an IBAN without spaces are right: it is 1 modulo 97 (ISO 7064, MOD 97-10)."""
    moved = account[4:] + account[:4]
    return int("".join(str(int(c, 36)) for c in moved)) % 97 == 1
