"""How alike updates are, by what they change, not by the numbers that travel.

LoRA's factors are not unique: (BG, G⁻¹A) is the same update for every invertible G, and clients may have different
ranks. So their updates are compared as products,

    ⟨P_iQ_i, P_jQ_j⟩ = tr((P_jᵀP_i)(Q_iQ_jᵀ)),

of which only small matrices are formed: O((m + n)·r²) a pair instead of O(m·n·r). Updates of other methods are vectors,
compared by their dot product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agora.errors import AdapterError
from fed.adapter import Adapter, Method, Spec, Vector
from fed.aggregate.lowrank import Block, svd
from fed.aggregate.rule import State

Matrix = NDArray[np.float64]

COLUMNS: Final = 4096
"""Columns of factors compared with as many others at a time: two matrices of 4096² float32 numbers take 128 MB."""

NUMBERS: Final = 65_536
"""Numbers of every vector compared at a time: of 256 clients 64 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What an update changes, or the weighted sum of several.

    Attributes:
        spec: Of the adapter, at any rank.
        factors: By layer of LoRA P of shape (outputs, k) and Q of shape (k, inputs): the change is P·Q.
        vector: Of other methods, shape (spec.size,).
    """

    spec: Spec
    factors: Mapping[str, Block]
    vector: Vector | None = None

    @classmethod
    def of(cls, start: Adapter, delta: Vector) -> Change:
        """What training changed.

        The difference s(BA − B⁰A⁰) is taken as s(ΔB·A⁰ + B·ΔA), which does not subtract what is nearly equal.

        Args:
            start: The adapter as it was sent to the client, of its rank.
            delta: What training added to it, shape (start.spec.size,).
        """
        if start.spec.method is not Method.LORA:
            return cls(start.spec, {}, delta)
        s = np.float32(start.spec.scaling)
        factors = {}
        for (layer, b0, a0), (_, db, da) in zip(start.factors(), Adapter(start.spec, delta).factors(), strict=True):
            factors[layer] = (s * np.hstack((db, b0 + db)), np.vstack((a0, da)))
        return cls(start.spec, factors)

    @classmethod
    def between(cls, old: Adapter, new: Adapter) -> Change:
        """What leads from one adapter to another, whose rank may differ.

        Raises:
            AdapterError: If they are not of the same layers, or of the same tensors.
        """
        if old.spec.method is not Method.LORA:
            if old.spec != new.spec:
                raise AdapterError("two adapters of different tensors cannot be compared")
            return cls(old.spec, {}, new.flat - old.flat)
        if old.spec.layers != new.spec.layers:
            raise AdapterError("two adapters of different layers cannot be compared")
        factors = {}
        for (layer, b0, a0), (_, b, a) in zip(old.factors(), new.factors(), strict=True):
            p = np.hstack((np.float32(-old.spec.scaling) * b0, np.float32(new.spec.scaling) * b))
            factors[layer] = (p, np.vstack((a0, a)))
        return cls(new.spec, factors)

    def mixed(self, other: Change, share: float, *, rank: int) -> Change:
        """(1 − share)·self + share·other.

        Args:
            other: Of an adapter of the same layers.
            share: From 0 to 1.
            rank: Most columns of the factors; the smallest singular values are left out above it.
        """
        if self.vector is not None and other.vector is not None:
            return Change(other.spec, {}, np.float32(1 - share) * self.vector + np.float32(share) * other.vector)
        keep, add = np.float32(1 - share), np.float32(share)
        factors = {}
        for layer, (p, q) in other.factors.items():
            old_p, old_q = self.factors[layer]
            both = (np.hstack((keep * old_p, add * p)), np.vstack((old_q, q)))
            factors[layer] = both if len(both[1]) <= rank else _cut(both, other.spec, layer, rank)
        return Change(other.spec, factors)

    def capped(self, rank: int) -> Change:
        """The same with at most so many columns, the smallest singular values left out."""
        if all(len(q) <= rank for _, q in self.factors.values()):
            return self
        return Change(self.spec, {n: _cut(f, self.spec, n, rank) for n, f in self.factors.items()}, self.vector)

    def save(self) -> State:
        """All numbers; not the spec."""
        if self.vector is not None:
            return State({"vector": self.vector}, {})
        arrays = {}
        for n, (p, q) in enumerate(self.factors.values()):
            arrays[f"p{n}"], arrays[f"q{n}"] = np.ascontiguousarray(p), np.ascontiguousarray(q)
        return State(arrays, {})

    @classmethod
    def load(cls, spec: Spec, arrays: Mapping[str, NDArray[np.float32]]) -> Change:
        """Reads what `save` told."""
        if "vector" in arrays:
            return cls(spec, {}, arrays["vector"])
        return cls(spec, {layer: (arrays[f"p{n}"], arrays[f"q{n}"]) for n, layer in enumerate(spec.layers)})


def gram(changes: Sequence[Change]) -> Matrix:
    """Inner products ⟨Δ_i, Δ_j⟩ of changes, shape (n, n), never forming a product.

    Raises:
        AdapterError: If some are of other layers, or of another size.
    """
    found = np.zeros((len(changes), len(changes)))
    if not changes:
        return found
    first = changes[0]
    for one in changes[1:]:
        if (one.vector is None) != (first.vector is None) or (
            one.spec.layers != first.spec.layers if one.vector is None else one.spec.size != first.spec.size
        ):
            raise AdapterError("updates of different adapters cannot be compared")
    if first.vector is not None:
        for at in range(0, first.spec.size, NUMBERS):
            block = np.stack([c.vector[at : at + NUMBERS] for c in changes if c.vector is not None]).astype(np.float64)
            found += block @ block.T
        return found
    for layer in first.factors:
        parts = _parts([c.factors[layer] for c in changes])
        for n, (rows, ours) in enumerate(parts):
            for columns, theirs in parts[: n + 1]:
                products = _inner(ours, theirs)
                found[rows, columns] += products
                if theirs is not ours:
                    found[columns, rows] += products.T
    return (found + found.T) / 2


def inner(one: Change, other: Change) -> float:
    """⟨Δ_i, Δ_j⟩."""
    return float(gram([one, other])[0, 1])


def norm(change: Change) -> float:
    """‖Δ‖, of LoRA that of the product."""
    return math.sqrt(max(float(gram([change])[0, 0]), 0.0))


def cosine(one: Change, other: Change) -> float:
    """⟨Δ_i, Δ_j⟩/(‖Δ_i‖·‖Δ_j‖); 0 if one of them is zero."""
    return float(cosines(gram([one, other]))[0, 1])


def centred(products: Matrix) -> Matrix:
    """Inner products after the mean of all is subtracted from each: what all clients have in common tells nothing."""
    mean = products.mean(0)
    found: Matrix = products - mean[:, None] - mean[None, :] + products.mean()
    return found


def cosines(products: Matrix) -> Matrix:
    """Cosines from inner products; 0 with whatever is zero, 1 with itself."""
    size = np.sqrt(np.maximum(np.diag(products), 0.0))
    # What is left of a mean that was subtracted from itself is rounding, not a direction.
    alive = size > 1e-7 * max(float(size.max(initial=0.0)), 1e-300)
    scale = np.divide(1.0, size, out=np.zeros_like(size), where=alive)
    found: Matrix = np.clip(products * scale[:, None] * scale[None, :], -1.0, 1.0)
    np.fill_diagonal(found, 1.0)
    return found


def distances(products: Matrix) -> Matrix:
    """1 − cosine, from 0 to 2, shape (n, n), zero on the diagonal."""
    found: Matrix = 1.0 - cosines(products)
    return np.maximum((found + found.T) / 2, 0.0)


def _parts(blocks: Sequence[Block]) -> list[tuple[slice, Sequence[Block]]]:
    """Runs of clients with about `COLUMNS` columns together."""
    found, start, columns = [], 0, 0
    for n, (p, _) in enumerate(blocks):
        if columns and columns + p.shape[1] > COLUMNS:
            found.append((slice(start, n), blocks[start:n]))
            start, columns = n, 0
        columns += p.shape[1]
    found.append((slice(start, len(blocks)), blocks[start:]))
    return found


def _inner(one: Sequence[Block], other: Sequence[Block]) -> Matrix:
    p, q = (np.hstack([b[0] for b in one]), np.vstack([b[1] for b in one]))
    p2, q2 = (p, q) if other is one else (np.hstack([b[0] for b in other]), np.vstack([b[1] for b in other]))
    both = (p.T @ p2).astype(np.float64) * (q @ q2.T)
    rows = np.cumsum([0, *(b[0].shape[1] for b in one)])[:-1]
    columns = np.cumsum([0, *(b[0].shape[1] for b in other)])[:-1]
    found: Matrix = np.add.reduceat(np.add.reduceat(both, rows, axis=0), columns, axis=1)
    return found


def _cut(block: Block, spec: Spec, layer: str, rank: int) -> Block:
    p, q = svd([(np.ascontiguousarray(block[0]), np.ascontiguousarray(block[1]))], spec.layers[layer], rank).block(0)
    if not p.shape[1]:
        # A change of nothing still has a shape.
        return np.zeros((len(block[0]), 1), np.float32), np.zeros((1, block[1].shape[1]), np.float32)
    return p, q
