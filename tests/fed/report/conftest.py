"""A run's folder as it is on disk, of two models and a client that was left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def row(at: float, model: str, version: int, of: list[list[Any]], **more: Any) -> dict[str, Any]:
    return {
        "at": at,
        "model": model,
        "version": version,
        "updates": len(of),
        "clients": len({u[0] for u in of}),
        "staleness_mean": sum(u[1] for u in of) / len(of),
        "staleness_max": max(u[1] for u in of),
        "norm_mean": 1.0,
        "loss": 0.5,
        "assigned": 4 * version,
        "absorbed": 2 * version,
        "refused": 0,
        "lost": 0,
        "cancelled": 0,
        "bytes_down": 1000 * version,
        "bytes_up": 500 * version,
        "of": of,
        "notes": {},
        "problems": [],
    } | more


ROWS = [
    row(10.0, "all", 1, [["a", 0, 3.0], ["b", 0, 1.0]]),
    row(20.0, "all", 2, [["a", 1, 3.0], ["c", 0, 1.0]], refused=1, lost=2, problems=["<b>job 3</b> was refused"]),
    row(30.0, "cluster-1", 1, [["a", 0, 1.0], ["b", 2, 1.0]], refused=1, lost=2),
]

JUDGED = [
    {"at": 0.0, "model": "all", "version": 0, "loss": 0.9, "accuracy": 0.5, "rows": 10},
    {"at": 20.0, "model": "all", "version": 2, "loss": 0.6, "accuracy": 0.7, "rows": 10},
    {"at": 30.0, "model": "cluster-1", "version": 1, "loss": 0.4, "accuracy": 0.9, "rows": 10},
    # Told by a process that was killed before the version was in the record again.
    {"at": 40.0, "model": "cluster-1", "version": 2, "loss": 0.1, "accuracy": 1.0, "rows": 10},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder; the run has not ended."""
    clients: list[dict[str, Any]] = [
        {"name": name, "rows": n, "model": "all", "note": None, "left_out": None}
        for name, n in (("a", 30), ("b", 10), ("c", 10))
    ]
    clients.append({"name": "empty", "left_out": "it has no rows <script>alert(1)</script>"})
    place = tmp_path / "run"
    place.mkdir()
    (place / "config.toml").write_text('[run]\nname = "hospital <i>x</i>"\n')
    (place / "record.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (place / "evaluations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in JUDGED))
    group = {"at": 20.0, "model": "all", "version": 2, "groups": {"all": ["c"], "cluster-1": ["a", "b"]}}
    (place / "clusters.jsonl").write_text(json.dumps(group) + "\n")
    (place / "clients.json").write_text(json.dumps({"clients": clients}))
    return place
