"""The section on the guarantee judges by the population, not by the sample."""

import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cascade_parts.risk import FIT_SHARE, Population, cell, population
from benchmarks.cascade_parts.sets import SETS

needs_data = pytest.mark.skipif(not os.environ.get("AGORA_DATA"), reason="AGORA_DATA does not name the data folder")


def people(true: list[float], saving: list[float]) -> Population:
    """A population of 2000 rows in which each threshold loses on the first so many."""
    losses = np.array([[float(row < 2000 * r) for r in true] for row in range(2000)])
    return Population(losses=losses, saving=np.array(saving))


def test_a_threshold_just_above_the_promise_catches_who_only_tunes() -> None:
    found = cell(people([0.0525, 0.02], [0.9, 0.5]), n=1000, draws=60, seed=0)
    assert found["at_stake"]
    assert found["naive"]["violations"] > 0.25
    assert found["agora"]["violations"] <= 0.15
    # The best that keeps the promise saves 0.5; agora finds it nearly always.
    assert found["saving_possible"] == 0.5
    assert found["agora"]["saving_kept"] > 0.9


def test_where_nothing_can_be_broken_nobody_breaks_it() -> None:
    found = cell(people([0.04, 0.01], [0.9, 0.5]), n=1000, draws=20, seed=0)
    assert not found["at_stake"]
    assert found["naive"]["violations"] == found["agora"]["violations"] == 0


def test_where_nothing_keeps_the_promise_always_the_dearest_is_no_violation() -> None:
    found = cell(people([0.3, 0.2], [0.9, 0.5]), n=1000, draws=20, seed=0)
    assert found["agora"] == {"violations": 0.0, "saving_kept": 0.0}
    assert found["naive"]["violations"] == 0


@needs_data
def test_populations_are_of_other_rows_and_repeat_by_seed() -> None:
    outcomes = SETS["routerbench_mini"](Path(os.environ["AGORA_DATA"]))
    first, again = population(outcomes, seed=1), population(outcomes, seed=1)
    assert len(first.losses) == len(outcomes) - int(len(outcomes) * FIT_SHARE)
    assert (first.losses == again.losses).all() and (first.saving == again.saving).all()
    # Roughly from the cheapest to the dearest: the order is that of the rows it was fitted to.
    assert first.saving[0] > 0.3 > first.saving[-1]
