"""The run store: what was asked, how it stands, and the checkpoints to resume from.

A run is written down before it starts, so that nothing accepted is lost; its finished subtasks are in the checkpoints,
which alone decide what a resume repeats.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import psutil
from langgraph.checkpoint.base import BaseCheckpointSaver

from agora.errors import InvalidRequest, RunNotFound, StoreError
from agora.types import RunResult
from graphs.databases import Database, Taken, open_database
from graphs.run import checked_run_id

_SCHEMA: Final = (
    """
    CREATE TABLE IF NOT EXISTS runs (
        id TEXT PRIMARY KEY,
        question TEXT NOT NULL,
        graph TEXT NOT NULL,
        config TEXT,
        status TEXT NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        finished_at DOUBLE PRECISION,
        result TEXT,
        error TEXT,
        owner TEXT
    )
    """,
    "CREATE INDEX IF NOT EXISTS runs_by_time ON runs (created_at)",
)


class RunStatus(StrEnum):
    """How a run stands. `partial`: ended with parts missing. `interrupted`: can be resumed."""

    RUNNING = "running"
    DONE = "done"
    PARTIAL = "partial"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run as the store knows it.

    Attributes:
        id: The run's id; also its thread id in the checkpoints.
        question: What was asked.
        graph: Name of the graph it ran on.
        config: The configuration file it was started with, or None for the built-in one.
        status: How it stands.
        created_at: Wall-clock seconds since the epoch.
        finished_at: The same, once it came to an end.
        result: What it came to.
        error: Why it came to nothing.
    """

    id: str
    question: str
    graph: str
    config: str | None
    status: RunStatus
    created_at: float
    finished_at: float | None = None
    result: RunResult | None = None
    error: str | None = None


class RunStore:
    """See the module. Open it with `RunStore.open`.

    Args:
        database: An open database with the store's tables.
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    @classmethod
    @asynccontextmanager
    async def open(cls, where: Path | str) -> AsyncIterator[RunStore]:
        """Opens the store, making it if it is not there.

        Args:
            where: A file's path (SQLite), or `postgresql://user@host/name` (with the extra `postgres`).

        Raises:
            StoreError: If it cannot be opened, or is no such store.
        """
        async with open_database(where) as database:
            await database.script(_SCHEMA)
            yield cls(database)

    @property
    def checkpointer(self) -> BaseCheckpointSaver[Any]:
        """For `horizontal(..., checkpointer=...)`."""
        return self._db.checkpointer

    async def create(self, run_id: str, question: str, *, graph: str, config_path: Path | str | None) -> None:
        """Writes a run down before it starts.

        Raises:
            InvalidRequest: If the id is taken or malformed.
            StoreError: If it cannot be written.
        """
        try:
            await self._db.write(
                "INSERT INTO runs (id, question, graph, config, status, created_at, owner) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    checked_run_id(run_id),
                    question,
                    graph,
                    None if config_path is None else str(config_path),
                    str(RunStatus.RUNNING),
                    time.time(),
                    _me(),
                ),
            )
        except Taken:
            raise InvalidRequest(
                f"a run {run_id!r} is already in the store", hint="choose another id, or resume it"
            ) from None

    async def finish(self, run_id: str, *, result: RunResult | None = None, error: str | None = None) -> None:
        """Writes down how a run ended: with a result, complete or not, or with an error.

        Raises:
            StoreError: If it cannot be written, or this process is not the one that is at the run.
        """
        status = RunStatus.FAILED
        if result is not None:
            status = RunStatus.DONE if result.complete else RunStatus.PARTIAL
        text = None if result is None else json.dumps(result.to_dict(), ensure_ascii=False)
        await self._own(
            run_id,
            "status = ?, finished_at = ?, result = ?, error = ?, owner = NULL",
            (str(status), time.time(), text, error),
        )

    async def interrupt(self, run_id: str) -> None:
        """Writes down that a run was stopped and may be resumed.

        Raises:
            StoreError: If it cannot be written, or this process is not the one that is at the run.
        """
        await self._own(run_id, "status = ?, owner = NULL", (str(RunStatus.INTERRUPTED),))

    async def take_over(self, run_id: str) -> None:
        """Writes down that this process goes on with a run.

        Raises:
            RunNotFound: If there is no such run.
            InvalidRequest: If it came to its end, or another living process is at it.
        """
        row = await self._row(run_id)
        record = _record(row)
        if record.status in (RunStatus.DONE, RunStatus.PARTIAL):
            raise InvalidRequest(f"run {run_id!r} already came to its end", hint=f"see: agora runs show {run_id}")
        taken = 0
        if record.status is not RunStatus.RUNNING:
            # Only if nobody else has taken it since it was looked at.
            taken = await self._db.write(
                "UPDATE runs SET status = ?, finished_at = NULL, error = NULL, owner = ? "
                "WHERE id = ? AND status = ? AND COALESCE(owner, '') = ?",
                (str(RunStatus.RUNNING), _me(), run_id, row["status"], row["owner"] or ""),
            )
        if not taken:
            raise InvalidRequest(f"run {run_id!r} is being worked on by another process", hint="wait for it")

    async def _own(self, run_id: str, change: str, values: tuple[Any, ...]) -> None:
        """Changes a run that this process is at."""
        sql = f"UPDATE runs SET {change} WHERE id = ? AND owner = ?"
        if not await self._db.write(sql, (*values, run_id, _me())):
            await self._row(run_id)
            raise StoreError(f"run {run_id!r} is not this process's to write", hint="another process took it over")

    async def _row(self, run_id: str) -> Mapping[str, Any]:
        rows = await self._db.read("SELECT * FROM runs WHERE id = ?", (run_id,))
        if not rows:
            raise RunNotFound(f"no run {run_id!r} is in the store", hint="list them with: agora runs list")
        return rows[0]

    async def get(self, run_id: str) -> RunRecord:
        """The run of that id.

        Raises:
            RunNotFound: If there is none.
            StoreError: If the store cannot be read.
        """
        return _record(await self._row(run_id))

    async def list(self, *, limit: int = 100) -> list[RunRecord]:
        """The newest runs first.

        Raises:
            InvalidRequest: If `limit` is not positive.
            StoreError: If the store cannot be read.
        """
        if limit < 1:
            raise InvalidRequest(f"limit is {limit}; it must be ≥ 1")
        rows = await self._db.read("SELECT * FROM runs ORDER BY created_at DESC, id LIMIT ?", (limit,))
        return [_record(r) for r in rows]


def _record(row: Mapping[str, Any]) -> RunRecord:
    status = RunStatus(row["status"])
    if status is RunStatus.RUNNING and not _alive(row["owner"]):
        status = RunStatus.INTERRUPTED
    return RunRecord(
        id=row["id"],
        question=row["question"],
        graph=row["graph"],
        config=row["config"],
        status=status,
        created_at=row["created_at"],
        finished_at=row["finished_at"],
        result=None if row["result"] is None else RunResult.from_dict(json.loads(row["result"])),
        error=row["error"],
    )


def _me() -> str:
    return _process_name(psutil.Process())


def _alive(owner: str | None) -> bool:
    if owner is None:
        return False
    host, pid, _ = owner.rsplit(":", 2)
    if host != platform.node():
        # A process of another machine cannot be seen from here; it is taken at its word.
        return True
    try:
        process = psutil.Process(int(pid))
        # A killed process whose parent has not asked about it yet is still listed.
        return process.status() != psutil.STATUS_ZOMBIE and _process_name(process) == owner
    except psutil.NoSuchProcess:
        return False


def _process_name(process: psutil.Process) -> str:
    # With its start time: the system gives the number of a dead process to a new one.
    return f"{platform.node()}:{process.pid}:{process.create_time():.0f}"
