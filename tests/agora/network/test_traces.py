import gzip
import math
import re
from pathlib import Path as FilePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import InvalidRequest
from agora.network import trace_files
from agora.network.mobility import Played, PlayedTopology, Player
from agora.network.path import Link, Technology
from agora.network.topology import Topology
from agora.network.trace_files import read_trace
from agora.network.traces import Trace

TRACE = Trace([10.0, 11.0, 13.0], [8.0, 0.0, 16.0], end_s=14.0)  # 1 MB/s, nothing for two seconds, 2 MB/s


@pytest.mark.parametrize(
    ("start", "size", "seconds"),
    [
        (10.0, 1_000_000, 1.0),
        (10.0, 500_000, 0.5),
        (10.5, 500_000, 0.5),
        (10.5, 500_001, 2.5 + 0.0000005),
        (10.0, 2_000_000, 3.5),
        (11.0, 1_000_000, 2.5),
        (12.9, 1_000_000, 0.6),
        (13.5, 2_000_000, 1.5),  # it begins again
        (10.0, 30_000_000, 40.0),  # ten times over
        (10.0, 31_000_000, 41.0),
        (50.0, 1_000_000, 1.0),
        (6.0, 1_000_000, 1.0),
        (10.0, 0, 0.0),
    ],
)
def test_a_transfer_takes_as_long_as_the_bytes_need(start: float, size: int, seconds: float) -> None:
    assert TRACE.transfer_s(start, size) == pytest.approx(seconds, abs=1e-9)


def test_values_hold_until_the_next() -> None:
    assert [TRACE.at(t) for t in (10.0, 10.99, 11.0, 12.99, 13.0, 14.0, 9.5)] == [8, 8, 0, 0, 16, 8, 16]
    assert [TRACE.next_change(t) for t in (10.0, 10.5, 11.0, 13.2, 14.0)] == [11, 11, 13, 14, 15]
    assert TRACE.moved(10.5, 13.5) == pytest.approx(1_500_000)
    assert TRACE.moved(13.5, 15.0) == pytest.approx(2_000_000)
    assert TRACE.moved(5.0, 5.0) == TRACE.moved(6.0, 5.0) == 0.0


@pytest.mark.parametrize(
    ("times", "mbps", "end", "size", "start"),
    [
        ([0.0, 0.1, 0.2], [0, 0.1, 1], 0.30000000000000004, 41250.000000000015, 0.6404601078208078),
        ([0.0, 0.3, 0.4, 1.4], [0, 1e-9, 1, 0], 1.7333333333333332, 3500000.0003499994, -3.532538738522741),
    ],
)
def test_a_transfer_that_ends_with_a_round_ends_though_the_next_begins_with_nothing(
    times: list[float], mbps: list[float], end: float, size: float, start: float
) -> None:
    trace = Trace(times, mbps, end_s=end)
    took = trace.transfer_s(start, size)
    assert trace.moved(start, start + took) == pytest.approx(size)


def test_a_trace_of_nothing_never_ends_a_transfer() -> None:
    assert Trace([0.0, 1.0], [0.0, 0.0]).transfer_s(0.5, 1) == math.inf


RATES = st.lists(st.one_of(st.just(0.0), st.floats(0.01, 2000)), min_size=1, max_size=12)


@given(RATES, st.lists(st.floats(0.05, 5.0), min_size=12, max_size=12), st.floats(-50, 50), st.integers(1, 10**8))
def test_what_was_moved_until_the_end_is_the_size(
    rates: list[float], steps: list[float], start: float, size: int
) -> None:
    times = [sum(steps[:i]) for i in range(len(rates))]
    trace = Trace(times, rates, end_s=sum(steps[: len(rates)]))
    took = trace.transfer_s(start, size)
    if not any(rates):
        assert took == math.inf
        return
    assert trace.moved(start, start + took) == pytest.approx(size, rel=1e-6, abs=1)
    assert trace.transfer_s(start, size + 1000) >= took
    # The very end, not a moment in a gap after it.
    assert trace.moved(start, start + took - 1e-3) < size + 1


def test_a_transfer_is_what_small_steps_add_up_to() -> None:
    trace = Trace([0.0, 0.7, 1.1, 3.0], [5.0, 80.0, 0.0, 33.0], end_s=3.3)
    t, left = 0.4, 3_000_000.0
    while left > 0:
        left -= trace.at(t) * 125_000 * 1e-4
        t += 1e-4
    assert trace.transfer_s(0.4, 3_000_000) == pytest.approx(t - 0.4, abs=1e-3)


@pytest.mark.parametrize(
    ("times", "mbps", "said"),
    [
        ([], [], "0 times and 0 values"),
        ([0.0], [1.0, 2.0], "1 times and 2 values"),
        ([0.0, 0.0], [1.0, 2.0], "0.0 s follows 0.0 s"),
        ([1.0, 0.0], [1.0, 2.0], "times must rise"),
        ([0.0, math.nan], [1.0, 2.0], "times must rise"),
        ([0.0], [-1.0], "-1.0 Mbit/s"),
        ([0.0], [math.nan], "nan Mbit/s"),
    ],
)
def test_traces_that_cannot_be_are_refused(times: list[float], mbps: list[float], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        Trace(times, mbps)


def write(file: FilePath, *lines: str) -> FilePath:
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    return file


def test_paired_traces_are_read(tmp_path: FilePath) -> None:
    rows = ["trace,mobility,t_s,mbps_5g,mbps_4g", "a,driving,1.0,361,32.0", "a,driving,2.0,0,44.5", "b,walking,1,5,6"]
    first, second = trace_files.read_multipath(write(tmp_path / "m.csv.gz", *rows))
    assert (first.name, first.kind, second.kind) == ("a", "driving", "walking")
    assert first.traces[Technology.NR].mbps == (361, 0) and first.traces[Technology.LTE].mbps == (32, 44.5)
    assert first.traces[Technology.NR].times_s == (1.0, 2.0) and first.traces[Technology.NR].end_s == 3.0


def test_single_traces_are_read(tmp_path: FilePath) -> None:
    rows = ["trace,tech,mobility,t_s,mbps", "x,4g,walking,0,45.0", "x,4g,walking,1,44.0"]
    (one,) = trace_files.read_single(write(tmp_path / "s.csv.gz", *rows))
    assert one.traces[Technology.LTE].mbps == (45, 44)
    with pytest.raises(InvalidRequest, match=r"'6g' is no technology.*allowed: 5g, 4g"):
        trace_files.read_single(write(tmp_path / "t.csv.gz", rows[0], "x,6g,walking,0,45.0"))


def test_mahimahi_packets_become_bandwidth_and_bins_left_out_are_gaps(tmp_path: FilePath) -> None:
    rows = ["trace,direction,t_ms,packets_1500B", "d,down,0,100", "d,down,300,50", "d,up,0,10"]
    (one,) = trace_files.read_mahimahi(write(tmp_path / "m.csv.gz", *rows))
    assert one.traces[Technology.LTE].mbps == pytest.approx((12.0, 0, 0, 6.0))
    assert one.traces[Technology.LTE].moved(0.0, 0.4) == pytest.approx(150 * 1500)
    assert one.up[Technology.LTE].mbps == pytest.approx((1.2,))


def test_ucc_kilobits_and_speed_tests_are_read(tmp_path: FilePath) -> None:
    rows = ["trace,application,mobility,DL_bitrate,UL_bitrate", "u,x,Static,28000,600", "u,x,Static,0,23"]
    (one,) = trace_files.read_ucc5g(write(tmp_path / "u.csv.gz", *rows))
    assert one.traces[Technology.NR].mbps == (28, 0) and one.up[Technology.NR].mbps == (0.6, 0.023)
    tests = ["downlink_Mbps,uplink_Mbps,latency_ms,carrier,radio_type", "10,5,40,V,4G-LTE", "9,4,60,V,4G-LTE", ",,,V,x"]
    read = trace_files.read_speedtests(write(tmp_path / "t.csv.gz", *tests))
    assert len(read) == 2 and trace_files.median_rtt_s(read, "4G-LTE") == pytest.approx(0.05)
    assert trace_files.median_rtt_s(read, "5G") is None


@pytest.mark.parametrize("time", ["nan", "inf", "1e300", "1e12", "-5"])
def test_a_time_that_cannot_be_is_told_clearly(tmp_path: FilePath, time: str) -> None:
    file = tmp_path / "x.csv.gz"
    file.write_bytes(gzip.compress(f"trace,direction,t_ms,packets_1500B\na,down,0,3\na,down,{time},3\n".encode()))
    with pytest.raises(InvalidRequest, match="t_ms of a is"):
        trace_files.read_mahimahi(file)


def test_a_file_that_is_damaged_in_the_middle_is_told_clearly(tmp_path: FilePath) -> None:
    rows = "".join(f"a,w,{i},{i * 7919 % 1000},{i * 31337 % 977}\n" for i in range(2000))
    packed = bytearray(gzip.compress(f"trace,mobility,t_s,mbps_5g,mbps_4g\n{rows}".encode()))
    packed[len(packed) // 2] ^= 0xFF
    packed[len(packed) // 2 + 1] ^= 0x55
    (tmp_path / "x.csv.gz").write_bytes(packed)
    with pytest.raises(InvalidRequest, match=r"cannot be read|must"):
        trace_files.read_multipath(tmp_path / "x.csv.gz")


def test_damaged_files_are_told_clearly(tmp_path: FilePath) -> None:
    with pytest.raises(InvalidRequest, match="is not there"):
        trace_files.read_multipath(tmp_path / "none.csv.gz")
    (tmp_path / "text.csv.gz").write_text("trace,mobility\n")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        trace_files.read_multipath(tmp_path / "text.csv.gz")
    with pytest.raises(InvalidRequest, match=r"has no column 'mbps_5g'.*its columns: trace, mobility, t_s"):
        trace_files.read_multipath(write(tmp_path / "c.csv.gz", "trace,mobility,t_s", "a,b,1"))
    header = "trace,mobility,t_s,mbps_5g,mbps_4g"
    with pytest.raises(InvalidRequest, match=r"row 3: .*mbps_5g is 'many'"):
        trace_files.read_multipath(write(tmp_path / "n.csv.gz", header, "a,w,1,1,1", "a,w,2,many,1"))
    with pytest.raises(InvalidRequest, match="must be numbers"):
        trace_files.read_multipath(write(tmp_path / "short.csv.gz", header, "a,w,1"))
    with pytest.raises(InvalidRequest, match="a line of more than"):
        trace_files.read_multipath(write(tmp_path / "long.csv.gz", header, "a" * 200_000))
    with pytest.raises(InvalidRequest, match="nan Mbit/s"):
        trace_files.read_multipath(write(tmp_path / "nan.csv.gz", header, "a,w,1,nan,1"))


class Hand:
    """A clock whose sleep moves it on, and that notes what a link was like on the way."""

    def __init__(self, topology: Topology) -> None:
        self.t = 100.0
        self.topology = topology
        self.seen: list[tuple[float, float | None, float | None]] = []

    def now(self) -> float:
        return self.t

    async def sleep(self, seconds: float) -> None:
        link = self.topology.link("a")
        self.seen.append((self.t, link.up_mbps, link.down_mbps))
        assert seconds > 0
        self.t += seconds


async def test_a_player_changes_links_as_their_traces_say() -> None:
    links = [Link(name=n, source="car", target="edge", technology=Technology.NR, rtt_s=0.05) for n in ("a", "b")]
    topology = Topology(links)
    clock = Hand(topology)
    player = Player(topology, {"a": Played(down=TRACE, up=Trace([0.0], [3.0], end_s=100.0))}, clock)
    await player.play(4.5)
    assert clock.t == pytest.approx(104.5)
    assert clock.seen == [(100.0, 3, 8), (101.0, 3, 0), (103.0, 3, 16), (104.0, 3, 8)]
    assert topology.link("b") == links[1] and topology.link("a").rtt_s == 0.05


LINK = Link(name="a", source="car", target="edge", technology=Technology.NR)


@given(
    elapsed=st.lists(st.floats(0, 50), min_size=1, max_size=20),
    loop=st.booleans(),
    speed=st.sampled_from([0.25, 1.0, 3.0]),
)
def test_a_played_topology_is_what_its_traces_say_whenever_it_is_looked_at(
    elapsed: list[float], loop: bool, speed: float
) -> None:
    now = [1000.0]
    topology = PlayedTopology(
        [LINK], {"a": Played(down=TRACE, up=Trace([0.0, 1.5], [3.0, 4.0]), loop=loop, speed=speed)}, lambda: now[0]
    )
    version, kept = topology.version, topology.links
    for t in sorted(elapsed):
        now[0] = 1000.0 + t
        # Looking at the version alone tells whether something is new.
        assert (topology.links == kept) == (topology.version == version)
        version, kept = topology.version, topology.links
        played = (now[0] - 1000.0) * speed
        over = not loop and played >= 4.0
        assert kept[0].down_mbps == (16.0 if over else TRACE.at(10.0 + played))
        if not loop and played >= 3.0:
            assert kept[0].up_mbps == 4.0
        assert topology.link("a") == kept[0]


def test_a_trace_that_does_not_begin_again_stays_as_it_was_last() -> None:
    once = Played(down=TRACE, loop=False, speed=2.0)
    assert [once.values(t)["down_mbps"] for t in (0.0, 0.5, 1.49, 1.5, 1.99, 2.0, 100.0)] == [8, 0, 0, 16, 16, 16, 16]
    assert once.next_change(0.0) == 0.5
    assert once.next_change(2.0) == float("inf")
    with pytest.raises(InvalidRequest, match="speed of a trace is 0"):
        Played(down=TRACE, speed=0.0)
    with pytest.raises(InvalidRequest, match="no link 'z'"):
        PlayedTopology([LINK], {"z": once}, lambda: 0.0)


@pytest.mark.parametrize(
    ("table", "down", "up"),
    [
        ("t_s,mbps\n0,3\n1,4\n", (3, 4), (3, 4)),
        ("t_s,down_mbps\n0,3\n1,4\n", (3, 4), None),
        ("up_mbps,t_s,down_mbps,who\n1,0,3,x\n2,1,4,x\n", (3, 4), (1, 2)),
        ("t_s,mbps,up_mbps\n0,3,1\n1,4,2\n", (3, 4), (1, 2)),
    ],
)
def test_a_links_own_table(
    tmp_path: FilePath, table: str, down: tuple[float, ...], up: tuple[float, ...] | None
) -> None:
    plain, packed = tmp_path / "t.csv", tmp_path / "t.csv.gz"
    plain.write_text(table)
    with gzip.open(packed, "wt") as file:
        file.write(table)
    for path in (plain, packed):
        assert tuple(None if t is None else t.mbps for t in read_trace(path)) == (down, up)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("", "no column 't_s'"),
        ("t_s,speed\n0,3\n", "holds no bandwidth: it has t_s, speed"),
        ("t_s,mbps\n", "it has no rows"),
        ("t_s,mbps\n0,fast\n", "row 2: t_s is '0', mbps is 'fast'; these must be numbers"),
        ("t_s,mbps\n0,1\n0,2\n", "times must rise"),
        ("t_s,mbps\n0,-1\n", "must be a number ≥ 0"),
        ("t_s,mbps\n0,nan\n", "must be a number ≥ 0"),
    ],
)
def test_a_table_that_cannot_be_played_says_why(tmp_path: FilePath, table: str, said: str) -> None:
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(InvalidRequest, match=re.escape(said)):
        read_trace(tmp_path / "t.csv")


async def test_a_link_that_is_gone_is_left_out_until_it_is_back() -> None:
    link = Link(name="a", source="car", target="edge", technology=Technology.NR)
    topology = Topology([link])
    player = Player(topology, {"a": Played(down=TRACE)}, Hand(topology))
    topology.remove("a")
    player.apply(0.0)
    topology.join(link)
    player.apply(3.5)
    assert topology.link("a").down_mbps == 16 and topology.link("a").up_mbps is None
    with pytest.raises(InvalidRequest, match="no link 'z' to play a trace on"):
        Player(topology, {"z": Played(down=TRACE)}, Hand(topology))
