"""Reading files of one JSON object a line, gzipped or not, in bounded memory."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from agora.errors import InvalidRequest

MAX_LINE_BYTES: Final = 16 * 2**20
"""Longest line that is read: a book has about 1 MB."""

MAX_ROWS: Final = 50_000_000
"""Rows read of one file, so that a small gzip file cannot unpack without end."""


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file with their line numbers, from 1; empty lines are passed over.

    Raises:
        InvalidRequest: If the file is missing, damaged, or has a line that is no JSON object.
    """
    try:
        with _opened(path) as file:
            for number in range(1, MAX_ROWS + 1):
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > MAX_LINE_BYTES:
                    raise InvalidRequest(f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes")
                if line.strip():
                    yield number, _row(path, number, line)
    except FileNotFoundError:
        raise InvalidRequest(f"{path.name} is not in {str(path.parent)!r}", hint="check the data folder") from None
    except (OSError, EOFError, zlib.error) as e:
        raise InvalidRequest(f"{path} cannot be read: {e}", hint="fetch the data set again") from None
    raise InvalidRequest(f"{path} has more than {MAX_ROWS:,} lines", hint="split it")


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        # The decoder's own words tell a place in the line, and none of its text.
        told = e.msg if isinstance(e, json.JSONDecodeError) else "not UTF-8, or nested too deeply"
        raise InvalidRequest(f"{path}, line {number}: not JSON ({told})", hint="one JSON object a line") from None
    if not isinstance(row, dict):
        raise InvalidRequest(f"{path}, line {number}: holds {type(row).__name__}; allowed: a JSON object")
    return row
