"""FedAsync: the server moves towards a client's whole adapter, instead of adding what it changed.

    w ← (1 − α_τ)·w + α_τ·w_client,     α_τ = α·s(τ)

(Xie, Koyejo and Gupta 2019, arXiv 1903.03934, algorithm 1). For LoRA that is done with products, and the head at the
server's rank is the next version. Weights by examples play no part, as published. Several updates between two versions
are mixed in one after another, so their order matters a little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from agora.errors import ConfigError
from fed.adapter import Adapter, Method
from fed.aggregate.product import STACK, ProductRule
from fed.aggregate.rule import Contribution, State, share, whole
from fed.aggregate.terms import Factors, Term, Whole, load_factors, save_factors, summed

ALPHA: Final = 0.6
"""As in the paper's experiments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixOptions:
    """Of the rule `mix`.

    Attributes:
        alpha: α, above 0 and at most 1.
        seed: Of the random rows of unused ranks.
    """

    alpha: float = ALPHA
    seed: int = 0

    def __post_init__(self) -> None:
        share("alpha", self.alpha, whole_too=True)
        if not self.alpha:
            raise ConfigError("alpha is 0, so that nothing would ever be learned")
        whole("seed", self.seed, least=0)


class Mix(ProductRule):
    """See the module. Any mix of ranks, all kinds of adapters.

    Plain tensors take one vector, however many updates come; of LoRA, adapters are held until they take `STACK`
    columns, and then half as many singular values of their mixture.

    Args:
        initial: The first version.
        options: `MixOptions`.
    """

    name = "mix"
    options_type: ClassVar[type[Any]] = MixOptions
    methods: ClassVar[frozenset[Method]] = frozenset(Method)

    def __init__(self, initial: Adapter, options: MixOptions | None = None) -> None:
        super().__init__(initial, options)
        self._mixed: Adapter | None = None
        self._parts: list[tuple[float, Adapter]] = []
        self._folded = Factors()
        self._cut = 0.0

    def _take(self, contribution: Contribution) -> None:
        alpha = float(self._options.alpha * contribution.discount)
        client = contribution.start.plus(contribution.delta)
        if self._spec.method is not Method.LORA:
            mixed = self._current if self._mixed is None else self._mixed
            self._mixed = mixed.plus(np.float32(alpha) * (client.flat - mixed.flat))
            return
        if not self._parts and not self._folded.by_layer:
            self._parts = [(1.0, self._current)]
        self._parts = [(weight * (1 - alpha), adapter) for weight, adapter in self._parts]
        self._folded = Factors(
            {layer: (p, np.float32(1 - alpha) * q) for layer, (p, q) in self._folded.by_layer.items()}
        )
        self._cut *= 1 - alpha
        self._parts.append((alpha, client))
        if sum(term.columns for _, term in self._terms()) > STACK:
            self._fold()

    def _next(self) -> Adapter:
        if self._mixed is not None:
            return self._finite(self._mixed)
        made, _, cut = self._summed(self._terms(), self._spec.rank, 0)
        self._notes = {"cut": math.hypot(cut, self._cut)}
        return self._finite(made)

    def _terms(self) -> list[tuple[float, Term]]:
        return [(1.0, self._folded), *((weight, Whole(adapter)) for weight, adapter in self._parts)]

    def _fold(self) -> None:
        folded, cut = {}, 0.0
        for layer, found in summed(self._spec, self._terms(), STACK // 2):
            folded[layer] = found.block(0)
            cut += found.cut**2
        self._folded, self._parts = Factors(folded), []
        self._cut += math.sqrt(cut)

    def _forget(self) -> None:
        super()._forget()
        self._mixed, self._parts, self._folded, self._cut = None, [], Factors(), 0.0

    def _save(self, state: State) -> None:
        if self._mixed is not None:
            state.arrays["mixed"] = self._mixed.flat
        save_factors(state, "folded", self._folded)
        state.facts.update(cut=self._cut, parts=[[weight, adapter.spec.rank] for weight, adapter in self._parts])
        state.arrays.update({f"part{n}": adapter.flat for n, (_, adapter) in enumerate(self._parts)})

    def _load(self, state: State) -> None:
        self._mixed = Adapter(self._spec, state.arrays["mixed"]) if "mixed" in state.arrays else None
        self._folded = load_factors(state, "folded", self._spec)
        self._cut = float(state.facts["cut"])
        self._parts = [
            (float(weight), Adapter(self._ranked(rank), state.arrays[f"part{n}"]))
            for n, (weight, rank) in enumerate(state.facts["parts"])
        ]
