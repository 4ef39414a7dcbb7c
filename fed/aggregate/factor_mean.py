"""The mean of factors: mean(B) and mean(A), each for itself.

That is FedIT (Zhang et al. 2023, arXiv 2305.05644): what federated averaging does with adapters when it knows nothing
of products. mean(B)·mean(A) is not mean(B·A), by the covariance of the two among clients. Clients of lower rank get the
first rows of A and columns of B, and what they lack is padded with zeros, as in HetLoRA (Cho et al. 2024, arXiv
2401.06432; without its pruning and its weights by norm). Numbers are in the server's scaling here: a client of rank r
gets both factors times √(s_server/s_r), so that s·B·A is what it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from agora.errors import AdapterError, ConfigError
from fed.adapter import Adapter, Method, Vector
from fed.aggregate.lowrank import layer_rng, unused
from fed.aggregate.mean import Mean, MomentumOptions
from fed.aggregate.rule import Contribution, Options, State


class Padding(StrEnum):
    """What a client of lower rank says of the ranks that it lacks: that they are zero, as published, or nothing."""

    WEIGHTS = "weights"
    UPDATE = "update"


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorOptions(MomentumOptions):
    """Of the rule `factor_mean`.

    Attributes:
        padding: What a client of lower rank says of the ranks that it lacks. With `weights`, the upper ranks shrink
            with every one of its updates.
    """

    padding: Padding = Padding.WEIGHTS

    def __post_init__(self) -> None:
        super(FactorOptions, self).__post_init__()
        if self.padding not in list(Padding):
            raise ConfigError(f"padding is {self.padding!r}; allowed: {', '.join(Padding)}")


class FactorMean(Mean):
    """See the module. Ranks up to the server's.

    Args:
        initial: The first version.
        options: `FactorOptions`.
    """

    name = "factor_mean"
    options_type: ClassVar[type[Options]] = FactorOptions
    methods: ClassVar[frozenset[Method]] = frozenset({Method.LORA})
    instead: ClassVar[str] = "mean"

    def __init__(self, initial: Adapter, options: FactorOptions | None = None) -> None:
        super().__init__(initial, options)
        self._absent: NDArray[np.float64] = np.zeros(self._spec.rank)
        """Σ c by rank, of the clients that lack it."""

    def _check_rank(self, contribution: Contribution) -> None:
        if contribution.start.spec.rank > self._spec.rank:
            raise AdapterError(
                f"the update of {contribution.client!r} has rank {contribution.start.spec.rank}, "
                f"above the server's {self._spec.rank}: its upper ranks have no place in a mean of factors",
                hint="raise the server's rank, or take the rule 'delta'",
            )

    def _at_rank(self, adapter: Adapter, rank: int) -> Adapter:
        """The first ranks of an adapter; if it has fewer, B = 0 and A random for the others."""
        spec = self._ranked(rank)
        return Adapter(spec, _moved(adapter, Adapter.zeros(spec), self._options.seed))

    def _take(self, contribution: Contribution) -> None:
        rank = contribution.start.spec.rank
        if rank == self._spec.rank:
            self._sum.add(contribution.weight, contribution.delta)
            return
        self._sum.add(contribution.weight, _moved(contribution.change, Adapter.zeros(self._spec)))
        if self._options.padding == Padding.WEIGHTS:
            self._absent[rank:] += contribution.weight

    def _direction(self) -> Vector:
        direction = super()._direction()
        if not self._absent.any():
            return direction
        shrink = (self._scale * self._absent).astype(np.float32)
        step = Adapter(self._spec, direction)
        for layer, b, a in self._current.factors():
            step[f"{layer}.lora_B"][:] -= shrink * b
            step[f"{layer}.lora_A"][:] -= shrink[:, None] * a
        return direction

    def _moved(self, direction: Vector) -> Adapter:
        made = super()._moved(direction)
        # A rank that no client of this version had may have vanished from both factors, and would never learn again.
        for number, (_, b, a) in enumerate(made.factors()):
            dead = ~(b.any(0) | a.any(1))
            if dead.any():
                a[dead] = unused(len(a), a.shape[1], layer_rng(self._options.seed, number))[dead]
        return made

    def _forget(self) -> None:
        super()._forget()
        self._absent = np.zeros(self._spec.rank)

    def _save(self, state: State) -> None:
        super()._save(state)
        state.arrays["absent"] = self._absent.copy()

    def _load(self, state: State) -> None:
        super()._load(state)
        self._absent = np.array(state.arrays["absent"], np.float64)


def _moved(source: Adapter, target: Adapter, seed: int | None = None) -> Vector:
    """Copies the ranks that both have into `target`; with a seed, A of those that only it has is made random."""
    rank = min(source.spec.rank, target.spec.rank)
    factor = np.float32((source.spec.scaling / target.spec.scaling) ** 0.5)
    for number, (layer, b, a) in enumerate(target.factors()):
        b[:, :rank] = factor * source[f"{layer}.lora_B"][:, :rank]
        if seed is not None and target.spec.rank > rank:
            a[:] = unused(len(a), a.shape[1], layer_rng(seed, number))
        a[:rank] = factor * source[f"{layer}.lora_A"][:rank]
    return target.flat
