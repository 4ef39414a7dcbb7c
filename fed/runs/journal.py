"""A file of JSON lines that a killed process may write again: each row has a key, and is there once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from agora.errors import StoreError

MAX_BYTES: Final = 2**30
"""Of a journal that is read: a million rows and more."""


class Journal:
    """Rows by key, in memory and in a file.

    A run that goes on from a checkpoint makes again what came after it, bit for bit; rows that are there already are
    therefore not written again.

    Args:
        path: The file; made when the first row comes.
        key: Names of what tells rows apart.

    Raises:
        StoreError: If the file cannot be read.
    """

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self._path, self._key = path, key
        self.rows: list[dict[str, Any]] = read_lines(path)
        _cut(path)
        self._known: set[Hashable] = {self._of(row) for row in self.rows}

    def __contains__(self, row: Mapping[str, Any]) -> bool:
        return self._of(row) in self._known

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row, and brings it to the file."""
        if row in self:
            return
        try:
            with self._path.open("ab") as file:
                file.write(orjson.dumps(dict(row)) + b"\n")
        except OSError as e:
            raise StoreError(f"{str(self._path)!r} cannot be written: {e.strerror}") from e
        self.rows.append(dict(row))
        self._known.add(self._of(row))

    def _of(self, row: Mapping[str, Any]) -> Hashable:
        return tuple(row[name] for name in self._key)


def _cut(path: Path) -> None:
    """Cuts off half a line, written when the process was killed."""
    try:
        with path.open("r+b") as file:
            data = file.read(MAX_BYTES)
            file.truncate(data.rfind(b"\n") + 1)
    except FileNotFoundError:
        return
    except OSError as e:
        raise StoreError(f"{str(path)!r} cannot be written: {e.strerror}") from e


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none if it is not there. A last line that is not whole is passed over.

    Raises:
        StoreError: If the file cannot be read, or another line is no JSON object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise StoreError(f"{str(path)!r} cannot be read: {e.strerror}") from e
    whole, _, _ = data.rpartition(b"\n")
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = orjson.loads(line)
        except ValueError as e:
            raise StoreError(f"{path}, line {number}: not JSON: {e}") from None
        if not isinstance(row, dict):
            raise StoreError(f"{path}, line {number}: no JSON object")
        rows.append(row)
    return rows
