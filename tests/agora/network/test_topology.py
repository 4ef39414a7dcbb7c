import math
import time

import pytest

from agora.errors import InvalidRequest
from agora.network.path import Link, Technology
from agora.network.topology import MAX_PATHS, Topology


def link(name: str, source: str, target: str, technology: Technology = Technology.WIFI, **more: float) -> Link:
    return Link(name=name, source=source, target=target, technology=technology, **more)


def names(topology: Topology, source: str = "car", target: str = "cloud", max_relays: int = 2) -> list[str]:
    return [p.name for p in topology.paths(source, target, max_relays=max_relays)]


def test_parallel_links_are_paths_of_their_own_and_relays_come_after_them() -> None:
    topology = Topology(
        [
            link("uplink", "car", "cloud", Technology.NR, price_per_mb=2.0),
            link("old", "car", "cloud", Technology.LTE),
            link("side", "car", "truck", Technology.V2V, price_per_mb=0.5),
            link("truck-up", "truck", "cloud", Technology.NR, price_per_mb=1.0),
        ]
    )
    paths = topology.paths("car", "cloud")
    assert [p.name for p in paths] == ["5g", "4g", "v2v+5g"]
    assert paths[2].relays == ("truck",) and paths[2].price_per_mb == 1.5
    assert names(topology, max_relays=0) == ["5g", "4g"]


def test_paths_with_the_same_technologies_go_by_their_links() -> None:
    topology = Topology(
        [link("a", "car", "cloud"), link("b", "car", "cloud"), link("c", "car", "cloud", Technology.NR)]
    )
    assert names(topology) == ["a", "b", "5g"]


def test_names_are_unique_even_where_links_are_named_to_confuse() -> None:
    topology = Topology(
        [
            link("5g", "car", "cloud", Technology.WIFI),
            link("x", "car", "cloud", Technology.NR),
            link("a+b", "car", "cloud", Technology.LTE),
            link("y", "car", "cloud", Technology.LTE),
            link("a", "car", "m", Technology.LTE),
            link("b", "m", "cloud", Technology.LTE),
            link("c", "car", "n", Technology.LTE),
            link("d", "n", "cloud", Technology.LTE),
        ]
    )
    found = names(topology)
    assert len(found) == 6 and len(set(found)) == 6


def test_a_cycle_of_relays_gives_finitely_many_paths_without_loops() -> None:
    ring = ["car", "a", "b", "c"]
    links = [link(f"{x}-{y}", x, y) for x in ring for y in ring if x != y]
    paths = Topology([*links, link("out", "c", "cloud")]).paths("car", "cloud", max_relays=16)
    assert len(paths) == 5  # c | a,c | b,c | a,b,c | b,a,c
    for path in paths:
        machines = [path.links[0].source, *(one.target for one in path.links)]
        assert len(set(machines)) == len(machines)


def test_dense_topologies_are_searched_in_bounded_time() -> None:
    crowd = [f"r{i}" for i in range(14)]
    links = [link(f"{x}-{y}", x, y) for x in crowd for y in crowd if x != y]
    dense = Topology([*links, link("in", "car", "r0"), *(link(f"{x}-out", x, "cloud") for x in crowd)])
    assert len(dense.paths("car", "cloud", max_relays=16)) == MAX_PATHS
    nowhere = Topology([*links, link("in", "car", "r0"), link("other", "elsewhere", "cloud")])
    began = time.perf_counter()
    assert nowhere.paths("car", "cloud", max_relays=16) == ()
    assert time.perf_counter() - began < 2


def test_the_very_machine_and_machines_nobody_knows() -> None:
    topology = Topology([link("a", "car", "cloud")])
    assert topology.paths("cloud", "car") == ()  # links lead one way
    assert topology.paths("car", "nobody") == () == topology.paths("nobody", "car")
    (here,) = topology.paths("nobody", "nobody")
    assert here.links == () and here.name == "here"
    with pytest.raises(InvalidRequest, match="max_relays is -1"):
        topology.paths("car", "cloud", max_relays=-1)


def test_links_change_come_and_go_and_the_version_tells() -> None:
    topology = Topology([link("a", "car", "cloud", up_mbps=5.0)])
    seen = [topology.version]
    topology.change("a", up_mbps=1.5)
    seen.append(topology.version)
    assert topology.paths("car", "cloud")[0].links[0].up_mbps == 1.5
    topology.join(link("b", "car", "edge"))
    seen.append(topology.version)
    topology.change("b", target="cloud")
    seen.append(topology.version)
    assert names(topology) == ["a", "b"] and "edge" not in topology.machines
    assert topology.remove("a").up_mbps == 1.5
    seen.append(topology.version)
    assert names(topology) == ["wifi"]
    assert seen == sorted(set(seen))
    topology.change("b", up_mbps=None)
    assert topology.version == seen[-1]  # nothing changed


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"up_mbps": -1.0}, "up_mbps of link 'a' is -1.0"),
        ({"up_mbps": math.nan}, "up_mbps"),
        ({"rtt_s": math.inf}, "rtt_s"),
        ({"availability": 1.2}, "at most 1"),
        ({"target": "car"}, "to itself"),
        ({"speed": 3}, "no 'speed' that could change; allowed: source, target"),
        ({"name": "z"}, "no 'name'"),
    ],
)
def test_bad_changes_are_refused_and_change_nothing(values: dict[str, float], said: str) -> None:
    topology = Topology([link("a", "car", "cloud", up_mbps=5.0)])
    with pytest.raises(InvalidRequest, match=said):
        topology.change("a", **values)
    assert topology.link("a").up_mbps == 5.0 and names(topology) == ["wifi"]


def test_links_that_are_not_there_or_twice() -> None:
    topology = Topology([link("a", "car", "cloud")])
    with pytest.raises(InvalidRequest, match=r"no link 'b'.*links there are: a"):
        topology.change("b", up_mbps=1.0)
    with pytest.raises(InvalidRequest, match="no link 'b'"):
        topology.remove("b")
    with pytest.raises(InvalidRequest, match="two links called 'a'"):
        topology.join(link("a", "x", "y"))
