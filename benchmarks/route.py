"""Does a question reach the right expert? Five-expert routing on MMLU, and question splitting against gold plans.

`python -m benchmarks.route --data DIR [--quick] [--json]`

MMLU questions, grouped by field, are routed to the five ready experts by their cards alone: by agora's sentence
embeddings, by keywords, and by chance. No card was worded after these questions, and no constant of the router tuned on
them. The second half scores `RulePlanner` against gold decompositions.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from agora.protocols import Embedder
from agora.routing import EmbeddingRouter, KeywordRouter, Router
from agora.routing.embedding import ends_of
from agora.square import Expert, Square
from agora.types import Subtask
from benchmarks import decomposition
from benchmarks.common import data_dir, facts, parser, read_jsonl, run, show
from experts.embed import MiniLM
from experts.fake import FakeBackend
from experts.ready import ready_experts

FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "communications": ("electrical_engineering", "computer_security"),
    "robotics": ("conceptual_physics", "high_school_physics", "college_physics", "machine_learning"),
    "healthcare": (
        "anatomy",
        "clinical_knowledge",
        "college_medicine",
        "human_aging",
        "medical_genetics",
        "nutrition",
        "professional_medicine",
        "virology",
    ),
    "finance": (
        "econometrics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "professional_accounting",
    ),
    "education": (
        "elementary_mathematics",
        "high_school_mathematics",
        "high_school_statistics",
        "high_school_chemistry",
        "high_school_geography",
        "high_school_us_history",
        "high_school_european_history",
        "high_school_world_history",
        "high_school_government_and_politics",
    ),
}
"""Subjects by the expert they plausibly belong to, chosen by their names before anything was measured. MMLU has nothing
on robots: mechanics and machine learning stand in, though physics has optics and heat too. It has nothing on teaching
either: what is taught at school stands in."""

LEFT_OUT: Final[Mapping[str, str]] = {
    "two fields claim it": "biology, psychology, human sexuality (healthcare or education); marketing, management,"
    " business ethics (finance or none); computer science (communications, robotics or education)",
    "no field claims it": "law, philosophy, logic, religion, politics, sociology, public relations, prehistory,"
    " astronomy, abstract algebra, college mathematics and chemistry, global facts, miscellaneous",
}
"""Why the other subjects are not asked about."""

QUICK_PER_SUBJECT: Final = 25
"""Questions of each subject under `--quick`: 675 in all, ±0.04 on the accuracy."""

QUICK_PLANS: Final = 200
"""Questions of each planning set under `--quick`."""

TIMED: Final = 100
"""Questions whose routing is timed, one after another, if that takes no longer than `TIMED_S`."""

TIMED_S: Final = 8.0
"""Seconds after which enough is timed: on a busy machine one embedding may take half a second."""

RESAMPLES: Final = 2_000
"""Bootstrap resamples: the ends of a 95 % interval then stand on 50 of them each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question: its subject, the field that is right, the text that is routed."""

    subject: str
    field: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """What a router chose for each item, and whether it called that a close match."""

    chosen: tuple[str, ...]
    close: tuple[bool, ...]


def items(data: Path, *, per_subject: int | None, seed: int, choices: bool = True) -> list[Item]:
    """MMLU's test questions of the subjects in `FIELDS`, shuffled.

    Args:
        data: The data folder.
        per_subject: Most questions of one subject, drawn at random; None for all.
        seed: Of the draw.
        choices: Whether the four choices stand under the question, as a model is asked; else the stem alone.

    Raises:
        InvalidRequest: If the data is missing.
    """
    field_of = {subject: field for field, subjects in FIELDS.items() for subject in subjects}
    rows = [r for r in read_jsonl(data / "mmlu" / "test.jsonl.gz") if r["subject"] in field_of]
    taken: Counter[str] = Counter()
    found = []
    for i in np.random.default_rng(seed).permutation(len(rows)):
        row = rows[int(i)]
        taken[row["subject"]] += 1
        if per_subject is None or taken[row["subject"]] <= per_subject:
            text = "\n".join([row["question"], *row["choices"]] if choices else [row["question"]])
            found.append(Item(subject=row["subject"], field=field_of[row["subject"]], text=text))
    return found


def five_experts() -> Square:
    """The ready experts, idle and free: what is measured is the match alone."""
    backend = FakeBackend()
    return Square(
        [Expert(card=r.card, backend=backend, system_prompt=r.system_prompt) for r in ready_experts().values()]
    )


async def route(router: Router, questions: Iterable[Item], square: Square) -> Routed:
    """Routes one question after another."""
    rankings = [await router.rank(Subtask(id="q", question=q.text), q.text, square) for q in questions]
    return Routed(chosen=tuple(r.candidates[0].expert for r in rankings), close=tuple(r.close for r in rankings))


async def ms_per_routing(router: Router, questions: Sequence[Item], square: Square) -> float:
    """Median milliseconds of one routing, with the cards known and the question not."""
    await route(router, questions[:1], square)
    seconds: list[float] = []
    for question in questions[1:]:
        started = time.perf_counter()
        await route(router, [question], square)
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > TIMED_S:
            break
    return round(1e3 * median(seconds), 3)


def scores(asked: Sequence[Item], routed: Routed, *, seed: int) -> dict[str, Any]:
    """Top-1 accuracy: over all questions (micro), over the fields' means (macro), each with a 95 % interval.

    The interval is a percentile bootstrap that resamples questions within each field.
    """
    right = _right_by_field(asked, routed)
    subjects: dict[str, list[bool]] = defaultdict(list)
    confusion: dict[str, Counter[str]] = {field: Counter() for field in right}
    for item, expert in zip(asked, routed.chosen, strict=True):
        subjects[item.subject].append(expert == item.field)
        confusion[item.field][expert] += 1
    micro, macro = _resampled(right, seed)
    return {
        "micro": _mean(np.concatenate(list(right.values()))),
        "micro_ci95": _interval(micro),
        "macro": _mean([r.mean() for r in right.values()]),
        "macro_ci95": _interval(macro),
        "fields": {field: _mean(r) for field, r in right.items()},
        "subjects": {subject: _mean(r) for subject, r in sorted(subjects.items())},
        "confusion": {field: dict(c.most_common()) for field, c in confusion.items()},
        "no_close_match": _mean([not c for c in routed.close]),
    }


def _right_by_field(asked: Sequence[Item], routed: Routed) -> dict[str, NDArray[np.float64]]:
    right: dict[str, list[float]] = {field: [] for field in FIELDS}
    for item, expert in zip(asked, routed.chosen, strict=True):
        right[item.field].append(float(expert == item.field))
    return {field: np.array(values) for field, values in right.items() if values}


def _resampled(right: Mapping[str, NDArray[np.float64]], seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Bootstrapped micro and macro accuracy, shape (RESAMPLES,) each; same seed, same draws for any router."""
    rng = np.random.default_rng(seed)
    means = np.stack([_draws(values, rng) for values in right.values()])
    sizes = np.array([len(values) for values in right.values()])
    return sizes @ means / sizes.sum(), means.mean(axis=0)


def _draws(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[Any]:
    picks = (values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES))
    return np.fromiter(picks, dtype=np.float64, count=RESAMPLES)


def gain(asked: Sequence[Item], a: Routed, b: Routed, *, seed: int) -> dict[str, Any]:
    """Macro accuracy of `a` over that of `b`, on the same questions (paired bootstrap)."""
    ra, rb = _right_by_field(asked, a), _right_by_field(asked, b)
    difference = {field: ra[field] - rb[field] for field in ra}
    return {
        "macro": _mean([d.mean() for d in difference.values()]),
        "macro_ci95": _interval(_resampled(difference, seed)[1]),
    }


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 4)


def _interval(draws: NDArray[Any]) -> list[float]:
    return [round(float(x), 4) for x in np.quantile(draws, [0.025, 0.975])]


async def measure(data: Path, *, quick: bool, seed: int, embedder: Embedder) -> dict[str, Any]:
    """Routes everything and counts what went right."""
    per_subject = QUICK_PER_SUBJECT if quick else None
    asked = items(data, per_subject=per_subject, seed=seed)
    stems = [] if quick else items(data, per_subject=None, seed=seed, choices=False)
    square = five_experts()
    routers: dict[str, Router] = {"agora": EmbeddingRouter(embedder), "keywords": KeywordRouter()}
    ms = {name: await ms_per_routing(router, asked[:TIMED], square) for name, router in routers.items()}
    # Full batches through the embedder, which remembers: one text at a time would take some ten times as long.
    await embedder.embed(list(dict.fromkeys(end for q in (*asked, *stems) for end in ends_of(q.text))))
    routed = {name: await route(router, asked, square) for name, router in routers.items()}
    result = {
        "questions": len(asked),
        **{name: {**scores(asked, r, seed=seed), "ms_per_routing": ms[name]} for name, r in routed.items()},
        "chance": round(1 / len(square), 4),
        "agora_over_keywords": gain(asked, routed["agora"], routed["keywords"], seed=seed),
    }
    if stems:
        result["stem_only"] = {n: scores(stems, await route(r, stems, square), seed=seed) for n, r in routers.items()}
    return result


async def _measure(data: Path, *, quick: bool, seed: int) -> dict[str, Any]:
    embedder = MiniLM()
    try:
        return await measure(data, quick=quick, seed=seed, embedder=embedder)
    finally:
        await embedder.aclose()


def tables(result: Mapping[str, Any]) -> Group:
    """The result for people."""
    who, chance = ("agora", "keywords"), f"{result['chance']:.2f}"
    routing = Table(
        title=f"Top-1 routing of {result['questions']} MMLU questions to five experts", box=SIMPLE_HEAD, pad_edge=False
    )
    routing.add_column("")
    for column in (*who, "chance"):
        routing.add_column(column, justify="right", no_wrap=True)
    for field in FIELDS:
        routing.add_row(field, *(f"{result[w]['fields'][field]:.3f}" for w in who), chance)
    routing.add_section()
    for mean, over in (("macro", "fields"), ("micro", "questions")):
        routing.add_row(f"mean over {over}", *(_with_interval(result[w], mean) for w in who), chance)
    if stem := result.get("stem_only"):
        routing.add_row("the same, stem only", *(_with_interval(stem[w], "micro") for w in who), chance)
    routing.add_row("ms per routing", *(f"{result[w]['ms_per_routing']:.2f}" for w in who), "")
    mapping = Table(title="Which subjects are whose", box=SIMPLE_HEAD, pad_edge=False, show_header=False)
    for field, subjects in FIELDS.items():
        mapping.add_row(field, ", ".join(s.replace("_", " ") for s in subjects))
    for why, what in LEFT_OUT.items():
        mapping.add_row(f"(nobody's: {why})", what)
    return Group(routing, mapping)


def _with_interval(one: Mapping[str, Any], mean: str) -> str:
    low, high = one[f"{mean}_ci95"]
    return f"{one[mean]:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    args = parser("How often a question reaches the right expert, and is split as people split it.").parse_args()
    data = data_dir(args)
    result = asyncio.run(_measure(data, quick=args.quick, seed=args.seed))
    result |= {
        "plans": decomposition.plan_scores(data, limit=QUICK_PLANS if args.quick else None),
        "mapping": {field: list(subjects) for field, subjects in FIELDS.items()},
        "left_out": dict(LEFT_OUT),
        "quick": args.quick,
        "seed": args.seed,
        "facts": facts(),
    }
    show(result, args.json, None if args.json else Group(tables(result), decomposition.table(result["plans"])))


if __name__ == "__main__":
    run(main)
