"""Synthetic clients: each pulls a low-rank adapter of one matrix towards a matrix of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fed.adapter import Adapter, LayerSize, Method, Spec, Vector

LAYER: Final = "layer"

TRUE_RANK: Final = 48
"""Rank of what all clients have in common: more than any adapter here has."""

OWN_RANK: Final = 16
"""Rank of what a client has for itself."""

DECAY: Final = 0.9
"""Each singular value over the one before: the 32 largest of 48 then hold 0.998 of the squares, the 8 largest 0.81."""

OWN: Final = 0.5
"""Norm of a client's own part over the common one: clearly non-IID."""

STEPS: Final = 5
"""Local steps of a job."""

RATE: Final = 0.3
"""Of a local step, over the largest curvature there is."""

Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Target:
    """What a client wants: U·V, with U (m, q) and V (q, n), so that the matrix need not be formed."""

    left: Matrix
    right: Matrix


def targets(side: int, clients: int, seed: int) -> list[Target]:
    """One for each client: a common part with falling singular values, and one of its own."""
    rng = np.random.default_rng([seed, 1])
    common = _factors(rng, side, TRUE_RANK, 1.0)
    found = []
    for _ in range(clients):
        own = _factors(rng, side, OWN_RANK, OWN)
        found.append(Target(np.concatenate([common[0], own[0]], axis=1), np.concatenate([common[1], own[1]], axis=0)))
    return found


def spec(side: int, rank: int) -> Spec:
    """LoRA of one square layer, with s = 1 at rank 16."""
    return Spec.lora({LAYER: LayerSize(side, side)}, rank=rank, alpha=16.0)


def train(start: Adapter, target: Target) -> Vector:
    """Gradient descent on ½‖s·B·A − U·V‖² from a start; what that adds to it."""
    assert start.spec.method is Method.LORA
    s = np.float32(start.spec.scaling)
    b, a = start[f"{LAYER}.lora_B"].copy(), start[f"{LAYER}.lora_A"].copy()
    for _ in range(STEPS):
        # Both gradients without the matrix; each step over the largest eigenvalue of its factor's curvature.
        to_b = s * (s * b @ (a @ a.T) - target.left @ (target.right @ a.T))
        to_a = s * (s * (b.T @ b) @ a - (b.T @ target.left) @ target.right)
        curve = s * s * max(np.linalg.norm(a @ a.T, 2), np.linalg.norm(b.T @ b, 2))
        b -= np.float32(RATE / curve) * to_b
        a -= np.float32(RATE / curve) * to_a
    end = Adapter.from_tensors(start.spec, {f"{LAYER}.lora_A": a, f"{LAYER}.lora_B": b})
    return end.flat - start.flat


def _factors(rng: np.random.Generator, side: int, rank: int, size: float) -> tuple[Matrix, Matrix]:
    u, v = (np.linalg.qr(rng.standard_normal((side, rank)))[0] for _ in range(2))
    sigma = DECAY ** np.arange(rank)
    sigma *= size / np.linalg.norm(sigma)
    return (u * np.sqrt(sigma)).astype(np.float32), (v * np.sqrt(sigma)).T.astype(np.float32)
