"""The run store's database on PostgreSQL; needs the extra `postgres`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.serde.base import SerializerProtocol
from psycopg.rows import DictRow, dict_row

from agora.errors import StoreError
from graphs.databases import Taken


class Postgres:
    """See `graphs.databases.Database`.

    Args:
        connection: An open connection in autocommit mode.
        serde: How checkpoints are written.
    """

    def __init__(self, connection: psycopg.AsyncConnection[DictRow], serde: SerializerProtocol) -> None:
        self._db = connection
        self._saver = AsyncPostgresSaver(connection, serde=serde)

    @property
    def checkpointer(self) -> AsyncPostgresSaver:
        """LangGraph's saver on the same connection."""
        return self._saver

    async def script(self, statements: Sequence[str]) -> None:
        """Runs statements that make tables."""
        await self._saver.setup()
        for s in statements:
            await self._run(s, ())

    async def write(self, sql: str, values: Sequence[Any]) -> None:
        """Runs and commits one statement; raises `Taken` or `StoreError`."""
        try:
            await self._run(sql, values)
        except psycopg.IntegrityError as e:
            raise Taken from e
        except psycopg.Error as e:
            raise StoreError(f"cannot write to the run store: {e}", hint="is the server up?") from e

    async def read(self, sql: str, values: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
        """The rows of one query; raises `StoreError`."""
        try:
            return await self._run(sql, values)
        except psycopg.Error as e:
            raise StoreError(f"cannot read the run store: {e}", hint="is the server up?") from e

    async def _run(self, sql: str, values: Sequence[Any]) -> list[DictRow]:
        # The saver's lock: one connection serves one statement at a time.
        async with self._saver.lock, self._db.cursor() as cursor:
            await cursor.execute(sql.replace("?", "%s").encode(), values)
            return await cursor.fetchall() if cursor.description else []


@asynccontextmanager
async def connect(where: str, serde: SerializerProtocol, timeout_s: int) -> AsyncIterator[Postgres]:
    """Connects to the server at `where`; raises `psycopg.Error` if that fails."""
    connection = await psycopg.AsyncConnection.connect(
        where, autocommit=True, prepare_threshold=0, row_factory=dict_row, connect_timeout=timeout_s
    )
    async with connection:
        yield Postgres(connection, serde)
