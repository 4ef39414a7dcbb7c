"""The running batch: who joins, what each step computes, and where the results go."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch
from torch import Tensor

from agora.errors import AdapterError, AgoraError, Unavailable
from experts.adapters import LoadedAdapter
from experts.engine.cache import LANE_TOKENS, SlotCache
from experts.engine.jobs import Event, GenerateJob, Job, Marks, Outbox, Piece, ScoreJob
from experts.engine.layout import arrange
from experts.engine.loading import LoadedModel
from experts.engine.pace import Pace
from experts.engine.rows import GenerateRow, Part, Row, ScoreRow
from experts.engine.sampling import choose

PREFILL_TOKENS: Final[Mapping[str, int]] = {"cpu": 128, "cuda": 2048}
"""Prompt tokens read in one step, by device, shared by all rows that are reading. While a step lasts, the rows that are
decoding wait. On 2 CPU cores 128 tokens of a 135M model take 210 ms, a decode step of 16 rows 61 ms, and chunks of 512
read no faster (610 tokens/s); 2048 is vLLM's choice for GPUs."""

logger = logging.getLogger(__name__)


class Batch:
    """Rows decoding together. Lives on the worker thread.

    Args:
        loaded: The model.
        max_rows: Most requests at once; urgent ones come on top.
        max_bytes: Memory for keys and values; a request waits until its share is free, or it is alone.
        outbox: Where events go.
        pace: Where it is noted how fast requests end.
        prefill_tokens: Prompt tokens read in one step; None for `PREFILL_TOKENS` of the device.
        lane_tokens: Tokens a row of the cache's smallest lane holds.
        clock: Seconds, for measuring.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_rows: int,
        max_bytes: int,
        outbox: Outbox,
        pace: Pace | None = None,
        prefill_tokens: int | None = None,
        lane_tokens: int = LANE_TOKENS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.facts = loaded.facts
        self._runner = loaded.runner
        self._adapters: set[str] = set()
        self._cache = SlotCache(loaded.runner.shape, lane_tokens=lane_tokens)
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        device = loaded.runner.shape.device.type
        self._prefill = prefill_tokens or PREFILL_TOKENS.get(device, PREFILL_TOKENS["cuda"])
        self._outbox = outbox
        self._pace = Pace() if pace is None else pace
        self._clock = clock
        self._waiting: deque[Job] = deque()
        self._rows: list[Row] = []

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._rows or self._waiting)

    def enqueue(self, job: Job) -> None:
        """Takes a request; it joins in its turn."""
        if job.urgent:
            self._waiting.appendleft(job)
        else:
            self._waiting.append(job)

    def add_adapter(self, name: str, adapter: LoadedAdapter) -> None:
        """Puts an adapter on the model; rows that run do not use it and do not change.

        Raises:
            AdapterError: If peft refuses it.
        """
        try:
            self._runner.adapters.add(name, adapter)
        except Exception as e:
            raise AdapterError(f"the adapter cannot be put on the model: {_told(e)}") from e
        self._adapters.add(name)

    def remove_adapter(self, name: str) -> None:
        """Takes an adapter off the model; requests that still want it fail."""
        self.sweep()
        for row in [r for r in self._rows if r.job.adapter == name]:
            self._end(row, AdapterError("the adapter has been unloaded", backend=row.job.name))
        self._adapters.discard(name)
        self._runner.adapters.remove(name)

    def sweep(self) -> None:
        """Frees the rows of cancelled requests and forgets those that wait."""
        for row in [r for r in self._rows if r.job.cancelled]:
            self._leave(row)
        if any(j.cancelled for j in self._waiting):
            self._waiting = deque(j for j in self._waiting if not j.cancelled)

    def abort(self, error: Callable[[Job], AgoraError]) -> None:
        """Ends all requests with an error."""
        for row in self._rows[:]:
            self._end(row, error(row.job))
        for job in self._waiting:
            self._outbox.post(job, error(job))
        self._waiting.clear()
        self._outbox.flush()

    def step(self) -> None:
        """Lets requests in, computes one forward pass, and hands out the results.

        Never raises: what goes wrong ends the requests that took part, with an error that says so.
        """
        self.sweep()
        self._admit()
        work: list[tuple[Row, Part]] = []
        try:
            work = [(row, row.part(count)) for row, count in self._share() if self._has_room(row, count)]
            if work:
                with torch.inference_mode():
                    self._advance(work)
        except Exception as e:
            logger.exception("a step of %d rows failed", len(work))
            took_part = {row for row, _ in work} or set(self._rows)
            for row in [r for r in self._rows if r in took_part]:
                self._end(row, self._failed(row.job, len(took_part), e))
        self._outbox.flush()

    # -- Who takes part

    def _admit(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            if not job.urgent and (len(self._rows) >= self._max_rows or not self._fits(job)):
                return
            self._waiting.popleft()
            job.started = True
            if job.adapter is not None and job.adapter not in self._adapters:
                self._outbox.post(job, AdapterError("the adapter has been unloaded", backend=job.name))
                continue
            try:
                self._rows.append(self._row(job))
            except Exception as e:
                logger.exception("a request could not join the batch")
                self._outbox.post(job, self._failed(job, 1, e))

    def _fits(self, job: Job) -> bool:
        taken = sum(self._cache.cost(row.job.most_tokens) for row in self._rows)
        return not self._rows or taken + self._cache.cost(job.most_tokens) <= self._max_bytes

    def _row(self, job: Job) -> Row:
        place = self._cache.open(len(job.prompt))
        try:
            if isinstance(job, GenerateJob):
                return GenerateRow(job, place, self.facts)
            assert isinstance(job, ScoreJob)
            return ScoreRow(job, place)
        except Exception:
            self._cache.close(place)
            raise

    def _share(self) -> list[tuple[Row, int]]:
        """How many tokens of each row take part in this step.

        One of each row that is decoding. The rows that are reading share the rest evenly, and what a short one leaves
        goes to the longer ones (max-min fairness), so a long prompt delays a short one by at most a factor of the
        number of readers. If there are more readers than tokens, the first come are served.
        """
        counts = {row: 1 for row in self._rows if row.pending == 1}
        readers = [row for row in self._rows if row.pending > 1][: self._prefill]
        left = self._prefill
        for n, row in enumerate(sorted(readers, key=lambda r: r.pending)):
            counts[row] = min(row.pending, left // (len(readers) - n))
            left -= counts[row]
        return [(row, counts[row]) for row in self._rows if row in counts]

    def _has_room(self, row: Row, count: int) -> bool:
        """Makes room for a row's next tokens; where there is none, only this row ends."""
        try:
            self._cache.reserve(row.place, row.place.length + count)
        except Exception as e:
            logger.exception("no room for %d tokens more", count)
            self._end(row, self._failed(row.job, 1, e))
            return False
        return True

    # -- One pass

    def _advance(self, work: list[tuple[Row, Part]]) -> None:
        layout = arrange(self._cache, work)
        logits = self._runner.forward(
            layout.tokens,
            layout.positions,
            layout.step,
            # A step in which every row is in the middle of its prompt needs no logits; one is computed all the same.
            layout.keep or [0],
            layout.adapters if self._adapters else (),
        )
        for seat in layout.seats:
            seat.row.place.length += len(seat.part.tokens)
        chosen: list[tuple[GenerateRow, int]] = []
        for seat in layout.seats:
            if isinstance(seat.row, ScoreRow):
                self._score(seat.row, logits[seat.first : seat.last], seat.part)
            elif seat.last > seat.first:
                chosen.append((seat.row, seat.first))
        if chosen:
            self._generate(chosen, logits)

    def _score(self, row: ScoreRow, logits: Tensor, part: Part) -> None:
        start = row.place.length - len(part.tokens)
        self._take(row, lambda: row.take(logits, [start + k for k in part.keep]))

    def _generate(self, rows: list[tuple[GenerateRow, int]], logits: Tensor) -> None:
        choices = choose(logits[[at for _, at in rows]], [row.wish for row, _ in rows])
        now = self._clock()
        for (row, _), choice in zip(rows, choices, strict=True):
            self._take(row, partial(row.take, choice, now))

    def _take(self, row: Row, take: Callable[[], Piece | Marks | None]) -> None:
        """Gives a row its results; what goes wrong with them is that row's failure only."""
        try:
            event = take()
        except Exception as e:
            if not isinstance(e, AgoraError):
                logger.exception("the results of a row could not be taken")
            self._end(row, self._failed(row.job, 1, e))
            return
        if isinstance(event, Piece) and event.finish_reason is None:
            self._outbox.post(row.job, event)
        elif event is not None:
            self._end(row, event)

    # -- Ends

    def _end(self, row: Row, event: Event) -> None:
        self._outbox.post(row.job, event)
        self._leave(row)
        self._pace.ended(self._clock(), others_wait=bool(self._waiting))

    def _leave(self, row: Row) -> None:
        self._rows.remove(row)
        self._cache.close(row.place)

    @staticmethod
    def _failed(job: Job, rows: int, error: Exception) -> AgoraError:
        if isinstance(error, AgoraError):
            return error
        return Unavailable(
            f"the model failed in a step of {rows} requests: {_told(error)}",
            backend=job.name,
            hint="ask again; if it was out of memory, lower max_batch or ask for less",
        )


def _told(error: Exception) -> str:
    """An error of a library in one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"
