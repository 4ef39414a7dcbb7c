"""An aggregator as a client of the level above: what it took from there, what it has learned since, what it sends.

**What goes up** is the change of its adapter since what it last sent or took, weighted by the examples behind it, as in
hierarchical federated averaging (Liu et al. 2020, "Client-Edge-Cloud Hierarchical Federated Learning", arXiv
1905.06641), where an edge averages κ₂ times (`every`) between two averages of the cloud.

**What comes down** is taken in when the aggregator makes its next version. There, in that paper, an edge waits for the
cloud. Here nobody waits: the aggregator goes on with its own clients while its update and the next version from above
travel, and the version it then makes is

    W ← W + (V′ − V) − Σ own updates that are in V′

with V the version from above on which W rests and V′ the new one: V′, and on top of it all that the aggregator has
learned and V′ does not hold yet. Learning on while averages are under way, and replacing only one's own part when they
come, is delayed gradient averaging (Zhu et al. 2021, NeurIPS, "Delayed Gradient Averaging: Tolerate the Communication
Latency for Federated Learning"), one level up; asynchronous hierarchies weigh late updates by staleness at each level
(Wang and Wang 2022, arXiv 2206.00054), as the level above does here anyway. Taking it in between two versions, never
within one, keeps versions immutable: jobs under way go on from the version they were given, and what they bring is a
change, that fits on the next as well.

LoRA adapters are added as products where the rule does so, and cut to the rank of the rule; what the cut leaves out of
an update stays unsent and goes with the next one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fed.adapter import Adapter, Spec
from fed.aggregate.product import ProductRule
from fed.aggregate.rule import Base, State
from fed.aggregate.terms import at
from fed.hierarchy.gate import Part
from fed.hierarchy.mix import aligned
from fed.state import job_from_json, job_to_json
from fed.words import Job, Trained


@dataclass(slots=True)
class Share:
    """What a child has behind an update: examples, devices, and the mean loss of its devices, if told."""

    examples: int
    devices: int
    loss: float | None


@dataclass(slots=True, eq=False)
class Sent:
    """An update that the level above has accepted and this aggregator still has in its adapter as its own.

    Attributes:
        job: Whose.
        start: What it was sent as a change of.
        end: What it ends at.
        version: The first version above that holds it; None while none does.
    """

    job: int
    start: Adapter
    end: Adapter
    version: int | None = None


@dataclass(slots=True, eq=False)
class Outgoing:
    """An update on its way up; without numbers where only counts may be seen."""

    job: int
    start: Adapter
    end: Adapter | None
    made: int
    shares: dict[str, Share]


@dataclass(slots=True, eq=False)
class Above:
    """See the module.

    Attributes:
        base: The version from above that the aggregator's adapter rests on.
        every: Own versions between two updates.
        behind: Devices that must have had part in one.
        blind: Whether the level above sees counts alone; then no numbers go either way.
        version: Number of `base`.
        have: Number of the newest version that has come.
        offered: That version, until it is taken in.
        order: The job that the level above gave, and what it starts from.
        made: Own versions since the last update.
        shares: What is behind them, by child.
        out: The update on its way.
        sent: Those accepted that are part of this aggregator's adapter besides `base`.
    """

    base: Adapter
    every: int
    behind: int
    blind: bool
    version: int = 0
    have: int = -1
    offered: Adapter | None = None
    order: tuple[Job, Adapter] | None = None
    made: int = 0
    shares: dict[str, Share] = field(default_factory=dict)
    out: Outgoing | None = None
    sent: list[Sent] = field(default_factory=list)

    # Down.

    def ordered(self, job: Job, start: Adapter) -> None:
        """The level above gave a job, and sent the version it starts from."""
        self.order = (job, start)
        self.have = job.version
        if not self.blind and job.version > self.version:
            self.offered = start

    def taking(self) -> list[tuple[float, Adapter]]:
        """By what the aggregator's adapter is to move to take in what was offered; nothing if nothing was."""
        if self.offered is None:
            return []
        parts = [(1.0, self.offered), (-1.0, self.base)]
        for sent in self.sent:
            if self._held(sent):
                parts += [(-1.0, sent.end), (1.0, sent.start)]
        return parts

    def taken(self) -> None:
        """It has moved."""
        assert self.offered is not None
        self.sent = [sent for sent in self.sent if not self._held(sent)]
        self.base, self.version, self.offered = self.offered, self.have, None

    def _held(self, sent: Sent) -> bool:
        return sent.version is not None and sent.version <= self.have

    # What this aggregator makes.

    def grew(self, parts: Iterable[Part]) -> None:
        """It made a version of these updates."""
        self.made += 1
        for part in parts:
            self._add(part.child, Share(part.examples, part.devices, part.loss))

    def _add(self, child: str, share: Share) -> None:
        before = self.shares.get(child)
        devices = share.devices if before is None else max(share.devices, before.devices)
        self.shares[child] = Share(share.examples, devices, share.loss)

    # Up.

    @property
    def devices(self) -> int:
        """Devices that had part in what is not sent yet; one that moved from child to child counts at both."""
        return sum(share.devices for share in self.shares.values())

    @property
    def ready(self) -> bool:
        """Whether an update is to be sent now."""
        waiting = self.order is not None and self.out is None
        return waiting and bool(self.shares) and self.made >= self.every and self.devices >= self.behind

    def pack(self, rule: Base) -> Job:
        """Makes the update of the job that was ordered.

        Raises:
            AdapterError: If it would hold NaN.
        """
        assert self.order is not None
        job, start = self.order
        end = None if self.blind else self._end(rule, start)
        self.out = Outgoing(job.id, start, end, self.made, self.shares)
        self.made, self.shares = 0, {}
        return job

    def _end(self, rule: Base, start: Adapter) -> Adapter:
        parts = [(1.0, rule.current)]
        if start is not self.base and not np.array_equal(start.flat, self.base.flat):
            parts += [(1.0, start), (-1.0, self.base)]
        for sent in self.sent:
            parts += [(-1.0, sent.end), (1.0, sent.start)]
        one = len(parts) == 1 and rule.current.spec == start.spec
        end = rule.current if one else rule.combined(parts, start.spec.rank)
        return aligned(end, start) if isinstance(rule, ProductRule) else end

    def trained(self, job: Job) -> Trained:
        """What the level above gets for a job."""
        out = self.out
        assert out is not None and out.job == job.id
        delta = np.zeros(out.start.spec.size, np.float32) if out.end is None else out.end.flat - out.start.flat
        told = [share for share in out.shares.values() if share.loss is not None]
        metrics = {}
        if told and sum(share.devices for share in told) >= self.behind:
            examples = sum(share.examples for share in told)
            metrics["loss"] = sum(share.examples * (share.loss or 0.0) for share in told) / examples
        return Trained(
            delta=delta,
            examples=sum(share.examples for share in out.shares.values()),
            steps=min(out.made, job.steps or out.made),
            metrics=metrics,
        )

    def behind_out(self) -> int:
        """Devices behind the update on its way."""
        assert self.out is not None
        return sum(share.devices for share in self.out.shares.values())

    def ended(self, job: int, *, accepted: bool) -> None:
        """A job is over. What came to nothing is still in the aggregator's adapter, and goes with the next update."""
        if self.order is not None and self.order[0].id == job:
            self.order = None
        out = self.out
        if out is None or out.job != job:
            return
        self.out = None
        if not accepted:
            self.made += out.made
            newer, self.shares = self.shares, out.shares
            for child, share in newer.items():
                self._add(child, share)
        elif out.end is not None:
            self.sent.append(Sent(job, out.start, out.end))

    def included(self, job: int, version: int) -> None:
        """A version above holds an update."""
        for sent in self.sent:
            if sent.job == job:
                sent.version = version

    def dropped(self, job: int) -> None:
        """An update was accepted, but the version above that was to hold it could not be made."""
        self.sent = [sent for sent in self.sent if sent.job != job]

    # To go on later.

    def state(self) -> State:
        """All of it."""
        shelf = _Shelf()
        facts: dict[str, Any] = {
            "base": shelf.put(self.base),
            "version": self.version,
            "have": self.have,
            "offered": None if self.offered is None else shelf.put(self.offered),
            "order": None if self.order is None else [job_to_json(self.order[0]), shelf.put(self.order[1])],
            "made": self.made,
            "shares": _shares_to_json(self.shares),
            "sent": [[s.job, shelf.put(s.start), shelf.put(s.end), s.version] for s in self.sent],
            "out": None,
        }
        if self.out is not None:
            out = self.out
            end = None if out.end is None else shelf.put(out.end)
            facts["out"] = [out.job, shelf.put(out.start), end, out.made, _shares_to_json(out.shares)]
        return State(shelf.arrays, facts)

    def load_state(self, state: State, spec: Spec) -> None:
        """Goes on where `state` was asked for."""
        facts, shelf = state.facts, _Shelf(spec, state.arrays)
        self.base, self.version, self.have = shelf.get(facts["base"]), facts["version"], facts["have"]
        self.offered = None if facts["offered"] is None else shelf.get(facts["offered"])
        self.order = None
        if facts["order"] is not None:
            self.order = (job_from_json(facts["order"][0]), shelf.get(facts["order"][1]))
        self.made, self.shares = facts["made"], _shares_from_json(facts["shares"])
        self.sent = [Sent(job, shelf.get(start), shelf.get(end), v) for job, start, end, v in facts["sent"]]
        self.out = None
        if facts["out"] is not None:
            job, start, end, made, shares = facts["out"]
            to = None if end is None else shelf.get(end)
            self.out = Outgoing(job, shelf.get(start), to, made, _shares_from_json(shares))


class _Shelf:
    """Adapters of one spec at any rank, by place; the same one is there once."""

    def __init__(self, spec: Spec | None = None, arrays: dict[str, Any] | None = None) -> None:
        self._spec = spec
        self.arrays: dict[str, Any] = {} if arrays is None else arrays
        self._places: dict[int, list[Any]] = {}
        self._got: dict[str, Adapter] = {}

    def put(self, adapter: Adapter) -> list[Any]:
        """Its place and rank."""
        if id(adapter) not in self._places:
            place = f"adapter{len(self.arrays)}"
            self.arrays[place] = adapter.flat
            self._places[id(adapter)] = [place, adapter.spec.rank]
        return self._places[id(adapter)]

    def get(self, found: list[Any]) -> Adapter:
        """The adapter at a place."""
        place, rank = found
        if place not in self._got:
            assert self._spec is not None
            self._got[place] = Adapter(at(self._spec, rank), self.arrays[place])
        return self._got[place]


def _shares_to_json(shares: dict[str, Share]) -> list[list[Any]]:
    return [[child, s.examples, s.devices, s.loss] for child, s in shares.items()]


def _shares_from_json(body: list[list[Any]]) -> dict[str, Share]:
    return {child: Share(examples, devices, loss) for child, examples, devices, loss in body}
