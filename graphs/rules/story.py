"""Story problems: what they tell and what they ask cannot be taken apart."""

from __future__ import annotations

import re

from graphs.rules.asks import Asked

_FIGURE = re.compile(
    r"\d|\b(?:two|three|four|five|six|seven|eight|nine|ten|twice|half|dozen|double|third)\b", re.IGNORECASE
)
_COUNTS = re.compile(
    r"\bhow (?:many|much|long|far|old|fast|tall|big|large|high)\b|\bwhat (?:is|was|will be|percentage|fraction)\b|"
    r"\b(?:calculate|find|determine|compute)\b",
    re.IGNORECASE,
)


def is_story(asked: Asked) -> bool:
    """Whether the sentences around the questions state figures, and every question asks for one."""
    told = " ".join(asked.context)
    return len(_FIGURE.findall(told)) >= 2 and all(_COUNTS.search(a.text) is not None for a in asked.asks)
