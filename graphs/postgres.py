"""The run store's database on PostgreSQL; needs the extra `postgres`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import psycopg
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.serde.base import SerializerProtocol
from psycopg.rows import DictRow, dict_row

from agora.errors import StoreError
from graphs.databases import Many, Taken, Watched

SETUP_LOCK: Final = 0x61676F7261
"""Key of the server's lock under which tables are made: "agora" in ASCII, so that no other program has it by chance."""

SETUP_RETRY_S: Final = 0.05
"""Seconds between two tries for that lock; tables are made within some tenths of a second."""


class WatchedPostgres(Watched, AsyncPostgresSaver):
    """LangGraph's saver for PostgreSQL, watched."""

    def __init__(self, connection: psycopg.AsyncConnection[DictRow], serde: SerializerProtocol) -> None:
        super().__init__(connection, serde=serde)
        self._watchers = {}

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Writes what a task returned."""
        try:
            await super().aput_writes(config, writes, task_id, task_path)
        except Exception as e:
            self._told(config, e)
            raise


class Postgres:
    """See `graphs.databases.Database`.

    Args:
        connection: An open connection in autocommit mode.
        serde: How checkpoints are written.
    """

    def __init__(self, connection: psycopg.AsyncConnection[DictRow], serde: SerializerProtocol) -> None:
        self._db = connection
        self._saver = WatchedPostgres(connection, serde)

    @property
    def checkpointer(self) -> AsyncPostgresSaver:
        """LangGraph's saver on the same connection."""
        return self._saver

    async def script(self, statements: Sequence[str]) -> None:
        """Runs statements that make tables."""
        # Two processes that make the same table at the same time would get in each other's way.
        # Tried rather than waited for: LangGraph's `CREATE INDEX CONCURRENTLY` waits until no other statement runs.
        while True:
            rows, _ = await self._run("SELECT pg_try_advisory_lock(?) AS got", (SETUP_LOCK,))
            if rows[0]["got"]:
                break
            await asyncio.sleep(SETUP_RETRY_S)
        try:
            await self._saver.setup()
            for s in statements:
                await self._run(s, ())
        finally:
            await self._run("SELECT pg_advisory_unlock(?)", (SETUP_LOCK,))

    async def add_columns(self, table: str, columns: Mapping[str, str]) -> None:
        """Adds the columns, by name and type, that the table does not have yet."""
        rows, _ = await self._run(
            "SELECT column_name FROM information_schema.columns "
            "WHERE table_schema = current_schema() AND table_name = ?",
            (table,),
        )
        there = {r["column_name"] for r in rows}
        for name, kind in columns.items():
            # Looked at first: the statement locks the table even where it adds nothing.
            if name not in there:
                await self._run(f"ALTER TABLE {table} ADD COLUMN IF NOT EXISTS {name} {kind}", ())

    async def write(self, sql: str, values: Sequence[Any]) -> int:
        """Runs and commits one statement; the number of rows it changed. Raises `Taken` or `StoreError`."""
        try:
            return (await self._run(sql, values))[1]
        except psycopg.IntegrityError as e:
            raise Taken from e
        except (psycopg.Error, ValueError) as e:
            raise StoreError(f"cannot write to the run store: {e}", hint="is the server up?") from e

    async def write_all(self, statements: Sequence[Many]) -> bool:
        """Runs statements as one transaction; see `graphs.databases.Database`."""
        done = False
        try:
            async with self._saver.lock, self._db.transaction() as transaction, self._db.cursor() as cursor:
                for sql, rows in statements:
                    await cursor.executemany(_marked(sql), rows)
                    if cursor.rowcount != len(rows):
                        raise psycopg.Rollback(transaction)
                done = True
        except psycopg.IntegrityError as e:
            raise Taken from e
        except (psycopg.Error, ValueError) as e:
            raise StoreError(f"cannot write to the run store: {e}", hint="is the server up?") from e
        return done

    async def read(self, sql: str, values: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
        """The rows of one query; raises `StoreError`."""
        try:
            return (await self._run(sql, values))[0]
        except psycopg.Error as e:
            raise StoreError(f"cannot read the run store: {e}", hint="is the server up?") from e

    async def _run(self, sql: str, values: Sequence[Any]) -> tuple[list[DictRow], int]:
        # The saver's lock: one connection serves one statement at a time.
        async with self._saver.lock, self._db.cursor() as cursor:
            await cursor.execute(_marked(sql), values)
            return (await cursor.fetchall() if cursor.description else []), cursor.rowcount


def _marked(sql: str) -> bytes:
    return sql.replace("?", "%s").encode()


@asynccontextmanager
async def connect(where: str, serde: SerializerProtocol, timeout_s: int) -> AsyncIterator[Postgres]:
    """Connects to the server at `where`; raises `psycopg.Error` if that fails."""
    connection = await psycopg.AsyncConnection.connect(
        where, autocommit=True, prepare_threshold=0, row_factory=dict_row, connect_timeout=timeout_s
    )
    async with connection:
        yield Postgres(connection, serde)
