"""Text on its way to a terminal."""

from __future__ import annotations

import re
from typing import Final

_CONTROL: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """The text without control characters, new lines and tabs aside.

    Questions and answers come from outside: an escape sequence in them could rewrite what the terminal shows, and a
    direction override could make it read as something else.
    """
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


def first_line(text: str) -> str:
    """The first line that is not empty, cleaned."""
    return next((line.strip() for line in clean(text).splitlines() if line.strip()), "")


def seconds(value: float) -> str:
    """A duration for people: `0.42 s`, `12.3 s`, `3 min 05 s`."""
    if value < 10:
        return f"{value:.2f} s"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(value: int | float) -> str:
    """Bytes for people, in powers of 1000: `93 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def counted(number: int, noun: str) -> str:
    """`1 subtask`, `2 subtasks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
