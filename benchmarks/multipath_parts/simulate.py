"""Plays a stream of jobs over two radios whose bandwidth follows a trace, event by event."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from agora.network.jobs import Observation
from agora.network.path import Path, Technology
from agora.network.traces import Trace
from benchmarks.multipath_parts.policies import Policy
from benchmarks.multipath_parts.traces import FIRST_SHARE, FIRST_TOKEN_BYTES, GIVE_UP_S, Asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How a job ended.

    Attributes:
        at: When it came up.
        seconds: From then to the answer, at most `GIVE_UP_S`.
        late: Whether that was after its deadline.
        took: The radio that it was first sent on.
        hedged: The radio that a second copy was sent on.
    """

    at: float
    seconds: float
    late: bool
    took: Technology
    hedged: Technology | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What a policy made of a trace: its jobs, its money, and how many second copies it sent."""

    done: tuple[Done, ...]
    money: float
    copies: int

    @property
    def late(self) -> int:
        """Jobs that were late."""
        return sum(d.late for d in self.done)


@dataclass(eq=False, slots=True)
class _Copy:
    """One copy of a job on one radio."""

    of: _Open
    tech: Technology
    sent_at: float
    up_from: float = math.inf
    up_s: float = math.inf
    first_token_s: float | None = None
    ended: bool = False


@dataclass(eq=False, slots=True)
class _Open:
    """A job under way."""

    asked: Asked
    copies: list[_Copy] = field(default_factory=list)
    done: Done | None = None


class Simulation:
    """One policy on one recording.

    A radio sends one upload after another, each as fast as the trace lets it. An answer is so small that it only
    waits where the radio is dead. What is broken off is paid for as far as it was sent.

    Args:
        traces: Bandwidth by radio.
        paths: The paths, for observations and prices.
        policy: What decides.
    """

    def __init__(self, traces: Mapping[Technology, Trace], paths: Mapping[Technology, Path], policy: Policy) -> None:
        self._traces = traces
        self._queues: dict[Technology, list[_Copy]] = {tech: [] for tech in traces}
        self._paths = paths
        self._policy = policy
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self._now = 0.0
        self._money = 0.0
        self._copies = 0

    def run(self, jobs: Sequence[Asked]) -> Played:
        """Plays all jobs to their ends."""
        opened = [_Open(asked=asked) for asked in jobs]
        for one in opened:
            self._at(one.asked.at, partial(self._begin, one))
        while self._events:
            self._now, _, happens = heapq.heappop(self._events)
            happens()
        done = tuple(one.done for one in opened if one.done is not None)
        return Played(done=done, money=self._money, copies=self._copies)

    def _at(self, when: float, what: Callable[[], None]) -> None:
        if math.isfinite(when):
            self._order += 1
            heapq.heappush(self._events, (when, self._order, what))

    def _begin(self, one: _Open) -> None:
        running = {tech: len(queue) for tech, queue in self._queues.items()}
        self._send(one, self._policy.choose(one.asked, self._now, running))
        self._at(one.asked.at + GIVE_UP_S, partial(self._finish, one))
        if (late_in_s := self._policy.late_in_s(one.asked)) is not None:
            self._at(self._now + late_in_s, partial(self._late, one))

    def _late(self, one: _Open) -> None:
        if one.done is None and one.copies[0].first_token_s is None:
            tech = self._policy.hedge(one.asked, self._now)
            if tech is not None:
                self._copies += 1
                self._send(one, tech)

    def _send(self, one: _Open, tech: Technology) -> None:
        copy = _Copy(of=one, tech=tech, sent_at=self._now)
        one.copies.append(copy)
        self._queues[tech].append(copy)
        if len(self._queues[tech]) == 1:
            self._upload(copy)

    def _upload(self, copy: _Copy) -> None:
        copy.up_from = self._now
        copy.up_s = self._traces[copy.tech].transfer_s(self._now, copy.of.asked.job.up_bytes)
        self._at(self._now + copy.up_s, partial(self._uploaded, copy))

    def _uploaded(self, copy: _Copy) -> None:
        if copy.ended:
            return
        self._leave(copy)
        asked, trace = copy.of.asked, self._traces[copy.tech]
        half = asked.rtt_s[copy.tech] / 2
        begun = self._now + half + FIRST_SHARE * asked.server_s
        self._at(begun + half + trace.transfer_s(begun, FIRST_TOKEN_BYTES), partial(self._first_token, copy))
        computed = self._now + half + asked.server_s
        self._at(computed + half + trace.transfer_s(computed, asked.job.down_bytes), partial(self._answered, copy))

    def _leave(self, copy: _Copy) -> None:
        """It is off the air: the next one begins."""
        queue = self._queues[copy.tech]
        if copy in queue:
            was_first = queue[0] is copy
            queue.remove(copy)
            if was_first and queue:
                self._upload(queue[0])

    def _first_token(self, copy: _Copy) -> None:
        if not copy.ended:
            copy.first_token_s = self._now - copy.sent_at
            if copy is copy.of.copies[0]:
                self._policy.first_token(copy.of.asked, self._now)

    def _answered(self, copy: _Copy) -> None:
        if not copy.ended:
            self._end(copy, ok=True)
            self._finish(copy.of)

    def _finish(self, one: _Open) -> None:
        """It has its answer, or nobody waits for one any more."""
        if one.done is not None:
            return
        asked, given_up = one.asked, not any(copy.ended for copy in one.copies)
        seconds = self._now - asked.at
        one.done = Done(
            at=asked.at,
            seconds=seconds,
            late=seconds > (asked.job.deadline_s or math.inf),
            took=one.copies[0].tech,
            hedged=one.copies[1].tech if len(one.copies) > 1 else None,
        )
        for copy in one.copies:
            if not copy.ended:
                self._end(copy, ok=False, cancelled=not given_up)
        self._policy.gone(asked, self._now)

    def _end(self, copy: _Copy, *, ok: bool, cancelled: bool = False) -> None:
        copy.ended = True
        job, path = copy.of.asked.job, self._paths[copy.tech]
        up = float(job.up_bytes) if ok else self._sent_bytes(copy)
        down = job.down_bytes if ok else 0
        self._money += (up + down) / 1e6 * path.price_per_mb
        self._leave(copy)
        started = math.isfinite(copy.up_from) and self._now > copy.up_from
        self._policy.observe(
            Observation(
                path=path,
                at=self._now,
                ok=ok,
                cancelled=cancelled,
                up_bytes=round(up),
                down_bytes=down,
                prompt_tokens=job.prompt_tokens,
                completion_tokens=job.completion_tokens if ok else 0,
                first_token_s=copy.first_token_s,
                total_s=self._now - copy.sent_at,
                up_s=min(self._now - copy.up_from, copy.up_s) if started else None,
            )
        )

    def _sent_bytes(self, copy: _Copy) -> float:
        size = float(copy.of.asked.job.up_bytes)
        if not math.isfinite(copy.up_from):
            return 0.0
        if self._now >= copy.up_from + copy.up_s:
            return size
        return min(self._traces[copy.tech].moved(copy.up_from, self._now), size)
