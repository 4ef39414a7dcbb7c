"""Verbalised confidence: the expert says how sure it is (Lin et al. 2022; Tian et al. 2023, arXiv 2305.14975)."""

from __future__ import annotations

import re
from typing import Final

from agora.protocols import GenerateRequest
from graphs.signals.asking import Asking, NoSignal

WORDS: Final = (
    "How sure are you that your answer is right? Reply with one whole number from 0 (certainly wrong) to 100 "
    "(certainly right), and nothing else."
)
"""What is asked. A number alone keeps the call short, and can be read."""

REPLY_TOKENS: Final = 16
"""Tokens of the reply: a number with some words around it."""

_NUMBER: Final = re.compile(r"(?<![\d.,-])(\d{1,3}(?:\.\d{1,6})?)(?![\d,]|\.\d)")


async def verbalised(asking: Asking) -> float:
    """How sure the expert says it is, in [0, 1].

    Raises:
        NoSignal: If it says no such number.
    """
    messages, prompt = asking.about_it(WORDS)
    done = await asking.generate(
        GenerateRequest(messages=messages, prompt=prompt, max_tokens=REPLY_TOKENS, adapter=asking.expert.adapter)
    )
    said = read_percent(done.text)
    if said is None:
        raise NoSignal(f"asked how sure it is, it said {done.text.strip()[:60]!r}")
    return said


def read_percent(text: str) -> float | None:
    """The first number of a reply as a share in [0, 1]; None if it has none from 0 to 100.

    A number with decimals that is at most 1 is a share already.
    """
    found = _NUMBER.search(text)
    if found is None:
        return None
    value = float(found[1])
    if value > 100:
        return None
    return value if value <= 1 and "." in found[1] else value / 100
