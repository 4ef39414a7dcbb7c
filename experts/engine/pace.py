"""How fast requests end while others wait: what a refused one is told to wait for."""

from __future__ import annotations

from typing import Final

NEWEST: Final = 0.2
"""Weight of the newest request in the running mean: about the last ten count."""


class Pace:
    """Written by the worker thread, read by the event loop.

    Attributes:
        seconds: Running mean of the seconds between requests that end while others wait; None until two have.
    """

    def __init__(self) -> None:
        self.seconds: float | None = None
        self._last: float | None = None

    def ended(self, now: float, *, others_wait: bool) -> None:
        """Notes that a request has ended."""
        if others_wait and self._last is not None:
            seconds = now - self._last
            before = seconds if self.seconds is None else self.seconds
            self.seconds = before + NEWEST * (seconds - before)
        self._last = now if others_wait else None
