"""The same adapters on every replica, on those that come later too."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from agora.errors import AdapterError, AgoraError, Unavailable, Unsupported
from agora.types import AdapterRef
from experts.adapters import CONFIG_FILE, WEIGHTS_FILE
from experts.replicas_crew import Replica, ReplicaCrew, nobody

T = TypeVar("T")

FOLDER_PREFIX: Final = "agora-replicas-"


@runtime_checkable
class TakesAdapters(Protocol):
    """A backend that adapters can be loaded on while it runs."""

    async def load_adapter(self, ref: AdapterRef, folder: Path) -> Any:
        """Puts an adapter beside the others."""

    async def unload_adapter(self, ref: AdapterRef) -> None:
        """Forgets an adapter."""


class ReplicaAdapters:
    """The adapters of a set of replicas.

    Args:
        name: The set's name, for errors.
    """

    def __init__(self, *, name: str) -> None:
        self._name = name
        self._crew: ReplicaCrew | None = None
        self._held: dict[AdapterRef, Path] = {}
        self._busy = asyncio.Lock()
        self._folder: Path | None = None

    @property
    def held(self) -> tuple[AdapterRef, ...]:
        """Those that are loaded."""
        return tuple(self._held)

    def serve(self, crew: ReplicaCrew) -> None:
        """Says whose adapters they are. The crew itself needs `prepare` when it is made."""
        self._crew = crew

    def _serving(self) -> ReplicaCrew:
        assert self._crew is not None
        return self._crew

    async def aclose(self) -> None:
        """Removes the copies."""
        folder, self._folder = self._folder, None
        if folder is not None:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def load(self, ref: AdapterRef, folder: Path) -> Any:
        """Puts an adapter on all replicas; see `ReplicaSet.load_adapter`."""
        async with self._busy:
            if ref in self._held:
                # Each replica says whether these are the same weights.
                return (await self._everywhere(lambda b: b.load_adapter(ref, folder)))[0]
            copy = await asyncio.to_thread(self._copied, ref, folder)
            try:
                told = await self._everywhere(lambda b: b.load_adapter(ref, copy))
            except AgoraError:
                for r in self._serving().all:
                    if isinstance(r.backend, TakesAdapters):
                        with suppress(AgoraError):  # It did not get that far there.
                            await r.backend.unload_adapter(ref)
                await asyncio.to_thread(shutil.rmtree, copy, ignore_errors=True)
                raise
            self._held[ref] = copy
            return told[0]

    async def unload(self, ref: AdapterRef) -> None:
        """Has all replicas forget an adapter; see `ReplicaSet.unload_adapter`."""
        async with self._busy:
            await self._everywhere(lambda b: b.unload_adapter(ref))
            self._held.pop(ref, None)

    async def _everywhere(self, do: Callable[[TakesAdapters], Awaitable[T]]) -> list[T]:
        """On all replicas. One that cannot be reached gets what it lacks when it can be again."""

        async def on(replica: Replica) -> T:
            backend = replica.backend
            if not isinstance(backend, TakesAdapters):
                raise Unsupported("its replicas take no adapters", backend=self._name)
            return await do(backend)

        crew = self._serving()
        here = list(crew.all)
        if not here:
            raise nobody(self._name, crew)
        results = await asyncio.gather(*(on(r) for r in here), return_exceptions=True)
        done: list[T] = []
        for r, result in zip(here, results, strict=True):
            if isinstance(result, Unavailable):
                r.behind = True
                crew.ails(r, result)
            elif isinstance(result, BaseException):
                raise result
            else:
                done.append(result)
        if not done:
            raise next(e for e in results if isinstance(e, Unavailable))
        return done

    async def prepare(self, replica: Replica) -> None:
        """Loads what the others have on a replica that is new or was away; see `ReplicaCrew`."""
        backend = replica.backend
        async with self._busy:
            for ref, folder in self._held.items():
                if not isinstance(backend, TakesAdapters):
                    raise Unsupported("this replica takes no adapters", backend=self._name)
                await backend.load_adapter(ref, folder)
            replica.behind = False

    def _copied(self, ref: AdapterRef, folder: Path) -> Path:
        """A copy for replicas that are started later, whatever becomes of the folder. Runs in a thread."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        to = self._folder / str(ref)
        try:
            to.mkdir(exist_ok=True)
            # These two alone: whatever else lies there is none of the adapter's.
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copyfile(folder / file, to / file)
        except OSError as e:
            shutil.rmtree(to, ignore_errors=True)
            raise AdapterError(f"adapter {str(ref)!r} cannot be read: {e}", backend=self._name) from None
        return to
