"""The reference: whole matrices are added up, and an SVD of the sum is cut to the rank (FlexLoRA).

FlexLoRA (Bai et al. 2024, arXiv 2402.11505) averages the s_i·B_i·A_i and gives every client the head of the sum at its
rank; as deltas here. It needs the m×n matrix of every layer and O(mn·min(m, n)) time, where `fed.aggregate.delta`
without an error buffer gets the same.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fed.adapter import Adapter
from fed.aggregate.lowrank import Matrix, Svd, product
from fed.aggregate.product import ProductRule
from fed.aggregate.rule import Contribution, Options, State, finite


class Dense(ProductRule):
    """See the module. Any mix of ranks. Holds one matrix per layer, however many updates come.

    Args:
        initial: The first version.
        options: `Options`.
    """

    name = "dense"
    options_type: ClassVar[type[Options]] = Options

    def __init__(self, initial: Adapter, options: Options | None = None) -> None:
        super().__init__(initial, options)
        self._sums: dict[str, Matrix] = {}

    def _take(self, contribution: Contribution) -> None:
        start = contribution.start
        end = start.plus(contribution.delta)
        weight = np.float32(contribution.weight)
        for layer, size in self._spec.layers.items():
            change = weight * (product(end, layer) - product(start, layer))
            if layer not in self._sums:
                self._sums[layer] = np.zeros((size.outputs, size.inputs), np.float32)
            self._sums[layer] += change

    def _next(self) -> Adapter:
        made = Adapter.zeros(self._spec)
        lost = 0.0
        for number, layer in enumerate(self._spec.layers):
            whole = product(self._current, layer) + np.float32(self._scale) * self._sums[layer]
            finite(whole.ravel())
            u, values, vh = np.linalg.svd(whole, full_matrices=False)
            rank = self._spec.rank
            self._write(made, number, layer, Svd(left=u[:, :rank], values=values[:rank], right=vh[:rank]))
            lost += float((values[rank:].astype(np.float64) ** 2).sum())
        self._notes = {"cut": lost**0.5}
        return made

    def _forget(self) -> None:
        super()._forget()
        self._sums = {}

    def _save(self, state: State) -> None:
        state.arrays.update({f"sum{n}": self._sums[layer].copy() for n, layer in enumerate(self._sums)})

    def _load(self, state: State) -> None:
        self._sums = {
            layer: np.array(state.arrays[f"sum{n}"])
            for n, layer in enumerate(self._spec.layers)
            if f"sum{n}" in state.arrays
        }
