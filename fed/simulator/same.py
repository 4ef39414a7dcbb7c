"""Whether two configurations are the same, and if not, where they differ."""

from __future__ import annotations

from typing import Any, Final

SHOWN: Final = 60
"""Characters of a value that a difference shows."""


def difference(was: Any, now: Any, where: str = "") -> str | None:
    """The first place where two JSON values differ, in words; None if they are equal."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted({*was, *now}):
            inner = f"{where}.{key}" if where else str(key)
            if key not in was:
                return f"{inner} is {_short(now[key])}, and was not there"
            if key not in now:
                return f"{inner} is not there, and was {_short(was[key])}"
            if found := difference(was[key], now[key], inner):
                return found
        return None
    if isinstance(was, list) and isinstance(now, list):
        if len(was) != len(now):
            return f"{where} has {len(now)} entries, and had {len(was)}"
        pairs = enumerate(zip(was, now, strict=True))
        return next((d for i, (a, b) in pairs if (d := difference(a, b, f"{where}[{i}]"))), None)
    return None if was == now else f"{where} is {_short(now)}, and was {_short(was)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
