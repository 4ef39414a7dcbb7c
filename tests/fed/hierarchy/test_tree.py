"""What is no tree is refused, with what is wrong and what is allowed."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from agora.errors import ConfigError
from fed.fleet import Change, Move, fleet
from fed.hierarchy import Aggregator, Level, Link, Orphans, Sees, Tree, View, simulate_tree
from fed.pace import Pace, Weighting

CLOUD, EDGE = Level(name="cloud", pace=Pace.synchronous(2)), Level(name="edge", pace=Pace.fedbuff(4, 2))
TOP = Aggregator(name="cloud", level="cloud")


def edge(name: str, *devices: str, parent: str | None = "cloud", **more: Any) -> Aggregator:
    return Aggregator(name=name, level="edge", parent=parent, devices=devices, **more)


def tree(*places: Aggregator, cloud: Level = CLOUD, below: Level = EDGE) -> Tree:
    return Tree(levels=(cloud, below), aggregators=places)


def seeing(**sees: Any) -> Level:
    return Level(name="cloud", pace=Pace.synchronous(2), sees=Sees(**sees))


WRONG: dict[str, Callable[[], Any]] = {
    "device 'a' is under 'e0' and 'e1'": lambda: tree(TOP, edge("e0", "a"), edge("e1", "a")),
    "parent of aggregator 'e0' is 'sky', which is not there": lambda: tree(TOP, edge("e0", "a", parent="sky")),
    "'e1' has neither devices nor aggregators below it": lambda: tree(TOP, edge("e0", "a"), edge("e1")),
    "the aggregators form a circle: e0 → e1 → e0": lambda: tree(
        TOP, edge("e0", "a", parent="e1"), edge("e1", "b", parent="e0")
    ),
    "aggregators without a parent: cloud, e0; exactly one": lambda: tree(TOP, edge("e0", "a", parent=None)),
    "aggregator 'e0' is there twice": lambda: tree(TOP, edge("e0", "a"), edge("e0", "b")),
    "level 'edge' has no aggregator": lambda: tree(Aggregator(name="cloud", level="cloud", devices=("a",))),
    "level of aggregator 'x' is 'fog'; there are cloud, edge": lambda: tree(
        TOP, edge("e0", "a"), Aggregator(name="x", level="fog")
    ),
    "under 'e0' of level 'edge'; levels are from the top down: cloud, edge": lambda: tree(
        TOP, edge("e0", "a"), edge("e1", "b", parent="e0")
    ),
    "'cloud' is a device of 'e0' and an aggregator": lambda: tree(TOP, edge("e0", "cloud")),
    "an aggregator is named '../x'": lambda: tree(TOP, edge("../x", "a")),
    "'cloud' is at the top, and has a link upwards": lambda: tree(
        Aggregator(name="cloud", level="cloud", up=Link(round_trip_s=1.0)), edge("e0", "a")
    ),
    "needs a level and an aggregator": lambda: Tree(levels=(), aggregators=()),
    "sees only counts, so that nothing would be learned from its devices": lambda: Tree.flat(
        seeing(what="counts"), ["a"]
    ),
    "sees only counts, so that nothing would be learned above it": lambda: Tree(
        levels=(CLOUD, Level(name="region", pace=Pace(), sees=Sees(what=View.COUNTS)), EDGE),
        aggregators=(TOP, Aggregator(name="r", level="region", parent="cloud"), edge("e0", "a", parent="r")),
    ),
    "sees only sums of 2 children, and has 1": lambda: tree(TOP, edge("e0", "a"), cloud=seeing(what="sums", least=2)),
    "a version of 2": lambda: seeing(what="sums", least=3),
    "least is 1; a sum that hides": lambda: Sees(what=View.SUMS),
    "least is 3 without sums": lambda: Sees(least=3),
    "what is 'all'; allowed: updates, sums, counts": lambda: Sees(what="all"),  # type: ignore[arg-type]
    "metrics is 'no'": lambda: Sees(metrics="no"),  # type: ignore[arg-type]
    "behind is 0": lambda: Sees(behind=0),
    "its rule 'mix' needs single updates": lambda: Level(
        name="x", pace=Pace(), rule="mix", sees=Sees(what=View.SUMS, least=2)
    ),
    "neither remember clients": lambda: Level(
        name="x", pace=Pace(), options={"remember": 5}, sees=Sees(what=View.SUMS, least=2)
    ),
    "3 devices behind them, and has devices of its own": lambda: Tree.flat(seeing(behind=3), ["a", "b", "c"]),
    "below 'e0' are 1": lambda: tree(TOP, edge("e0", "a"), cloud=seeing(behind=2)),
    "which may not see a single device's update": lambda: tree(
        TOP,
        edge("e0", "a", "b"),
        cloud=seeing(behind=2),
        below=Level(name="edge", pace=Pace(), orphans=Orphans.PARENT),
    ),
    "every of level 'x' is 0": lambda: Level(name="x", pace=Pace(), every=0),
    "orphans of level 'x' is 'go'; allowed: sibling, parent, wait": lambda: Level(
        name="x",
        pace=Pace(),
        orphans="go",  # type: ignore[arg-type]
    ),
    "rule of level 'x' is 'sum'": lambda: Level(name="x", pace=Pace(), rule="sum"),
    "up_bytes_per_s is 0": lambda: Link(up_bytes_per_s=0),
    "loss is 2": lambda: Link(loss=2),
    "round_trip_s is -1": lambda: Link(round_trip_s=-1),
    "3 edges for 2 devices": lambda: Tree.even(CLOUD, EDGE, ["a", "b"], edges=3),
    "'x' is neither a device nor": lambda: tree(TOP, edge("e0", "a")).path("x"),
}


@pytest.mark.parametrize("told", sorted(WRONG))
def test_what_is_no_tree_is_told(told: str) -> None:
    with pytest.raises(ConfigError) as e:
        WRONG[told]()
    assert told in str(e.value)


GOOD = """
[levels.cloud]
pace = {preset = "synchronous", cohort = 2, publications = 9}
sees = {what = "sums", least = 2, behind = 2, metrics = false}
[levels.edge]
pace = {preset = "fedbuff", cohort = 8, buffer = 4, weighting = "equal"}
rule = "mean"
options = {step = 0.5}
up = {up_bytes_per_s = 1e6, round_trip_s = 0.2}
every = 3
orphans = "sibling"
chain = [{kind = "int8"}]
[[aggregators]]
name = "cloud"
level = "cloud"
[[aggregators]]
name = "edge-0"
level = "edge"
parent = "cloud"
devices = ["a", "b"]
[[aggregators]]
name = "edge-1"
level = "edge"
parent = "cloud"
devices = ["c", "d"]
up = {up_bytes_per_s = 5e4}
"""


def test_a_tree_is_read_from_a_configuration_and_written_again() -> None:
    found = Tree.from_config(tomllib.loads(GOOD))
    cloud, below = found.levels
    assert cloud.pace == Pace.synchronous(2, publications=9) and cloud.sees.what is View.SUMS
    assert below.pace == Pace.fedbuff(8, 4, weighting=Weighting.EQUAL) and below.orphans is Orphans.SIBLING
    assert (below.every, below.rule, dict(below.options)) == (3, "mean", {"step": 0.5})
    assert below.chain is not None and below.chain.to_json()[0]["kind"] == "int8"
    assert found.link("edge-0") == Link(up_bytes_per_s=1e6, round_trip_s=0.2)
    assert found.link("edge-1") == Link(up_bytes_per_s=5e4)
    assert found.path("c") == ("edge-1", "cloud") and found.root == "cloud" and found.below("cloud") == 4
    again = Tree.from_config(orjson.loads(orjson.dumps(found.to_json())))
    assert again.to_json() == found.to_json() and again.levels == found.levels
    assert again.aggregators == found.aggregators


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        ("every = 3", "each = 3", "level 'edge' has no setting 'each'; allowed: pace"),
        ("every = 3", "every = 'x'", "every of level 'edge' is 'x'"),
        ('preset = "fedbuff"', 'preset = "fast"', "level 'edge': preset is 'fast'"),
        ("buffer = 4, ", "", "preset 'fedbuff' needs 'buffer'"),
        ("buffer = 4, ", "buffr = 4, ", "level 'edge': 'buffr' is no setting of the pace"),
        ("cohort = 2, ", "cohort = 2, lockstep = false, ", "level 'cloud': preset 'synchronous'"),
        ("least = 2", "at_least = 2", "'at_least' is no setting of what a level sees"),
        ("round_trip_s = 0.2", "delay = 0.2", "'delay' is no setting of a link"),
        ("round_trip_s = 0.2", "round_trip_s = 'long'", "could not convert"),
        ('kind = "int8"', 'kind = "zip"', "level 'edge': chain, stage 1: kind is 'zip'"),
        ('devices = ["a", "b"]', 'devices = "a"', "devices of aggregator 'edge-0' are 'a'"),
        ('name = "edge-1"', 'nam = "edge-1"', "aggregator 3 has no setting 'nam'"),
        ('parent = "cloud"', "parent = 3", "parent of aggregator 'edge-0' is 3"),
        ("[levels.cloud]\n", "[leaves.cloud]\n", "a tree has no setting 'leaves'"),
    ],
)
def test_a_wrong_configuration_is_told_with_its_level_or_aggregator(was: str, now: str, told: str) -> None:
    assert was in GOOD
    with pytest.raises(ConfigError) as e:
        Tree.from_config(tomllib.loads(GOOD.replace(was, now, 1)))
    assert told in str(e.value)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"own_steps": 0}, "own_steps are 0"),
        ({"changes": (Change(1.0, "client-0", Move.DIES),)}, "is no aggregator of this tree"),
        ({"changes": (Change(1.0, "cloud", Move.DIES),)}, "is at the top"),
        ({"changes": (Change(-1.0, "edge-0", Move.DIES),)}, "must be from 0"),
    ],
)
def test_a_run_that_cannot_be_is_told_at_once(trees: Any, more: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as e:
        simulate_tree(trees.tree(), trees.rough(), trees.Pull(), initial=trees.start(trees.DENSE), **more)
    assert told in str(e.value)


def test_tree_and_fleet_have_the_same_devices(trees: Any) -> None:
    given = {"initial": trees.start(trees.DENSE)}
    with pytest.raises(ConfigError, match="'client-9' of the fleet is under no aggregator"):
        simulate_tree(trees.tree(9), fleet(10), trees.Pull(), **given)
    with pytest.raises(ConfigError, match="'client-8' of 'edge-2' is not in the fleet"):
        simulate_tree(trees.tree(9), fleet(8), trees.Pull(), **given)
    with pytest.raises(ConfigError, match="no clients"):
        simulate_tree(trees.tree(9), fleet(0), trees.Pull(), **given)


def test_rules_of_products_and_of_factors_do_not_go_together(trees: Any) -> None:
    found = trees.tree(edge={"rule": "factor_mean"})
    with pytest.raises(ConfigError, match="do not go together: cloud: delta, edge-0: factor_mean"):
        simulate_tree(found, trees.rough(), trees.Pull(), initial=trees.start(trees.LORA))
    both = trees.tree(versions=5, rule="factor_mean", edge={"rule": "factor_mean"})
    assert simulate_tree(both, trees.rough(), trees.Pull(), initial=trees.start(trees.LORA)).rows["cloud"]
