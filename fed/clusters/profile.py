"""Clusters by how long a job takes: clients of a cluster then keep pace with each other.

One number a client, the logarithm of its seconds per job by its machine and its link, so that a factor counts alike
everywhere. In one dimension k-means has an exact answer, without draws: clusters are runs of the sorted numbers, and
dynamic programming finds the runs with the least sum of squares (Wang and Song 2011, "Ckmeans.1d.dp", The R Journal
3/2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from agora.errors import ConfigError
from fed.adapter import Adapter
from fed.aggregate.rule import State, positive, share, whole
from fed.clusters.base import Base, Options, needed
from fed.clusters.separate import Labels, silhouette
from fed.simulator.uplink import HEADER_BYTES
from fed.simulator.words import Published
from fed.words import ClientInfo

SIMILAR: Final = 1.5
"""If the slowest job takes at most so many times as long as the fastest, all clients are one cluster: waiting for the
slowest then wastes less than a third of the fastest's time."""

WIDE: Final = 0.5
"""Least mean silhouette of clusters whose number is found out: below, "the structure is weak and could be artificial"
(Kaufman and Rousseeuw 1990, Finding Groups in Data, table 4)."""

MOST: Final = 8
"""Most clusters that are looked for."""

FASTEST_S: Final = 1e-9
"""Seconds a job is taken at, if less: its logarithm is needed."""


def job_seconds(client: ClientInfo, *, steps: int, up_bytes: int, down_bytes: int) -> float:
    """Seconds a client takes for a job, both transfers included, by its profile."""
    p = client.profile
    return steps * p.seconds_per_step + down_bytes / p.down_bytes_per_s + up_bytes / p.up_bytes_per_s + p.round_trip_s


def k_means(numbers: NDArray[np.float64], k: int) -> Labels:
    """The partition of numbers into k clusters with the least sum of squares, exactly; O(k·n²).

    Args:
        numbers: Shape (n,).
        k: Clusters, from 1 to n.

    Returns:
        Clusters from 0, rising with the numbers; fewer than k if there are fewer different numbers.
    """
    order = np.argsort(numbers, kind="stable")
    x = numbers[order] - numbers.mean() if len(numbers) else numbers
    n = len(x)
    once, twice = np.concatenate(([0.0], np.cumsum(x))), np.concatenate(([0.0], np.cumsum(x * x)))
    best = np.full((k + 1, n + 1), np.inf)
    best[0, 0] = 0.0
    cut = np.zeros((k + 1, n + 1), np.intp)
    for clusters in range(1, k + 1):
        for end in range(clusters, n + 1):
            start = np.arange(clusters - 1, end)
            sums = once[end] - once[start]
            costs = best[clusters - 1, start] + (twice[end] - twice[start]) - sums * sums / (end - start)
            at = int(np.argmin(costs))
            best[clusters, end], cut[clusters, end] = costs[at], start[at]
    labels = np.empty(n, np.intp)
    end = n
    for clusters in range(k, 0, -1):
        labels[order[cut[clusters, end] : end]] = clusters - 1
        end = int(cut[clusters, end])
    # Equal numbers belong together, also where that leaves a cluster empty.
    _, which = np.unique(numbers, return_inverse=True)
    first = np.full(which.max(initial=-1) + 1, k)
    np.minimum.at(first, which, labels)
    return np.asarray(np.unique(first[which], return_inverse=True)[1], np.intp)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions(Options):
    """Of the grouping `profile`.

    Attributes:
        steps: Local steps of a job, for the time it takes.
        similar: See `SIMILAR`.
        wide: See `WIDE`.
        enough: Share of the clients that must have joined before they are grouped.
        wait: Versions after which they are grouped without the rest.
    """

    steps: int = 1
    similar: float = SIMILAR
    wide: float = WIDE
    enough: float = 1.0
    wait: int = 10

    def __post_init__(self) -> None:
        super(ProfileOptions, self).__post_init__()
        whole("steps", self.steps, least=1)
        whole("wait", self.wait, least=1)
        positive("similar", self.similar)
        share("wide", self.wide, whole_too=True)
        positive("enough", self.enough)
        share("enough", self.enough, whole_too=True)


class ByProfile(Base):
    """See the module. Takes what `fed.clusters.base.Base` takes, with one first version.

    All begin with one model; clusters are made with its first version. With `every`, they are made again that often, by
    what clients told of themselves when they last joined.
    """

    name = "profile"
    options_type: ClassVar[type[Options]] = ProfileOptions

    def __init__(self, initial: Adapter | Mapping[str, Adapter], **others: Any) -> None:
        super().__init__(initial, **others)
        self.options: ProfileOptions
        if len(self.newest) > 1:
            raise ConfigError(f"grouping {self.name!r} begins with one model, not {len(self.newest)}")
        self._size = 4 * next(iter(self.newest.values())).spec.size + HEADER_BYTES
        self._centres: dict[str, float] = {}
        self._due = 0

    def _told(self, client: ClientInfo) -> float:
        seconds = job_seconds(client, steps=self.options.steps, up_bytes=self._size, down_bytes=self._size)
        return math.log(max(seconds, FASTEST_S)) if math.isfinite(seconds) else math.log(1e9)

    def _labels(self, told: NDArray[np.float64]) -> Labels:
        o = self.options
        if o.clusters is not None:
            return k_means(told, min(o.clusters, len(told)))
        best, widest = np.zeros(len(told), np.intp), o.wide
        if not len(told) or np.ptp(told) <= math.log(o.similar):
            return best
        apart = np.abs(told[:, None] - told[None, :])
        for k in range(2, min(MOST, len(told) - 1) + 1):
            labels = k_means(told, k)
            width = silhouette(apart, labels)
            if width > widest:
                best, widest = labels, width
        return best

    def _place(self, client: ClientInfo) -> str:
        if not self._centres:
            return self.home
        told = self._told(client)
        return min(sorted(self._centres), key=lambda name: abs(self._centres[name] - told))

    def _decide(self, published: Published) -> tuple[dict[str, str], dict[str, Adapter]]:
        o, there = self.options, sorted(self.members)
        if self._centres and (o.every is None or self.versions < self._due):
            return {}, {}
        enough = len(there) >= needed(o.enough, self.clients)
        if not self._centres and not (enough or (self.versions >= o.wait and len(there) >= (o.clusters or 1))):
            return {}, {}
        self._due = self.versions + (o.every or 0)
        told = np.array([self._told(self.infos[c]) for c in there])
        labels = self._labels(told)
        count = int(labels.max()) + 1
        if count < 2 and not self._centres:
            self._centres = {self.home: float(told.mean())}
            return {}, {}
        groups = [[c for c, i in zip(there, labels, strict=True) if i == n] for n in range(count)]
        before = {c: m for c, m in self.members.items() if m != self.home or m in self._centres}
        models, starts = self._named(groups, before)
        self._centres = {models[group[0]]: float(told[labels == n].mean()) for n, group in enumerate(groups)}
        return models, starts

    def _kept(self) -> set[str]:
        return set(self._centres)

    def _save(self, state: State) -> None:
        state.facts.update(centres=self._centres, due=self._due)

    def _load(self, state: State) -> None:
        self._centres = {name: float(at) for name, at in state.facts["centres"].items()}
        self._due = int(state.facts["due"])
