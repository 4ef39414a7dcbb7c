"""Three real tiers end to end: is anything saved by asking the cheap ones first, and is quality kept?

`python -m benchmarks.tiers --data DIR [--quick] [--json] [--plot FILE] [--fresh]`

A stream of 50 grade-school problems (GSM8K) and 200 film reviews (SST-2) is answered by each tier alone and by agora:
smollm2-135m as it is (end), the same with a LoRA adapter for reviews (edge), qwen2.5-coder-1.5b (cloud). The adapter is
trained, and agora calibrated, on questions of the training splits; neither sees the stream. Agora is `graphs.vertical`
as the agora.toml that is written beside the answers says, with what `agora calibrate` learns.

The adapter and every answer are kept in the user's cache, so that a run that was stopped goes on, and a further one
takes seconds. What was kept is told with what it took then. Where nothing was kept, the adapter takes some minutes, and
the answers about an hour, on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from agora.routing.cascade.saved import VERSION as POLICY_FORMAT
from benchmarks.common import data_dir, facts, parser, run, show
from benchmarks.tiers_parts import figures
from benchmarks.tiers_parts.adapter import Progress as TrainingStep
from benchmarks.tiers_parts.adapter import Recipe, Trained, adapter
from benchmarks.tiers_parts.alone import Judged, Step, ask_alone
from benchmarks.tiers_parts.experts import PRICES, SMALL, SST2_PROMPT, TIERS, Tiers, open_tiers, write_config
from benchmarks.tiers_parts.plot import plot
from benchmarks.tiers_parts.questions import SETS, Material, Question, material
from benchmarks.tiers_parts.recording import Taken
from benchmarks.tiers_parts.together import ask_together, calibrate, told, write_questions
from experts.models import ModelStore
from graphs.build import Routing, open_router
from graphs.calibrating import load_trust, policy_folder

STREAM: Final = (50, 200)
"""Problems and reviews of the stream."""

CALIBRATION: Final = (24, 80)
"""Problems and reviews to calibrate on, in about the stream's proportion: what a user would label in an evening."""

QUICK_STREAM: Final = (1, 8)
"""Problems and reviews under `--quick`: the cloud's answers to them take half a minute where none was kept."""

THREADS: Final = 1
"""CPU threads of each model. Where other programs want the cores too, two wait for each other: on a busy machine of two
cores 200 tokens took 101 s with two threads, 297 took 29 s with one. On an idle machine more are faster."""

TRADE_OFFS: Final = (0.5, 1, 2, 4, 8, 16, 32, 64, 256)
"""What a right answer is worth for the curve of other trade-offs, in multiples of the dearest tier's mean cost."""

UNCALIBRATED: Final = "nothing is calibrated: a plain cascade up the tiers; run once without --quick to calibrate"


class Watch:
    """Shows how far it is: bars on a terminal, always on stderr; elsewhere the bars as they ended.

    Args:
        progress: Where the bars are.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def part(self, what: str, total: int) -> Step:
        """A part of the work: a bar that each question moves."""
        bar = self._progress.add_task(what, total=total)
        kept = 0

        def step(question: Question, recorded: bool) -> None:
            nonlocal kept
            kept += recorded
            note = f" ({kept} kept from before)" if kept else ""
            self._progress.update(bar, advance=1, description=f"{what}{note}")

        return step

    def training(self) -> TrainingStep:
        """The bar of the adapter's training, which is there once there is a step."""
        bars: list[Any] = []

        def step(done: int, total: int, loss: float) -> None:
            if not bars:
                bars.append(self._progress.add_task("training the adapter", total=total))
            self._progress.update(bars[0], completed=done, description=f"training the adapter, loss {loss:.2f}")

        return step


async def measure(
    tiers: Tiers, questions: Material, *, routing: Routing, watch: Watch, quick: bool, seed: int
) -> dict[str, Any]:
    """Asks everybody everything, and compares.

    Args:
        tiers: The three tiers.
        questions: What to calibrate on and what to ask.
        routing: What `open_router` gave.
        watch: Told how far it is.
        quick: Whether to go by what was calibrated before, if anything was, rather than calibrate.
        seed: Of the intervals.

    Raises:
        AgoraError: If a model cannot be opened or does not answer.
    """
    stream, learned = questions.stream, () if quick else questions.calibration
    alone: dict[str, list[Judged]] = {}
    for tier in TIERS:
        asked = [*stream, *learned]
        judged = await ask_alone(tiers, tier, asked, step=watch.part(f"{tier} alone", len(asked)))
        alone[tier] = judged[: len(stream)]
    calibration = None
    if learned:
        file = tiers.file.parent / "calibration.jsonl"
        write_questions(file, learned)
        calibration = told(await calibrate(tiers, file, routing))
    trust = load_trust(policy_folder(tiers.config), list(tiers.square), config=tiers.config)
    chosen = trust.policy()
    agora = await ask_together(tiers, stream, routing=routing, step=watch.part("agora", len(stream)))
    curve = await _curve(tiers, stream, alone, routing, watch) if learned and chosen is not None else []
    best = figures.oracle(alone)
    return {
        "questions": {s: sum(q.set == s for q in stream) for s in SETS},
        "calibrated_on": {s: sum(q.set == s for q in learned) for s in SETS},
        "tiers": {t: {**figures.figures(many), "price_per_mtok": PRICES[t]} for t, many in alone.items()},
        "agora": {
            **figures.figures(agora),
            **figures.asked(agora),
            "policy": None if chosen is None else {"kind": chosen.kind, "why": chosen.why},
            "notes": [*trust.notes, *routing.notes, *([] if chosen else [UNCALIBRATED])],
            "curve": curve,
        },
        "oracle": {**figures.figures(best), "taken": figures.asked(best)["taken"]},
        "calibration": calibration,
        **figures.compared(alone, agora, seed=seed),
        "kept_from_before": {t: _kept(b.taken) for t, b in tiers.backends.items()},
    }


async def _curve(
    tiers: Tiers,
    stream: Sequence[Question],
    alone: Mapping[str, Sequence[Judged]],
    routing: Routing,
    watch: Watch,
) -> list[dict[str, Any]]:
    """Quality and cost where a right answer is worth less or more than what validation chose."""
    dearest = max(fmean(j.cost for j in many) for many in alone.values())
    step = watch.part("agora at other trade-offs", len(TRADE_OFFS) * len(stream))
    curve = []
    for times in TRADE_OFFS:
        judged = await ask_together(tiers, stream, routing=routing, trade_off=times * dearest, step=step)
        point = figures.figures(judged)
        curve.append({"trade_off": times * dearest, "quality": point["quality"], "cost": point["cost"]})
    return curve


def _kept(taken: Sequence[Taken]) -> int:
    """Different requests that were answered from before this run."""
    new = {t.request for t in taken if not t.recorded}
    return len({t.request for t in taken} - new)


async def _measure(
    data: Path,
    *,
    quick: bool,
    seed: int,
    fresh: bool,
    stream: tuple[int, int],
    calibration: tuple[int, int],
    threads: int,
    watch: Watch,
) -> dict[str, Any]:
    store = await asyncio.to_thread(ModelStore)
    root = store.cache_dir.parent / "benchmarks" / "tiers"
    recipe = Recipe()
    questions = await asyncio.to_thread(
        material, data, seed=seed, train=recipe.phrases, calibration=calibration, stream=stream
    )
    trained = await asyncio.to_thread(_adapter, root, store, questions, recipe, fresh and not quick, threads, watch)
    file = root / "agora.toml"
    # Another format of policies, another folder: what an earlier version fitted is not there, rather than in the way.
    policy = root / f"policy-{POLICY_FORMAT}"
    config = write_config(file, adapter=trained.folder, sha256=trained.sha256, policy=policy, threads=threads)
    started = time.perf_counter()
    tiers = open_tiers(config, file, answers=root / "answers", store=store, fresh=fresh)
    try:
        async with open_router(config, store=store, pull=True) as routing:
            result = await measure(tiers, questions, routing=routing, watch=watch, quick=quick, seed=seed)
    finally:
        await tiers.square.aclose()
    return result | {
        "adapter": {
            "sha256": trained.sha256,
            "phrases": recipe.phrases,
            "training_s": trained.seconds,
            "trained_now": not trained.cached,
        },
        "config": str(file),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _adapter(
    root: Path, store: ModelStore, questions: Material, recipe: Recipe, fresh: bool, threads: int, watch: Watch
) -> Trained:
    base = store.resolve(SMALL, pull=True)
    return adapter(
        root / "adapters",
        base,
        questions.train,
        recipe,
        system_prompt=SST2_PROMPT,
        threads=threads,
        fresh=fresh,
        progress=watch.training(),
    )


def tables(result: Mapping[str, Any]) -> Group:
    """The result for people."""
    n = result["questions"]
    table = Table(
        title=f"{n['gsm8k']} GSM8K and {n['sst2']} SST-2 questions{' (quick)' if result['quick'] else ''}",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for column in ("quality", "GSM8K", "SST-2", "cost", "s", "CPU s", "asked"):
        table.add_column(column, justify="right", no_wrap=True)
    whole = result["tiers"][result["best_single"]]["cost"]
    total = sum(n.values())
    for tier, row in result["tiers"].items():
        asked = "/".join(str(total if t == tier else 0) for t in result["tiers"])
        table.add_row(f"{tier} alone", *_cells(row, whole), asked)
    table.add_section()
    table.add_row("agora", *_cells(result["agora"], whole), "/".join(map(str, result["agora"]["asked"].values())))
    table.add_row("oracle", *_cells(result["oracle"], whole), "/".join(map(str, result["oracle"]["taken"].values())))
    policy = result["agora"]["policy"]
    lines = [
        result["verdict"],
        f"quality over a random mix of tiers at the same cost: {result['quality_over_mixing']:+.3f}",
        f"policy: {policy['kind']}: {policy['why']}" if policy else UNCALIBRATED,
        "cost in shares of the best tier's; seconds per question, as they were when the answers were recorded",
        f"asked: how often {', '.join(TIERS)} were",
    ]
    if file := result.get("config"):
        lines.append(f'the tiers to try: agora ask --config {file} "…"')
    return Group(table, *(Text(line) for line in lines))


def _cells(row: Mapping[str, Any], whole: float) -> list[str]:
    quality = [f"{row[k]:.3f}" for k in ("quality", "quality_gsm8k", "quality_sst2")]
    return [*quality, f"{row['cost'] / whole:.3f}", f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}"]


def _count(text: str) -> int:
    """A number of questions, or of threads."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number ≥ 1")
    return int(text)


def main() -> None:
    options = parser("Three real tiers alone and together: quality and cost.")
    options.add_argument("--fresh", action="store_true", help="ask and train again what was kept from before")
    options.add_argument(
        "--threads", type=_count, default=THREADS, metavar="N", help=f"CPU threads of each model (default: {THREADS})"
    )
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw quality over cost")
    for name, many, what in (("--stream", STREAM, "that are asked"), ("--calibration", CALIBRATION, "to calibrate on")):
        usual = f"default: {many[0]} {many[1]}"
        told_by = f"problems and reviews {what} ({usual})"
        options.add_argument(name, type=_count, nargs=2, metavar=("GSM8K", "SST2"), help=told_by)
    args = options.parse_args()
    data = data_dir(args)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        result = asyncio.run(
            _measure(
                data,
                quick=args.quick,
                seed=args.seed,
                fresh=args.fresh,
                stream=args.stream or (QUICK_STREAM if args.quick else STREAM),
                calibration=args.calibration or CALIBRATION,
                threads=args.threads,
                watch=Watch(progress),
            )
        )
    result |= {"quick": args.quick, "seed": args.seed, "facts": facts()}
    if args.plot:
        plot(result, args.plot)
    show(result, args.json, None if args.json else tables(result))


if __name__ == "__main__":
    run(main)
