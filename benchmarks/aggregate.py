"""How near does merging LoRA adapters come to the best that is possible, and how fast is it, beside Flower's FedAvg?

    python -m benchmarks.aggregate [--quick] [--json] [--seed N] [--plot FILE] [--peers DIR] [--without flower]

Error: 16 non-IID clients train adapters of one 1024² matrix for ten rounds, ranks all 16, or 4 to 32. Each round has an
exact sum of all that they changed (dense, float64), and a best adapter of the server's rank for that. Told is
the distance of the server's adapter from the sum over that of the best one, after ten rounds (errors of earlier rounds
are in it) and after the first. `relative_error` has, by rule, that distance and the best one's over the size of the
sum: small errors over smaller ones make large ratios. (Clients go on from what a rule published: sums differ by rule.)

Speed: the whole of the rule `delta` on adapters of real sizes; and the plain weighted mean of the same factors, in
bytes of factors per second, beside what Flower's FedAvg does with the updates of a round, reading them included
(agora's arrive as vectors that need no reading; Flower's arithmetic alone is told too). agora has its turns before and
after Flower, each in a process of its own; the best time counts for both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from agora.errors import AgoraError, InvalidRequest
from benchmarks.aggregate_parts import errors
from benchmarks.aggregate_parts.models import CLIENTS, MODELS, QUICK_BLOCKS, Model
from benchmarks.aggregate_parts.plot import plot
from benchmarks.common import facts, parser, run, show

ROOT: Final = Path(__file__).parents[1]
PEERS: Final = ROOT / ".venv-flower"
FLOWER: Final = "flower"

SIDE, QUICK_SIDE = 1024, 256
"""Of the matrix whose adapters are merged."""

SECONDS, QUICK_SECONDS = 3.0, 0.5
"""Time given to each way of averaging, per turn."""

RUNS: Final = 3
"""Of the rule `delta`."""

LIMIT_S: Final = 600.0
"""Seconds after which a process is given up; the longest takes one to two minutes."""

GOALS: Final[Mapping[str, str]] = MappingProxyType({"error_over_best": "≤ 1.01", "smollm2": "≥ 10", "llama7b": "≥ 5"})
"""The last two are agora's averaging over Flower's."""


class MeasureFailed(AgoraError):
    """A process that measures did not say how it went."""

    code = "measure_failed"


def has_flower(peers: Path) -> bool:
    """Whether that environment has Flower."""
    return any(peers.glob("lib/python*/site-packages/flwr/__init__.py"))


def told(command: Sequence[str], what: str) -> dict[str, Any]:
    """The JSON object that a process prints last.

    Raises:
        MeasureFailed: If it fails, or takes too long.
    """
    with tempfile.TemporaryDirectory(prefix="agora-aggregate-") as home:
        env = os.environ | {"FLWR_HOME": home, "FLWR_TELEMETRY_ENABLED": "0"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise MeasureFailed(f"{what} has not ended after {LIMIT_S:g} s") from None
        except OSError as e:
            raise MeasureFailed(f"{what} could not be started: {e}", hint="set it up again: make peers") from None
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    if done.returncode or not last.startswith("{"):
        said = (done.stderr or done.stdout).strip()[-600:]
        raise MeasureFailed(f"{what} ended with code {done.returncode}: {said}")
    found: dict[str, Any] = json.loads(last)
    return found


def agora_speed(name: str, model: Model, *, runs: int, seconds: float, seed: int) -> dict[str, Any]:
    """Seconds of the rule `delta` and of a mean, and the memory it took."""
    wanted = {"model": name, "blocks": model.blocks, "runs": runs, "seconds": seconds, "seed": seed}
    return told([sys.executable, "-m", "benchmarks.aggregate_parts.speed", json.dumps(wanted)], f"merging {name}")


def flower_speed(peers: Path, model: Model, *, seconds: float, seed: int) -> dict[str, Any]:
    """Seconds of Flower's ways."""
    shapes = list(model.spec().shapes.values())
    wanted = {"shapes": shapes, "clients": CLIENTS, "seconds": seconds, "seed": seed}
    script = ROOT / "benchmarks" / "aggregate_parts" / "flower.py"
    return told([str(peers / "bin" / "python"), str(script), json.dumps(wanted)], "Flower")


def measure(
    *, quick: bool, seed: int, peers: Path = PEERS, without: Sequence[str] = (), picture: Path | None = None
) -> dict[str, Any]:
    """Errors first, then speeds."""
    side = QUICK_SIDE if quick else SIDE
    courses = {
        ranks: {rule: errors.course(side, rule, of, seed) for rule in errors.RULES}
        for ranks, of in errors.RANKS.items()
    }
    notes: dict[str, str] = {}
    if FLOWER in without:
        notes[FLOWER] = "left out by --without"
    elif not has_flower(peers):
        notes[FLOWER] = f"not installed in {peers.name}: make peers"
    speeds = {
        name: _speed(name, replace(model, blocks=QUICK_BLOCKS) if quick else model, quick, seed, peers, notes)
        for name, model in MODELS.items()
    }
    result = {
        **{
            f"{prefix}error_over_best{suffix}": {
                ranks: _rounded(by[rule].to_sum[after]) for ranks, by in courses.items()
            }
            for prefix, rule in (("", "delta"), ("factor_mean_", "factor_mean"))
            for suffix, after in (("", errors.ROUNDS), ("_first_round", 1))
        },
        **{
            key: {name: speed[key] for name, speed in speeds.items()}
            for key in (
                "seconds",
                "peak_mb",
                "gb_per_s",
                "flower_gb_per_s",
                "flower_arithmetic_gb_per_s",
                "over_flower",
                "sizes",
            )
        },
        "relative_error": {
            ranks: {rule: [_rounded(c.relative), _rounded(c.relative_best)] for rule, c in by.items()}
            for ranks, by in courses.items()
        },
        "flower_version": next(iter(speeds.values()))["flower_version"],
        "courses": {
            ranks: {
                rule: {"to_sum": _rounded_all(c.to_sum), "to_target": _rounded_all(c.to_target)}
                for rule, c in by.items()
            }
            for ranks, by in courses.items()
        },
        "side": side,
        "rounds": errors.ROUNDS,
        "notes": notes,
        "quick": quick,
        "seed": seed,
    }
    if picture is not None:
        plot(picture, result)
    return result


def _speed(name: str, model: Model, quick: bool, seed: int, peers: Path, notes: Mapping[str, str]) -> dict[str, Any]:
    seconds = QUICK_SECONDS if quick else SECONDS
    before = agora_speed(name, model, runs=1 if quick else RUNS, seconds=seconds, seed=seed)
    flower = None if FLOWER in notes else flower_speed(peers, model, seconds=seconds, seed=seed)
    after = before if quick else agora_speed(name, model, runs=0, seconds=seconds, seed=seed)
    gb = 4e-9 * before["numbers"] * CLIENTS
    mine = gb / min(before["mean_seconds"], after["mean_seconds"])
    ways = {} if flower is None else flower["seconds"]
    theirs = None if flower is None else gb / min(ways["aggregate_train"], ways["aggregate_fit"])
    return {
        "seconds": _rounded(min(before["seconds"])),
        "peak_mb": round(before["peak_mb"], 1),
        "gb_per_s": _rounded(mine),
        "flower_gb_per_s": None if theirs is None else _rounded(theirs),
        "flower_arithmetic_gb_per_s": None if flower is None else _rounded(gb / ways["arrays"]),
        "over_flower": None if theirs is None else _rounded(mine / theirs),
        "flower_version": None if flower is None else flower["version"],
        "sizes": {
            "modules": len(model.spec().layers),
            "rank": model.rank,
            "clients": CLIENTS,
            "updates_mb": round(1e3 * gb, 1),
        },
    }


def _rounded(value: float) -> float:
    return round(float(value), 5)


def _rounded_all(values: Mapping[int, float]) -> dict[str, float]:
    return {str(n): _rounded(v) for n, v in values.items()}


def table(result: Mapping[str, Any]) -> Table:
    """The result for people."""
    found = Table(
        title=f"Merging adapters of {CLIENTS} clients" + (" (quick: smaller sizes)" if result["quick"] else ""),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("", "equal ranks", "ranks 4–32", ""):
        found.add_column(column, justify="right" if column and "rank" in column else "left")
    for rule in errors.RULES:
        last = [result["courses"][ranks][rule]["to_sum"][str(errors.ROUNDS)] for ranks in errors.RANKS]
        goal = f"goal {GOALS['error_over_best']}" if rule == "delta" else ""
        found.add_row(f"error over best, {rule.replace('_', ' ')}", *(f"{v:.4g}" for v in last), goal)
    for rule in errors.RULES:
        shares = [result["relative_error"][ranks][rule] for ranks in errors.RANKS]
        found.add_row(f"  of the sum, {rule.replace('_', ' ')}", *(f"{v:.2%} ({best:.2%})" for v, best in shares), "")
    found.add_section()
    found.add_row("", "smollm2", "llama7b", "", style="bold")
    for key, label in (
        ("seconds", "rule delta, s"),
        ("peak_mb", "its memory with all updates, MB"),
        ("gb_per_s", "weighted mean, GB/s"),
        ("flower_gb_per_s", "Flower's FedAvg, GB/s"),
        ("flower_arithmetic_gb_per_s", "  its arithmetic alone, GB/s"),
        ("over_flower", "agora over Flower"),
    ):
        values = [result[key][name] for name in MODELS]
        why = result["notes"].get(FLOWER, "") if values[0] is None else ""
        goal = ", ".join(f"{GOALS[name]} {name}" for name in MODELS)
        told_goal = f"goal {goal}" if key == "over_flower" and not result["quick"] else ""
        found.add_row(label, *("–" if v is None else f"{v:.3g}" for v in values), why or told_goal)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("How near merging adapters comes to the best, and how fast it is beside Flower's FedAvg.")
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw errors by round, and speeds")
    options.add_argument("--peers", type=Path, default=PEERS, metavar="DIR", help="environment that has Flower")
    options.add_argument("--without", action="append", default=[], choices=[FLOWER], help="leave it out")
    args = options.parse_args(argv)
    if args.seed < 0:
        raise InvalidRequest(f"--seed is {args.seed}; it must be from 0")
    if args.plot is not None and not args.plot.absolute().parent.is_dir():
        # Told before minutes of measuring.
        raise InvalidRequest(f"the plot cannot be written to {str(args.plot)!r}: there is no such folder")
    result = measure(
        quick=args.quick, seed=args.seed, peers=args.peers.absolute(), without=args.without, picture=args.plot
    )
    result |= {"facts": facts()}
    show(result, args.json, None if args.json else table(result))


if __name__ == "__main__":
    run(main)
