"""What experts answered to labelled questions, written down as it comes, so that an interruption loses nothing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from filelock import FileLock, Timeout

from agora.errors import ConfigError, InvalidRequest
from agora.routing.trust import Version

Key = tuple[str, Version, tuple[str, ...]]
"""What an outcome is the outcome of: the question, who was asked, and what was asked of the answer (`asked_for`)."""

EARLY_AT_ONCE: Final = 8
"""Questions asked at once by those who wrote journals that do not tell."""

MAX_LINE_BYTES: Final = 1024 * 1024
"""Longest line that is read back; those that are written stay far below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """One expert's answer to one labelled question.

    Attributes:
        question: Key of the question.
        version: Which version of which expert answered.
        asked_for: Signals that were asked for besides those that come with an answer, as
            `graphs.calibration_version.asked_for` tells them.
        right: Whether it was right; None if there is no answer.
        answer: The final answer, if one can be read.
        signals: By name; finite numbers only.
        cost: Money of the answer, of making the question ready to leave, and of asking for the answer's signals.
        seconds: Time of all that.
        tokens: Tokens of the expert's own that the money was for.
        price: Money per million tokens by which the cost was reckoned; None if that is not known.
        error: Why there is no answer; empty if there is one.
        at_once: Most questions that were asked of its machine at once; with more than 1 its seconds include waiting.
    """

    question: str
    version: Version
    asked_for: tuple[str, ...] = ()
    right: bool | None = None
    answer: str | None = None
    signals: Mapping[str, float] = field(default_factory=dict)
    cost: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    price: float | None = None
    error: str = ""
    at_once: int = 1

    @property
    def key(self) -> Key:
        """What it is the outcome of."""
        return self.question, self.version, self.asked_for

    def priced(self, price: float) -> Graded:
        """The same at another price per million tokens; what paths took besides stays as it was."""
        if self.price is None or self.price == price:
            return self
        return replace(self, cost=max(0.0, self.cost + (price - self.price) * self.tokens / 1e6), price=price)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {**asdict(self), "signals": dict(self.signals)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Graded:
        """Reads what `to_dict` wrote.

        Raises:
            KeyError: If something is missing.
            TypeError: If something is of another type.
            ValueError: If a number is out of range.
        """
        cost, seconds = float(plain["cost"]), float(plain["seconds"])
        if not (cost >= 0 and seconds >= 0 and math.isfinite(cost + seconds)):
            raise ValueError(f"cost {cost} and seconds {seconds} must be numbers ≥ 0")
        if plain["right"] not in (True, False, None):
            raise ValueError(f"right is {plain['right']!r}")
        tokens, price = int(plain["tokens"]), None if plain["price"] is None else float(plain["price"])
        if tokens < 0 or not (price is None or (price >= 0 and math.isfinite(price))):
            raise ValueError(f"tokens {tokens} and price {price} must be numbers ≥ 0")
        signals = {str(k): float(v) for k, v in plain["signals"].items()}
        return cls(
            question=str(plain["question"]),
            version=Version(**plain["version"]),
            asked_for=tuple(map(str, plain["asked_for"])),
            right=plain["right"],
            answer=None if plain["answer"] is None else str(plain["answer"]),
            signals={k: v for k, v in signals.items() if math.isfinite(v)},
            cost=cost,
            seconds=seconds,
            tokens=tokens,
            price=price,
            error=str(plain["error"]),
            at_once=int(plain.get("at_once", EARLY_AT_ONCE)),
        )


class Journal:
    """A file to which outcomes are added, one JSON object a line; a context manager.

    Entering reads what is there. Lines that are torn, as a kill in the middle of one leaves them, or damaged are passed
    over and counted; what they stood for is asked again.

    Args:
        path: The file.
        fresh: Begin anew; what is there is kept beside it as `….old`.

    Attributes:
        known: Outcomes that are written down, the last one of each key.
        damaged: Lines that could not be read.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self.known: dict[Key, Graded] = {}
        self.damaged = 0
        self._fresh = fresh
        self._file: IO[bytes] | None = None
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise ConfigError(f"{self.path}: another calibration is writing to it", hint="wait for it to end") from None
        except OSError as e:
            raise self._cannot(e) from e
        try:
            if self._fresh and self.path.exists():
                self.path.replace(self.path.with_name(self.path.name + ".old"))
            self._file = self.path.open("a+b")
            self._read(self._file)
        except OSError as e:
            self.__exit__(None, None, None)
            raise self._cannot(e) from e
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._lock.release()

    def _cannot(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.path}: {error.strerror or error}", hint="choose another folder in [vertical] policy")

    def put(self, outcome: Graded) -> None:
        """Writes an outcome down; it survives the end of this process from then on.

        Raises:
            ConfigError: If it cannot be written.
        """
        assert self._file is not None
        try:
            self._file.write(json.dumps(outcome.to_dict(), allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as e:
            raise ConfigError(f"{self.path}: {e.strerror or e}", hint="make room, then start again: it goes on") from e
        self.known[outcome.key] = outcome

    def _read(self, file: IO[bytes]) -> None:
        file.seek(0)
        whole = True
        while line := file.readline(MAX_LINE_BYTES):
            whole = line.endswith(b"\n")
            try:
                outcome = Graded.from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidRequest):
                self.damaged += 1
                continue
            self.known[outcome.key] = outcome
        file.seek(0, os.SEEK_END)
        if not whole:
            file.write(b"\n")
            file.flush()
