"""The smallest words: tiers, modalities, names, and what may be asked at all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from agora.errors import InvalidRequest

MAX_QUESTION_CHARS: Final = 100_000
"""Characters of one question: ~25,000 tokens, past the context of every model in the catalogue."""


ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""What names things: experts, adapters, subtasks."""


class Tier(StrEnum):
    """Where a machine stands, from the user's hand to the data centre. Order: end < edge < cloud."""

    END = "end"
    EDGE = "edge"
    CLOUD = "cloud"

    @property
    def height(self) -> int:
        """0 for end, 1 for edge, 2 for cloud."""
        return list(Tier).index(self)


class Modality(StrEnum):
    """What a subtask brings to an expert."""

    TEXT = "text"
    IMAGE = "image"
    AUDIO = "audio"
    SENSOR = "sensor"


def checked_question(text: str, *, what: str = "question") -> str:
    """Returns `text` if it can be asked at all.

    Args:
        text: What the user or a planner wants answered.
        what: What to call it in the error.

    Raises:
        InvalidRequest: If it is empty, too long, or not valid Unicode text.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"{what} must be text, got {type(text).__name__}")
    if not text.strip():
        raise InvalidRequest(f"{what} is empty", hint="write a question")
    if len(text) > MAX_QUESTION_CHARS:
        raise InvalidRequest(
            f"{what} has {len(text):,} characters; at most {MAX_QUESTION_CHARS:,} are allowed",
            hint="shorten it or split it",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise InvalidRequest(
            f"{what} is not valid Unicode text: lone surrogate at character {e.start}",
            hint="send it as UTF-8",
        ) from None
    if "\x00" in text:
        raise InvalidRequest(f"{what} contains a NUL character", hint="remove it")
    return text


def to_plain(value: Any) -> Any:
    """Dataclasses, enums and tuples as plain JSON values, nested ones too."""
    if isinstance(value, StrEnum):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value
