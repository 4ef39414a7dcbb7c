"""Server-sent events: the line format in which language-model servers stream.

Source: WHATWG HTML Living Standard, section 9.2.6, "Interpreting an event stream".
"""

from __future__ import annotations

from typing import Final

MAX_EVENT_BYTES: Final = 4 * 2**20
"""Largest event taken. A chunk of 256 tokens, each with 20 alternatives of ~100 bytes, is 0.5 MB; eight times that."""

_BOM: Final = b"\xef\xbb\xbf"


class SseParser:
    """Turns bytes, cut anywhere, into the data of the events they hold.

    Lines end in LF, CRLF or CR. Lines of bytes are decoded whole, so a character whose bytes arrive in two reads is
    never torn; invalid UTF-8 becomes U+FFFD, as the standard says. Only `data` is kept: the APIs spoken here use no
    other field. An event without its closing blank line is not an event.

    Args:
        max_event_bytes: Largest event, and largest line, taken.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max = max_event_bytes
        self._tail = bytearray()
        self._data: list[bytes] = []
        self._size = 0
        self._after_cr = False
        self._at_start = True

    @property
    def pending(self) -> bool:
        """Whether an event has begun that has not ended."""
        return bool(self._tail or self._data)

    def feed(self, received: bytes) -> list[str]:
        """The data of the events that `received` completes.

        Raises:
            ValueError: If an event or a line is larger than allowed.
        """
        if self._after_cr and received:
            received = received.removeprefix(b"\n")
            self._after_cr = False
        if b"\n" not in received and b"\r" not in received:
            # Only ever appended to, so that a long line in small pieces costs linear time.
            self._tail += received
            self._check(self._size + len(self._tail))
            return []
        self._after_cr = received.endswith(b"\r")
        lines = (bytes(self._tail) + received).splitlines(keepends=True)
        last = lines[-1]
        self._tail = bytearray() if last.endswith((b"\n", b"\r")) else bytearray(lines.pop())
        events: list[str] = []
        for line in lines:
            self._take(line.rstrip(b"\r\n"), events)
        self._check(self._size + len(self._tail))
        return events

    def _take(self, line: bytes, events: list[str]) -> None:
        if self._at_start:
            line = line.removeprefix(_BOM)
            self._at_start = False
        if not line:
            if self._data:
                events.append(b"\n".join(self._data).decode("utf-8", "replace"))
                self._data, self._size = [], 0
            return
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
            self._size += len(value) + 1
            self._check(self._size)

    def _check(self, size: int) -> None:
        if size > self._max:
            raise ValueError(f"an event is larger than {self._max:,} bytes")
