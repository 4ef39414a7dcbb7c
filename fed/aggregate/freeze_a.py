"""FFA-LoRA: A stays as it began, the same for all; only B is trained and averaged (Sun et al. 2024, arXiv 2403.12313).

With one A for all, mean(B)·A is mean(B·A): the mean of factors is exact, at half the traffic and half the freedom.
"""

from __future__ import annotations

from typing import ClassVar

from agora.errors import AdapterError
from fed.adapter import Method
from fed.aggregate.mean import Mean, MomentumOptions
from fed.aggregate.rule import Contribution, Options


class FreezeA(Mean):
    """See the module. One rank for all, since a client of lower rank would not have the same A.

    Args:
        initial: The first version.
        options: `MomentumOptions`.
    """

    name = "freeze_a"
    options_type: ClassVar[type[Options]] = MomentumOptions
    methods: ClassVar[frozenset[Method]] = frozenset({Method.LORA})
    instead: ClassVar[str] = "mean"

    def _check(self, contribution: Contribution) -> None:
        super()._check(contribution)
        for layer, _, a in contribution.change.factors():
            if a.any():
                raise AdapterError(
                    f"the update of {contribution.client!r} changes A of layer {layer!r}, which is frozen",
                    hint="have clients train B alone, or take the rule 'delta'",
                )

    def _check_rank(self, contribution: Contribution) -> None:
        raise AdapterError(
            f"the update of {contribution.client!r} has rank {contribution.start.spec.rank}; "
            f"with A frozen all have the server's, {self._spec.rank}",
            hint="take the rule 'delta' for mixed ranks",
        )
