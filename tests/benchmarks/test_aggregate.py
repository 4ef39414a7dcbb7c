"""The benchmark of aggregation: what it tells, that agora's rule is near the best there, and what it says of peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agora.errors import InvalidRequest
from benchmarks import aggregate
from benchmarks.aggregate_parts import errors, flower
from benchmarks.aggregate_parts.clients import LAYER, spec, targets, train
from benchmarks.aggregate_parts.models import MODELS
from fed.aggregate.lowrank import fresh, product


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("aggregate")
    patch = pytest.MonkeyPatch()
    patch.setattr(aggregate, "QUICK_SIDE", 80)
    patch.setattr(aggregate, "QUICK_SECONDS", 0.02)
    patch.setattr(aggregate, "QUICK_BLOCKS", 1)
    patch.setattr(errors, "ROUNDS", 3)
    patch.setattr(errors, "LOOKED_AT", (1, 3))
    try:
        return aggregate.measure(quick=True, seed=3, peers=folder / "none", picture=folder / "plot.png")
    finally:
        patch.undo()


def test_agora_is_within_a_hundredth_of_the_best_and_factors_are_not(result: dict[str, Any]) -> None:
    for ranks in ("equal", "mixed"):
        assert 0.999 <= result["error_over_best"][ranks] <= 1.01
        assert 0.999 <= result["error_over_best_first_round"][ranks] <= 1.01
        assert result["factor_mean_error_over_best"][ranks] > 1.02
        off, best = result["relative_error"][ranks]["delta"]
        assert off / best == pytest.approx(result["error_over_best"][ranks], rel=0.01) and 0 < best < 1


def test_speeds_are_told_and_flower_is_not_made_up(result: dict[str, Any]) -> None:
    for name in MODELS:
        assert result["seconds"][name] > 0 and result["gb_per_s"][name] > 0 and result["peak_mb"][name] > 0
        assert result["flower_gb_per_s"][name] is None and result["over_flower"][name] is None
    assert result["sizes"]["smollm2"] == {"modules": 2, "rank": 8, "clients": 16, "updates_mb": 1.0}
    assert result["sizes"]["llama7b"] == {"modules": 2, "rank": 16, "clients": 16, "updates_mb": 16.8}
    assert "make peers" in result["notes"]["flower"]
    assert result["quick"] is True
    json.dumps(result, allow_nan=False)


def test_clients_come_nearer_to_what_they_want() -> None:
    [target] = targets(64, 1, 0)
    wanted = target.left @ target.right
    start = fresh(spec(64, 8))
    ends = [start]
    for _ in range(10):
        ends.append(ends[-1].plus(train(ends[-1], target)))
    missing = [float(np.linalg.norm(product(end, LAYER) - wanted)) for end in ends]
    assert missing == sorted(missing, reverse=True) and missing[-1] < 0.8 * missing[0]


def test_sizes_are_those_of_the_models() -> None:
    llama = MODELS["llama7b"].spec()
    assert len(llama.layers) == 64 and llama.size == 64 * 16 * 8192
    assert len(MODELS["smollm2"].spec().layers) == 60


def test_flowers_times_are_of_right_results(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """With a way that averages wrongly nothing is told."""
    wanted = json.dumps({"shapes": [[2, 3], [4]], "clients": 3, "seconds": 0.0, "seed": 0})
    monkeypatch.setattr("sys.argv", ["flower.py", wanted])

    def way(clients: flower.Clients, weights: list[int]) -> flower.Way:
        return lambda: [np.mean([c[n] for c in clients], axis=0) for n in range(2)], lambda found: found

    monkeypatch.setattr(flower, "aggregate_train", way)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        flower.main()
    assert capsys.readouterr().out == ""


def test_what_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(aggregate.MeasureFailed, match=r"(?s)Flower ended with code 1: .*No module named"):
        aggregate.told(["python3", "-c", "import nothing_of_that_name"], "Flower")
    with pytest.raises(aggregate.MeasureFailed, match="could not be started"):
        aggregate.told([str(tmp_path / "python")], "Flower")
    with pytest.raises(InvalidRequest, match="the plot cannot be written to"):
        aggregate.main(["--plot", str(tmp_path / "no" / "plot.png")])
    with pytest.raises(InvalidRequest, match="--seed is -1"):
        aggregate.main(["--seed", "-1"])
