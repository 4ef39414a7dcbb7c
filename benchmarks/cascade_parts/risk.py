"""Is the promise kept? Certified policies against policies merely tuned, on draws from known populations.

Each recorded set is cut in two. On one part agora fits its policies, as `agora calibrate` does; the other part is the
population, whose mean losses and costs are known exactly. Samples of n rows are drawn from it with replacement. On
each, `naive` takes the cheapest policy of the family whose loss on the sample is within the promise, agora the cheapest
one that it can certify. A promise is broken where the policy's loss on the *population* is above it. A cell counts
(`at_stake`) if there is a policy that breaks it; where even the cheapest one does not, nobody can fail, and its figures
are shown but not averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agora.routing.cascade.fit import fit
from agora.routing.cascade.outcomes import Outcomes
from agora.routing.risk import certify, hoeffding_bentkus_p_values
from agora.routing.risk.certify import first_certified
from benchmarks.cascade_parts.sets import SETS
from graphs.calibration_family import family_of, judge

Floats = NDArray[np.float64]

MAX_RISK: Final = 0.05
"""The promise: at most 5 points lost, the usual example."""

CONFIDENCE: Final = 0.95
"""With which it is to hold."""

SIZES: Final = (500, 1000, 3000)
"""Rows of a calibration sample."""

DRAWS: Final = 100
"""Samples of each size from each population."""

QUICK_DRAWS: Final = 10
"""The same under `--quick`."""

QUICK_SETS: Final = ("zeroeval_math", "routellm_gsm8k", "routerbench_mini")
"""Sets under `--quick`: those that are quick to fit."""

FIT_SHARE: Final = 0.4
"""Share of a set's rows that the policies are fitted to."""

MOST_FITTED: Final = 2000
"""Most rows that they are fitted to: more take longer and hardly change them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """A family of policies, from the cheapest to the dearest, on rows that it was not fitted to.

    Attributes:
        losses: Shape (n, k): quality of the dearest model's answer minus that of the policy's.
        saving: Shape (k,): share of the cost of always asking the dearest that each saves on average.
    """

    losses: Floats
    saving: Floats

    @property
    def risk(self) -> Floats:
        """Shape (k,): mean losses."""
        return np.asarray(self.losses.mean(axis=0), dtype=np.float64)


def risk(data: Path, *, quick: bool, seed: int) -> dict[str, Any]:
    """How often the promise is broken, and how much of the possible saving is kept.

    Args:
        data: The data folder.
        quick: Fewer sets and draws.
        seed: Of everything random.

    Raises:
        InvalidRequest: If the data is missing.
    """
    draws = QUICK_DRAWS if quick else DRAWS
    cells = []
    for name in QUICK_SETS if quick else SETS:
        people = population(SETS[name](data), seed=seed)
        cells += [{"set": name, **cell(people, n=n, draws=draws, seed=seed)} for n in SIZES]
    result: dict[str, Any] = {
        "max_risk": MAX_RISK,
        "confidence": CONFIDENCE,
        "draws": draws,
        "quick": quick,
        "cells": cells,
    }
    at_stake = [c for c in cells if c["at_stake"]]
    for who in CHOOSERS:
        broken = [c[who]["violations"] for c in at_stake]
        result[who] = {
            "violations": max(broken, default=None),
            "mean_violations": _mean(broken),
            "saving_kept": {str(n): _mean([c[who]["saving_kept"] for c in at_stake if c["n"] == n]) for n in SIZES},
        }
    return result


def _mean(values: Sequence[float]) -> float | None:
    """None where there is nothing to average."""
    return float(np.mean(values)) if values else None


def cell(people: Population, *, n: int, draws: int, seed: int) -> dict[str, Any]:
    """One population and one sample size."""
    true = people.risk
    k = len(true)
    allowed = np.flatnonzero(true <= MAX_RISK)
    possible = max(float(people.saving[allowed].max(initial=0.0)), 0.0)
    rng = np.random.default_rng([seed, n])
    broken: dict[str, int] = dict.fromkeys(CHOOSERS, 0)
    saved: dict[str, float] = dict.fromkeys(CHOOSERS, 0.0)
    for draw in range(draws):
        sample = people.losses[rng.integers(0, len(people.losses), n)]
        for who, choose in CHOOSERS.items():
            at = choose(sample, draw)
            if at < k:
                broken[who] += bool(true[at] > MAX_RISK)
                saved[who] += float(people.saving[at])
    return {
        "n": n,
        "at_stake": bool((true > MAX_RISK).any()),
        "saving_possible": possible,
        **{
            who: {
                "violations": broken[who] / draws,
                "saving_kept": saved[who] / draws / possible if possible else 0.0,
            }
            for who in CHOOSERS
        },
    }


def _naive(sample: Floats, seed: int) -> int:
    within = np.flatnonzero(sample.mean(axis=0) <= MAX_RISK)
    return int(within[0]) if len(within) else sample.shape[1]


def _agora(sample: Floats, seed: int) -> int:
    chosen = certify(sample, max_risk=MAX_RISK, confidence=CONFIDENCE, seed=seed).chosen
    return sample.shape[1] if chosen is None else chosen


def _hoeffding_bentkus(sample: Floats, seed: int) -> int:
    return first_certified(hoeffding_bentkus_p_values(sample, MAX_RISK), 1 - CONFIDENCE)


CHOOSERS: Final[Mapping[str, Callable[[Floats, int], int]]] = MappingProxyType(
    {"naive": _naive, "agora": _agora, "hoeffding_bentkus": _hoeffding_bentkus}
)
"""Ways to choose a policy: its position in the family, or their number for always asking the dearest."""


def population(outcomes: Outcomes, *, seed: int) -> Population:
    """Fits policies to a part of the rows, and tells what they do on the others."""
    order = np.random.default_rng(seed).permutation(len(outcomes))
    cut = min(int(len(outcomes) * FIT_SHARE), MOST_FITTED)
    fitted = fit(outcomes.take(np.sort(order[:cut])), seed=seed)
    judged = judge(fitted, family_of(fitted), outcomes.take(np.sort(order[cut:])))
    saving = 1 - judged.cost.mean(axis=0) / judged.top_cost.mean()
    return Population(losses=judged.losses, saving=np.asarray(saving, dtype=np.float64))
