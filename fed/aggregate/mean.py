"""Weighted means of updates, number by number: for prefixes, prompts, P-tuning and plain tensors.

    w_{t+1} = w_t + v_{t+1},     v_{t+1} = β·v_t + η·Σ c_i·Δ_i / Σ w_i

Federated averaging (McMahan et al. 2017, arXiv 1602.05629) with a server step (Reddi et al. 2021, arXiv 2003.00295) and
FedAvgM's momentum (Hsu et al. 2019, arXiv 1909.06335). With `remember`, the mean over the last updates of all clients
takes part (`fed.aggregate.memory`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fed.adapter import Adapter, Method, Vector
from fed.aggregate.flat import RunningSum
from fed.aggregate.memory import Memory
from fed.aggregate.rule import Base, Contribution, Options, State, share, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentumOptions(Options):
    """Of rules with momentum.

    Attributes:
        momentum: β.
    """

    momentum: float = 0.0

    def __post_init__(self) -> None:
        # Without zero arguments: a slotted dataclass is another class than the one that `super()` closed over.
        super(MomentumOptions, self).__post_init__()
        share("momentum", self.momentum)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanOptions(MomentumOptions):
    """Of the rule `mean`.

    Attributes:
        remember: Clients whose last update is remembered; 0 for none.
    """

    remember: int = 0

    def __post_init__(self) -> None:
        super(MeanOptions, self).__post_init__()
        whole("remember", self.remember, least=0)


class Mean(Base):
    """See the module. Holds a running sum, however many updates come.

    Args:
        initial: The first version.
        options: `MeanOptions`.
    """

    name = "mean"
    options_type: ClassVar[type[Options]] = MeanOptions
    methods: ClassVar[frozenset[Method]] = frozenset(Method) - {Method.LORA}
    instead: ClassVar[str] = "delta"

    def __init__(self, initial: Adapter, options: Options | None = None) -> None:
        super().__init__(initial, options)
        self._sum = RunningSum(self._spec.size)
        self._velocity: Vector | None = None
        remember = getattr(self._options, "remember", 0)
        self._memory = Memory(remember) if remember else None

    def _take(self, contribution: Contribution) -> None:
        self._sum.add(contribution.weight, contribution.delta)
        if self._memory is not None:
            self._memory.see(contribution, start=False)

    def _next(self) -> Adapter:
        made = self._moved(self._direction())
        if self._memory is not None:
            self._memory.turn()
        return made

    def _direction(self) -> Vector:
        """η·Σ c_i·Δ_i / Σ w_i, what is remembered included."""
        if self._memory is not None:
            total = self._options.step / self._scale
            for client, part in self._memory.shares(total).items():
                self._sum.add(part * total, self._memory.known[client].delta)
        direction = self._sum.take()
        direction *= np.float32(self._scale)
        return direction

    def _moved(self, direction: Vector) -> Adapter:
        """The next version, that much and the momentum away."""
        beta = self._options.momentum
        if beta and self._velocity is not None:
            direction += np.float32(beta) * self._velocity
        made = self._finite(self._current.plus(direction))
        if beta:
            self._velocity = direction
        return made

    def _forget(self) -> None:
        super()._forget()
        self._sum.clear()
        if self._memory is not None:
            self._memory.drop()

    def _save(self, state: State) -> None:
        # A copy: the sum goes on.
        state.arrays["sum"] = self._sum.total().copy()
        if self._velocity is not None:
            state.arrays["velocity"] = self._velocity
        if self._memory is not None:
            state.put("memory", self._memory.save())

    def _load(self, state: State) -> None:
        self._sum.load(state.arrays["sum"])
        self._velocity = state.arrays.get("velocity")
        if self._memory is not None:
            self._memory.load(state.within("memory"), self._spec)
