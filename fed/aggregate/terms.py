"""What sums of products are made of, and the stack in which updates wait to be added up.

An update from (B⁰, A⁰) to (B, A) = (B⁰ + dB, A⁰ + dA) changes the product by s(BA − B⁰A⁰) = s(dB·A + B⁰·dA). The second
term of all updates that began from the same adapter has the same B⁰, so that k of them at rank r need (k + 1)·r columns
instead of 2k·r.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import torch

from agora.errors import StoreError
from fed.adapter import Adapter, Spec, Vector
from fed.aggregate.lowrank import Block, Svd, svd
from fed.aggregate.rule import State

PARALLEL_FROM: Final = 300_000
"""Numbers in all factors from which several layers are worked on at a time: it costs a millisecond to begin, and about
as long to factor so many."""


class Term(Protocol):
    """A sum of products, layer by layer."""

    @property
    def columns(self) -> int:
        """Columns that it takes in a layer."""

    def blocks(self, layer: str, scale: float) -> Sequence[Block]:
        """Its factors there, times `scale`."""


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """The product of an adapter, s·B·A."""

    adapter: Adapter

    @property
    def columns(self) -> int:
        """See `Term`."""
        return self.adapter.spec.rank

    def blocks(self, layer: str, scale: float) -> Sequence[Block]:
        """See `Term`."""
        b, a = self.adapter[f"{layer}.lora_B"], self.adapter[f"{layer}.lora_A"]
        return [(b, np.float32(scale * self.adapter.spec.scaling) * a)]


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """Factors by layer."""

    by_layer: Mapping[str, Block] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """See `Term`."""
        return max((p.shape[1] for p, _ in self.by_layer.values()), default=0)

    def blocks(self, layer: str, scale: float) -> Sequence[Block]:
        """See `Term`."""
        if layer not in self.by_layer:
            return []
        p, q = self.by_layer[layer]
        return [(p, np.float32(scale) * q)]


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Weighted updates from one start: Σ c_i·s(B_i·A_i − B⁰·A⁰)."""

    start: Adapter
    updates: list[tuple[float, Vector]] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """See `Term`."""
        return (len(self.updates) + 1) * self.start.spec.rank

    def blocks(self, layer: str, scale: float) -> Sequence[Block]:
        """See `Term`."""
        b_name, a_name = f"{layer}.lora_B", f"{layer}.lora_A"
        b0, a0 = self.start[b_name], self.start[a_name]
        moved = np.zeros_like(a0)
        found: list[Block] = []
        for weight, delta in self.updates:
            change = Adapter(self.start.spec, delta)
            c = np.float32(scale * weight * self.start.spec.scaling)
            da = change[a_name]
            moved += c * da
            found.append((change[b_name], c * (a0 + da)))
        found.append((b0, moved))
        return found


def add_to(groups: list[Group], start: Adapter, weight: float, delta: Vector) -> int:
    """Puts an update beside those from the same start; returns the columns that this takes."""
    for group in groups:
        same = group.start is start or (group.start.spec == start.spec and np.array_equal(group.start.flat, start.flat))
        if same:
            group.updates.append((weight, delta))
            return start.spec.rank
    groups.append(Group(start, [(weight, delta)]))
    return 2 * start.spec.rank


def summed(spec: Spec, terms: Sequence[tuple[float, Term]], keep: int) -> Iterator[tuple[str, Svd]]:
    """The largest singular values of a weighted sum of terms, layer by layer.

    Every layer is worked on by one thread, as many layers at a time as torch may use threads: several threads in one
    small factorisation mostly wait for each other (measured 40 times slower on a busy machine), and the result has the
    same bytes whatever their number.

    Args:
        spec: Whose layers.
        terms: Weight and term.
        keep: Most singular values wanted.
    """

    def one(layer: str) -> Svd:
        blocks = [block for scale, term in terms for block in term.blocks(layer, scale)]
        return svd(blocks, spec.layers[layer], keep)

    threads = torch.get_num_threads()
    numbers = sum(term.columns for _, term in terms) * sum(s.inputs + s.outputs for s in spec.layers.values())
    workers = min(threads, len(spec.layers)) if numbers >= PARALLEL_FROM else 1
    # Holds for this thread, and for those that begin before it is set back.
    torch.set_num_threads(1)
    try:
        if workers == 1:
            for layer in spec.layers:
                yield layer, one(layer)
        else:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield from zip(spec.layers, pool.map(one, spec.layers), strict=True)
    finally:
        torch.set_num_threads(threads)


class Stack:
    """Weighted updates that wait to be added up, in bounded memory.

    Updates are held by reference, at no cost, until they take more than `cap` columns; then all are added up and the
    cap//2 largest singular values kept. So it is exact, up to rounding, as long as there are at most `cap` columns, and
    beyond that as long as the sum's rank is at most cap//2 in every layer; otherwise it keeps what cap//2 columns can
    hold best (Eckart-Young), and `cut` tells how much was lost.

    Args:
        spec: Of the server's adapter.
        cap: Most columns.
    """

    def __init__(self, spec: Spec, cap: int) -> None:
        self._spec = spec
        self._cap = cap
        self._groups: list[Group] = []
        self._folded = Factors()
        self._columns = 0
        self.cut = 0.0

    def add(self, start: Adapter, weight: float, delta: Vector) -> None:
        """Adds weight times what an update changes of the product."""
        self._columns += add_to(self._groups, start, weight, delta)
        if self._columns > self._cap:
            self._fold()

    def terms(self, scale: float) -> list[tuple[float, Term]]:
        """The sum so far, times `scale`."""
        return [(scale, self._folded), *((scale, group) for group in self._groups)]

    def clear(self) -> None:
        """Begins anew."""
        self._groups, self._folded, self._columns, self.cut = [], Factors(), 0, 0.0

    def save(self) -> State:
        """All of it."""
        state = State({}, {"columns": self._columns, "cut": self.cut, "groups": []})
        save_factors(state, "folded", self._folded)
        for n, group in enumerate(self._groups):
            state.arrays[f"start{n}"] = group.start.flat
            state.facts["groups"].append([group.start.spec.rank, [weight for weight, _ in group.updates]])
            for m, (_, delta) in enumerate(group.updates):
                state.arrays[f"delta{n}.{m}"] = delta
        return state

    def load(self, state: State) -> None:
        """Goes on from what `save` returned."""
        self._folded = load_factors(state, "folded", self._spec)
        self._columns, self.cut = int(state.facts["columns"]), float(state.facts["cut"])
        self._groups = []
        for n, (rank, weights) in enumerate(state.facts["groups"]):
            start = Adapter(at(self._spec, rank), state.arrays[f"start{n}"])
            updates = [(float(weight), state.arrays[f"delta{n}.{m}"]) for m, weight in enumerate(weights)]
            self._groups.append(Group(start, updates))

    def _fold(self) -> None:
        keep, folded, cut = self._cap // 2, {}, 0.0
        for layer, found in summed(self._spec, self.terms(1.0), keep):
            folded[layer] = found.block(0)
            cut += found.cut**2
        self._folded, self._groups = Factors(folded), []
        self._columns = self._folded.columns
        self.cut = math.hypot(self.cut, math.sqrt(cut))


def at(spec: Spec, rank: int) -> Spec:
    """A spec at a rank, itself if it has it."""
    return spec if spec.rank == rank else spec.at_rank(rank)


def save_factors(state: State, name: str, factors: Factors) -> None:
    """Files factors under a name."""
    for n, (p, q) in enumerate(factors.by_layer.values()):
        state.arrays[f"{name}.p{n}"], state.arrays[f"{name}.q{n}"] = np.ascontiguousarray(p), np.ascontiguousarray(q)
    state.facts[name] = bool(factors.by_layer)


def load_factors(state: State, name: str, spec: Spec) -> Factors:
    """The factors that `save_factors` filed.

    Raises:
        StoreError: If a shape is not that of its layer.
    """
    if not state.facts[name]:
        return Factors()
    found: dict[str, Block] = {}
    for n, (layer, size) in enumerate(spec.layers.items()):
        p, q = state.arrays[f"{name}.p{n}"], state.arrays[f"{name}.q{n}"]
        if p.ndim != 2 or p.shape[0] != size.outputs or q.shape != (p.shape[1], size.inputs):
            raise StoreError(f"the factors {name!r} of layer {layer!r} have shapes {p.shape} and {q.shape}")
        found[layer] = (p, q)
    return Factors(found)
