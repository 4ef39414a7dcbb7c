"""Who decides on which radio a job goes: always the same one, agora, or somebody who sees the future."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Final, Protocol

from agora.network.choice import Chooser
from agora.network.estimates import Estimates
from agora.network.hedge import Hedging, Sent
from agora.network.jobs import Observation
from agora.network.path import Path, Technology
from agora.network.traces import Trace
from benchmarks.multipath_parts.traces import Asked

SECONDS_PER_DOLLAR: Final = 100.0
"""β: a second of waiting is worth a cent. Set before anything was measured."""


class Policy(Protocol):
    """Decides where jobs go, told only what a device would see. A job is known by its time, `asked.at`."""

    def choose(self, asked: Asked, now: float, running: Mapping[Technology, int]) -> Technology:
        """On which radio to send a job; `running` are the jobs under way, by radio."""

    def late_in_s(self, asked: Asked) -> float | None:
        """Seconds after which to think about a second copy of a job just sent; None for never."""

    def hedge(self, asked: Asked, now: float) -> Technology | None:
        """Where to send a second copy, the first one having no token yet; None for nowhere."""

    def first_token(self, asked: Asked, now: float) -> None:
        """Told of the first token of a job's first copy."""

    def gone(self, asked: Asked, now: float) -> None:
        """Told that a job is over."""

    def observe(self, seen: Observation) -> None:
        """Told of every copy that ended."""


class Static:
    """Always the same radio.

    Args:
        tech: Which.
    """

    def __init__(self, tech: Technology) -> None:
        self._tech = tech

    def choose(self, asked: Asked, now: float, running: Mapping[Technology, int]) -> Technology:
        return self._tech

    def late_in_s(self, asked: Asked) -> float | None:
        return None

    def hedge(self, asked: Asked, now: float) -> Technology | None:
        return None

    def first_token(self, asked: Asked, now: float) -> None:
        pass

    def gone(self, asked: Asked, now: float) -> None:
        pass

    def observe(self, seen: Observation) -> None:
        pass


class Oracle(Static):
    """Sees the future: of the radios on which a job will be in time that with the least time + β·money.

    If it will be in time on none, the quickest.
    It sends no second copies, and looks at one job at a time: not the best there could be, but close to it.

    Args:
        traces: The bandwidths, past and future.
        paths: What the radios cost.
    """

    def __init__(self, traces: Mapping[Technology, Trace], paths: Mapping[Technology, Path]) -> None:
        super().__init__(Technology.NR)
        self._traces = traces
        self._paths = paths
        self._free = dict.fromkeys(traces, -math.inf)

    def choose(self, asked: Asked, now: float, running: Mapping[Technology, int]) -> Technology:
        sent = {t: max(now, self._free[t]) for t in self._traces}
        sent = {t: at + self._traces[t].transfer_s(at, asked.job.up_bytes) for t, at in sent.items()}
        took = {t: self._answered(asked, t, at) - now for t, at in sent.items()}

        def badness(tech: Technology) -> tuple[bool, float]:
            late = took[tech] > (asked.job.deadline_s or math.inf)
            return late, took[tech] + (0.0 if late else SECONDS_PER_DOLLAR * asked.job.money(self._paths[tech]))

        best = min(took, key=badness)
        self._free[best] = sent[best]
        return best

    def _answered(self, asked: Asked, tech: Technology, sent: float) -> float:
        if not math.isfinite(sent):
            return math.inf
        computed = sent + asked.rtt_s[tech] / 2 + asked.server_s
        return computed + asked.rtt_s[tech] / 2 + self._traces[tech].transfer_s(computed, asked.job.down_bytes)


class Agora:
    """agora's own estimates, choice and hedging with their defaults, told only of what it sent itself: no probes.

    Args:
        paths: The paths, as configured.
        seed: Of its chance.
    """

    def __init__(self, paths: Mapping[Technology, Path], *, seed: int) -> None:
        self._paths = paths
        self._tech = {path.name: tech for tech, path in paths.items()}
        self._now = 0.0
        self._estimates = Estimates(lambda: self._now)
        self._chooser = Chooser(lambda: self._now, seconds_per_money=SECONDS_PER_DOLLAR)
        self._hedging = Hedging(clock=lambda: self._now)
        self._sent: dict[float, Sent] = {}
        self._rng = random.Random(seed)

    def choose(self, asked: Asked, now: float, running: Mapping[Technology, int]) -> Technology:
        self._now = now
        candidates = [
            (path, self._estimates.expect(path, asked.job, running=running[tech])) for tech, path in self._paths.items()
        ]
        counts = {self._paths[tech].name: n for tech, n in running.items()}
        choice = self._chooser.choose(candidates, asked.job, running=counts, rng=self._rng)
        late_after_s = next(e for path, e in candidates if path is choice.path).first_token_p95_s
        self._hedging.bucket.fill()
        self._sent[asked.at] = self._hedging.sent(choice.path.name, late_after_s)
        return self._tech[choice.path.name]

    def late_in_s(self, asked: Asked) -> float | None:
        return self._hedging.late_in_s(self._sent[asked.at])

    def hedge(self, asked: Asked, now: float) -> Technology | None:
        self._now = now
        sent = self._sent[asked.at]
        others = [path for path in self._paths.values() if path.name != sent.path]
        if self._hedging.correlated(sent) or not self._hedging.bucket.take_now():
            return None
        return self._tech[min(others, key=lambda path: self._estimates.expect(path, asked.job).seconds).name]

    def first_token(self, asked: Asked, now: float) -> None:
        self._now = now
        self._hedging.first_token(self._sent[asked.at])

    def gone(self, asked: Asked, now: float) -> None:
        self._now = now
        self._hedging.gone(self._sent.pop(asked.at))

    def observe(self, seen: Observation) -> None:
        self._now = seen.at
        self._estimates.observe(seen)
