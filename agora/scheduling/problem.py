"""What is to be scheduled: tasks that need each other's results, and machines with slots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from types import MappingProxyType
from typing import Any, Final

from agora.errors import InvalidPlan
from agora.scheduling.speed import Speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A piece of work that one machine does.

    Attributes:
        id: Unique in its problem.
        work: Units of work (tokens, say) by kind of machine; a kind that is not there cannot do it.
    """

    id: str
    work: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A result that another task needs first.

    Attributes:
        source: Id of the task that makes it.
        target: Id of the task that needs it.
        size: Bytes.
    """

    source: str
    target: str
    size: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Something that does tasks.

    Attributes:
        name: Unique in its problem.
        kind: What tasks' `work` tells its own units by.
        slots: Most tasks at once; a vLLM server is as many slots as it runs sequences.
        speed: How fast each of them is.
    """

    name: str
    kind: str
    slots: int
    speed: Speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What results move over from one machine to another.

    Attributes:
        latency_s: Seconds before the first byte.
        bytes_per_s: Speed after that; infinite for no matter.
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf


NO_WIRE: Final = Wire()
"""Between machines of which nothing is said: at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Tasks, what they need of each other, and who can do them.

    Attributes:
        tasks: At least one.
        flows: At most one from a task to another.
        machines: At least one.
        wires: Between two machines, by (from, to); results that stay where they are take no time.
        wire: Between all others.
        by_id: The tasks by their ids.
        by_name: The machines by their names.
        order: Ids of the tasks, each after all that it needs; ties as in `tasks`.
        inputs: Bytes by the task they come from, for each task.
        outputs: Bytes by the task they go to, for each task.
        able: Names of the machines that can do each task.

    Raises:
        InvalidPlan: If a name appears twice or is not known, a number is out of range, the flows make a cycle, or
            nobody can do a task.
    """

    tasks: tuple[Task, ...]
    flows: tuple[Flow, ...] = ()
    machines: tuple[Machine, ...]
    wires: Mapping[tuple[str, str], Wire] = field(default_factory=dict)
    wire: Wire = NO_WIRE
    by_id: Mapping[str, Task] = field(init=False, repr=False, compare=False)
    by_name: Mapping[str, Machine] = field(init=False, repr=False, compare=False)
    order: tuple[str, ...] = field(init=False, repr=False, compare=False)
    inputs: Mapping[str, Mapping[str, float]] = field(init=False, repr=False, compare=False)
    outputs: Mapping[str, Mapping[str, float]] = field(init=False, repr=False, compare=False)
    able: Mapping[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_id = {t.id: t for t in self.tasks}
        by_name = {m.name: m for m in self.machines}
        if not by_id or not by_name or len(by_id) < len(self.tasks) or len(by_name) < len(self.machines):
            raise InvalidPlan("a problem needs tasks and machines, each with a name of its own")
        for m in self.machines:
            if m.slots < 1:
                raise InvalidPlan(f"machine {m.name!r} has {m.slots} slots; it needs at least 1")
        for pair, wire in ((("any", "other"), self.wire), *self.wires.items()):
            if not (wire.latency_s >= 0 and math.isfinite(wire.latency_s) and wire.bytes_per_s > 0):
                raise InvalidPlan(
                    f"the wire from {pair[0]} to {pair[1]} has {wire.latency_s} s latency and {wire.bytes_per_s} B/s;"
                    " needed: latency ≥ 0, speed > 0",
                    hint="leave a machine that cannot be reached out",
                )
        inputs: dict[str, dict[str, float]] = {i: {} for i in by_id}
        outputs: dict[str, dict[str, float]] = {i: {} for i in by_id}
        for flow in self.flows:
            if unknown := [i for i in (flow.source, flow.target) if i not in by_id]:
                raise InvalidPlan(f"the flow {flow.source!r} → {flow.target!r} names unknown tasks {unknown}")
            if not (flow.size >= 0 and math.isfinite(flow.size)):
                raise InvalidPlan(f"the flow {flow.source!r} → {flow.target!r} has {flow.size} bytes; needed: ≥ 0")
            inputs[flow.target][flow.source] = flow.size
            outputs[flow.source][flow.target] = flow.size
        try:
            order = tuple(TopologicalSorter(inputs).static_order())
        except CycleError as e:
            raise InvalidPlan(f"the tasks need each other in a circle: {' → '.join(e.args[1])}") from None
        able = {}
        for t in self.tasks:
            for kind, work in t.work.items():
                if not (work >= 0 and math.isfinite(work)):
                    raise InvalidPlan(f"task {t.id!r} has {work} units of work for {kind!r}; needed: a number ≥ 0")
            able[t.id] = tuple(m.name for m in self.machines if m.kind in t.work)
            if not able[t.id]:
                raise InvalidPlan(f"no machine can do task {t.id!r}: it has work for {sorted(t.work)} only")
        derived: dict[str, Mapping[str, Any]] = {
            "by_id": by_id,
            "by_name": by_name,
            "inputs": inputs,
            "outputs": outputs,
            "able": able,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, MappingProxyType(value))
        object.__setattr__(self, "order", order)

    def work(self, task: str, machine: str) -> float:
        """Units of work that a task is on a machine that can do it."""
        return self.by_id[task].work[self.by_name[machine].kind]

    def seconds(self, task: str, machine: str, at_once: int = 1) -> float:
        """Seconds that a task takes there among so many."""
        return self.work(task, machine) * self.by_name[machine].speed.seconds(at_once)

    def transfer_s(self, source: str, target: str, size: float) -> float:
        """Seconds until a result of that many bytes is there."""
        if source == target:
            return 0.0
        wire = self.wires.get((source, target), self.wire)
        return wire.latency_s + size / wire.bytes_per_s
