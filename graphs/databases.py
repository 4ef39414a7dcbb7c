"""Where the run store keeps its rows and LangGraph its checkpoints: a SQLite file, or a PostgreSQL server.

Both live behind one connection, so that a run and its checkpoints are in one place.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import aiosqlite
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, ChannelVersions, Checkpoint, CheckpointMetadata
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from agora.errors import InvalidRequest, StoreError

BUSY_TIMEOUT_S: Final = 10.0
"""Seconds to wait for another process that is writing to the same file; a checkpoint is written in milliseconds."""

BUSY_RETRY_S: Final = 0.05
"""Seconds between two tries where SQLite does not wait by itself."""

CONNECT_TIMEOUT_S: Final = 10
"""Seconds to wait for a PostgreSQL server to accept; one that is up accepts in milliseconds, far ones in one or two."""


T = TypeVar("T")

Many = tuple[str, Sequence[Sequence[Any]]]
"""A statement, and the values for every time that it is run."""


class Taken(Exception):
    """A row with that key is already there."""


class Database(Protocol):
    """One open connection. SQL has `?` for values."""

    @property
    def checkpointer(self) -> BaseCheckpointSaver[Any]:
        """LangGraph's saver on the same connection."""

    async def script(self, statements: Sequence[str]) -> None:
        """Runs statements that make tables."""

    async def add_columns(self, table: str, columns: Mapping[str, str]) -> None:
        """Adds the columns, by name and type, that the table does not have yet."""

    async def write(self, sql: str, values: Sequence[Any]) -> int:
        """Runs and commits one statement; the number of rows it changed. Raises `Taken` or `StoreError`."""

    async def write_all(self, statements: Sequence[Many]) -> bool:
        """Runs statements as one transaction, each once for every row of values.

        Returns:
            Whether each changed one row every time. If not, none of them changed anything.

        Raises:
            Taken: If a key was already there.
            StoreError: If it cannot be written.
        """

    async def read(self, sql: str, values: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
        """The rows of one query; raises `StoreError`."""


def _serde() -> JsonPlusSerializer:
    # Plain values only: a checkpoint can never make agora build an object of its choosing.
    return JsonPlusSerializer(allowed_msgpack_modules=None)


class Watched:
    """Mixed into a saver: tells whoever watches a thread that one of its results could not be written.

    LangGraph itself tells that only when the run has come to its end, after everybody has been asked (and paid).
    """

    _watchers: dict[str, Callable[[Exception], None]]

    @contextmanager
    def watched(self, thread: str, on_loss: Callable[[Exception], None]) -> Iterator[None]:
        """Calls `on_loss` with the error, for as long as the block lasts."""
        self._watchers[thread] = on_loss
        try:
            yield
        finally:
            self._watchers.pop(thread, None)

    def _told(self, config: RunnableConfig, error: Exception) -> None:
        watcher = self._watchers.get(str(config["configurable"]["thread_id"]))
        if watcher is not None:
            watcher(error)


def watching(checkpointer: object, thread: str, on_loss: Callable[[Exception], None]) -> AbstractContextManager[None]:
    """Watches a thread of a saver, if it is one that can be watched."""
    return checkpointer.watched(thread, on_loss) if isinstance(checkpointer, Watched) else nullcontext()


class WatchedSqlite(Watched, AsyncSqliteSaver):
    """LangGraph's saver for SQLite, watched."""

    def __init__(self, connection: aiosqlite.Connection, serde: SerializerProtocol) -> None:
        super().__init__(connection, serde=serde)
        self._watchers = {}

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Writes a checkpoint."""
        return await _whole(super().aput(config, checkpoint, metadata, new_versions))

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Writes what a task returned."""
        try:
            await _whole(super().aput_writes(config, writes, task_id, task_path))
        except Exception as e:
            with suppress(sqlite3.Error):
                # Under the lock, or somebody else's transaction would be taken back.
                async with self.lock:
                    await self.conn.rollback()
            self._told(config, e)
            raise


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    """Does a piece of work to its end, also if whoever waits for it is cancelled meanwhile.

    Left in the middle, a transaction would stay open, and the file locked for every other process.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # told to nobody: whoever waited for it has gone
        raise


class _Unlike(Exception):
    """A statement did not change what it was to change."""


class _Sqlite:
    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._db = connection
        self._saver = WatchedSqlite(connection, _serde())

    @property
    def checkpointer(self) -> AsyncSqliteSaver:
        return self._saver

    async def close(self) -> None:
        # Whoever is in the middle of a transaction ends it first: closed over it, the file would stay locked.
        async with self._saver.lock:
            await self._db.close()

    async def script(self, statements: Sequence[str]) -> None:
        until = asyncio.get_running_loop().time() + BUSY_TIMEOUT_S
        while True:
            try:
                await self._saver.setup()
                break
            except sqlite3.OperationalError as e:
                # It changes how the file keeps its journal, which does not wait for whoever is reading.
                if e.sqlite_errorcode != sqlite3.SQLITE_BUSY or asyncio.get_running_loop().time() > until:
                    raise
                await asyncio.sleep(BUSY_RETRY_S)
        for s in statements:
            await self._db.execute(s)
        await self._db.commit()

    async def add_columns(self, table: str, columns: Mapping[str, str]) -> None:
        # At once, so that no other process adds them between the look and the change.
        await self._db.execute("BEGIN IMMEDIATE")
        try:
            async with self._db.execute(f"PRAGMA table_info({table})") as cursor:
                there = {row[1] for row in await cursor.fetchall()}
            for name, kind in columns.items():
                if name not in there:
                    await self._db.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")
            await self._db.commit()
        except BaseException:
            await self._db.rollback()
            raise

    async def write(self, sql: str, values: Sequence[Any]) -> int:
        async with self._transaction():
            return (await self._db.execute(sql, values)).rowcount

    async def write_all(self, statements: Sequence[Many]) -> bool:
        try:
            async with self._transaction():
                for sql, rows in statements:
                    if (await self._db.executemany(sql, rows)).rowcount != len(rows):
                        raise _Unlike
        except _Unlike:
            return False
        return True

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[None]:
        # The saver's lock, since both write through one connection and a commit is of the whole connection.
        async with self._saver.lock:
            try:
                yield
                await self._db.commit()
            except sqlite3.IntegrityError as e:
                await self._db.rollback()  # or the file stays locked for everybody else
                raise Taken from e
            except (sqlite3.Error, ValueError) as e:
                await self._db.rollback()
                raise StoreError(f"cannot write to the run store: {e}", hint="is the disk full?") from e
            except BaseException:
                # Whoever was cancelled in the middle leaves nothing that the next commit would write. The thread of
                # the connection works in order, so what is still under way there is taken back as well.
                await asyncio.shield(self._db.rollback())
                raise

    async def read(self, sql: str, values: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
        try:
            async with self._saver.lock, self._db.execute(sql, values) as cursor:
                names = [c[0] for c in cursor.description]
                return [dict(zip(names, row, strict=True)) for row in await cursor.fetchall()]
        except sqlite3.Error as e:
            raise StoreError(f"cannot read the run store: {e}", hint="is the file damaged?") from e


@asynccontextmanager
async def _open_sqlite(where: str) -> AsyncIterator[Database]:
    path = Path(where)
    try:
        path = await asyncio.to_thread(_prepared, path)
        connection = await aiosqlite.connect(path, timeout=BUSY_TIMEOUT_S)
    except (OSError, sqlite3.Error) as e:
        raise StoreError(f"cannot open the run store {path}: {e}", hint="check the folder, or set [store] path") from e
    database = _Sqlite(connection)
    try:
        yield database
    except sqlite3.DatabaseError as e:
        raise StoreError(
            f"cannot use the run store {path}: {e}",
            hint="is it locked, full, or no run store? Set [store] path to use another",
        ) from e
    finally:
        await database.close()


def _prepared(path: Path) -> Path:
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@asynccontextmanager
async def _open_postgres(where: str) -> AsyncIterator[Database]:
    try:
        import psycopg

        from graphs.postgres import connect
    except ImportError as e:
        raise StoreError(
            f"a run store in PostgreSQL needs more packages: {e}", hint="pip install 'agora-llm[postgres]'"
        ) from e
    try:
        async with connect(where, _serde(), CONNECT_TIMEOUT_S) as database:
            yield database
    except psycopg.Error as e:
        # The address may hold a password: it is not repeated.
        raise StoreError(f"the PostgreSQL run store failed: {e}", hint="check [store] path and the server") from e


OPENERS: Final[Mapping[str, Callable[[str], AbstractAsyncContextManager[Database]]]] = {
    "postgresql": _open_postgres,
    "postgres": _open_postgres,
}
"""How to open a store by the scheme of its address; whatever has no scheme is a SQLite file."""


def open_database(where: Path | str) -> AbstractAsyncContextManager[Database]:
    """Opens the database at `where`: a file's path, or `postgresql://user@host/name`.

    Raises:
        InvalidRequest: If the address has a scheme that nothing here opens.
        StoreError: When entered: if it cannot be opened.
    """
    if isinstance(where, str) and "://" in where:
        scheme = where.partition("://")[0]
        if scheme not in OPENERS:
            raise InvalidRequest(
                f"run store address of scheme {scheme!r}; allowed: a file's path, or {', '.join(OPENERS)}://…"
            )
        return OPENERS[scheme](where)
    return _open_sqlite(str(where))
