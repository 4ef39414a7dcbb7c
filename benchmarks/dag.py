"""How close does a run come to its critical path, and what does a subtask cost us?

Random task graphs of 32 subtasks with scripted durations are run by `graphs.horizontal` and, in the same process and by
turns, as a plain LangGraph `StateGraph`, whose supersteps are barriers. Then 32 empty subtasks tell the overhead.

    python -m benchmarks.dag [--quick] [--json] [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypedDict

from langgraph.graph import END, START, StateGraph
from rich.progress import Progress
from rich.table import Table

from agora.errors import InvalidRequest
from agora.events import Event
from agora.protocols import GenerateRequest
from agora.square import Expert, Square
from agora.types import ExpertCard, Subtask, TaskGraph
from benchmarks.common import facts, parser, run, show
from experts.fake import FakeBackend, Reply, question_of
from graphs.horizontal import horizontal
from graphs.plan import StaticPlanner
from graphs.run import Graph, new_run_id
from graphs.run import run as run_graph
from graphs.store import RunStore

SUBTASKS: Final = 32
SHORTEST_S, LONGEST_S = 0.005, 0.5
MOST_INPUTS: Final = 3
DAGS: Final = 200
QUICK_DAGS: Final = 12
SIDE_BY_SIDE: Final = 4
"""Graphs run at the same time, to be done in minutes: one event loop serves them all, which can only slow us down."""
STAGGER_S: Final = 0.1
"""Seconds from the start of one to the next: a run's first milliseconds are its busiest; four should not collide."""
EMPTY_RUNS: Final = 30


def random_dag(seed: int) -> tuple[TaskGraph, dict[str, float]]:
    """A random graph and the seconds that each of its subtasks takes: every subtask needs up to three earlier ones."""
    rng = random.Random(seed)
    subtasks = []
    for n in range(SUBTASKS):
        inputs = rng.sample(range(n), min(n, rng.randint(0, MOST_INPUTS)))
        subtasks.append(Subtask(id=f"t{n}", question=f"step {n}", inputs=tuple(f"t{i}" for i in inputs)))
    seconds = {s.id: rng.uniform(SHORTEST_S, LONGEST_S) for s in subtasks}
    rng.shuffle(subtasks)
    return TaskGraph(tuple(subtasks)), seconds


def critical_path(graph: TaskGraph, seconds: dict[str, float]) -> float:
    """Seconds of the longest chain: no schedule can be shorter."""
    end: dict[str, float] = {}
    for s in graph.order:
        end[s.id] = seconds[s.id] + max((end[i] for i in s.inputs), default=0.0)
    return max(end.values())


def scripted(graph: TaskGraph, seconds: dict[str, float], **more: Any) -> Graph:
    by_question = {s.question: seconds[s.id] for s in graph}

    def reply(request: GenerateRequest) -> Reply:
        # Inputs may stand before the question; the question is the text's end.
        asked = question_of(request).rpartition("answer: ")[2]
        return Reply("ok", latency=by_question[asked])

    expert = Expert(card=ExpertCard(name="scripted", description="Waits as told."), backend=FakeBackend(reply))
    return horizontal(Square([expert]), planner=StaticPlanner(graph), max_parallel=SUBTASKS, **more)


async def ours(graph: TaskGraph, seconds: dict[str, float]) -> float:
    built = scripted(graph, seconds)
    clock = asyncio.get_running_loop().time
    started = clock()
    result = await run_graph(built, "all steps")
    took = clock() - started
    assert result.complete
    return took


class _State(TypedDict):
    done: Annotated[list[str], lambda a, b: a + b]


async def supersteps(graph: TaskGraph, seconds: dict[str, float]) -> float:
    builder = StateGraph(_State)

    def step(name: str) -> Any:
        async def body(state: _State) -> _State:
            await asyncio.sleep(seconds[name])
            return {"done": [name]}

        return body

    for s in graph:
        builder.add_node(s.id, step(s.id))
    for s in graph:
        if len(s.inputs) > 1:
            builder.add_edge(list(s.inputs), s.id)
        else:
            builder.add_edge(s.inputs[0] if s.inputs else START, s.id)
    for s in graph.leaves:
        builder.add_edge(s.id, END)
    built = builder.compile()
    clock = asyncio.get_running_loop().time
    started = clock()
    state = await built.ainvoke({"done": []}, {"recursion_limit": 10 * SUBTASKS})
    took = clock() - started
    assert len(state["done"]) == SUBTASKS
    return took


async def makespans(dags: int, seed: int, progress: Progress) -> dict[str, list[float]]:
    bar = progress.add_task("random graphs", total=dags)
    ratios: dict[str, list[float]] = {"ours": [], "supersteps": []}
    for first in range(0, dags, SIDE_BY_SIDE):
        drawn = [random_dag(seed + n) for n in range(first, min(first + SIDE_BY_SIDE, dags))]
        # By turns, so that neither way of running disturbs the other.
        for name, way in (("ours", ours), ("supersteps", supersteps)):
            taken = await asyncio.gather(*(_later(n * STAGGER_S, way, *d) for n, d in enumerate(drawn)))
            ratios[name] += [t / critical_path(*d) for t, d in zip(taken, drawn, strict=True)]
        progress.advance(bar, len(drawn))
    return ratios


async def _later(
    delay: float,
    way: Callable[[TaskGraph, dict[str, float]], Awaitable[float]],
    graph: TaskGraph,
    seconds: dict[str, float],
) -> float:
    await asyncio.sleep(delay)
    return await way(graph, seconds)


async def overhead(runs: int, progress: Progress) -> dict[str, float]:
    """Milliseconds per empty subtask, events listened to, median over runs: in memory and with a durable checkpoint."""
    graph = TaskGraph(tuple(Subtask(id=f"t{n}", question=f"step {n}") for n in range(SUBTASKS)))
    nothing = {s.id: 0.0 for s in graph}
    bar = progress.add_task("empty subtasks", total=2 * runs)
    taken: dict[str, list[float]] = {"memory": [], "sqlite": []}
    clock = asyncio.get_running_loop().time
    with tempfile.TemporaryDirectory() as folder:
        async with RunStore.open(Path(folder) / "runs.sqlite") as store:
            graphs = {
                "memory": scripted(graph, nothing),
                "sqlite": scripted(graph, nothing, checkpointer=store.checkpointer),
            }
            for _ in range(runs):
                for name, built in graphs.items():
                    run_id = new_run_id()
                    if name == "sqlite":
                        await store.create(run_id, "all steps", graph="horizontal", config_path=None)
                    events: list[Event] = []
                    started = clock()
                    await run_graph(built, "all steps", run_id=run_id, on_event=events.append)
                    taken[name].append((clock() - started) * 1000 / SUBTASKS)
                    assert len(events) == 2 * SUBTASKS + 3
                    progress.advance(bar)
    return {name: statistics.median(values) for name, values in taken.items()}


def plot(ratios: dict[str, list[float]], file: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InvalidRequest("--plot needs matplotlib", hint="pip install 'agora-llm[plots]'") from None
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, label in (("ours", "agora"), ("supersteps", "LangGraph supersteps")):
        values = sorted(ratios[name])
        axes.plot(values, [(n + 1) / len(values) for n in range(len(values))], label=label)
    axes.set(xlabel="makespan / critical path", ylabel="share of graphs", title=f"{SUBTASKS} subtasks, 5–500 ms")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


async def measure(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], dict[str, list[float]]]:
    dags = args.dags or (QUICK_DAGS if args.quick else DAGS)
    spent = await overhead(EMPTY_RUNS // 3 if args.quick else EMPTY_RUNS, progress)
    ratios = await makespans(dags, args.seed, progress)
    result = {
        "makespan_over_critical_path": statistics.median(ratios["ours"]),
        "worst": max(ratios["ours"]),
        "supersteps_over_critical_path": statistics.median(ratios["supersteps"]),
        "supersteps_worst": max(ratios["supersteps"]),
        "overhead_ms_per_subtask": spent["memory"],
        "overhead_ms_per_subtask_sqlite": spent["sqlite"],
        "dags": dags,
        "subtasks": SUBTASKS,
        "seed": args.seed,
        "quick": args.quick,
        "facts": facts(),
    }
    return result, ratios


def table(result: dict[str, Any]) -> Table:
    shown = Table(title=f"{result['dags']} random graphs of {SUBTASKS} subtasks, 5–500 ms each")
    for column in ("", "median", "worst"):
        shown.add_column(column, justify="right" if column else "left")
    rows: Sequence[tuple[str, str, str]] = (
        ("makespan / critical path, agora", "makespan_over_critical_path", "worst"),
        ("the same, LangGraph supersteps", "supersteps_over_critical_path", "supersteps_worst"),
    )
    for label, median, worst in rows:
        shown.add_row(label, f"{result[median]:.3f}", f"{result[worst]:.3f}")
    shown.add_row("overhead per subtask, in memory", f"{result['overhead_ms_per_subtask']:.2f} ms", "")
    shown.add_row("overhead per subtask, SQLite", f"{result['overhead_ms_per_subtask_sqlite']:.2f} ms", "")
    return shown


def main() -> None:
    options = parser(__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--dags", type=int, help=f"random graphs (default: {DAGS}; quick: {QUICK_DAGS})")
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw the distribution of the ratios")
    args = options.parse_args()
    if args.dags is not None and args.dags < 1:
        raise InvalidRequest(f"--dags is {args.dags}; it must be ≥ 1")
    with Progress(transient=True, disable=args.json) as progress:
        result, ratios = asyncio.run(measure(args, progress))
    if args.plot:
        plot(ratios, args.plot)
    show(result, args.json, table(result))


if __name__ == "__main__":
    run(main)
