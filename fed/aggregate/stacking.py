"""Stacking: factors are put side by side, so that the sum is exact and the server's rank grows (FLoRA).

FLoRA (Wang et al. 2024, arXiv 2409.05976) stacks the B_i beside and the A_i below each other: the product of the stacks
is Σ c_i·B_i·A_i without an error. There, clients merge the stack into their base model and begin with new factors; here
the base stays as it is, so a version carries all that was learned, and what is stacked on it are deltas. Versions have
`max_rank` ranks at most: beyond that the stack is cut to its largest singular values. What is served needs that rank
(vLLM: `--max-lora-rank`); clients of any rank start from the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from agora.errors import ConfigError
from fed.adapter import Adapter
from fed.aggregate.lowrank import INITIAL_NORM
from fed.aggregate.product import ProductOptions, ProductRule
from fed.aggregate.rule import Contribution, State, whole
from fed.aggregate.terms import Stack, Term, Whole

MAX_RANK: Final = 256
"""Most ranks of a version: 15 updates of rank 16 on top of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackingOptions(ProductOptions):
    """Of the rule `stacking`.

    Attributes:
        max_rank: Most ranks of a version.
    """

    max_rank: int = MAX_RANK

    def __post_init__(self) -> None:
        super(StackingOptions, self).__post_init__()
        whole("max_rank", self.max_rank, least=1)


class Stacking(ProductRule):
    """See the module. Any mix of ranks.

    `notes` has `rank`, the version's, and `cut`, √Σσ² of what did not fit into it.

    Args:
        initial: The first version.
        options: `StackingOptions`.

    Raises:
        ConfigError: If the first version has more ranks than allowed.
    """

    name = "stacking"
    options_type: ClassVar[type[ProductOptions]] = StackingOptions

    def __init__(self, initial: Adapter, options: StackingOptions | None = None) -> None:
        super().__init__(initial, options)
        self._options: StackingOptions
        if self._options.max_rank < self._spec.rank:
            raise ConfigError(f"max_rank is {self._options.max_rank}, below the server's rank of {self._spec.rank}")
        self._stack = Stack(self._spec, self._options.stack)

    def _take(self, contribution: Contribution) -> None:
        self._stack.add(contribution.start, contribution.weight, contribution.delta)

    def _next(self) -> Adapter:
        terms = [(1.0, Whole(self._current)), *self._stack.terms(self._scale)]
        columns = sum(term.columns for _, term in terms)
        cut = self._stack.cut * self._scale
        if columns <= self._options.max_rank:
            made = self._stacked(terms, columns)
        else:
            made, _, more = self._summed(terms, self._options.max_rank, 0)
            cut += more
        self._finite(made)
        self._notes = {"rank": made.spec.rank, "cut": cut}
        return made

    def _shifted(self, parts: Sequence[tuple[float, Adapter]]) -> Adapter:
        columns = self._current.spec.rank + sum(adapter.spec.rank for _, adapter in parts)
        return self.combined([(1.0, self._current), *parts], min(columns, self._options.max_rank))

    def _stacked(self, terms: list[tuple[float, Term]], columns: int) -> Adapter:
        adapter = Adapter.zeros(self._ranked(columns))
        for layer, b, a in adapter.factors():
            at = 0
            for scale, term in terms:
                for p, q in term.blocks(layer, scale):
                    # Rows of A get the norm that they begin with: see `fed.aggregate.lowrank.factors`.
                    size = np.linalg.norm(q, axis=1)
                    size[size == 0] = 1.0
                    part = slice(at, at + p.shape[1])
                    a[part] = q * (np.float32(INITIAL_NORM) / size)[:, None]
                    b[:, part] = p * (size / np.float32(INITIAL_NORM * adapter.spec.scaling))
                    at += p.shape[1]
        return adapter

    def _forget(self) -> None:
        super()._forget()
        self._stack.clear()

    def _save(self, state: State) -> None:
        state.put("stack", self._stack.save())

    def _load(self, state: State) -> None:
        self._stack.load(state.within("stack"))
