"""How far rules are from the best adapter of the rank, round after round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from benchmarks.aggregate_parts.clients import LAYER, Target, spec, targets, train
from fed.aggregate.lowrank import fresh, product
from fed.aggregate.rule import Contribution
from fed.aggregate.rules import make

CLIENTS: Final = 16

RANKS: Final[Mapping[str, Sequence[int]]] = MappingProxyType({"equal": [16] * CLIENTS, "mixed": [4, 8, 16, 32] * 4})
"""Of the clients; the server has the highest."""

RULES: Final[Mapping[str, tuple[str, dict[str, Any]]]] = MappingProxyType(
    {
        "delta": ("delta", {}),
        "delta_without_error": ("delta", {"error_rank": 0}),
        "factor_mean": ("factor_mean", {}),
        "factor_mean_of_updates": ("factor_mean", {"padding": "update"}),
    }
)
"""What is compared; the last pads with updates of zero instead of, as published, weights of zero."""

ROUNDS: Final = 10

LOOKED_AT: Final = (1, 2, 5, ROUNDS)
"""Rounds after which errors are taken: each needs a dense SVD."""


@dataclass(frozen=True, slots=True)
class Course:
    """Of one rule with one mix of ranks.

    Attributes:
        to_sum: By round, ‖W − S‖ over that of the best adapter of the rank, where S is the exact sum of all that was
            absorbed (Frobenius).
        to_target: The same for the mean of what clients want.
        relative: ‖W − S‖/‖S‖ in the end.
        relative_best: That of the best adapter of the rank.
    """

    to_sum: dict[int, float]
    to_target: dict[int, float]
    relative: float
    relative_best: float


def course(side: int, rule_name: str, ranks: Sequence[int], seed: int) -> Course:
    """Rounds in which all clients take part, of equal weight."""
    name, settings = RULES[rule_name]
    wanted = targets(side, len(ranks), seed)
    highest = max(ranks)
    # One thread: these matrices are small, and the machine is rarely alone with a benchmark.
    with threadpool_limits(1, user_api="blas"):
        mean = _mean(wanted)
        least = _least(mean, highest)
        rule = make(name, fresh(spec(side, highest), seed), **settings)
        total = product(rule.current, LAYER).astype(np.float64)
        to_sum: dict[int, float] = {}
        to_target: dict[int, float] = {}
        off = best = 0.0
        for number in range(1, ROUNDS + 1):
            for client, (rank, target) in enumerate(zip(ranks, wanted, strict=True)):
                start = rule.start_for(rule.current, rank)
                delta = train(start, target)
                rule.absorb(Contribution(client=f"c{client}", start=start, delta=delta))
                total += (product(start.plus(delta), LAYER) - product(start, LAYER)) / len(ranks)
            made = product(rule.publish(), LAYER)
            if number in LOOKED_AT:
                off, best = float(np.linalg.norm(made - total)), _least(total, highest)
                to_sum[number] = off / best
                to_target[number] = float(np.linalg.norm(made - mean) / least)
        size = float(np.linalg.norm(total))
    return Course(to_sum, to_target, off / size, best / size)


def _mean(wanted: Sequence[Target]) -> NDArray[np.float64]:
    total = sum((t.left @ t.right for t in wanted), np.zeros(1, np.float32))
    return np.asarray(total, np.float64) / len(wanted)


def _least(matrix: NDArray[np.float64], rank: int) -> float:
    """What the best approximation of a rank misses (Eckart-Young)."""
    values = np.linalg.svd(matrix, compute_uv=False)[rank:]
    return float(np.sqrt((values**2).sum()))
