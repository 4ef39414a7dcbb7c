"""An aggregator as a client of the level above: nothing that was learned is lost, nothing counts twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fed.adapter import Adapter
from fed.aggregate.rules import make
from fed.draws import bits, of_text
from fed.fleet import Change, Move, fleet
from fed.hierarchy import Aggregator, Level, Link, Orphans, Tree, simulate_tree
from fed.pace import Pace
from fed.simulate import simulate

ROUND = Pace.synchronous(2, steps=1)


def one_edge(cloud: Pace, edge: Pace, n: int = 2, **of_edge: Any) -> Tree:
    names = [f"client-{i}" for i in range(n)]
    return Tree.even(Level(name="cloud", pace=cloud), Level(name="edge", pace=edge, **of_edge), names, edges=1)


def test_an_edge_alone_under_a_cloud_learns_as_it_would_without_one(trees: Any) -> None:
    world, initial = trees.rough(4, changes=(), up_bytes_per_s=1e9), trees.start(trees.DENSE)
    pace = Pace.fedbuff(4, 2, job_timeout_s=40.0, steps=2)
    link = Link(round_trip_s=3.0, up_bytes_per_s=1000.0)
    tree = one_edge(Pace.synchronous(1, publications=12), pace, 4, up=link)
    found = simulate_tree(tree, world, trees.Pull(), initial=initial)
    # The same seed for the edge's server, since draws go by it.
    versions = len(found.rows["edge-0"])
    flat = simulate(
        pace.but(publications=versions),
        world,
        trees.Pull(),
        lambda a: make("mean", a),
        initial=initial,
        seed=bits(0, of_text("edge-0")) >> 1,
    )
    assert [r["at"] for r in flat.rows] == [r["at"] for r in found.rows["edge-0"]]
    np.testing.assert_allclose(found.adapters["edge-0"].flat, flat.adapters["all"].flat, atol=2e-6)
    assert found.rows["edge-0"][-1]["notes"]["above"] >= 10, "what the cloud made came down"


@pytest.mark.parametrize("loss", [0.0, 0.4])
@pytest.mark.parametrize("cloud", [Pace.synchronous(1, publications=15), Pace.fedasync(1, publications=15)])
def test_each_version_of_an_edge_counts_once_whatever_the_way_up_does(trees: Any, loss: float, cloud: Pace) -> None:
    # Every version of this edge adds one; with no other edge, what is above holds a part of that, and nothing else.
    tree = one_edge(cloud, ROUND, up=Link(round_trip_s=2.6, loss=loss), every=2)
    gaps: list[float] = []

    def look(made: Any) -> None:
        if made.aggregator == "edge-0":
            assert made.published.adapter.flat == pytest.approx(made.published.version, abs=1e-4)
            last["edge"] = made.published.version
        else:
            gaps.append(last["edge"] - float(made.published.adapter.flat[0]))

    last = {"edge": 0}
    found = simulate_tree(
        tree, fleet(2), trees.Add(), initial=Adapter.zeros(trees.DENSE), observe=look, own_steps=1, seed=1
    )
    lost = found.level("cloud").lost
    assert lost > 0 if loss else lost == 0
    assert min(gaps) >= -1e-4, "the cloud holds no more than the edge has made"
    # What was lost on its way went up with the next update: the gap does not grow with the losses.
    assert gaps[-1] <= 12


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gone=st.lists(st.tuples(st.sampled_from(["region", "edge"]), st.floats(1, 100), st.floats(1, 30)), max_size=4),
    loss=st.sampled_from([0.0, 0.3]),
    every=st.integers(1, 3),
    trip=st.sampled_from([0.0, 0.7, 6.0]),
    seed=st.integers(0, 99),
)
def test_whatever_dies_and_comes_back_each_version_counts_once(
    trees: Any, gone: list[tuple[str, float, float]], loss: float, every: int, trip: float, seed: int
) -> None:
    link = Link(round_trip_s=trip, loss=loss)
    upper = Pace.fedasync(1, job_timeout_s=25.0)
    tree = Tree(
        levels=(
            Level(name="cloud", pace=upper.but(seconds=150.0)),
            Level(name="region", pace=upper, up=link),
            Level(name="edge", pace=ROUND.but(job_timeout_s=5.0), up=link, every=every),
        ),
        aggregators=(
            Aggregator(name="cloud", level="cloud"),
            Aggregator(name="region", level="region", parent="cloud"),
            Aggregator(name="edge", level="edge", parent="region", devices=("client-0", "client-1")),
        ),
    )
    changes = tuple(c for name, at, s in gone for c in (Change(at, name, Move.DIES), Change(at + s, name, Move.JOINS)))
    last = {"cloud": 0.0, "region": 0.0, "edge": 0.0}

    def look(made: Any) -> None:
        value = made.published.adapter.flat
        assert np.ptp(value) < 1e-5
        last[made.aggregator] = float(value[0])
        if made.aggregator == "edge":
            assert value[0] == pytest.approx(made.published.version, abs=1e-4)
        # No level holds more than was made below it.
        assert last["cloud"] <= last["region"] + 1e-4 and last["region"] <= last["edge"] + 1e-4

    found = simulate_tree(
        tree, fleet(2), trees.Add(), initial=Adapter.zeros(trees.DENSE), observe=look, changes=changes, seed=seed
    )
    assert found.why == "its 150 s are over"
    assert last["edge"] >= 30
    if not gone and not loss:
        assert last["cloud"] >= last["edge"] - 2 * every - 4 * trip - 2


def test_edges_go_on_while_their_updates_travel(trees: Any) -> None:
    near = one_edge(Pace.synchronous(1, seconds=60.0), ROUND)
    far = one_edge(Pace.synchronous(1, seconds=60.0), ROUND, up=Link(round_trip_s=20.0))
    made = [
        len(simulate_tree(t, fleet(2), trees.Add(), initial=Adapter.zeros(trees.DENSE)).rows["edge-0"])
        for t in (near, far)
    ]
    assert made[0] == made[1] >= 59


def test_a_cloud_weighs_edges_by_the_examples_behind_their_updates(trees: Any) -> None:
    class Toward:
        def train(self, start: Adapter, job: Any) -> Any:
            found = trees.Add().train(start, job)
            return found if job.client != "client-0" else type(found)(delta=-found.delta, examples=6, steps=1)

    tree = Tree.even(
        Level(name="cloud", pace=Pace.synchronous(2, publications=1)),
        Level(name="edge", pace=Pace.synchronous(1, steps=1)),
        trees.devices(2),
        edges=2,
    )
    found = simulate_tree(tree, fleet(2), Toward(), initial=Adapter.zeros(trees.DENSE))
    assert found.adapter.flat == pytest.approx((2 * 1.0 - 6 * 1.0) / 8)


def test_a_lora_edge_sends_all_it_has_learned_over_time(trees: Any) -> None:
    """One edge, products: what the cut to a rank leaves out of an update goes with a later one."""
    tree = one_edge(Pace.synchronous(1, publications=25), Pace.synchronous(2, steps=1), up=Link(round_trip_s=1.5))
    found = simulate_tree(tree, fleet(2), trees.Pull(), initial=trees.start(trees.LORA), seed=2)
    cloud, edge = (
        {n: b.astype(float) @ a for n, b, a in found.adapters[name].factors()} for name in ("cloud", "edge-0")
    )
    start = {n: b.astype(float) @ a for n, b, a in trees.start(trees.LORA).factors()}
    for layer in start:
        way = np.linalg.norm(edge[layer] - start[layer])
        assert np.linalg.norm(cloud[layer] - edge[layer]) < 0.25 * way


def test_all_levels_learn_and_edges_differ_from_the_cloud(trees: Any) -> None:
    found = trees.run("dense", changes=())
    target = np.mean([np.random.default_rng(i).normal(size=20) for i in range(3, 9)], axis=0)
    before = np.linalg.norm(trees.start(trees.DENSE).flat - target)
    assert np.linalg.norm(found.adapter.flat - target) < 0.7 * before
    own = np.mean([np.random.default_rng(i).normal(size=20) for i in range(6, 9)], axis=0)
    gap = {name: np.linalg.norm(found.adapters[name].flat - own) for name in ("cloud", "edge-2")}
    assert gap["edge-2"] < gap["cloud"], "an edge is nearer to its own devices than the cloud"
    report = found.level("edge")
    assert report.aggregators == 3 and report.staleness_max > 0 and report.sent > 0
    assert found.rows["edge-2"][-1]["notes"]["above"] > 3


@pytest.mark.parametrize(("orphans", "host"), [("sibling", "edge-0"), ("parent", "cloud"), ("wait", None)])
def test_devices_of_an_edge_that_died_go_where_they_shall_and_come_back(
    trees: Any, orphans: str, host: str | None
) -> None:
    pace = Pace.fedbuff(4, 1, job_timeout_s=20.0, steps=1)
    tree = Tree.even(
        Level(name="cloud", pace=pace.but(seconds=100.0)),
        Level(name="edge", pace=pace, orphans=Orphans(orphans)),
        trees.devices(4),
        edges=2,
    )
    changes = (Change(20.5, "edge-1", Move.DIES), Change(60.5, "edge-1", Move.JOINS))
    at: dict[str, set[str]] = {}
    seen: dict[str, list[tuple[float, int]]] = {name: [] for name in tree.places}

    def look(made: Any) -> None:
        seen[made.aggregator].append((made.published.at, made.published.row["clients"]))

    def until(made: Any) -> bool:
        return bool(made.published.at > stop)

    for stop in (50.0, 99.0):
        found = simulate_tree(
            tree, fleet(4), trees.Add(), initial=Adapter.zeros(trees.DENSE), changes=changes, observe=look, until=until
        )
        at = {
            name: {n for n, c in state.clients.items() if c.present and n.startswith("client")}
            for name, state in found.states.items()
            if name != "edge-1" or stop > 60
        }
        moved = {"client-2", "client-3"}
        if stop == 50.0:
            assert {name for name, who in at.items() if moved <= who} == ({host} if host else set())
        else:
            assert at == {"cloud": set(), "edge-0": {"client-0", "client-1"}, "edge-1": moved}
        assert not [t for t, _ in seen["edge-1"] if 20.5 < t < 60.5]
    assert [t for t, _ in seen["edge-1"] if t > 62]
    assert found.why.startswith("what was waited for")


def test_a_device_comes_back_elsewhere_when_its_edge_has_gone_meanwhile(trees: Any) -> None:
    pace = Pace.fedbuff(4, 1, job_timeout_s=10.0, steps=1)
    tree = Tree.even(
        Level(name="cloud", pace=pace.but(seconds=80.0)),
        Level(name="edge", pace=pace, orphans=Orphans.SIBLING),
        trees.devices(4),
        edges=2,
    )
    world = fleet(
        4, changes=(Change(5.5, "client-2", Move.DIES), Change(30.5, "client-2", Move.JOINS)), loss_of={"client-3": 0.5}
    )
    changes = (
        Change(10.5, "edge-1", Move.LEAVES),
        Change(20.5, "edge-0", Move.DIES),
        Change(40.5, "edge-0", Move.JOINS),
    )
    found = simulate_tree(tree, world, trees.Add(), initial=Adapter.zeros(trees.DENSE), changes=changes)
    there = {n for n, c in found.states["edge-0"].clients.items() if c.present}
    assert there == set(trees.devices(4))
    assert found.level("edge").lost > 2, "a device keeps its losses wherever it is"
    assert found.why == "its 80 s are over"


def test_when_all_devices_are_dead_the_top_ends_the_run(trees: Any) -> None:
    world = fleet(4, changes=tuple(Change(5.0, name, Move.DIES) for name in trees.devices(4)))
    tree = Tree.even(
        Level(name="cloud", pace=Pace.synchronous(2, job_timeout_s=30.0, give_up=3)),
        Level(name="edge", pace=Pace.synchronous(2, job_timeout_s=10.0, give_up=2)),
        trees.devices(4),
        edges=2,
    )
    found = simulate_tree(tree, world, trees.Add(), initial=Adapter.zeros(trees.DENSE))
    assert "no client works" in found.why


def test_an_edge_whose_own_pace_ends_it_leaves_and_the_others_go_on(trees: Any) -> None:
    tree = Tree(
        levels=(
            Level(name="cloud", pace=Pace.fedasync(2, publications=20)),
            Level(name="brief", pace=Pace.synchronous(2, publications=3)),
            Level(name="edge", pace=Pace.synchronous(2)),
        ),
        aggregators=(
            Aggregator(name="cloud", level="cloud"),
            Aggregator(name="a", level="brief", parent="cloud", devices=("client-0", "client-1")),
            Aggregator(name="b", level="edge", parent="cloud", devices=("client-2", "client-3")),
        ),
    )
    found = simulate_tree(tree, fleet(4), trees.Add(), initial=Adapter.zeros(trees.DENSE))
    assert len(found.rows["a"]) == 3 and len(found.rows["b"]) > 10
    assert found.why == "20 versions were made" and not found.states["cloud"].clients["a"].present
