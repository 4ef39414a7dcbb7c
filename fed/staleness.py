"""What an update is worth that comes late: discounts s(τ), by staleness τ, the versions published since its start.

All of them are those of FedAsync (Xie, Koyejo and Gupta 2019, arXiv 1903.03934, section 5.2): s(0) is exactly 1, and no
later update weighs more than an earlier one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final

from agora.errors import ConfigError, InvalidRequest

Discount = Callable[[int], float]
"""s(τ): from staleness, in versions, to a factor above 0 and at most 1."""

POLYNOMIAL_A: Final = 0.5
"""Exponent of the polynomial: 1/√(1+τ), as in FedAsync's and FedBuff's experiments."""

HINGE_A: Final = 10.0
"""Slope of the hinge, as in FedAsync's experiments."""

HINGE_B: Final = 4.0
"""Versions until the hinge bends, as in FedAsync's experiments."""


def constant(staleness: int) -> float:
    """s(τ) = 1.

    Raises:
        InvalidRequest: If the staleness is below 0.
    """
    _checked(staleness)
    return 1.0


def polynomial(staleness: int, *, a: float = POLYNOMIAL_A) -> float:
    """s(τ) = (1 + τ)^−a.

    Args:
        staleness: τ.
        a: Exponent, from 0.

    Raises:
        InvalidRequest: If the staleness or `a` is out of range.
    """
    _checked(staleness, a=a)
    return float((1.0 + staleness) ** -a)


def hinge(staleness: int, *, a: float = HINGE_A, b: float = HINGE_B) -> float:
    """s(τ) = 1 up to b, then 1/(1 + a·(τ − b)).

    Args:
        staleness: τ.
        a: Slope, from 0.
        b: Versions until it bends, from 0.

    Raises:
        InvalidRequest: If the staleness, `a` or `b` is out of range.
    """
    _checked(staleness, a=a, b=b)
    return 1.0 / (1.0 + a * max(0.0, staleness - b))


DISCOUNTS: Final[Mapping[str, Discount]] = MappingProxyType(
    {"constant": constant, "polynomial": polynomial, "hinge": hinge}
)
"""By name, with the parameters of the paper."""


def discount(name: str, **parameters: float) -> Discount:
    """A discount by its name, with parameters of one's own.

    Args:
        name: One of `DISCOUNTS`.
        parameters: `a` of the polynomial; `a` and `b` of the hinge.

    Raises:
        ConfigError: If there is none of that name, it has no such parameter, or a value is out of range.
    """
    if name not in DISCOUNTS:
        raise ConfigError(f"discount is {name!r}; allowed: {', '.join(sorted(DISCOUNTS))}")
    allowed = [p for p in inspect.signature(DISCOUNTS[name]).parameters if p != "staleness"]
    if wrong := sorted(set(parameters) - set(allowed)):
        raise ConfigError(f"discount {name!r} has no parameter {wrong[0]!r}; it has {', '.join(allowed) or 'none'}")
    found = partial(DISCOUNTS[name], **parameters)
    try:
        found(0)
    except InvalidRequest as e:
        raise ConfigError(f"discount {name!r}: {e.message}") from None
    return found


def _checked(staleness: int, **parameters: float) -> None:
    if staleness < 0:
        raise InvalidRequest(f"staleness is {staleness}; it counts versions, from 0")
    for name, value in parameters.items():
        if not (math.isfinite(value) and value >= 0):
            raise InvalidRequest(f"{name} is {value}; it must be a number from 0")
