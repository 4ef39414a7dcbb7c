"""Sums of low-rank products without ever forming the matrix.

Σ_j P_j·Q_j is P·Q with the factors side by side: P of shape (m, k), Q of shape (k, n). Thin QR of P and of Qᵀ leaves a
small core R_P·R_Qᵀ, whose singular values are those of the sum; the Householder reflections turn the core's singular
vectors into the sum's. O((m + n)k² + k³) time, O((m + n)k) memory. LAPACK through torch, in float32: numpy's QR works
in float64, and was measured to take six times as long on (4096, 288).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from agora.errors import AdapterError
from fed.adapter import Adapter, LayerSize, Spec

Matrix = NDArray[np.float32]

Block = tuple[Matrix, Matrix]
"""P of shape (m, k) and Q of shape (k, n)."""

INITIAL_NORM: Final = 1 / math.sqrt(3)
"""Norm of a row of A as peft begins: numbers uniform in ±1/√n, hence of variance 1/(3n)."""

NOTHING: Final = 8 * float(np.finfo(np.float32).eps)
"""Singular values under this share of the largest, times √k, are rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Svd:
    """U·diag(σ)·V with orthonormal U (m, q) and Vᵀ (n, q), and σ (q,) falling.

    Attributes:
        cut: √Σσ² of what is left out.
    """

    left: Matrix
    values: Matrix
    right: Matrix
    cut: float = 0.0

    def block(self, start: int, stop: int | None = None) -> Block:
        """A run of its singular values as factors, rounding left out."""
        stop = min(len(self.values) if stop is None else stop, self.rank)
        return np.ascontiguousarray(self.left[:, start:stop] * self.values[start:stop]), self.right[start:stop]

    @property
    def rank(self) -> int:
        """Singular values that are more than rounding."""
        if not len(self.values) or not self.values[0] > 0:
            return 0
        return int(np.count_nonzero(self.values > NOTHING * math.sqrt(len(self.values)) * self.values[0]))


def svd(blocks: Sequence[Block], size: LayerSize, keep: int) -> Svd:
    """The largest singular values, and their vectors, of a sum of products.

    Args:
        blocks: What is added up.
        size: Of the sum: m outputs, n inputs.
        keep: Most singular values wanted.

    Raises:
        AdapterError: If a number is NaN or infinite.
    """
    k = sum(p.shape[1] for p, _ in blocks)
    if not k:
        return _empty(size)
    # LAPACK wants columns one after another: rows of a C-ordered array, seen transposed.
    left, right = np.empty((k, size.outputs), np.float32), np.empty((k, size.inputs), np.float32)
    at = 0
    for p, q in blocks:
        left[at : at + p.shape[1]] = p.T
        right[at : at + p.shape[1]] = q
        at += p.shape[1]
    p_packed, p_tau = torch.geqrf(torch.from_numpy(left).T)
    q_packed, q_tau = torch.geqrf(torch.from_numpy(right).T)
    core = torch.triu(p_packed[:k]) @ torch.triu(q_packed[:k]).T
    if not bool(torch.isfinite(core).all()):
        raise AdapterError(
            "the next version would hold NaN or infinity, so what was absorbed is dropped",
            hint="look for clients whose training diverges, or clip updates",
        )
    u, values, vh = torch.linalg.svd(core, full_matrices=False)
    kept = min(keep, len(values))
    tail = values[kept:].double()
    return Svd(
        left=_applied(p_packed, p_tau, u[:, :kept]),
        values=values[:kept].numpy(),
        right=np.ascontiguousarray(_applied(q_packed, q_tau, vh[:kept].T).T),
        cut=math.sqrt(float((tail * tail).sum())),
    )


def factors(found: Svd, size: LayerSize, *, rank: int, scaling: float, rng: np.random.Generator) -> Block:
    """B (m, rank) and A (rank, n) with scaling·B·A equal to the product's head.

    The product leaves open how its size is shared out between the factors. A's rows keep at least the norm that they
    begin with (`INITIAL_NORM`): the gradient of B goes with A's size, and an even split √σ of the small products of
    early versions would slow down learning. Large ones are split evenly. So a rank whose σ falls to 0 goes over into an
    unused one: B = 0, A random, never both zero, or no gradient would ever bring it back.
    """
    used = min(found.rank, rank)
    sigma = found.values[:used] / np.float32(scaling)
    norm = np.maximum(np.sqrt(sigma), np.float32(INITIAL_NORM))
    b, a = np.zeros((size.outputs, rank), np.float32), np.empty((rank, size.inputs), np.float32)
    b[:, :used] = found.left[:, :used] * (sigma / norm)
    a[:used] = found.right[:used] * norm[:, None]
    a[used:] = unused(rank, size.inputs, rng)[used:]
    return b, a


def unused(rank: int, inputs: int, rng: np.random.Generator) -> Matrix:
    """Rows of A as peft begins (Kaiming uniform with a = √5): uniform in ±1/√n, shape (rank, inputs)."""
    bound = 1 / math.sqrt(inputs)
    return rng.uniform(-bound, bound, (rank, inputs)).astype(np.float32)


def fresh(spec: Spec, seed: int = 0) -> Adapter:
    """A LoRA adapter as peft begins: B = 0, A random.

    Args:
        spec: Of the adapter.
        seed: Of its randomness.

    Raises:
        AdapterError: If the spec is not of LoRA.
    """
    spec.at_rank(spec.rank)
    adapter = Adapter.zeros(spec)
    for number, (_, _, a) in enumerate(adapter.factors()):
        a[:] = unused(spec.rank, a.shape[1], layer_rng(seed, number))
    return adapter


def layer_rng(seed: int, layer: int) -> np.random.Generator:
    """The random numbers of a layer: the same at any rank, in any version."""
    return np.random.default_rng([seed, layer])


def product(adapter: Adapter, layer: str) -> Matrix:
    """s·B·A of a layer, shape (outputs, inputs): for tests and references, since it is large."""
    found: Matrix = np.float32(adapter.spec.scaling) * (adapter[f"{layer}.lora_B"] @ adapter[f"{layer}.lora_A"])
    return found


def _applied(packed: torch.Tensor, tau: torch.Tensor, core: torch.Tensor) -> Matrix:
    """Q·core, where Q is what QR left packed as reflections."""
    padded = torch.zeros(packed.shape[0], core.shape[1])
    padded[: core.shape[0]] = core
    applied: Matrix = torch.ormqr(packed[:, : len(tau)], tau, padded).contiguous().numpy()
    return applied


def _empty(size: LayerSize) -> Svd:
    return Svd(
        left=np.zeros((size.outputs, 0), np.float32),
        values=np.zeros(0, np.float32),
        right=np.zeros((0, size.inputs), np.float32),
    )
