"""The thread that owns the model: it alone runs it, and changes it only between steps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from agora.errors import Unavailable
from experts.engine.batch import Batch
from experts.engine.jobs import Job, closed

T = TypeVar("T")

logger = logging.getLogger(__name__)

Command = Callable[[Batch], None]


class Worker:
    """Runs a batch on a thread of its own.

    Args:
        build: Makes the batch, on the thread.
        name: Of the thread.
        threads: CPU threads of one operation; None for torch's own choice.
    """

    def __init__(self, build: Callable[[], Batch], *, name: str, threads: int | None = None) -> None:
        self.ready: Future[None] = Future()
        """Done when the batch is there, or failed with what `build` raised."""
        self.ended: Future[None] = Future()
        """Done when the thread has let go of the model."""
        self._threads = threads
        self._inbox: SimpleQueue[Command | None] = SimpleQueue()
        # A daemon: a program that forgets to close a backend can still end.
        self._thread = threading.Thread(target=self._run, args=(build,), name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Gives a request to the batch; a closed worker answers with an error."""
        self.call(lambda batch: batch.enqueue(job))

    def call(self, do: Callable[[Batch], T]) -> Future[T]:
        """Has something done between two steps."""
        future: Future[T] = Future()

        def command(batch: Batch) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(do(batch))
            except BaseException as e:
                future.set_exception(e)

        self._inbox.put(command)
        return future

    def stop(self) -> None:
        """Has the thread end all requests and then itself; returns at once."""
        self._inbox.put(None)

    def join(self) -> None:
        """Waits for the thread to end: at once after `ended`."""
        self._thread.join()

    def _run(self, build: Callable[[], Batch]) -> None:
        # Running futures cannot be cancelled by whoever stops waiting for them.
        self.ready.set_running_or_notify_cancel()
        self.ended.set_running_or_notify_cancel()
        try:
            if self._threads is not None:
                torch.set_num_threads(self._threads)
            batch = build()
        except BaseException as e:
            self.ready.set_exception(e)
        else:
            self.ready.set_result(None)
            self._serve(batch)
            del batch
        self.ended.set_result(None)

    def _serve(self, batch: Batch) -> None:
        while self._commands(batch):
            try:
                batch.step()
            except Exception as e:
                # A step handles what can be foreseen. Whatever else happens, nobody waits for ever.
                logger.exception("a step failed beyond its own means")
                batch.abort(_broken(e))
        while not self._inbox.empty():
            if (command := self._inbox.get()) is not None:
                command(batch)
        batch.abort(lambda job: closed(job.name))

    def _commands(self, batch: Batch) -> bool:
        """Runs what is asked, waiting for it if there is nothing else to do; False to stop."""
        try:
            while True:
                command = self._inbox.get(block=not batch.busy)
                if command is None:
                    return False
                command(batch)
        except Empty:
            return True


def _broken(error: Exception) -> Callable[[Job], Unavailable]:
    told = f"the engine failed: {type(error).__name__}: {error}"
    return lambda job: Unavailable(told, backend=job.name)
