import gzip
import itertools
import json
import math
import random
from pathlib import Path as FilePath
from typing import Any

import pytest

from agora.errors import InvalidRequest
from agora.network.jobs import Job, Observation
from agora.network.path import Technology
from agora.network.trace_files import Recording, read_multipath
from benchmarks import multipath
from benchmarks.multipath_parts import traces
from benchmarks.multipath_parts.policies import Agora, Oracle, Static
from benchmarks.multipath_parts.simulate import Played, Simulation

NR, LTE = Technology.NR, Technology.LTE


def write(data: FilePath, rates: dict[str, list[tuple[float, float]]]) -> FilePath:
    """A data folder with these traces: (5G, 4G) megabits per second of each second."""
    lines = ["trace,mobility,t_s,mbps_5g,mbps_4g"]
    for name, seconds in rates.items():
        lines += [f"{name},driving,{t}.0,{nr},{lte}" for t, (nr, lte) in enumerate(seconds, 1)]
    file = data / traces.FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    return data


def recordings(data: FilePath, rates: dict[str, list[tuple[float, float]]]) -> tuple[Recording, ...]:
    return read_multipath(write(data, rates) / traces.FILE)


def outages(seed: int, seconds: int = 400) -> list[tuple[float, float]]:
    """5G that is fast, and dead a fifth of the time for half a minute; 4G that will just do."""
    rng, found = random.Random(seed), []
    while len(found) < seconds:
        found += [(rng.uniform(200, 900), rng.uniform(30, 60)) for _ in range(rng.randrange(60, 120))]
        found += [(0.0, rng.uniform(30, 60)) for _ in range(rng.randrange(15, 30))]
    return found[:seconds]


def asked(at: float, size: int = 1_000_000) -> traces.Asked:
    job = Job(up_bytes=size, down_bytes=0, prompt_tokens=10, completion_tokens=5, deadline_s=1.5)
    return traces.Asked(at=at, kind="photo", job=job, server_s=0.2, rtt_s={NR: 0.1, LTE: 0.1})


def simulated(recording: Recording, policy: Any, jobs: list[traces.Asked]) -> Played:
    return Simulation(recording.traces, traces.paths(traces.PRICES), policy).run(jobs)


def test_a_job_takes_round_trip_transfer_and_computing(tmp_path: FilePath) -> None:
    (flat,) = recordings(tmp_path, {"flat": [(8.0, 16.0)] * 60})
    played = simulated(flat, Static(NR), [asked(5.0), asked(10.0)])
    assert [d.seconds for d in played.done] == pytest.approx([1.3, 1.3])
    assert played.money == pytest.approx(2 * traces.PRICES[NR]) and played.late == 0
    assert simulated(flat, Static(LTE), [asked(5.0)]).done[0].seconds == pytest.approx(0.8)


def test_jobs_on_one_radio_wait_for_each_other(tmp_path: FilePath) -> None:
    (flat,) = recordings(tmp_path, {"flat": [(8.0, 16.0)] * 60})
    played = simulated(flat, Static(NR), [asked(5.0), asked(5.5)])
    assert [d.seconds for d in played.done] == pytest.approx([1.3, 1.8])
    assert [d.late for d in played.done] == [False, True]


def test_a_job_that_is_given_up_costs_what_was_sent(tmp_path: FilePath) -> None:
    (dying,) = recordings(tmp_path, {"dying": [(8.0, 16.0)] * 5 + [(0.0, 0.0)] * 60})
    seen: list[Observation] = []

    class Noting(Static):
        def observe(self, seen_now: Observation) -> None:
            seen.append(seen_now)

    played = simulated(dying, Noting(NR), [asked(5.25)])
    (done,) = played.done
    assert done.late and done.seconds == traces.GIVE_UP_S
    assert played.money == pytest.approx(0.75 * traces.PRICES[NR])
    assert [(o.ok, o.cancelled, o.up_bytes) for o in seen] == [(False, False, 750_000)]


def test_a_second_copy_wins_and_the_first_is_broken_off_and_paid_for(tmp_path: FilePath) -> None:
    (dead,) = recordings(tmp_path, {"dead": [(8.0, 80.0)] * 5 + [(0.0, 80.0)] * 60})
    seen: list[Observation] = []

    class Hedging(Static):
        def late_in_s(self, one: traces.Asked) -> float | None:
            return 0.5

        def hedge(self, one: traces.Asked, now: float) -> Technology | None:
            return LTE

        def observe(self, seen_now: Observation) -> None:
            seen.append(seen_now)

    played = simulated(dead, Hedging(NR), [asked(5.75)])
    (done,) = played.done
    assert done.seconds == pytest.approx(0.5 + 0.1 + 0.2 + 0.1) and not done.late
    assert (done.took, done.hedged, played.copies) == (NR, LTE, 1)
    assert played.money == pytest.approx(0.25 * traces.PRICES[NR] + traces.PRICES[LTE])
    assert {(o.path.name, o.ok, o.cancelled) for o in seen} == {("4g", True, False), ("5g", False, True)}


def test_the_stream_is_the_same_for_all_and_ends_in_time(tmp_path: FilePath) -> None:
    (one,) = recordings(tmp_path, {"one": outages(1)})
    jobs = traces.stream(one, 7)
    assert jobs == traces.stream(one, 7) != traces.stream(one, 8)
    assert 90 < len(jobs) < 160 and jobs[-1].at < one.traces[NR].end_s - traces.GIVE_UP_S
    assert all(b.at - a.at >= traces.GAPS_S[0] for a, b in itertools.pairwise(jobs))
    assert traces.stream(read_multipath(write(tmp_path, {"short": [(1, 1)] * 3}) / traces.FILE)[0], 0) == []


def test_agora_leaves_a_dead_radio_and_the_oracle_is_never_worse_than_one_radio(tmp_path: FilePath) -> None:
    found = recordings(tmp_path, {f"t{i}": outages(i) for i in range(4)})
    played = multipath.play_all(found, seed=0)
    late = {name: sum(p.late for p in of_policy) for name, of_policy in played.items()}
    assert late["5g"] > 50 and late["agora"] < 0.5 * late["5g"] and late["agora"] < late["best_static"], late
    for oracle, nr, lte in zip(played["oracle"], played["5g"], played["4g"], strict=True):
        assert oracle.late <= min(nr.late, lte.late)
    for best, nr, lte in zip(played["best_static"], played["5g"], played["4g"], strict=True):
        assert best.late == min(nr.late, lte.late)
    agora = played["agora"]
    assert sum(p.copies for p in agora) <= 0.05 * sum(len(p.done) for p in agora)
    again = multipath.play(found, lambda r, p: Agora(p, seed=0), seed=0)
    assert again == agora


def test_the_oracle_takes_the_cheaper_radio_where_both_are_in_time(tmp_path: FilePath) -> None:
    (flat,) = recordings(tmp_path, {"flat": [(80.0, 80.0)] * 60})
    paths = traces.paths({NR: 0.002, LTE: 0.001})
    played = Simulation(flat.traces, paths, Oracle(flat.traces, paths)).run([asked(5.0)])
    assert played.done[0].took is LTE


def test_ratios_come_with_paired_intervals() -> None:
    def played(late: int, money: float) -> Played:
        done = traces_done(late)
        return Played(done=done, money=money, copies=0)

    a = [played(i, 1.1 * i) for i in range(1, 21)]
    b = [played(2 * i, 1.0 * i) for i in range(1, 21)]
    compared = multipath.compare(a, b, seed=0)
    assert compared["misses"] == 0.5 and compared["misses_ci95"] == [0.5, 0.5]  # paired: no spread at all
    assert compared["money"] == pytest.approx(1.1) and multipath.goals(compared)["surely"]
    none = multipath.compare(a, [played(0, 1.0)] * 20, seed=0)
    assert none["misses"] is None and multipath.goals(none) == {"reached": None, "surely": None}


def traces_done(late: int) -> Any:
    from benchmarks.multipath_parts.simulate import Done

    return tuple(Done(at=float(i), seconds=1.0, late=i < late, took=NR, hedged=None) for i in range(50))


def run(data: FilePath, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    hedged = {"p99_cut": 9.0, "extra_requests": 0.04}
    monkeypatch.setattr(multipath, "hedging", lambda **_: {"hedging": hedged, "hedging_correlated": hedged})
    monkeypatch.setattr("sys.argv", ["multipath", "--data", str(data), *options])
    multipath.main()


def test_what_it_prints(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {f"t{i}": outages(i, 200) for i in range(3)} | {traces.TUNED_ON[0]: outages(9, 200)}
    data, picture = write(tmp_path, rates), tmp_path / "x.png"
    run(data, monkeypatch, "--quick", "--json", "--plot", str(picture))
    result = json.loads(capsys.readouterr().out)
    assert list(result["traces"]) == ["4g", "5g", "best_static", "agora", "oracle"]
    for row in result["traces"].values():
        assert {"p50_s", "p95_s", "p99_s", "deadline_misses", "money"} <= set(row)
        assert all(math.isfinite(v) for v in row.values())
    assert result["recordings"] == 3  # the tuned one is no part of it
    assert {"hedging", "hedging_correlated", "setup", "agora_over_best_static", "facts"} <= set(result)
    assert picture.read_bytes().startswith(b"\x89PNG")
    run(data, monkeypatch)
    assert "best_static" in capsys.readouterr().out


def test_wrong_data_is_told(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="is not there"):
        run(tmp_path, monkeypatch)
    write(tmp_path, {traces.TUNED_ON[0]: outages(9, 100)})
    with pytest.raises(InvalidRequest, match="no traces but those that constants were tuned on"):
        run(tmp_path, monkeypatch)
