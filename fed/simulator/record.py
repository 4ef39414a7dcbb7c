"""The record of a run: one row per version, as JSON lines, right also after the process was killed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from agora.errors import StoreError

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Absorbed:
    """What a row tells of one update."""

    client: str
    staleness: int
    weight: float
    norm: float
    examples: int
    loss: float | None


@dataclass(slots=True)
class Totals:
    """Counts since the beginning of the run.

    Attributes:
        assigned: Jobs given out.
        absorbed: Updates used.
        refused: Updates not used.
        lost: Jobs that came to nothing, timeouts included.
        cancelled: Jobs stopped by the server, timeouts not included.
        bytes_down: Sent to clients.
        bytes_up: Come from clients, refused updates included.
    """

    assigned: int = 0
    absorbed: int = 0
    refused: int = 0
    lost: int = 0
    cancelled: int = 0
    bytes_down: int = 0
    bytes_up: int = 0


def row(at: float, model: str, version: int, updates: Sequence[Absorbed], totals: Totals) -> Row:
    """The row of a version.

    Returns:
        `at` (virtual seconds), `model`, `version`, `updates` in it from so many `clients`, `staleness_mean` and
        `staleness_max`, `norm_mean`, `loss` (the clients' training losses, by examples; None if none told), the
        totals until then, and `of`: client, staleness and weight of each update.
    """
    told = [(u.loss, u.examples) for u in updates if u.loss is not None]
    examples = sum(n for _, n in told)
    return {
        "at": at,
        "model": model,
        "version": version,
        "updates": len(updates),
        "clients": len({u.client for u in updates}),
        "staleness_mean": sum(u.staleness for u in updates) / len(updates) if updates else 0.0,
        "staleness_max": max((u.staleness for u in updates), default=0),
        "norm_mean": sum(u.norm for u in updates) / len(updates) if updates else 0.0,
        "loss": sum(loss * n for loss, n in told) / examples if examples else None,
        "assigned": totals.assigned,
        "absorbed": totals.absorbed,
        "refused": totals.refused,
        "lost": totals.lost,
        "cancelled": totals.cancelled,
        "bytes_down": totals.bytes_down,
        "bytes_up": totals.bytes_up,
        "of": [[u.client, u.staleness, u.weight] for u in updates],
    }


class Record:
    """Rows, in memory and in a file.

    Args:
        path: The file; None for none.
        size: Bytes of it that count: rows written after the checkpoint that a run is resumed from are made again, so
            they are cut off.

    Raises:
        StoreError: If the file has fewer bytes, or what is in it are no rows.
    """

    def __init__(self, path: Path | None, size: int = 0) -> None:
        self.rows: list[Row] = []
        self.size = size
        self._file: BinaryIO | None = None
        if path is None:
            return
        try:
            self._open(path, size)
        except OSError as e:
            self.close()
            raise StoreError(f"{str(path)!r} cannot be opened: {e}") from e
        except ValueError as e:
            self.close()
            raise StoreError(f"{str(path)!r} is damaged: {e}", hint="begin again in another folder") from e
        except StoreError:
            self.close()
            raise

    def _open(self, path: Path, size: int) -> None:
        self._file = path.open("r+b" if path.exists() else "w+b")
        there = os.fstat(self._file.fileno()).st_size
        if there < size:
            raise StoreError(
                f"{str(path)!r} has {there} bytes; the checkpoint was made when it had {size}",
                hint="put the file back, or begin again in another folder",
            )
        self._file.truncate(size)
        self.rows = [orjson.loads(line) for line in self._file.read().splitlines()]

    def add(self, one: Row) -> None:
        """Adds a row; readers of the file see it at once."""
        self.rows.append(one)
        if self._file is not None:
            line = orjson.dumps(one) + b"\n"
            self._file.write(line)
            self._file.flush()
            self.size += len(line)

    def sync(self) -> None:
        """Brings the file to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
