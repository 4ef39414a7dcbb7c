"""The methods, and the settings that each is tuned over: as many for one as for another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any, Final

from benchmarks.fed_speed_parts.fleets import CLIENTS
from benchmarks.fed_speed_parts.race import Setting
from fed.adapter import Method as Kind
from fed.aggregate.rules import default
from fed.pace import Pace

FEDBUFF_K: Final = 4
"""Buffer of the FedBuff that agora is measured against; `fedbuff_any_k` has it tuned."""

MIDDLE_FIRST: Final = (3, 2, 4, 1, 5, 0)
"""All places of a ladder of learning rates. A setting is given up sooner when a good one was tried before it."""

PLAIN: Final = default(Kind.DENSE)
"""agora's rule for plain tensors; without options it is federated averaging's weighted mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method.

    Attributes:
        title: For tables.
        rates: Places on the task's ladder of learning rates.
        knobs: What else is tuned, and its values.
        setting: Makes the pace, the rule's name and its options of the knobs.
        baseline: Whether agora's speed is told against it.
    """

    title: str
    rates: Sequence[int]
    knobs: Mapping[str, Sequence[Any]]
    setting: Callable[..., tuple[Pace, str, Mapping[str, Any]]]
    baseline: bool = True

    def grid(self, ladder: Sequence[float]) -> list[Setting]:
        """All settings that are tried, given the task's learning rates."""
        found = []
        for rate, *values in product(self.rates, *self.knobs.values()):
            knobs = dict(zip(self.knobs, values, strict=True))
            pace, rule, options = self.setting(**knobs)
            lr = ladder[rate]
            found.append(Setting(lr=lr, pace=pace, rule=rule, options=options, knobs={"lr": lr, **knobs}))
        return found


def _sync(step: float, momentum: float = 0.0) -> tuple[Pace, str, Mapping[str, Any]]:
    return Pace.synchronous(CLIENTS), PLAIN, {"step": step, "momentum": momentum}


def _overselect(wait_for: int, step: float) -> tuple[Pace, str, Mapping[str, Any]]:
    return Pace.synchronous(wait_for, over_select=CLIENTS / wait_for), PLAIN, {"step": step}


def _fedasync(alpha: float, discount: str) -> tuple[Pace, str, Mapping[str, Any]]:
    return Pace.fedasync(CLIENTS, discount=discount), "mix", {"alpha": alpha}


def _fedbuff(step: float, discount: str = "polynomial", k: int = FEDBUFF_K) -> tuple[Pace, str, Mapping[str, Any]]:
    return Pace.fedbuff(CLIENTS, k, discount=discount), PLAIN, {"step": step}


def _agora(step: float) -> tuple[Pace, str, Mapping[str, Any]]:
    return Pace.default(CLIENTS), PLAIN, {"step": step}


METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        "agora": Method(
            title="agora's default",
            rates=MIDDLE_FIRST,
            knobs={"step": (0.7, 1.0, 0.4)},
            setting=_agora,
            baseline=False,
        ),
        "sync": Method(title="FedAvg", rates=MIDDLE_FIRST, knobs={"step": (1.4, 2.0, 1.0)}, setting=_sync),
        "overselect": Method(
            title="FedAvg with over-selection",
            rates=(3, 2, 4),
            knobs={"wait_for": (13, 11, 8), "step": (1.4, 1.0)},
            setting=_overselect,
        ),
        "fedasync": Method(
            title="FedAsync",
            rates=(3, 4, 5),
            knobs={"alpha": (0.2, 0.4, 0.8), "discount": ("polynomial", "constant")},
            setting=_fedasync,
        ),
        "fedbuff": Method(
            title=f"FedBuff, K = {FEDBUFF_K}",
            rates=(3, 2, 4),
            knobs={"step": (0.7, 1.0, 0.4), "discount": ("polynomial", "constant")},
            setting=_fedbuff,
        ),
        "fedbuff_any_k": Method(
            title="FedBuff, K tuned",
            rates=(3, 2, 4),
            knobs={"k": (1, 2, 8), "step": (1.0, 0.5)},
            setting=_fedbuff,
        ),
        "sync_momentum": Method(
            title="FedAvg with server momentum",
            rates=(3, 2, 4),
            knobs={"momentum": (0.3, 0.5, 0.8), "step": (1.0, 0.5)},
            setting=_sync,
        ),
    }
)
"""By name. All run through the same server and simulator, with `Pace`'s settings where nothing else is said."""

GRID: Final = 18
"""Settings of every method's grid."""
