"""What does a simulated update cost, beside Flower's simulation engine? A trainer that does nothing, ten numbers.

    python -m benchmarks.simulator [--quick] [--json] [--seed N] [--peers DIR] [--without flower]

agora: state machine, virtual clock, rule `mean`, one process; without and with every update encoded, checked and
decoded. Flower: rounds of its message API over Ray, which uses all cores, its start not counted (told apart). Both
average the same ten numbers of 16 clients, and both check the result. agora has its turns before and after Flower,
because a machine is rarely alone with a benchmark. `ratio` is of the medians.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from agora.errors import AgoraError, InvalidRequest
from benchmarks.common import facts, parser, run, show
from benchmarks.simulator_parts.ours import COHORT, timed

ROOT: Final = Path(__file__).parents[1]
PEERS: Final = ROOT / ".venv-flower"
FLOWER: Final = "flower"

FLOWER_LIMIT_S: Final = 300.0
"""Seconds after which Flower is given up: it needs 15 to 25 s to start, and 13 ms for a client's task."""

ENDS_S: Final = 10.0
"""Seconds that its processes have to end by themselves."""

IDLE_CLIENTS: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is done.

    Attributes:
        turns: Of agora, before Flower and as many after.
        updates: Of each turn.
        flower_rounds: Of Flower, 16 tasks each; the first starts its workers and is not counted.
    """

    turns: int
    updates: int
    flower_rounds: int


FULL: Final = Plan(turns=5, updates=8000, flower_rounds=60)
QUICK: Final = Plan(turns=2, updates=2000, flower_rounds=12)

GOALS: Final[Mapping[str, str]] = {"updates_per_s": "≥ 3,000", "ratio": "≥ 10"}


class PeerFailed(AgoraError):
    """A system that agora is measured against did not do its work."""

    code = "peer_failed"


def has_flower(peers: Path) -> bool:
    """Whether that environment has Flower with its simulation engine."""
    return all(any(peers.glob(f"lib/python*/site-packages/{name}/__init__.py")) for name in ("flwr", "ray"))


def flower(peers: Path, plan: Plan) -> dict[str, Any]:
    """Flower's rounds.

    Returns:
        Its version, `seconds` of every round but the first, and `start_s`, what came before.

    Raises:
        PeerFailed: If it ends with an error, or not at all.
    """
    command = [str(peers / "bin" / "python"), str(ROOT / "benchmarks" / "simulator_parts" / "flower.py")]
    command += ["--clients", str(COHORT), "--rounds", str(plan.flower_rounds)]
    with tempfile.TemporaryDirectory(prefix="agora-flower-") as home:
        env = {
            **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            "FLWR_HOME": home,
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        with subprocess.Popen(
            command,
            env=env,
            cwd=home,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A group of its own, so that all it starts can be ended with it.
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=FLOWER_LIMIT_S)
            except subprocess.TimeoutExpired:
                raise PeerFailed(f"Flower has not ended after {FLOWER_LIMIT_S:g} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    last = out.strip().splitlines()[-1] if out.strip() else ""
    if process.returncode or not last.startswith("{"):
        said = (err or out).strip()[-600:]
        raise PeerFailed(f"Flower ended with code {process.returncode}: {said}", hint="set it up again: make peers")
    told: dict[str, Any] = json.loads(last)
    rounds = told["seconds"][1:]
    return {"version": told["version"], "seconds": rounds, "start_s": told["whole_s"] - sum(rounds)}


def idle(*, quick: bool, seed: int) -> dict[str, Any]:
    """What idle clients cost, in a process of its own: memory is of nothing else there."""
    command = [sys.executable, "-m", "benchmarks.simulator_parts.idle", "--clients", str(IDLE_CLIENTS)]
    command += ["--updates", str(QUICK.updates if quick else FULL.updates), "--seed", str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=FLOWER_LIMIT_S, check=False)
    if done.returncode:
        raise PeerFailed(f"measuring idle clients ended with code {done.returncode}: {done.stderr[-600:]}")
    told: dict[str, Any] = json.loads(done.stdout)
    return {"clients": IDLE_CLIENTS, **told}


def measure(*, quick: bool, seed: int, peers: Path = PEERS, without: Sequence[str] = ()) -> dict[str, Any]:
    """Takes all turns."""
    plan = QUICK if quick else FULL
    kinds = {
        "updates_per_s": {"wire": False},
        "updates_per_s_wire": {"wire": True},
        "updates_per_s_rounds": {"wire": False, "synchronous": True},
    }
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    notes: dict[str, str] = {}
    told: dict[str, Any] | None = None

    def turns() -> None:
        for n in range(plan.turns):
            for kind, how in kinds.items():
                found[kind].append(timed(updates=plan.updates, clients=COHORT, seed=seed + n, **how).per_s)

    timed(updates=400, clients=COHORT, wire=True, seed=seed)
    turns()
    if FLOWER in without:
        notes[FLOWER] = "left out by --without"
    elif not has_flower(peers):
        notes[FLOWER] = f"not installed in {peers.name}: make peers"
    else:
        told = flower(peers, plan)
    turns()
    median = {kind: statistics.median(values) for kind, values in found.items()}
    per_s = None if told is None else COHORT / statistics.median(told["seconds"])
    return {
        **median,
        "flower_updates_per_s": per_s,
        "ratio": None if per_s is None else median["updates_per_s"] / per_s,
        "ratio_wire": None if per_s is None else median["updates_per_s_wire"] / per_s,
        "flower": None
        if told is None
        else {
            "version": told["version"],
            "start_s": told["start_s"],
            "ms_per_task": 1000 * statistics.median(told["seconds"]) / COHORT,
            "best_updates_per_s": COHORT / min(told["seconds"]),
        },
        "best": {kind: max(values) for kind, values in found.items()},
        "turns": found,
        "idle": idle(quick=quick, seed=seed),
        "cohort": COHORT,
        "updates": plan.updates,
        "notes": notes,
        "quick": quick,
        "seed": seed,
    }


def table(result: Mapping[str, Any]) -> Table:
    """The result for people."""
    shown = Table(title=f"{result['cohort']} jobs at once, ten numbers, no training", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("updates per second", "median", "best", ""):
        shown.add_column(column, justify="left" if column in ("updates per second", "") else "right")
    for key, name in (
        ("updates_per_s", "agora, buffers of 4"),
        ("updates_per_s_wire", "  encoded and decoded"),
        ("updates_per_s_rounds", "  rounds of 16"),
    ):
        shown.add_row(name, f"{result[key]:,.0f}", f"{result['best'][key]:,.0f}", _goal(key))
    told = result["flower"]
    if told is None:
        shown.add_row("Flower", "–", "–", result["notes"][FLOWER])
    else:
        started = f"{told['version']}, after {told['start_s']:.0f} s of start-up"
        shown.add_row("Flower", f"{result['flower_updates_per_s']:,.0f}", f"{told['best_updates_per_s']:,.0f}", started)
        shown.add_section()
        shown.add_row("agora over Flower", f"{result['ratio']:.0f}", "", _goal("ratio"))
        shown.add_row("  encoded and decoded", f"{result['ratio_wire']:.0f}", "", "")
    shown.add_section()
    waiting = result["idle"]
    shown.add_row(f"{waiting['clients']:,} idle clients", f"{waiting['updates_per_s']:,.0f}", "", _idle(waiting))
    return shown


def _idle(waiting: Mapping[str, float]) -> str:
    return f"{waiting['memory_mb']:.0f} MiB, {waiting['join_s']:.2f} s to join"


def _goal(key: str) -> str:
    return f"goal {GOALS[key]}" if key in GOALS else ""


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("What a simulated update costs, beside Flower's simulation engine.")
    options.add_argument("--peers", type=Path, default=PEERS, metavar="DIR", help="environment that has Flower")
    options.add_argument("--without", action="append", default=[], choices=[FLOWER], help="leave it out")
    args = options.parse_args(argv)
    if args.seed < 0:
        raise InvalidRequest(f"--seed is {args.seed}; it must be from 0")
    result = measure(quick=args.quick, seed=args.seed, peers=args.peers, without=args.without) | {"facts": facts()}
    show(result, args.json, None if args.json else table(result))


if __name__ == "__main__":
    run(main)
