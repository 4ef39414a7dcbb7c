"""Which of two radios carries a job, while the client moves: agora against always the same one, and against the future.

`python -m benchmarks.multipath --data DIR [--quick] [--json] [--plot FILE]`

A stream of jobs (some megabytes up, a short answer down, a deadline) is played over recorded 4G and 5G bandwidth of the
same walk or drive. agora is told nothing but what its own jobs met. `best_static` is the better radio of each trace,
known only afterwards. The second half hedges requests over replicas of which one in a hundred answers takes 50 times
as long."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from agora.errors import InvalidRequest
from agora.network.path import Path, Technology
from agora.network.trace_files import Recording
from benchmarks.common import data_dir, facts, parser, run, show
from benchmarks.multipath_parts import traces
from benchmarks.multipath_parts.hedging import hedging
from benchmarks.multipath_parts.plot import plot
from benchmarks.multipath_parts.policies import SECONDS_PER_DOLLAR, Agora, Oracle, Policy, Static
from benchmarks.multipath_parts.simulate import Played, Simulation

QUICK_TRACES: Final = 12
"""Traces under `--quick`, evenly out of all: some 2,000 jobs."""

RESAMPLES: Final = 10_000
"""Bootstrap resamples: the ends of a 95 % interval then stand on 250 of them each."""

GOAL_MISSES: Final = 0.8
"""Most deadline misses, as a share of those of `best_static`."""

GOAL_MONEY: Final = 1.1
"""Most money, as a share of that of `best_static`."""

Prices = Mapping[Technology, float]
Make = Callable[[Recording, Mapping[Technology, Path]], Policy]

OTHER_WORLDS: Final[Mapping[str, dict[str, Any]]] = {
    "5g_twice_as_dear": {"prices": {**traces.PRICES, Technology.NR: 2 * traces.PRICES[Technology.NR]}},
    "4g_twice_as_dear": {"prices": {**traces.PRICES, Technology.LTE: 2 * traces.PRICES[Technology.LTE]}},
    "deadline_1_s": {"deadline_s": 1.0},
    "deadline_2_s": {"deadline_s": 2.0},
}
"""What is assumed otherwise, to see whether the result hangs on it."""


def play(
    recordings: Sequence[Recording],
    make: Make,
    *,
    seed: int,
    prices: Prices = traces.PRICES,
    deadline_s: float = traces.DEADLINE_S,
) -> list[Played]:
    """Plays a policy on each recording, afresh."""
    found = []
    for recording in recordings:
        paths = traces.paths(prices)
        jobs = traces.stream(recording, seed, deadline_s=deadline_s)
        found.append(Simulation(recording.traces, paths, make(recording, paths)).run(jobs))
    return found


def play_all(recordings: Sequence[Recording], *, seed: int, **world: Any) -> dict[str, list[Played]]:
    """Plays all policies; `best_static` is on each trace the radio with fewer late jobs (of equals the cheaper one)."""
    makers: dict[str, Make] = {
        "4g": lambda r, p: Static(Technology.LTE),
        "5g": lambda r, p: Static(Technology.NR),
        "agora": lambda r, p: Agora(p, seed=seed),
        "oracle": lambda r, p: Oracle(r.traces, p),
    }
    played = {name: play(recordings, make, seed=seed, **world) for name, make in makers.items()}
    pairs = zip(played["4g"], played["5g"], strict=True)
    best = [min(pair, key=lambda p: (p.late, p.money)) for pair in pairs]
    return {"4g": played["4g"], "5g": played["5g"], "best_static": best, **{n: played[n] for n in ("agora", "oracle")}}


def figures(played: Sequence[Played]) -> dict[str, Any]:
    """Percentiles of time over all jobs, share of late ones, money for all, and extra copies per job."""
    seconds = np.array([d.seconds for p in played for d in p.done])
    p50, p95, p99 = np.quantile(seconds, [0.5, 0.95, 0.99])
    return {
        "p50_s": round(float(p50), 4),
        "p95_s": round(float(p95), 4),
        "p99_s": round(float(p99), 4),
        "deadline_misses": round(sum(p.late for p in played) / len(seconds), 5),
        "money": round(sum(p.money for p in played), 4),
        "extra_copies": round(sum(p.copies for p in played) / len(seconds), 4),
        "on_5g": round(sum(d.took is Technology.NR for p in played for d in p.done) / len(seconds), 4),
    }


def compare(a: Sequence[Played], b: Sequence[Played], *, seed: int) -> dict[str, Any]:
    """Late jobs and money of `a` over those of `b`; 95 % intervals by a bootstrap that resamples traces (paired)."""
    late = _ratio([p.late for p in a], [p.late for p in b], seed)
    money = _ratio([p.money for p in a], [p.money for p in b], seed)
    return {"misses": late[0], "misses_ci95": late[1], "money": money[0], "money_ci95": money[1]}


def _ratio(a: Sequence[float], b: Sequence[float], seed: int) -> tuple[float | None, list[float] | None]:
    """Sum over sum; None where nothing is to be divided by."""
    over, under = np.array(a, dtype=float), np.array(b, dtype=float)
    if under.sum() == 0:
        return None, None
    rng = np.random.default_rng(seed)
    picks: NDArray[np.int64] = rng.integers(len(over), size=(RESAMPLES, len(over)))
    sums = under[picks].sum(axis=1)
    draws = over[picks].sum(axis=1)[sums > 0] / sums[sums > 0]
    interval = [round(float(x), 4) for x in np.quantile(draws, [0.025, 0.975])]
    return round(float(over.sum() / under.sum()), 4), interval


def goals(compared: Mapping[str, Any]) -> dict[str, Any]:
    """Whether they are reached: the ratio itself, and surely (the upper end of its interval)."""
    if compared["misses"] is None:
        return {"reached": None, "surely": None}
    return {
        "misses_at_most": GOAL_MISSES,
        "money_at_most": GOAL_MONEY,
        "reached": compared["misses"] <= GOAL_MISSES and compared["money"] <= GOAL_MONEY,
        "surely": compared["misses_ci95"][1] <= GOAL_MISSES and compared["money_ci95"][1] <= GOAL_MONEY,
    }


def measure(data: FilePath, *, quick: bool, seed: int, picture: FilePath | None = None) -> dict[str, Any]:
    """Plays everything on the traces that no constant was tuned on.

    Raises:
        InvalidRequest: If the data is missing, or holds no other traces than those.
    """
    recordings = traces.recordings(data)
    if not recordings:
        raise InvalidRequest(f"{data / traces.FILE} holds no traces but those that constants were tuned on")
    if quick:
        recordings = recordings[:: max(len(recordings) // QUICK_TRACES, 1)][:QUICK_TRACES]
    played = play_all(recordings, seed=seed)
    if picture is not None:
        plot(picture, played, recordings)
    compared = compare(played["agora"], played["best_static"], seed=seed)
    result = {
        "setup": {**traces.setup(), "seconds_per_dollar": SECONDS_PER_DOLLAR},
        "recordings": len(recordings),
        "jobs": sum(len(p.done) for p in played["agora"]),
        "traces": {name: figures(of_policy) for name, of_policy in played.items()},
        "best_static_is_5g": round(float(np.mean([p.done[0].took is Technology.NR for p in played["best_static"]])), 4),
        "agora_over_best_static": compared,
        "goals": goals(compared),
    }
    if not quick:
        result["otherwise"] = {name: _otherwise(recordings, seed, world) for name, world in OTHER_WORLDS.items()}
    return result


def _otherwise(recordings: Sequence[Recording], seed: int, world: Mapping[str, Any]) -> dict[str, Any]:
    played = play_all(recordings, seed=seed, **world)
    misses = {name: figures(of_policy)["deadline_misses"] for name, of_policy in played.items()}
    return {"deadline_misses": misses, **compare(played["agora"], played["best_static"], seed=seed)}


def tables(result: Mapping[str, Any]) -> Group:
    """The result for people."""
    title = f"{result['jobs']} jobs on {result['recordings']} paired 4G and 5G traces"
    columns = ("p50 s", "p95 s", "p99 s", "late", "dollars", "copies", "on 5G")
    main = _table(title, columns)
    for name, row in result["traces"].items():
        cells = [f"{row[k]:.3f}" for k in ("p50_s", "p95_s", "p99_s")]
        cells += [f"{row['deadline_misses']:.2%}", f"{row['money']:.2f}"]
        main.add_row(name, *cells, f"{row['extra_copies']:.2%}", f"{row['on_5g']:.0%}")
    over = _table("agora over the better radio of each trace", ("late", "money"))
    for name, row in {"as above": result["agora_over_best_static"], **result.get("otherwise", {})}.items():
        over.add_row(name.replace("_", " "), _interval(row, "misses"), _interval(row, "money"))
    hedged = _table("Hedging", ("p99 cut", "extra requests"))
    for name in ("hedging", "hedging_correlated"):
        row = result[name]
        hedged.add_row(name.replace("_", " "), f"{row['p99_cut']:.2f}x", f"{row['extra_requests']:.2%}")
    return Group(main, over, hedged)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _interval(row: Mapping[str, Any], what: str) -> str:
    if row[what] is None:
        return "nothing to compare"
    low, high = row[f"{what}_ci95"]
    return f"{row[what]:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    options = parser("Which radio carries a job while the client moves, and what hedging saves.")
    options.add_argument("--plot", type=FilePath, metavar="FILE", help="draw times by policy, and one trace")
    args = options.parse_args()
    result = measure(data_dir(args), quick=args.quick, seed=args.seed, picture=args.plot)
    result |= hedging(quick=args.quick, seed=args.seed)
    result |= {"quick": args.quick, "seed": args.seed, "facts": facts()}
    show(result, args.json, None if args.json else tables(result))


if __name__ == "__main__":
    run(main)
