"""The run store: what was asked, how it stands, what happened, and the checkpoints to resume from.

A run is written down before it starts, so that nothing accepted is lost; its finished subtasks are in the checkpoints,
which alone decide what a resume repeats. Its events tell what happened, numbered from 1 over all its legs.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from langgraph.checkpoint.base import BaseCheckpointSaver

from agora.errors import InvalidRequest, RunNotFound, StoreError
from agora.events import Event
from agora.types import Budget, RunResult, Tier, label_of, to_plain
from graphs.databases import Database, Many, Taken, open_database
from graphs.owners import alive, this_process
from graphs.records import COLUMNS, FINAL, SCHEMA, RunRecord, RunStatus, StoredEvent, encoded, record_of
from graphs.run import checked_run_id

__all__ = ["NotOurs", "RunExists", "RunRecord", "RunStatus", "RunStore", "StoredEvent"]

_LISTED: Final = (
    "id, question, graph, config, status, created_at, finished_at, error, owner, planner, budget, metadata, origin, "
    "crashes, reach, asker, trade_off"
)

_APPEND: Final = (
    "INSERT INTO events (run, seq, at, type, body) "
    "SELECT id, COALESCE((SELECT MAX(seq) FROM events WHERE run = runs.id), 0) + 1, "
    "CAST(? AS DOUBLE PRECISION), CAST(? AS TEXT), CAST(? AS TEXT) FROM runs WHERE id = ? AND owner = ?"
)


class RunExists(InvalidRequest):
    """A run of that id is already in the store."""


class NotOurs(StoreError):
    """A run is not this process's to write: another one took it over."""


class RunStore:
    """See the module. Open it with `RunStore.open`.

    Args:
        database: An open database with the store's tables.
    """

    def __init__(self, database: Database) -> None:
        self._db = database
        self._me = this_process()

    @classmethod
    @asynccontextmanager
    async def open(cls, where: Path | str) -> AsyncIterator[RunStore]:
        """Opens the store, making it if it is not there; one made by an older version gets what it lacks.

        Args:
            where: A file's path (SQLite), or `postgresql://user@host/name` (with the extra `postgres`).

        Raises:
            StoreError: If it cannot be opened, or is no such store.
        """
        async with open_database(where) as database:
            await database.script(SCHEMA)
            await database.add_columns("runs", COLUMNS)
            yield cls(database)

    @property
    def checkpointer(self) -> BaseCheckpointSaver[Any]:
        """For `horizontal(..., checkpointer=...)`."""
        return self._db.checkpointer

    async def create(
        self,
        run_id: str,
        question: str,
        *,
        graph: str,
        config_path: Path | str | None,
        planner: str | None = None,
        budget: Budget | None = None,
        reach: Tier = Tier.CLOUD,
        metadata: Mapping[str, str] | None = None,
        origin: str | None = None,
        asker: str | None = None,
        trade_off: float | None = None,
    ) -> RunRecord:
        """Writes a run down before it starts. The arguments are those of `RunRecord`.

        Returns:
            The run as it is in the store now.

        Raises:
            InvalidRequest: If the id is malformed; `RunExists` if it is taken.
            StoreError: If it cannot be written.
        """
        row = {
            "id": checked_run_id(run_id),
            "question": question,
            "graph": graph,
            "config": None if config_path is None else str(config_path),
            "status": str(RunStatus.RUNNING),
            "created_at": time.time(),
            "finished_at": None,
            "error": None,
            "owner": self._me,
            "planner": planner,
            "budget": None if budget is None else json.dumps(to_plain(budget)),
            "metadata": json.dumps(dict(metadata), ensure_ascii=False) if metadata else None,
            "origin": origin,
            "crashes": 0,
            "reach": None if reach is Tier.CLOUD else label_of(reach),
            "asker": asker,
            "trade_off": trade_off,
        }
        places = ", ".join("?" * len(row))
        try:
            await self._db.write(f"INSERT INTO runs ({', '.join(row)}) VALUES ({places})", tuple(row.values()))
        except Taken:
            raise RunExists(
                f"a run {run_id!r} is already in the store", hint="choose another id, or resume it"
            ) from None
        return record_of(row)

    async def finish(
        self,
        run_id: str,
        *,
        result: RunResult | None = None,
        error: str | None = None,
        events: Sequence[Event] = (),
    ) -> None:
        """Writes down how a run ended, with a result, complete or not, or with an error, and its last events with it.

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
            events,
        )

    async def cancel(self, run_id: str, *, error: str = "cancelled", events: Sequence[Event] = ()) -> None:
        """Writes down that a run was ended by whoever asked for it, and its last events with it.

        Raises:
            StoreError: If it cannot be written, or this process is not the one that is at the run.
        """
        change = "status = ?, finished_at = ?, error = ?, owner = NULL"
        await self._own(run_id, change, (str(RunStatus.CANCELLED), time.time(), error), events)

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
        record = record_of(row)
        if record.status in FINAL:
            end = "was cancelled" if record.status is RunStatus.CANCELLED else "already came to its end"
            raise InvalidRequest(f"run {run_id!r} {end}", hint=f"see: agora runs show {run_id}")
        taken = 0
        if record.status is not RunStatus.RUNNING:
            crashed = row["status"] == RunStatus.RUNNING
            # Only if nobody else has taken it since it was looked at.
            taken = await self._db.write(
                "UPDATE runs SET status = ?, finished_at = NULL, error = NULL, owner = ?, crashes = ? "
                "WHERE id = ? AND status = ? AND COALESCE(owner, '') = ?",
                (
                    str(RunStatus.RUNNING),
                    self._me,
                    record.crashes + crashed,
                    run_id,
                    row["status"],
                    row["owner"] or "",
                ),
            )
        if not taken:
            raise InvalidRequest(f"run {run_id!r} is being worked on by another process", hint="wait for it")

    async def append(self, batch: Sequence[tuple[str, Event]]) -> Mapping[str, Sequence[StoredEvent]]:
        """Writes down events of runs that this process is at, all or none of them.

        Args:
            batch: For every event, the id of its run; those of one run in their order.

        Returns:
            For every run, its events with their numbers.

        Raises:
            StoreError: If they cannot be written, or this process is not the one that is at one of the runs.
        """
        if not batch:
            return {}
        runs = list(dict.fromkeys(run_id for run_id, _ in batch))
        # Before the write, so that nothing can go wrong after it; nobody else writes events of these runs.
        rows = await self._db.read(
            f"SELECT run, MAX(seq) AS last FROM events WHERE run IN ({', '.join('?' * len(runs))}) GROUP BY run",
            runs,
        )
        last = {r["run"]: int(r["last"]) for r in rows}
        sql, values = self._appending(batch)
        try:
            written = await self._db.write_all([(sql, values)])
        except Taken:
            written = False
        if not written:
            raise _not_ours(runs)
        stored: dict[str, list[StoredEvent]] = {run_id: [] for run_id in runs}
        for _, name, body, run_id, _ in values:
            last[run_id] = seq = last.get(run_id, 0) + 1
            stored[run_id].append(StoredEvent(seq=seq, type=name, body=body))
        return stored

    async def append_events(self, run_id: str, events: Sequence[Event]) -> int:
        """Writes down events of one run, all or none of them.

        Returns:
            The number of its last event, 0 if it has none.

        Raises:
            StoreError: As for `append`.
        """
        stored = await self.append([(run_id, e) for e in events])
        return stored[run_id][-1].seq if stored else await self.last_seq(run_id)

    async def last_seq(self, run_id: str) -> int:
        """The number of a run's last event, 0 if it has none; raises `StoreError`."""
        rows = await self._db.read("SELECT MAX(seq) AS last FROM events WHERE run = ?", (run_id,))
        return int(rows[0]["last"] or 0)

    async def stored_events(self, run_id: str, *, after: int = 0, limit: int = 1_000) -> list[StoredEvent]:
        """The events of a run behind that number, in order, as they are stored.

        Raises:
            InvalidRequest: If `limit` is not positive.
            StoreError: If the store cannot be read.
        """
        rows = await self._db.read(
            "SELECT seq, type, body FROM events WHERE run = ? AND seq > ? ORDER BY seq LIMIT ?",
            (run_id, after, _checked_limit(limit)),
        )
        return [StoredEvent(seq=r["seq"], type=r["type"], body=r["body"]) for r in rows]

    async def events(self, run_id: str, *, after: int = 0, limit: int = 1_000) -> list[tuple[int, Event]]:
        """The events of a run behind that number, in order, each with its own.

        Raises:
            InvalidRequest: If `limit` is not positive.
            StoreError: If the store cannot be read.
        """
        return [(e.seq, e.event) for e in await self.stored_events(run_id, after=after, limit=limit)]

    def _appending(self, batch: Sequence[tuple[str, Event]]) -> Many:
        try:
            rows = [(e.at, type(e).__name__, encoded(e), run_id, self._me) for run_id, e in batch]
        except ValueError as e:
            raise StoreError(str(e)) from e
        return _APPEND, rows

    async def _own(self, run_id: str, change: str, values: tuple[Any, ...], events: Sequence[Event] = ()) -> None:
        """Changes a run that this process is at, and appends events to it, as one transaction."""
        statements: list[Many] = [self._appending([(run_id, e) for e in events])] if events else []
        statements.append((f"UPDATE runs SET {change} WHERE id = ? AND owner = ?", [(*values, run_id, self._me)]))
        if not await self._db.write_all(statements):
            await self._row(run_id)
            raise _not_ours([run_id])

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
        return record_of(await self._row(run_id))

    async def list(
        self,
        *,
        limit: int = 100,
        status: RunStatus | None = None,
        before: str | None = None,
        origin: str | None = None,
        results: bool = True,
    ) -> list[RunRecord]:
        """The newest runs first.

        Args:
            limit: Most to return.
            status: Only those that stand so.
            before: Only those that come after the run of this id in the list.
            origin: Only those that were started by this one.
            results: Whether their results are read too, which may be long.

        Raises:
            InvalidRequest: If `limit` is not positive.
            RunNotFound: If there is no run `before`.
            StoreError: If the store cannot be read.
        """
        conditions: list[str] = []
        values: list[Any] = []
        if status is not None:
            condition, more = await self._standing(status)
            conditions.append(condition)
            values += more
        if origin is not None:
            conditions.append("origin = ?")
            values.append(origin)
        if before is not None:
            at = (await self._row(before))["created_at"]
            conditions.append("(created_at < ? OR (created_at = ? AND id > ?))")
            values += [at, at, before]
        where = f"WHERE {' AND '.join(conditions)} " if conditions else ""
        columns = f"{_LISTED}, result" if results else _LISTED
        rows = await self._db.read(
            f"SELECT {columns} FROM runs {where}ORDER BY created_at DESC, id LIMIT ?", (*values, _checked_limit(limit))
        )
        return [record_of(r) for r in rows]

    async def _standing(self, status: RunStatus) -> tuple[str, Sequence[str]]:
        """A condition for runs that stand so; a run whose process died was never written down as interrupted."""
        if status not in (RunStatus.RUNNING, RunStatus.INTERRUPTED):
            return "status = ?", [str(status)]
        running = str(RunStatus.RUNNING)
        owners = await self._db.read("SELECT DISTINCT owner FROM runs WHERE status = ?", (running,))
        living = [r["owner"] for r in owners if alive(r["owner"])]
        # An empty list is no SQL; no owner is called "".
        places = ", ".join("?" * len(living)) or "''"
        if status is RunStatus.RUNNING:
            return f"(status = ? AND owner IN ({places}))", [running, *living]
        return (
            f"(status = ? OR (status = ? AND COALESCE(owner, '-') NOT IN ({places})))",
            [str(status), running, *living],
        )


def _not_ours(runs: Sequence[str]) -> NotOurs:
    return NotOurs(
        f"run {', '.join(map(repr, runs))} is not this process's to write", hint="another process took it over"
    )


def _checked_limit(limit: int) -> int:
    if limit < 1:
        raise InvalidRequest(f"limit is {limit}; it must be ≥ 1")
    return limit
