"""Random scheduling problems: task graphs of three families on machines of three tiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import numpy as np

from agora.scheduling.problem import Flow, Machine, Problem, Task, Wire
from agora.scheduling.speed import Speed

Rng = np.random.Generator
Edges = list[tuple[int, int]]

TOKENS_MEDIAN: Final = 120.0
"""Tokens of an answer, median: half of a usual limit of 256."""

TOKENS_SIGMA: Final = 0.6
"""Standard deviation of their logarithm: nine of ten between 45 and 320."""

BYTES_MEDIAN: Final = 2e3
"""Bytes of a result that goes on, median: an answer of 120 tokens with what comes with it."""

BYTES_SIGMA: Final = 2.0
"""Standard deviation of their logarithm: now and then a passage or a picture."""

WORDINESS: Final[Mapping[str, tuple[float, float]]] = {"end": (0.6, 1.0), "edge": (0.8, 1.2), "cloud": (1.0, 1.4)}
"""Tokens of an answer by tier, as a share of the usual, from and to: larger models say more."""

SHAPES: Final[tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]] = (
    (84, 3, ((0, 2), (1, 2))),
    (51, 2, ((0, 1),)),
    (18, 3, ((0, 1), (1, 2))),
    (14, 4, ((0, 3), (1, 3), (2, 3))),
    (15, 5, ((0, 4), (1, 4), (2, 4), (3, 4))),
    (13, 6, ((0, 5), (1, 5), (2, 5), (3, 5), (4, 5))),
    (11, 4, ((0, 1), (1, 3), (2, 3))),
    (6, 4, ((0, 3), (1, 2), (2, 3))),
    (3, 5, ((0, 2), (1, 3), (2, 4), (3, 4))),
    (2, 5, ((0, 1), (1, 2), (2, 4), (3, 4))),
    (2, 4, ((0, 1), (0, 2), (1, 3), (2, 3))),
    (2, 1, ()),
    (7, 9, ((0, 8), (1, 8), (2, 8), (3, 8), (4, 8), (5, 8), (6, 8), (7, 8))),
)
"""How people decomposed questions: how often, subtasks, and which needs which. Counted in StrategyQA's dev split (183
questions) and ParallelQA's odd rows (46), shapes that occur once left out; the last is a movie recommendation with
eight titles (see `benchmarks.decomposition`), as often as ParallelQA's rarest."""


def layered(rng: Rng) -> tuple[int, Edges]:
    """Tasks in layers, each needing one to three of earlier layers."""
    count, layers = int(rng.integers(10, 41)), int(rng.integers(2, 8))
    layer = np.sort(rng.integers(0, layers, count))
    edges = []
    for n in range(count):
        earlier = np.flatnonzero(layer < layer[n])
        if len(earlier):
            needs = rng.choice(earlier, size=min(len(earlier), int(rng.integers(1, 4))), replace=False)
            edges += [(int(i), n) for i in needs]
    return count, edges


def fork_join(rng: Rng) -> tuple[int, Edges]:
    """One to three times: a task, branches of one to four tasks each, and a task that joins them."""
    edges: Edges = []
    last, count = 0, 1
    for _ in range(int(rng.integers(1, 4))):
        ends = []
        for _ in range(int(rng.integers(3, 9))):
            before = last
            for _ in range(int(rng.integers(1, 5))):
                edges.append((before, count))
                before, count = count, count + 1
            ends.append(before)
        edges += [(end, count) for end in ends]
        last, count = count, count + 1
    return count, edges


def decompositions(rng: Rng) -> tuple[int, Edges]:
    """Four to fourteen questions at once, each decomposed as people did."""
    often = np.array([s[0] for s in SHAPES], dtype=float)
    edges: Edges = []
    count = 0
    for pick in rng.choice(len(SHAPES), size=int(rng.integers(4, 15)), p=often / often.sum()):
        _, size, shape = SHAPES[int(pick)]
        edges += [(count + a, count + b) for a, b in shape]
        count += size
    return count, edges


FAMILIES: Final[Mapping[str, Callable[[Rng], tuple[int, Edges]]]] = MappingProxyType(
    {"layered": layered, "fork_join": fork_join, "decompositions": decompositions}
)
"""Families of task graphs, by name."""


def machines(rng: Rng) -> tuple[Machine, ...]:
    """One to three end machines, one or two edge servers, and one in the cloud.

    Speeds are around what was measured of small models: 12 to 22 tokens a second for one request on two CPU cores, 77
    for 16 together; a cloud server is some three times as fast.
    """
    found = [
        Machine(name=f"end{n}", kind="end", slots=int(rng.integers(1, 3)), speed=Speed(alone_s=1 / rng.uniform(8, 20)))
        for n in range(int(rng.integers(1, 4)))
    ]
    for n in range(int(rng.integers(1, 3))):
        speed = Speed.fit([(1, rng.uniform(12, 30)), (16, rng.uniform(60, 120))])
        found.append(Machine(name=f"edge{n}", kind="edge", slots=int(rng.integers(4, 9)), speed=speed))
    speed = Speed.fit([(1, rng.uniform(30, 60)), (16, rng.uniform(200, 400))])
    found.append(Machine(name="cloud", kind="cloud", slots=int(rng.integers(4, 17)), speed=speed))
    return tuple(found)


def wires(rng: Rng, nodes: Sequence[Machine]) -> dict[tuple[str, str], Wire]:
    """Links of 0.8 to 80 Mbit/s with 5 to 100 ms, other each way."""
    return {
        (a.name, b.name): Wire(latency_s=rng.uniform(0.005, 0.1), bytes_per_s=10 ** rng.uniform(5, 7))
        for a in nodes
        for b in nodes
        if a is not b
    }


def instance(family: str, rng: Rng) -> Problem:
    """One problem of a family."""
    count, edges = FAMILIES[family](rng)
    nodes = machines(rng)
    tasks = []
    for n in range(count):
        tokens = rng.lognormal(np.log(TOKENS_MEDIAN), TOKENS_SIGMA)
        tasks.append(Task(id=f"t{n}", work={kind: tokens * rng.uniform(*share) for kind, share in WORDINESS.items()}))
    flows = [
        Flow(source=f"t{a}", target=f"t{b}", size=rng.lognormal(np.log(BYTES_MEDIAN), BYTES_SIGMA)) for a, b in edges
    ]
    return Problem(tasks=tuple(tasks), flows=tuple(flows), machines=nodes, wires=wires(rng, nodes))
