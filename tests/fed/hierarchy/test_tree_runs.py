"""A tree under the virtual clock: flat where it is flat, repeatable, and whole again after any interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agora.errors import ConfigError
from fed.aggregate.rules import make
from fed.chain import Chain
from fed.fleet import fleet
from fed.hierarchy import Level, Tree, simulate_tree
from fed.pace import Pace
from fed.simulate import Checkpoints, simulate

FLAT: dict[str, dict[str, Any]] = {
    "buffered": {"pace": Pace.fedbuff(6, 3, job_timeout_s=40.0, steps=2, publications=60, share_cap=0.5)},
    "lockstep": {
        "pace": Pace.synchronous(
            4, over_select=1.5, deadline_s=8.0, job_timeout_s=40.0, steps=2, publications=40, seconds=300.0
        )
    },
    "chain": {
        "pace": Pace.fedbuff(6, 3, job_timeout_s=40.0, publications=40),
        "chain": Chain.from_config([{"kind": "top_k", "fraction": 0.3}]),
    },
    "lora": {"pace": Pace.fedbuff(6, 3, job_timeout_s=40.0, publications=25)},
}


@pytest.mark.parametrize("kind", sorted(FLAT))
def test_a_tree_of_one_aggregator_is_a_flat_federation_to_the_byte(trees: Any, kind: str, tmp_path: Path) -> None:
    given, world = FLAT[kind], trees.rough()
    initial = trees.start(trees.LORA if kind == "lora" else trees.DENSE)
    rule = "delta" if kind == "lora" else "mean"
    flat = simulate(
        given["pace"],
        world,
        trees.Pull(),
        lambda a: make(rule, a),
        initial=initial,
        chain=given.get("chain"),
        seed=3,
        checkpoint=tmp_path / "flat",
    )
    tree = Tree.flat(Level(name="server", **given), trees.devices(9))
    found = simulate_tree(tree, world, trees.Pull(), initial=initial, seed=3, checkpoint=tmp_path / "tree")
    assert found.adapter.flat.tobytes() == flat.adapters["all"].flat.tobytes()
    assert found.rows["server"] == flat.rows and found.states["server"] == flat.state
    assert (found.why, found.at, found.events) == (flat.why, flat.at, flat.events)
    record = (tmp_path / "tree" / "records" / "server.jsonl").read_bytes()
    assert record == (tmp_path / "flat" / "record.jsonl").read_bytes()
    assert found.levels[0].bytes_up > 0 and found.levels[0].updates == sum(r["updates"] for r in flat.rows)


def test_what_ends_a_flat_run_ends_a_tree_of_one(trees: Any) -> None:
    pace = Pace.fedasync(2, steps=1)
    flat = simulate(
        pace,
        fleet(2),
        trees.Add(),
        lambda a: make("mean", a),
        initial=trees.start(trees.DENSE),
        until=lambda p: p.version == 7,
    )
    tree = Tree.flat(Level(name="server", pace=pace), trees.devices(2))
    found = simulate_tree(
        tree, fleet(2), trees.Add(), initial=trees.start(trees.DENSE), until=lambda m: m.published.version == 7
    )
    assert (found.why, found.at, found.rows["server"]) == (flat.why, flat.at, flat.rows)


@pytest.mark.parametrize("kind", ["dense", "lora", "chain", "sums", "deep", "counts"])
def test_the_same_arguments_give_the_same_bytes_and_another_seed_gives_others(trees: Any, kind: str) -> None:
    one, other = trees.run(kind), trees.run(kind)
    assert trees.same(one, other) and not trees.same(one, trees.run(kind, seed=4))
    assert "versions were made" in one.why
    top = one.levels[0]
    assert top.versions == len(one.rows[one.tree.root]) and top.updates > 0 and top.bytes_up > 0
    if kind not in ("deep", "lora"):
        # In the others the top has devices' updates, too.
        assert one.levels[-1].sent >= top.updates


@pytest.mark.parametrize("kind", ["dense", "lora", "chain", "sums", "deep", "counts"])
def test_stopped_anywhere_and_resumed_it_ends_with_the_same_bytes(trees: Any, kind: str, tmp_path: Path) -> None:
    whole = trees.run(kind)
    stops = 0
    for _ in range(60):
        try:
            found = trees.run(kind, Checkpoints(folder=tmp_path, versions=2), trainer=trees.Pull(breaks_at=13))
            break
        except trees.Stopped:
            stops += 1
    assert stops >= 2
    assert trees.same(found, whole)
    for name, rows in whole.rows.items():
        lines = (tmp_path / "records" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == rows
    # It has ended: the same again, and nothing is trained for it.
    trainer = trees.Pull()
    assert trees.same(trees.run(kind, Checkpoints(folder=tmp_path, versions=2), trainer=trainer), whole)
    assert not trainer.trained


def test_another_tree_is_refused_with_what_differs(trees: Any, tmp_path: Path) -> None:
    place = Checkpoints(folder=tmp_path, versions=1)
    trees.run("dense", place)
    with pytest.raises(ConfigError, match="tree"):
        simulate_tree(
            trees.tree(edge={"orphans": "wait"}),
            trees.rough(),
            trees.Pull(),
            initial=trees.start(trees.DENSE),
            seed=3,
            changes=trees.SHOCKS,
            checkpoint=place,
        )


def test_until_may_be_met_at_any_level(trees: Any) -> None:
    made: list[Any] = []
    result = trees.run("deep", until=lambda m: m.aggregator == "e2" and m.published.version == 3, observe=made.append)
    assert result.why == "what was waited for has come with version 3 of 'e2'"
    assert made[-1].level == "edge" and {m.level for m in made} >= {"region", "edge"}
