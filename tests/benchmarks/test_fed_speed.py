"""The benchmark of federated speed: what it races, that it tunes fairly, and what it tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agora.errors import InvalidRequest
from benchmarks import fed_speed
from benchmarks.common import show
from benchmarks.fed_speed_parts.fleets import CLIENTS, FLEETS
from benchmarks.fed_speed_parts.methods import GRID, METHODS
from benchmarks.fed_speed_parts.race import race
from benchmarks.fed_speed_parts.tasks import TASKS
from benchmarks.fed_speed_parts.tune import Cell, geometric, tuned_race
from fed.pace import Pace


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    picture = tmp_path_factory.mktemp("plot") / "plot.png"
    found = fed_speed.measure(quick=True, seed=0, workers=1, fleets=("lognormal",), tasks=("softmax",), picture=picture)
    assert picture.stat().st_size > 10_000
    return found


def test_it_tells_the_ratios_that_are_asked_for_of_agora(result: dict[str, object]) -> None:
    speedup = result["speedup"]["lognormal"]  # type: ignore[index]
    assert {"vs_sync", "vs_overselect", "vs_fedasync", "vs_fedbuff", "client_jobs"} <= set(speedup)
    seconds = result["seconds"]
    ratios = [
        theirs / ours
        for theirs, ours in zip(
            seconds["sync"]["lognormal"]["softmax"],  # type: ignore[index]
            seconds["agora"]["lognormal"]["softmax"],  # type: ignore[index]
            strict=True,
        )
    ]
    assert speedup["vs_sync"] == pytest.approx(geometric(ratios), rel=1e-3)
    # Rounds wait for the slowest of 16, who takes five times the median.
    assert speedup["vs_sync"] > 2
    low, high = result["ci95"]["lognormal"]["vs_sync"]  # type: ignore[index]
    assert low <= speedup["vs_sync"] <= high
    assert set(result["goals"]) >= {"lognormal.vs_sync", "lognormal.client_jobs"}  # type: ignore[call-overload]
    json.dumps(result, allow_nan=False)


def test_every_method_is_tuned_over_as_many_settings(result: dict[str, object]) -> None:
    for name, method in METHODS.items():
        for task in TASKS.values():
            assert len(task.rates) == 6
            grid = method.grid(task.rates)
            assert len(grid) == GRID
            assert len({tuple(s.knobs.items()) for s in grid}) == GRID
        tried = result["tried"][name]["lognormal"]["softmax"]  # type: ignore[index]
        assert len(tried) == result["settings_each"]


def test_methods_are_what_their_names_say() -> None:
    ladder = next(iter(TASKS.values())).rates
    made = {name: method.grid(ladder) for name, method in METHODS.items()}
    assert all(s.rule == "mix" and s.pace.buffer == 1 for s in made["fedasync"])
    assert all(s.pace.lockstep and s.pace.buffer == CLIENTS for s in made["sync"])
    assert all(s.pace.lockstep and s.pace.wanted == CLIENTS and s.pace.buffer < CLIENTS for s in made["overselect"])
    assert any(s.pace == Pace.fedbuff(CLIENTS, 4) for s in made["fedbuff"])
    assert all(s.pace.buffer == 4 and not s.pace.lockstep for s in made["fedbuff"])
    assert all(s.pace == Pace.default(CLIENTS) for s in made["agora"])


def test_what_is_tuned_on_is_not_reported() -> None:
    cell = Cell(task="softmax", fleet="control", method="sync")
    with pytest.raises(ValueError, match=r"\[5\] would be tuned on and reported"):
        tuned_race(cell, tuning=[4, 5], reported=[5])


def test_the_setting_that_is_raced_was_the_best_on_the_tuning_seeds() -> None:
    cell = Cell(task="softmax", fleet="control", method="fedbuff")
    raced = tuned_race(cell, tuning=[1], reported=[2], thin=5)
    reached = [t for t in raced.tried if t["seconds"] is not None]
    best = min(reached, key=lambda t: t["seconds"])
    assert {k: v for k, v in best.items() if k != "seconds"} == raced.knobs
    method = METHODS["fedbuff"]
    setting = next(s for s in method.grid(TASKS["softmax"].rates) if s.knobs == raced.knobs)
    assert race("softmax", "control", setting, 1).seconds == pytest.approx(best["seconds"])
    assert race("softmax", "control", setting, 2) == raced.outcomes[0]


def test_the_default_is_one_pace_on_all_fleets(result: dict[str, object]) -> None:
    told = result["agora"]["pace"]  # type: ignore[index]
    assert told["buffer"] == Pace.default(CLIENTS).buffer
    assert set(FLEETS) == {"lognormal", "tiers_1_2_4", "per_job", "control"}


def test_the_default_has_two_updates_in_a_buffer_at_least_and_can_be_changed() -> None:
    assert [Pace.default(n).buffer for n in (1, 2, 8, 16, 64)] == [1, 2, 2, 2, 8]
    assert Pace.default(16).discounts(3) == pytest.approx(4**-0.25)
    changed = Pace.default(16, buffer=5, discount="hinge", discount_a=2.0)
    assert changed.buffer == 5
    assert changed.discounts(5) == pytest.approx(1 / 3)
    assert Pace.default(16, discount="constant").discounts(9) == 1.0


def test_a_picture_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="the plot cannot be written to"):
        fed_speed.main(["--plot", str(tmp_path / "no" / "plot.png")])


def test_impossible_options_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="--workers is 0; it must be from 1"):
        fed_speed.main(["--workers", "0"])
    with pytest.raises(InvalidRequest, match="--seed is -1; it must be from 0"):
        fed_speed.main(["--seed", "-1"])


def test_the_tables_say_what_large_ratios_measure(
    result: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    show(result, False, fed_speed.table(result))
    said = " ".join(capsys.readouterr().out.split())
    assert "mostly measure the slowest client" in said
    assert "FedAsync" in said
    assert "alpha 0.2 0.4 0.8" in said
