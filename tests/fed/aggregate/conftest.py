"""Small adapters and updates, and sums of them computed as whole float64 matrices: the fixture `worlds`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

from fed.adapter import Adapter, LayerSize, Method, Spec
from fed.aggregate.lowrank import fresh
from fed.aggregate.rule import Contribution, Rule

LAYERS = {"q": LayerSize(12, 10), "v": LayerSize(9, 14)}


@pytest.fixture(scope="session")
def worlds() -> ModuleType:
    """This module."""
    return sys.modules[__name__]


def lora(rank: int, *, alpha: float = 6.0, rslora: bool = False) -> Spec:
    return Spec.lora(LAYERS, rank=rank, alpha=alpha, rslora=rslora)


def plain(size: int = 40) -> Spec:
    return Spec(method=Method.PREFIX, shapes={"prefix": (size // 4, 2), "more": (size - size // 4 * 2,)}, rank=5)


def noise(spec: Spec, seed: int, size: float = 0.3) -> NDArray[np.float32]:
    return (size * np.random.default_rng(seed).standard_normal(spec.size)).astype(np.float32)


def initial(rank: int = 4, seed: int = 0) -> Adapter:
    """Trained a little: B is not zero."""
    found = fresh(lora(rank), seed)
    return found.plus(noise(found.spec, seed + 1))


def plain_start(seed: int = 0) -> Adapter:
    return Adapter.zeros(plain()).plus(noise(plain(), seed))


def whole(adapter: Adapter) -> dict[str, NDArray[np.float64]]:
    """s·B·A by layer."""
    return {n: adapter.spec.scaling * (b.astype(float) @ a.astype(float)) for n, b, a in adapter.factors()}


def change(c: Contribution) -> dict[str, NDArray[np.float64]]:
    """What an update changes of the product."""
    end, start = whole(c.start.plus(c.delta)), whole(c.start)
    return {n: end[n] - start[n] for n in end}


def added(adapter: Adapter, contributions: Sequence[Contribution], step: float) -> dict[str, NDArray[np.float64]]:
    """W + η·Σ c·change / Σ w."""
    total = sum(c.weight / c.discount for c in contributions)
    found = whole(adapter)
    for c in contributions:
        for n, d in change(c).items():
            found[n] = found[n] + step * c.weight / total * d
    return found


def best(matrix: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    found: NDArray[np.float64] = (u[:, :rank] * s[:rank]) @ v[:rank]
    return found


def updates(rule: Rule, ranks: Sequence[int], seed: int, *, late: Sequence[int] = ()) -> list[Contribution]:
    """One of each rank, made from the current version."""
    found = []
    for n, rank in enumerate(ranks):
        start = rule.start_for(rule.current, rank)
        tau = late[n] if late else 0
        discount = (1 + tau) ** -0.5
        weight = float(np.random.default_rng([seed, n]).uniform(0.5, 2.0))
        found.append(
            Contribution(
                client=f"c{n}",
                start=start,
                delta=noise(start.spec, seed * 100 + n),
                weight=weight * discount,
                staleness=tau,
                discount=discount,
            )
        )
    return found


def absorb(rule: Rule, contributions: Sequence[Contribution]) -> Adapter:
    for c in contributions:
        rule.absorb(c)
    return rule.publish()


def close(one: Adapter, other: Adapter, tolerance: float = 2e-5) -> None:
    """The same products."""
    a, b = whole(one), whole(other)
    for n in a:
        np.testing.assert_allclose(a[n], b[n], atol=tolerance * max(1.0, float(np.abs(b[n]).max())))
