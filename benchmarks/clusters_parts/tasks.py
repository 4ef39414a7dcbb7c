"""Clients in groups that read the same digits, and name them differently.

The data are scikit-learn's digits (1797 pictures of 8×8, from UCI's "Optical Recognition of Handwritten Digits"), which
come with the library. Every group has its own permutation of the ten labels, so that no model suits two groups. Within
a group clients see different digits, as many of each as Dirichlet draws, so that two clients of a group may have little
in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from fed.adapter import Adapter, LayerSize, Method, Spec, Vector
from fed.aggregate.lowrank import fresh
from fed.words import ClientInfo, Job, Trained

Floats = NDArray[np.float64]

CLASSES: Final = 10
TEST_ROWS: Final = 500
"""Rows that nobody trains on, the same for all."""

BASE_ROWS: Final = 400
"""Rows that the base model of the low-rank task is made with, labelled as they are."""

HIDDEN: Final = 32
RANK, RANKS = 8, (4, 8)
"""LoRA rank of the server, and those of the clients, in turn."""

ROWS: Final = 40
"""Rows of a client: few, so that a client alone does badly."""

BATCH: Final = 20
CLIP: Final = 1.0
"""Longest gradient of the low-rank task, as is usual for LoRA."""
STREAM: Final = 0xC1057E2


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a task.

    Attributes:
        groups: Of clients.
        each: Clients of a group from the beginning.
        late: Clients of a group that join on the way.
        skew: Parameter of the Dirichlet distribution of a client's digits; less is more uneven.
        drift_at: Job from which some clients belong to another group; None for never.
        drifting: Share of the clients that do.
    """

    groups: int = 4
    each: int = 8
    late: int = 0
    skew: float = 1.0
    drift_at: int | None = None
    drifting: float = 0.25


class Learner(Protocol):
    """What is trained on rows and labels."""

    spec: Spec

    def initial(self, seed: int) -> Adapter:
        """The first version."""

    def losses(self, adapter: Adapter, x: Floats, y: NDArray[np.intp]) -> Floats:
        """Cross-entropy of each row."""

    def train(
        self, start: Adapter, x: Floats, y: NDArray[np.intp], steps: int, rng: np.random.Generator
    ) -> tuple[Vector, float]:
        """What training adds, and the mean loss on the way."""


class Softmax:
    """A linear softmax classifier, trained as plain numbers, from zero.

    Args:
        rate: Learning rate.
    """

    spec = Spec(method=Method.DENSE, shapes={"weight": (CLASSES, 65)})

    def __init__(self, rate: float = 0.5) -> None:
        self.rate = rate

    def initial(self, seed: int) -> Adapter:
        """See `Learner`."""
        return Adapter.zeros(self.spec)

    def losses(self, adapter: Adapter, x: Floats, y: NDArray[np.intp]) -> Floats:
        """See `Learner`."""
        return _losses(x @ adapter["weight"].T, y)

    def train(
        self, start: Adapter, x: Floats, y: NDArray[np.intp], steps: int, rng: np.random.Generator
    ) -> tuple[Vector, float]:
        """See `Learner`."""
        weight = start["weight"].astype(np.float64)
        total = 0.0
        for _ in range(steps):
            rows = rng.integers(len(x), size=BATCH)
            out, loss = _slope(x[rows] @ weight.T, y[rows])
            weight -= self.rate * out.T @ x[rows]
            total += loss
        return (weight - start["weight"]).astype(np.float32).ravel(), total / steps


class LowRank:
    """LoRA on both layers of a small network that was trained on digits as they are labelled, with a new head.

    Args:
        base: Weights of the layers, shapes (HIDDEN, 65) and (CLASSES, HIDDEN).
        rate: Learning rate.
    """

    spec = Spec.lora(
        {"hidden": LayerSize(65, HIDDEN), "out": LayerSize(HIDDEN, CLASSES)}, rank=RANK, alpha=RANK, base="digits"
    )

    def __init__(self, base: tuple[Floats, Floats], rate: float = 0.2) -> None:
        self.base, self.rate = base, rate

    def initial(self, seed: int) -> Adapter:
        """See `Learner`."""
        return fresh(self.spec, seed)

    def losses(self, adapter: Adapter, x: Floats, y: NDArray[np.intp]) -> Floats:
        """See `Learner`."""
        first, second = self._whole(adapter.spec.scaling, dict(adapter.tensors()))
        return _losses(np.maximum(x @ first.T, 0) @ second.T, y)

    def train(
        self, start: Adapter, x: Floats, y: NDArray[np.intp], steps: int, rng: np.random.Generator
    ) -> tuple[Vector, float]:
        """See `Learner`."""
        t = {name: a.astype(np.float64) for name, a in start.tensors()}
        s, total = start.spec.scaling, 0.0
        for _ in range(steps):
            rows = rng.integers(len(x), size=BATCH)
            first, second = self._whole(s, t)
            middle = np.maximum(x[rows] @ first.T, 0)
            out, loss = _slope(middle @ second.T, y[rows])
            slopes = {}
            for layer, slope in (("out", out.T @ middle), ("hidden", ((out @ second) * (middle > 0)).T @ x[rows])):
                b, a = t[f"{layer}.lora_B"], t[f"{layer}.lora_A"]
                slopes[f"{layer}.lora_B"], slopes[f"{layer}.lora_A"] = s * slope @ a.T, s * b.T @ slope
            size = math.sqrt(sum(float((slope * slope).sum()) for slope in slopes.values()))
            for name, slope in slopes.items():
                t[name] = t[name] - self.rate * min(1.0, CLIP / size if size else 1.0) * slope
            total += loss
        made = Adapter.from_tensors(start.spec, t)
        return made.flat - start.flat, total / steps

    def _whole(self, s: float, t: Mapping[str, NDArray[np.floating]]) -> tuple[Floats, Floats]:
        first, second = self.base
        return (
            first + s * t["hidden.lora_B"] @ t["hidden.lora_A"],
            second + s * t["out.lora_B"] @ t["out.lora_A"],
        )


@dataclass(eq=False)
class Task:
    """Who has what, and who belongs to whom. A trainer and an assessor for all clients.

    Attributes:
        learner: What is trained.
        shape: Of the task.
        clients: All, by name and rank.
        group_of: True group by client, at the beginning.
        drifted: True group of those that change.
        now: The latest job that was given out.
    """

    learner: Learner
    shape: Shape
    seed: int
    steps: int = 5
    clients: tuple[ClientInfo, ...] = ()
    group_of: dict[str, int] = field(default_factory=dict)
    drifted: dict[str, int] = field(default_factory=dict)
    now: int = -1

    def __post_init__(self) -> None:
        s, rng = self.shape, np.random.default_rng([STREAM, self.seed])
        x, y = digits()
        order = rng.permutation(len(x))
        self._test, pool = order[:TEST_ROWS], order[TEST_ROWS + BASE_ROWS :]
        self.labels = np.array([rng.permutation(CLASSES) for _ in range(s.groups)])
        by_class = [pool[y[pool] == c] for c in range(CLASSES)]
        self._rows: dict[str, NDArray[np.intp]] = {}
        self._mix: dict[str, Floats] = {}
        infos = []
        for n in range(s.groups * (s.each + s.late)):
            name, group = f"client-{n:02d}", n % s.groups
            mix = rng.dirichlet([s.skew] * CLASSES)
            counts = rng.multinomial(ROWS, mix)
            self._rows[name] = np.concatenate([rng.choice(by_class[c], counts[c]) for c in range(CLASSES)])
            self._mix[name], self.group_of[name] = counts / ROWS, group
            rank = RANKS[(n // s.groups) % len(RANKS)] if self.learner.spec.method is Method.LORA else None
            infos.append(ClientInfo(name=name, examples=ROWS, rank=rank))
        self.clients = tuple(infos)
        if s.drift_at is not None:
            old = list(self.group_of)[: s.groups * s.each]
            for name in rng.choice(old, round(s.drifting * len(old)), replace=False).tolist():
                self.drifted[name] = (self.group_of[name] + 1 + int(rng.integers(s.groups - 1))) % s.groups

    @property
    def late(self) -> list[str]:
        """Clients that join on the way."""
        return list(self.group_of)[self.shape.groups * self.shape.each :]

    def truth(self, job: int | None = None) -> dict[str, int]:
        """True group by client when a job was given out; at the end where none is told."""
        at = self.shape.drift_at
        return self.group_of | (self.drifted if at is not None and (job is None or job >= at) else {})

    def train(self, start: Adapter, job: Job) -> Trained:
        """See `fed.words.Trainer`."""
        self.now = max(self.now, job.id)
        x, y = digits()
        rows, group = self._rows[job.client], self.truth(job.id)[job.client]
        rng = np.random.default_rng(job.seed)
        delta, loss = self.learner.train(start, x[rows], self.labels[group][y[rows]], job.steps or self.steps, rng)
        return Trained(delta=delta, examples=ROWS, steps=job.steps or self.steps, metrics={"loss": loss})

    def loss(self, adapter: Adapter, client: str) -> float:
        """See `fed.clusters.ifca.Assessor`: on the rows that the client trains on, as it labels them now."""
        x, y = digits()
        rows, group = self._rows[client], self.truth(self.now)[client]
        return float(self.learner.losses(adapter, x[rows], self.labels[group][y[rows]]).mean())

    def test_loss(self, adapter: Adapter, client: str) -> float:
        """On rows nobody trains on, as the client's group labels them, in the client's own mix of digits."""
        x, y = digits()
        classes = y[self._test]
        losses = self.learner.losses(adapter, x[self._test], self.labels[self.truth()[client]][classes])
        means = np.bincount(classes, losses, CLASSES) / np.bincount(classes, minlength=CLASSES)
        return float(means @ self._mix[client])


def softmax_task(shape: Shape, seed: int) -> Task:
    """Plain numbers: a softmax classifier from zero."""
    return Task(Softmax(), shape, seed)


def lowrank_task(shape: Shape, seed: int) -> Task:
    """LoRA of ranks 4 and 8 on a network that was trained on other rows, as they are labelled."""
    x, y = digits()
    rng = np.random.default_rng([STREAM, seed])
    rows = rng.permutation(len(x))[TEST_ROWS : TEST_ROWS + BASE_ROWS]
    first, second = rng.normal(size=(HIDDEN, 65)) * 0.2, rng.normal(size=(CLASSES, HIDDEN)) * 0.2
    for _ in range(600):
        at = rows[rng.integers(len(rows), size=BATCH)]
        middle = np.maximum(x[at] @ first.T, 0)
        out, _ = _slope(middle @ second.T, y[at])
        first, second = first - 0.2 * ((out @ second) * (middle > 0)).T @ x[at], second - 0.2 * out.T @ middle
    # A new head: groups name digits in their own ways, so that the old names would only be in the way.
    return Task(LowRank((first, np.zeros_like(second))), shape, seed)


TASKS: Final = {"softmax": softmax_task, "lora": lowrank_task}
"""By name."""


@cache
def digits() -> tuple[Floats, NDArray[np.intp]]:
    """Pictures as 64 numbers from 0 to 1 and a constant, shape (1797, 65), and what they show, from 0 to 9."""
    x, y = load_digits(return_X_y=True)
    return np.hstack((x / 16.0, np.ones((len(x), 1)))), y.astype(np.intp)


def _losses(scores: Floats, y: NDArray[np.intp]) -> Floats:
    scores = scores - scores.max(1, keepdims=True)
    found: Floats = np.log(np.exp(scores).sum(1)) - scores[np.arange(len(y)), y]
    return found


def _slope(scores: Floats, y: NDArray[np.intp]) -> tuple[Floats, float]:
    """Slope of the mean cross-entropy by the scores, and the loss."""
    every = np.arange(len(y))
    scores = scores - scores.max(1, keepdims=True)
    likely = np.exp(scores)
    likely /= likely.sum(1, keepdims=True)
    loss = float(-np.log(np.maximum(likely[every, y], 1e-30)).mean())
    likely[every, y] -= 1
    return likely / len(y), loss
