"""A small federation that is quick to run: used by tests in this process and, to be killed, in others.

As a program it reads lines with a kind and a folder, starts a process for each, and tells its number: so the imports,
which take seconds, are made once.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from fed.adapter import Adapter, LayerSize, Method, Spec
from fed.aggregate.rules import make
from fed.chain import Chain
from fed.fleet import Change, Fleet, Move, fleet
from fed.pace import Pace
from fed.simulate import Checkpoints, Result, simulate
from fed.words import Job, Trained

DENSE = Spec(method=Method.DENSE, shapes={"w": (4, 5)})
LORA = Spec.lora({"q": LayerSize(12, 10), "v": LayerSize(12, 6)}, rank=4, alpha=8.0, base="toy")


class Pull:
    """Every client pulls the adapter towards its own target, with noise of the job's seed."""

    def __init__(self) -> None:
        self.trained: list[int] = []

    def train(self, start: Adapter, job: Job) -> Trained:
        self.trained.append(job.id)
        rng = np.random.default_rng(job.seed)
        target = np.random.default_rng(len(job.client)).normal(size=start.spec.size)
        gap = target - start.flat
        delta = (0.1 * gap + 0.01 * rng.normal(size=start.spec.size)).astype(np.float32)
        loss = float(np.mean(gap**2))
        return Trained(delta=delta, examples=10, steps=job.steps or 1, metrics={"loss": loss})


def start(spec: Spec) -> Adapter:
    rng = np.random.default_rng(0)
    return Adapter(spec, (0.1 * rng.normal(size=spec.size)).astype(np.float32))


def world(kind: str) -> Fleet:
    ranks = {"lora": [2, 4, 8], "chain": [None], "dense": [None], "sync": [None]}[kind]
    plain = fleet(
        9,
        speeds="lognormal",
        jitter=0.3,
        loss=0.1,
        silent=0.3,
        up_bytes_per_s=2000.0,
        down_bytes_per_s=9000.0,
        round_trip_s=0.1,
        seed=5,
        changes=(
            Change(30.0, "client-0", Move.DIES),
            Change(20.0, "client-1", Move.LEAVES),
            Change(60.0, "client-1", Move.JOINS),
            Change(15.0, "client-2", Move.JOINS),
        ),
    )
    infos = tuple(replace(c, rank=ranks[i % len(ranks)], examples=10) for i, c in enumerate(plain.clients))
    return replace(plain, clients=infos)


PACE = Pace.fedbuff(6, 3, job_timeout_s=40.0, steps=2, publications=60, share_cap=0.5)
SYNC = Pace.synchronous(4, over_select=1.5, deadline_s=8.0, job_timeout_s=40.0, steps=2, publications=40)


def run(kind: str, checkpoint: Checkpoints | None = None, *, trainer: Pull | None = None, seed: int = 3) -> Result:
    spec = LORA if kind == "lora" else DENSE
    chain = Chain.from_config([{"kind": "top_k", "fraction": 0.3}, {"kind": "int8"}]) if kind == "chain" else None
    return simulate(
        SYNC if kind == "sync" else PACE,
        world(kind),
        trainer or Pull(),
        lambda adapter: make("delta" if kind == "lora" else "mean", adapter),
        initial=start(spec),
        chain=chain,
        seed=seed,
        about={"kind": kind},
        checkpoint=checkpoint,
    )


def serve() -> None:
    """Runs what is asked for, each in a process of its own; tells its number, and later how it ended."""
    print("ready", flush=True)
    for line in sys.stdin:
        kind, folder = line.rstrip("\n").split(" ", 1)
        child = os.fork()
        if not child:
            run(kind, Checkpoints(folder=Path(folder), versions=2))
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
