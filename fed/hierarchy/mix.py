"""Between general and personal: adapters of several levels mixed, by weights that a client chooses or that are fitted.

What a client is served is Σ w_l·(adapter of level l), of the cloud's, its edge's and its own, say: model interpolation
(Mansour et al. 2020, "Three Approaches for Personalization", arXiv 2002.10619, section 5; Deng et al. 2020, "Adaptive
Personalized Federated Learning", arXiv 2003.13461). LoRA's are mixed as products, Σ w_l·s_l·B_l·A_l: with the factors
side by side the sum is exact, at the sum of the ranks, and can be cut to its largest singular values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Final

import numpy as np

from agora.errors import AdapterError, InvalidRequest
from fed.adapter import A, Adapter, B, Method
from fed.aggregate.lowrank import factors, layer_rng
from fed.aggregate.rule import finite, whole
from fed.aggregate.terms import Term, Whole, summed
from fed.words import WHOLE, Job, Trainer

GRID: Final = 4
"""Parts of 1 in which weights are tried at first: halves and quarters; 15 mixtures of three levels."""

FINEST: Final = 1 / 32
"""Least share that fitting still moves from one level to another: a few hundred held-out rows tell no finer."""


def mix(levels: Mapping[str, Adapter], weights: Mapping[str, float], *, rank: int | None = None) -> Adapter:
    """A weighted sum of the adapters of several levels.

    Args:
        levels: Adapters by level, of one kind; LoRA's of any ranks.
        weights: By level; those not named count as 0. They need not sum to 1.
        rank: Most ranks of the sum of LoRA's, which is then cut to its largest singular values; None for as many as it
            takes, which is the sum of the ranks of those with a weight.

    Returns:
        The mixture. α is that of the first level.

    Raises:
        InvalidRequest: If a level is not there, a weight is no finite number, all are 0, or the rank is out of range.
        AdapterError: If the adapters are of different kinds.
    """
    if unknown := sorted(set(weights) - set(levels)):
        raise InvalidRequest(f"a weight is given for {unknown[0]!r}; there are {', '.join(levels) or 'no levels'}")
    if wrong := [name for name, weight in weights.items() if not math.isfinite(weight)]:
        raise InvalidRequest(f"the weight of {wrong[0]!r} is {weights[wrong[0]]}; it must be a number")
    parts = [(float(weights[name]), adapter) for name, adapter in levels.items() if weights.get(name)]
    if not parts:
        raise InvalidRequest("every weight is 0", hint=f"give one of {', '.join(levels) or 'the levels'} a weight")
    if rank is not None:
        whole("rank", rank, least=1)
    _check_kinds(parts)
    first = parts[0][1]
    if first.spec.method is not Method.LORA:
        flat = np.zeros(first.spec.size, np.float64)
        for weight, adapter in parts:
            flat += weight * adapter.flat
        made = Adapter(first.spec, flat.astype(np.float32))
        finite(made.flat)
        return made
    if parts == [(1.0, first)] and (rank is None or rank >= first.spec.rank):
        return first
    ranks = sum(adapter.spec.rank for _, adapter in parts)
    made = _concatenated(parts, ranks) if rank is None or rank >= ranks else _cut(parts, rank)
    finite(made.flat)
    return made


def _check_kinds(parts: list[tuple[float, Adapter]]) -> None:
    first = parts[0][1].spec
    for _, adapter in parts[1:]:
        spec = adapter.spec
        if first.method is not Method.LORA or spec.method is not Method.LORA:
            same = spec == first
        else:
            same = (spec.base, list(spec.layers.items())) == (first.base, list(first.layers.items()))
        if not same:
            raise AdapterError("adapters of different base models, methods or layers cannot be mixed")


def _concatenated(parts: list[tuple[float, Adapter]], ranks: int) -> Adapter:
    made = Adapter.zeros(parts[0][1].spec.at_rank(ranks))
    for layer, b, a in made.factors():
        start = 0
        for weight, adapter in parts:
            stop = start + adapter.spec.rank
            factor = weight * adapter.spec.scaling / made.spec.scaling
            # Both factors get a part of it, so that neither is much larger than it was.
            size = math.sqrt(abs(factor))
            b[:, start:stop] = np.float32(math.copysign(size, factor)) * adapter[f"{layer}.{B}"]
            a[start:stop] = np.float32(size) * adapter[f"{layer}.{A}"]
            start = stop
    return made


def _cut(parts: list[tuple[float, Adapter]], rank: int) -> Adapter:
    made = Adapter.zeros(parts[0][1].spec.at_rank(rank))
    spec = made.spec
    terms: list[tuple[float, Term]] = [(weight, Whole(adapter)) for weight, adapter in parts]
    for number, (layer, found) in enumerate(summed(spec, terms, rank)):
        b, a = factors(found, spec.layers[layer], rank=rank, scaling=spec.scaling, rng=layer_rng(0, number))
        made[f"{layer}.{B}"][:], made[f"{layer}.{A}"][:] = b, a
    return made


def aligned(adapter: Adapter, to: Adapter) -> Adapter:
    """The same products in the coordinates nearest to another adapter's.

    (B·G, Gᵀ·A) is the same product for every orthogonal G. The nearest to the other's factors is U·Vᵀ of the SVD of
    [B; Aᵀ]ᵀ·[B₀; A₀ᵀ] (Schönemann 1966, orthogonal Procrustes). The difference of the two, which is what travels, is
    then small where the change is, and not as large as the adapters themselves.
    """
    if adapter.spec.method is not Method.LORA or adapter.spec != to.spec or np.array_equal(adapter.flat, to.flat):
        return adapter
    made = Adapter.zeros(adapter.spec)
    for layer, b, a in adapter.factors():
        b0, a0 = to[f"{layer}.{B}"].astype(np.float64), to[f"{layer}.{A}"].astype(np.float64)
        u, _, vh = np.linalg.svd(b.astype(np.float64).T @ b0 + a.astype(np.float64) @ a0.T)
        turn = u @ vh
        made[f"{layer}.{B}"][:], made[f"{layer}.{A}"][:] = b @ turn, turn.T @ a
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Weights that were found for a client.

    Attributes:
        weights: By level; they sum to 1.
        loss: Of the mixture, on the client's held-out rows.
        alone: Of each level alone.
        asked: Mixtures tried.
    """

    weights: Mapping[str, float]
    loss: float
    alone: Mapping[str, float]
    asked: int


def fit(
    levels: Mapping[str, Adapter], assess: Callable[[Adapter], float], *, rank: int | None = None, most: int = 60
) -> Fitted:
    """Weights from 0 that sum to 1, for one client.

    Levels alone are tried first, then a grid, then shares are moved from one level to another for as long as that
    helps, by ever smaller steps: no gradient is needed, and nothing but `assess`'s numbers leaves the client. The
    result is never worse, on these rows, than the best level alone. Deterministic.

    Args:
        levels: Adapters by level.
        assess: The loss of an adapter on the client's own held-out rows, lower is better; NaN counts as infinite.
        rank: Of the mixture that is tried and will be served; see `mix`.
        most: Mixtures tried at most, the levels alone not counted.

    Raises:
        InvalidRequest: If there is no level, or every mixture's loss is infinite.
        AdapterError: If the adapters are of different kinds.
    """
    names = list(levels)
    if not names:
        raise InvalidRequest("there is no level to give a weight")
    whole("most", most, least=0)
    known: dict[tuple[float, ...], float] = {}

    def loss(shares: tuple[float, ...]) -> float:
        if shares not in known:
            found = float(assess(mix(levels, dict(zip(names, shares, strict=True)), rank=rank)))
            known[shares] = math.inf if math.isnan(found) else found
        return known[shares]

    corners = [tuple(float(i == j) for j in range(len(names))) for i in range(len(names))]
    best = min(corners, key=loss)
    alone = {name: known[corner] for name, corner in zip(names, corners, strict=True)}
    room = len(corners) + most
    for shares in _grid(len(names)):
        if len(known) < room and loss(shares) < loss(best):
            best = shares
    step = 0.5 / GRID
    while step >= FINEST and len(known) < room and len(names) > 1:
        moved = [m for m in (_moved(best, i, j, step) for i, j in permutations(range(len(names)), 2)) if m is not None]
        found = min(moved[: room - len(known)], key=loss, default=best)
        if loss(found) < loss(best):
            best = found
        else:
            step /= 2
    if not math.isfinite(loss(best)):
        raise InvalidRequest("the loss of every level and mixture is infinite or no number")
    weights = dict(zip(names, best, strict=True))
    return Fitted(weights=weights, loss=loss(best), alone=alone, asked=len(known))


def personal(trainer: Trainer, start: Adapter, client: str, *, seed: int = 0, steps: int | None = None) -> Adapter:
    """A client's own adapter: trained from one of a level above on the client's data alone, and sent to nobody.

    Args:
        trainer: The client's.
        start: What it starts from, its edge's newest version say.
        client: Whose data.
        seed: Of the training.
        steps: Local steps; None for the client's own setting.
    """
    job = Job(id=0, client=client, model=WHOLE, version=0, seed=seed, steps=steps, rank=None)
    made = start.plus(trainer.train(start, job).delta)
    finite(made.flat)
    return made


def _grid(n: int) -> list[tuple[float, ...]]:
    def parts(left: int, slots: int) -> list[tuple[int, ...]]:
        if slots == 1:
            return [(left,)]
        return [(first, *rest) for first in range(left + 1) for rest in parts(left - first, slots - 1)]

    return [tuple(i / GRID for i in p) for p in parts(GRID, n)]


def _moved(shares: tuple[float, ...], giver: int, taker: int, step: float) -> tuple[float, ...] | None:
    by = min(step, shares[giver])
    if not by:
        return None
    found = list(shares)
    found[giver] -= by
    found[taker] += by
    return tuple(found)
