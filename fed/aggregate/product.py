"""What all rules share that add up products instead of factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fed.adapter import Adapter, Method
from fed.aggregate.lowrank import Block, Svd, factors, layer_rng
from fed.aggregate.rule import Base, Options, whole
from fed.aggregate.terms import Factors, Term, Whole, summed

STACK: Final = 512
"""Columns in which updates may wait: 16 clients of rank 16 that began with the same version take 272, with 16 different
ones 512."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductOptions(Options):
    """Of rules that add up products.

    Attributes:
        stack: Most columns in which updates wait, per layer (`fed.aggregate.terms.Stack`).
    """

    stack: int = STACK

    def __post_init__(self) -> None:
        # Without zero arguments: a slotted dataclass is another class than the one that `super()` closed over.
        super(ProductOptions, self).__post_init__()
        whole("stack", self.stack, least=2)


class ProductRule(Base):
    """Clients of any rank start from the head of the product at their rank."""

    def combined(self, parts: Sequence[tuple[float, Adapter]], rank: int | None = None) -> Adapter:
        """See `Base.combined`: the best adapter of that rank for the sum of products."""
        if self._spec.method is not Method.LORA:
            return super().combined(parts, rank)
        wanted = self._spec.rank if rank is None else rank
        made = self._summed([(weight, Whole(adapter)) for weight, adapter in parts], wanted, 0)[0]
        return self._finite(made)

    def _at_rank(self, adapter: Adapter, rank: int) -> Adapter:
        """The best rank-r approximation of every layer's product; all of it, if r is not below the adapter's rank."""
        return self._made(Whole(adapter), rank)[0]

    def _made(self, term: Term, rank: int) -> tuple[Adapter, Factors, float]:
        return self._summed([(1.0, term)], rank, 0)

    def _summed(self, terms: Sequence[tuple[float, Term]], rank: int, behind: int) -> tuple[Adapter, Factors, float]:
        """The head of a sum at a rank, the `behind` singular values after it, and √Σσ² of the rest."""
        spec = self._ranked(rank)
        adapter = Adapter.zeros(spec)
        tails: dict[str, Block] = {}
        cut = 0.0
        for number, (layer, found) in enumerate(summed(spec, terms, rank + behind)):
            self._write(adapter, number, layer, found)
            if behind:
                tails[layer] = found.block(rank)
            cut += found.cut**2
        return adapter, Factors(tails), cut**0.5

    def _write(self, adapter: Adapter, number: int, layer: str, found: Svd) -> None:
        spec = adapter.spec
        b, a = factors(
            found,
            spec.layers[layer],
            rank=spec.rank,
            scaling=spec.scaling,
            rng=layer_rng(self._options.seed, number),
        )
        adapter[f"{layer}.lora_B"][:], adapter[f"{layer}.lora_A"][:] = b, a
