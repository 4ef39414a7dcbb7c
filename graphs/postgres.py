"""The run store's database on PostgreSQL; needs the extra `postgres`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.serde.base import SerializerProtocol
from psycopg.rows import DictRow, dict_row

from agora.errors import StoreError
from graphs.databases import Taken, Watched


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
        await self._saver.setup()
        for s in statements:
            await self._run(s, ())

    async def write(self, sql: str, values: Sequence[Any]) -> int:
        """Runs and commits one statement; the number of rows it changed. Raises `Taken` or `StoreError`."""
        try:
            return (await self._run(sql, values))[1]
        except psycopg.IntegrityError as e:
            raise Taken from e
        except (psycopg.Error, ValueError) as e:
            raise StoreError(f"cannot write to the run store: {e}", hint="is the server up?") from e

    async def read(self, sql: str, values: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
        """The rows of one query; raises `StoreError`."""
        try:
            return (await self._run(sql, values))[0]
        except psycopg.Error as e:
            raise StoreError(f"cannot read the run store: {e}", hint="is the server up?") from e

    async def _run(self, sql: str, values: Sequence[Any]) -> tuple[list[DictRow], int]:
        # The saver's lock: one connection serves one statement at a time.
        async with self._saver.lock, self._db.cursor() as cursor:
            await cursor.execute(sql.replace("?", "%s").encode(), values)
            return (await cursor.fetchall() if cursor.description else []), cursor.rowcount


@asynccontextmanager
async def connect(where: str, serde: SerializerProtocol, timeout_s: int) -> AsyncIterator[Postgres]:
    """Connects to the server at `where`; raises `psycopg.Error` if that fails."""
    connection = await psycopg.AsyncConnection.connect(
        where, autocommit=True, prepare_threshold=0, row_factory=dict_row, connect_timeout=timeout_s
    )
    async with connection:
        yield Postgres(connection, serde)
