"""Moves a small change of LoRA factors to other factors of the same layers: another version, another rank.

Numbers of factors mean something only beside the factors they are added to: a server that factors its sum anew may
hand out (B·G, G⁻¹·A), the same adapter in other coordinates. What stays the same is the change of the product, so that
is what is moved. A server that averages factors, or keeps A, hands out almost the same numbers again: then they stay.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fed.adapter import A, Adapter, B, Method, Vector

Matrix = NDArray[np.float64]

CUTOFF: Final = 0.01
"""Directions of a factor weaker than this, relative to its layer's strongest, take no part: to express a change through
them would need numbers a hundred times larger than the change. On matrix fitting with top-2 % and -10 %, 8 clients, the
factors made anew by SVD every round, any value from 0.001 to 0.1 came to the same loss, 0.3 to ten times as much."""

UNTURNED: Final = 0.5
"""Most of the change, by norm, that the numbers as they are may miss for the coordinates to count as the same. Between
coordinates that have nothing to do with each other they miss more than all of it."""


def carry(delta: Vector, start: Adapter, onto: Adapter) -> Vector | None:
    """The change `delta` of `start` as a change of `onto`.

    For LoRA: with E = s₀·(ΔB·A₀ + B₀·ΔA), the change of the product to first order, it is the smallest (ΔB, ΔA) that
    minimises ‖s₁(ΔB·A₁ + B₁·ΔA) − E‖_F. With B₁ = U·diag(σ)·Kᵀ and A₁ = H·diag(ς)·Vᵀ every pair (i, j) of singular
    directions is an equation of its own, solved by E_ij·(ς_j, σ_i)/(σ_i² + ς_j²). The part of E that `onto` cannot
    express, outside both U and V, is dropped, so E never grows; with the second-order ΔB·ΔA in it, it can run away.

    Where the numbers as they are make up most of E already, they are kept and only the rest is solved for: a rule that
    trains B alone then finds nothing in A. Nothing of size inputs × outputs is formed.

    Args:
        delta: Shape (start.spec.size,).
        start: What it was to be added to.
        onto: What it is to be added to.

    Returns:
        Shape (onto.spec.size,); None if the two adapters have nothing in common.
    """
    # Equal specs may still have their tensors in another order.
    same = start.spec == onto.spec and list(start.spec.shapes) == list(onto.spec.shapes)
    if same and (start is onto or np.array_equal(start.flat, onto.flat)):
        return delta
    if start.spec.method is not Method.LORA or onto.spec.method is not Method.LORA:
        return delta if same else None
    if start.spec.layers != onto.spec.layers or start.spec.base != onto.spec.base:
        return None
    change = dict(_named(Adapter(start.spec, delta)))
    target = dict(_named(onto))
    moved = np.empty(onto.spec.size, np.float32)
    result = Adapter(onto.spec, moved)
    for layer, b, a in start.factors():
        change_b, change_a = change[layer]
        # left·right = E/s₁.
        left = np.concatenate([change_b, b], axis=1).astype(np.float64) * (start.spec.scaling / onto.spec.scaling)
        right = np.concatenate([a, change_a]).astype(np.float64)
        new_b, new_a = _move(left, right, change[layer], target[layer])
        result[f"{layer}.{B}"][:] = new_b
        result[f"{layer}.{A}"][:] = new_a
    return moved


def _named(adapter: Adapter) -> list[tuple[str, tuple[Vector, Vector]]]:
    return [(layer, (b, a)) for layer, b, a in adapter.factors()]


def _move(
    left: Matrix, right: Matrix, change: tuple[Vector, Vector], target: tuple[Vector, Vector]
) -> tuple[Matrix, Matrix]:
    """(ΔB, ΔA) of the target that mean left·right: near `change` if that nearly means it too, else the smallest."""
    b, a = (factor.astype(np.float64) for factor in target)
    change_b, change_a = (factor.astype(np.float64) for factor in change)
    if change_b.shape == b.shape:
        left_rest = np.concatenate([left, -b, -change_b], axis=1)
        right_rest = np.concatenate([right, change_a, a])
        if _norm(left_rest, right_rest) <= UNTURNED * _norm(left, right):
            more_b, more_a = _solve(left_rest, right_rest, b, a)
            return change_b + more_b, change_a + more_a
    return _solve(left, right, b, a)


def _norm(left: Matrix, right: Matrix) -> float:
    """‖left·right‖_F = √tr((leftᵀ·left)·(right·rightᵀ))."""
    return math.sqrt(max(0.0, float(np.vdot(left.T @ left, right @ right.T))))


def _solve(left: Matrix, right: Matrix, b: Matrix, a: Matrix) -> tuple[Matrix, Matrix]:
    """The smallest (ΔB, ΔA) for which b·ΔA + ΔB·a is nearest to left·right."""
    u, sigma, k = _directions(b)
    v, rho, h = _directions(a.T)
    weakest = CUTOFF * max(sigma.max(), rho.max())
    u, sigma = u * (sigma > weakest), np.where(sigma > weakest, sigma, 0.0)
    v, rho = (v * (rho > weakest)).T, np.where(rho > weakest, rho, 0.0)
    rows, columns = (u.T @ left) @ right, left @ (right @ v.T)
    inner = rows @ v.T
    both = inner * _inverse(sigma[:, None] ** 2 + rho[None, :] ** 2)
    outside_v = (rows - inner @ v) * _inverse(sigma**2)[:, None]
    outside_u = (columns - u @ inner) * _inverse(rho**2)[None, :]
    return (outside_u + u @ both) * rho @ h.T, k * sigma @ (outside_v + both @ v)


def _directions(x: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Thin SVD, x = u·diag(σ)·kᵀ, by the small Gram matrix: in float64 exact enough above `CUTOFF`."""
    squares, k = np.linalg.eigh(x.T @ x)
    sigma = np.sqrt(np.maximum(squares, 0.0))
    return (x @ k) * _inverse(sigma), sigma, k


def _inverse(x: Matrix) -> Matrix:
    """1/x, and 0 of 0."""
    return np.divide(1.0, x, out=np.zeros_like(x), where=x > 0)
