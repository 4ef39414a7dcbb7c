"""One federation after another on the same task: a model for all, for the true groups, and for groups found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from sklearn.metrics import adjusted_rand_score

from benchmarks.clusters_parts.tasks import Task
from fed.adapter import Adapter, Method
from fed.aggregate.rules import default, make
from fed.clusters import ways
from fed.clusters.base import Base
from fed.fleet import Change, Fleet, Move, fleet
from fed.pace import Pace
from fed.simulate import Published, simulate
from fed.words import Job

STEPS: Final = 5
"""Local steps of a job."""

AT_ONCE, BUFFER = 32, 8
"""Jobs under way, and updates that make a version, of each model."""

JOINS_S: Final = 150.0
"""When the first late client joins, in virtual seconds: about when a third of the jobs are done; the next follow after
`BETWEEN_S` each."""

BETWEEN_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What came of a run.

    Attributes:
        worst: Mean test loss of the worst-off true group.
        ari: Adjusted Rand index of the models that clients ended with, against the true groups; 1 is perfect.
        models: Models that have clients.
        course: After every version: virtual seconds, job, ARI against the true groups of then.
        right: By client that joined late, whether it ended where most of its group are; empty if none did.
    """

    worst: float
    ari: float
    models: int
    course: list[tuple[float, int, float]] = field(default_factory=list)
    right: dict[str, bool] = field(default_factory=dict)


def federated(
    task: Task, *, jobs: int, seed: int, way: str | None = None, groups: Mapping[str, int] | None = None
) -> Found:
    """Runs a federation.

    Args:
        task: Trainer, assessor and truth.
        jobs: Given out in all.
        seed: Of the run.
        way: How groups are found; None for not at all.
        groups: Groups that are known beforehand; None for one model.
    """
    task.now = -1
    initial = task.learner.initial(seed)
    told = {c: f"group-{n}" for c, n in (groups or {}).items()}
    grouping: Base | None = None
    if way is not None:
        more = {"assessor": task} if way == "ifca" else {}
        grouping = ways.make(way, initial, clients=len(task.clients), seed=seed, **more)
    course: list[tuple[float, int, float]] = []

    def observe(published: Published) -> None:
        if grouping is not None:
            course.append((published.at, task.now, agreement(task.truth(task.now), grouping.members)))

    result = simulate(
        Pace.fedbuff(AT_ONCE, BUFFER, jobs=jobs, steps=STEPS),
        world(task, seed),
        task,
        lambda adapter: make(default(adapter.spec.method), adapter),
        initial=dict.fromkeys(sorted(set(told.values())), initial) if told else initial,
        groups=told,
        grouping=grouping,
        seed=seed,
        observe=observe,
    )
    members = grouping.members if grouping is not None else told
    adapters = {c.name: result.adapters[members.get(c.name, "all")] for c in task.clients}
    return Found(
        worst=worst(task, adapters),
        ari=agreement(task.truth(), members) if members else 0.0,
        models=len(set(members.values())) or 1,
        course=course,
        right=_right(task, members),
    )


def alone(task: Task, *, jobs: int, seed: int) -> Found:
    """Every client trains alone, at its rank, with its share of the jobs."""
    task.now = -1
    adapters = {}
    initial = task.learner.initial(seed)
    for number, client in enumerate(task.clients):
        now = initial
        if initial.spec.method is Method.LORA:
            now = make("delta", initial).start_for(initial, client.rank)
        for turn in range(jobs // len(task.clients)):
            at = turn * len(task.clients) + number
            trained = task.train(
                now, Job(id=at, client=client.name, model="alone", version=turn, seed=seed * 10**6 + at, steps=STEPS)
            )
            now = now.plus(trained.delta)
        adapters[client.name] = now
    return Found(worst=worst(task, adapters), ari=0.0, models=len(adapters))


def world(task: Task, seed: int) -> Fleet:
    """Clients of three speeds, 1:2:4; the late ones join one by one."""
    changes = tuple(Change(JOINS_S + BETWEEN_S * n, c, Move.JOINS) for n, c in enumerate(task.late))
    return fleet(task.clients, speeds="tiers", seed=seed, changes=changes)


def worst(task: Task, adapters: Mapping[str, Adapter]) -> float:
    """The mean test loss of the true group that has the highest."""
    losses: dict[int, list[float]] = {}
    for client, group in task.truth().items():
        losses.setdefault(group, []).append(task.test_loss(adapters[client], client))
    return max(float(np.mean(group)) for group in losses.values())


def agreement(truth: Mapping[str, int], members: Mapping[str, str]) -> float:
    """Adjusted Rand index (Hubert and Arabie 1985) over the clients that are in a model."""
    names = sorted(members)
    return float(adjusted_rand_score([truth[c] for c in names], [members[c] for c in names]))


def _right(task: Task, members: Mapping[str, str]) -> dict[str, bool]:
    truth, late = task.truth(), set(task.late)
    found = {}
    for client in sorted(late & set(members)):
        others = [members[c] for c, group in truth.items() if group == truth[client] and c not in late and c in members]
        home = max(sorted(set(others)), key=others.count)
        found[client] = members[client] == home
    return found
