"""The registry of aggregation rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Final

from agora.errors import ConfigError
from fed.adapter import Adapter, Method
from fed.aggregate.delta import Delta
from fed.aggregate.dense import Dense
from fed.aggregate.factor_mean import FactorMean
from fed.aggregate.freeze_a import FreezeA
from fed.aggregate.mean import Mean
from fed.aggregate.mix import Mix
from fed.aggregate.rule import Base, Rule
from fed.aggregate.stacking import Stacking

RULES: Final[Mapping[str, type[Base]]] = MappingProxyType(
    {rule.name: rule for rule in (Delta, FactorMean, Stacking, FreezeA, Dense, Mean, Mix)}
)
"""By name. Each is made of the first version and options: `RULES["delta"](initial, DeltaOptions(step=0.5))`."""


def default(method: Method) -> str:
    """The name of agora's rule for a kind of adapter."""
    return "delta" if method is Method.LORA else "mean"


def make(name: str, initial: Adapter, **settings: Any) -> Rule:
    """A rule by its name, with settings by theirs, as a configuration file has them.

    Args:
        name: One of `RULES`.
        initial: The first version.
        settings: Fields of the rule's `options_type`.

    Raises:
        ConfigError: If there is none of that name, it has no such setting, or a value is not allowed.
        AdapterError: If the rule is not for this kind of adapter.
    """
    if name not in RULES:
        raise ConfigError(f"rule is {name!r}; allowed: {', '.join(sorted(RULES))}")
    rule = RULES[name]
    allowed = [f.name for f in fields(rule.options_type)]
    if wrong := sorted(set(settings) - set(allowed)):
        raise ConfigError(f"rule {name!r} has no setting {wrong[0]!r}; it has {', '.join(allowed)}")
    return rule(initial, rule.options_type(**settings))
