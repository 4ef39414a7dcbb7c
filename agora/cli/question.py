"""The question, from the command line or from standard input."""

from __future__ import annotations

import sys
from typing import Final

from agora.errors import InvalidRequest
from agora.types import MAX_QUESTION_CHARS, checked_question

MAX_BYTES: Final = 4 * MAX_QUESTION_CHARS
"""Bytes read from standard input: UTF-8 takes at most four for a character."""


def read_question(given: str) -> str:
    """The question itself; `-` stands for what is on standard input.

    Raises:
        InvalidRequest: If it cannot be asked.
    """
    return checked_question(_from_stdin() if given == "-" else given).strip()


def _from_stdin() -> str:
    if sys.stdin is None:
        raise InvalidRequest("standard input is closed", hint="give the question as an argument, or pipe it in")
    try:
        raw = sys.stdin.buffer.read(MAX_BYTES + 1)
    except OSError as e:
        raise InvalidRequest(f"standard input cannot be read: {e.strerror or e}") from None
    if len(raw) > MAX_BYTES:
        raise InvalidRequest(
            f"the question on standard input has more than {MAX_BYTES:,} bytes; "
            f"at most {MAX_QUESTION_CHARS:,} characters are allowed",
            hint="shorten it or split it",
        )
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as e:
        raise InvalidRequest(
            f"standard input is not valid UTF-8: byte 0x{raw[e.start]:02x} at position {e.start}",
            hint="send it as UTF-8",
        ) from None
