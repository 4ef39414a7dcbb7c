"""agora's simulator with a trainer that costs next to nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import numpy as np

from fed.adapter import Adapter, Method, Spec
from fed.aggregate.mean import Mean
from fed.chain import Chain
from fed.fleet import fleet
from fed.pace import Pace
from fed.simulate import simulate
from fed.words import Job, Trained

SIZE: Final = 10
"""Numbers of the adapter: what is left is our overhead."""

COHORT, BUFFER = 16, 4


class Trivial:
    """Every job takes a tenth of the way to zero."""

    def train(self, start: Adapter, job: Job) -> Trained:
        return Trained(delta=np.float32(-0.1) * start.flat, examples=3, steps=1, metrics={"loss": 1.0})


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """How long a simulation took.

    Attributes:
        updates: Absorbed.
        seconds: Of real time.
    """

    updates: int
    seconds: float

    @property
    def per_s(self) -> float:
        """Updates per second."""
        return self.updates / self.seconds


def timed(*, updates: int, clients: int, wire: bool, seed: int, synchronous: bool = False) -> Timed:
    """Simulates until so many updates are in versions.

    Args:
        updates: How many.
        clients: Of the fleet; at most `COHORT` have a job at a time.
        wire: Whether every update is encoded, checked and decoded.
        seed: Of everything random.
        synchronous: Rounds of `COHORT`, as Flower's; else buffers of `BUFFER`.
    """
    per_version = COHORT if synchronous else BUFFER
    versions = max(1, updates // per_version)
    pace = Pace.synchronous(COHORT) if synchronous else Pace.fedbuff(COHORT, BUFFER)
    world = fleet(clients, speeds="lognormal", seed=seed)
    initial = Adapter(Spec(method=Method.DENSE, shapes={"x": (SIZE,)}), np.ones(SIZE, np.float32))
    began = time.perf_counter()
    result = simulate(
        pace.but(publications=versions),
        world,
        Trivial(),
        Mean,
        initial=initial,
        chain=Chain() if wire else None,
        seed=seed,
    )
    seconds = time.perf_counter() - began
    absorbed = int(result.rows[-1]["absorbed"])
    if len(result.rows) != versions or absorbed != versions * per_version:
        raise AssertionError(f"{absorbed} updates in {len(result.rows)} versions; expected {versions} versions")
    if synchronous and not np.allclose(result.adapters["all"].flat, 0.9**versions, rtol=1e-3):
        raise AssertionError(f"the numbers are {result.adapters['all'].flat}; expected {0.9**versions}")
    return Timed(updates=absorbed, seconds=seconds)
