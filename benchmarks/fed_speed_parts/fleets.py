"""Who takes part: 16 clients whose jobs take 1 s at the median, and how their speeds differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from fed.fleet import Fleet, fleet

CLIENTS: Final = 16
LOSS: Final = 0.1
"""Share of jobs that come to nothing, at a random moment of their time."""

SIGMA: Final = 1.0
"""Of both lognormals: of 16 clients, or jobs, the slowest takes 5 to 6 times the median on average."""


FLEETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "lognormal": {"speeds": "lognormal", "parameters": {"sigma": SIGMA}},
        "tiers_1_2_4": {"speeds": "tiers", "parameters": {"factors": (1.0, 2.0, 4.0)}},
        "per_job": {"speeds": "constant", "jitter": SIGMA},
        "control": {"speeds": "constant"},
    }
)
"""By name: clients that differ always, in tiers, from job to job, and not at all."""

TITLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "lognormal": "lognormal",
        "tiers_1_2_4": "tiers 1:2:4",
        "per_job": "lognormal per job",
        "control": "all equal",
    }
)


def drawn(name: str, steps: int, seed: int) -> Fleet:
    """A fleet, its speeds and losses drawn by the seed.

    Args:
        name: One of `FLEETS`.
        steps: Of a job, which take 1 s at the median client.
        seed: Of all that is drawn.
    """
    return fleet(CLIENTS, seconds_per_step=1.0 / steps, loss=LOSS, seed=seed, **FLEETS[name])


def named(made: Fleet, examples: list[int]) -> Fleet:
    """The same clients, with so many rows each."""
    return replace(made, clients=tuple(replace(c, examples=n) for c, n in zip(made.clients, examples, strict=True)))
