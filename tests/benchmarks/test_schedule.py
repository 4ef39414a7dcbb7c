"""The benchmark of schedules: what it tells, and that agora's are the shortest there too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agora.errors import InvalidRequest
from benchmarks import schedule
from benchmarks.schedule import drawn, measure


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    patch = pytest.MonkeyPatch()
    patch.setattr(schedule, "QUICK_PER_FAMILY", 8)
    try:
        return measure(quick=True, seed=3, picture=tmp_path_factory.mktemp("plot") / "plot.png")
    finally:
        patch.undo()


def test_agora_is_the_shortest_and_nobody_is_under_the_bound(result: dict[str, object]) -> None:
    means = result["makespan_over_lower_bound"]
    assert isinstance(means, dict)
    assert set(means) == {"agora", "round_robin", "least_loaded", "min_min"}
    assert min(means, key=means.__getitem__) == "agora"
    assert all(m >= 1.0 for m in means.values())
    assert result["instances"] == 24
    json.dumps(result, allow_nan=False)


def test_instances_are_drawn_by_their_number_alone() -> None:
    assert drawn("layered", 4, 0) == drawn("layered", 4, 0)
    assert drawn("layered", 4, 0) != drawn("layered", 5, 0)
    assert drawn("layered", 4, 0) != drawn("layered", 4, 1)


def test_a_picture_that_cannot_be_written_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["schedule", "--plot", str(tmp_path / "no" / "plot.png")])
    with pytest.raises(InvalidRequest, match="the plot cannot be written to"):
        schedule.main()
