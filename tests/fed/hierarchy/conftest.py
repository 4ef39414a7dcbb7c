"""Small federations through trees, quick to run: the fixture `trees`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fed.adapter import Adapter, LayerSize, Method, Spec
from fed.chain import Chain
from fed.fleet import Change, Fleet, Move, fleet
from fed.hierarchy import Level, Link, Sees, Tree, TreeResult, View, simulate_tree
from fed.pace import Pace
from fed.simulate import Checkpoints
from fed.words import Job, Trained

DENSE = Spec(method=Method.DENSE, shapes={"w": (4, 5)})
LORA = Spec.lora({"q": LayerSize(12, 10), "v": LayerSize(12, 6)}, rank=4, alpha=8.0, base="toy")


class Stopped(Exception):
    """Stands for a process that is killed."""


class Pull:
    """Every device pulls the adapter towards its own target, with noise of the job's seed."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.trained: list[tuple[str, int]] = []
        self.breaks_at = breaks_at

    def train(self, start: Adapter, job: Job) -> Trained:
        if len(self.trained) == self.breaks_at:
            raise Stopped
        self.trained.append((job.client, job.id))
        rng = np.random.default_rng(job.seed)
        target = np.random.default_rng(int(job.client.rpartition("-")[2])).normal(size=start.spec.size)
        gap = target - start.flat
        delta = (0.1 * gap + 0.01 * rng.normal(size=start.spec.size)).astype(np.float32)
        return Trained(delta=delta, examples=10, steps=job.steps or 1, metrics={"loss": float(np.mean(gap**2))})


class Add:
    """Adds one to every number."""

    def train(self, start: Adapter, job: Job) -> Trained:
        return Trained(delta=np.ones(start.spec.size, np.float32), examples=2, steps=1, metrics={"loss": 1.0})


def start(spec: Spec) -> Adapter:
    rng = np.random.default_rng(0)
    return Adapter(spec, (0.1 * rng.normal(size=spec.size)).astype(np.float32))


def devices(n: int) -> list[str]:
    return [f"client-{i}" for i in range(n)]


def rough(n: int = 9, **more: Any) -> Fleet:
    """Devices that are slow, lost, late and dead."""
    given: dict[str, Any] = {
        "speeds": "lognormal",
        "jitter": 0.3,
        "loss": 0.1,
        "silent": 0.3,
        "up_bytes_per_s": 2000.0,
        "down_bytes_per_s": 9000.0,
        "round_trip_s": 0.1,
        "seed": 5,
        "changes": (
            Change(30.0, "client-0", Move.DIES),
            Change(20.0, "client-1", Move.LEAVES),
            Change(60.0, "client-1", Move.JOINS),
            Change(15.0, "client-2", Move.JOINS),
        ),
    }
    plain = fleet(n, **given | more)
    return replace(plain, clients=tuple(replace(c, examples=10) for c in plain.clients))


EDGE = Pace.fedbuff(3, 2, job_timeout_s=40.0, steps=2)
FAR = Link(up_bytes_per_s=3000.0, down_bytes_per_s=6000.0, round_trip_s=0.5, loss=0.05)
SHOCKS = (
    Change(25.0, "edge-1", Move.DIES),
    Change(70.0, "edge-1", Move.JOINS),
    Change(80.0, "edge-0", Move.LEAVES),
    Change(110.0, "edge-0", Move.JOINS),
)


def tree(n: int = 9, *, versions: int = 14, edge: dict[str, Any] | None = None, **cloud: Any) -> Tree:
    """A cloud over three edges, semi-asynchronous at both levels."""
    given: dict[str, Any] = {"pace": Pace.fedbuff(3, 2, job_timeout_s=60.0, publications=versions)} | cloud
    below: dict[str, Any] = {"pace": EDGE, "up": FAR, "every": 2} | (edge or {})
    return Tree.even(Level(name="cloud", **given), Level(name="edge", **below), devices(n), edges=3)


def deep(versions: int = 15) -> Tree:
    """Four levels, of uneven depth."""
    from fed.hierarchy import Aggregator

    upper = Pace.fedbuff(2, 1, job_timeout_s=100.0)
    return Tree(
        levels=(
            Level(name="cloud", pace=upper.but(publications=versions)),
            Level(name="region", pace=upper, up=FAR),
            Level(name="edge", pace=EDGE, up=FAR),
        ),
        aggregators=(
            Aggregator(name="cloud", level="cloud"),
            Aggregator(name="north", level="region", parent="cloud"),
            Aggregator(name="south", level="region", parent="cloud", devices=("client-0", "client-1")),
            Aggregator(name="e0", level="edge", parent="north", devices=("client-2", "client-3", "client-4")),
            Aggregator(name="e1", level="edge", parent="north", devices=("client-5", "client-6")),
            Aggregator(name="e2", level="edge", parent="cloud", devices=("client-7", "client-8")),
        ),
    )


CHAIN = Chain.from_config([{"kind": "top_k", "fraction": 0.3}, {"kind": "int8", "block": 8}])

KINDS: dict[str, Callable[[], tuple[Tree, dict[str, Any]]]] = {
    "dense": lambda: (tree(edge={"orphans": "sibling"}), {"changes": SHOCKS}),
    "lora": lambda: (tree(versions=12, edge={"orphans": "parent"}), {"initial": start(LORA), "changes": SHOCKS}),
    "chain": lambda: (tree(chain=CHAIN, edge={"chain": CHAIN}), {"changes": SHOCKS}),
    "sums": lambda: (
        tree(
            sees=Sees(what=View.SUMS, least=2, behind=2),
            edge={"sees": Sees(what=View.SUMS, least=2), "chain": Chain()},
        ),
        {"changes": SHOCKS},
    ),
    "deep": lambda: (deep(), {"changes": (Change(20.0, "north", Move.DIES), Change(60.0, "north", Move.JOINS))}),
    "counts": lambda: (tree(sees=Sees(what=View.COUNTS)), {}),
}


def run(
    kind: str, checkpoint: Checkpoints | None = None, *, trainer: Any = None, seed: int = 3, **more: Any
) -> TreeResult:
    found, given = KINDS[kind]()
    given = {"initial": start(DENSE)} | given | more
    return simulate_tree(found, rough(), trainer or Pull(), seed=seed, checkpoint=checkpoint, **given)


def same(one: TreeResult, other: TreeResult) -> bool:
    flat = {name: a.flat.tobytes() for name, a in one.adapters.items()}
    return (
        flat == {name: a.flat.tobytes() for name, a in other.adapters.items()}
        and one.rows == other.rows
        and one.states == other.states
        and (one.why, one.at, one.levels) == (other.why, other.at, other.levels)
    )


@pytest.fixture(scope="session")
def trees() -> ModuleType:
    """This module."""
    return sys.modules[__name__]
