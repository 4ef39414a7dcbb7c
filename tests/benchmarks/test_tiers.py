"""The benchmark of the real tiers counts right, calibrates, and climbs: on scripted models."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from agora.protocols import Backend, GenerateRequest
from agora.routing import KeywordRouter
from benchmarks import tiers as benchmark
from benchmarks.tiers_parts import figures
from benchmarks.tiers_parts.alone import Judged, ask_alone
from benchmarks.tiers_parts.experts import CLOUD, EDGE, END, PRICES, TIERS, Tiers, open_tiers, write_config
from benchmarks.tiers_parts.plot import plot
from benchmarks.tiers_parts.questions import GSM8K, SST2, Material, Question, review_question
from benchmarks.tiers_parts.together import ask_together
from experts.fake import FakeBackend, Reply, question_of
from experts.models import ModelStore
from graphs.build import Routing

HARD = "convoluted"
"""The word in a review at which the scripted edge is wrong, and not sure."""


def problem(i: int, split: str) -> Question:
    text = f"Tom of {split} has {i} apples and buys twice as many. How many apples does he have now, all in all?"
    return Question(id=f"gsm8k-{split}-{i}", set=GSM8K, text=text, gold=str(3 * i))


def review(i: int, split: str) -> Question:
    label = ("negative", "positive")[i % 2]
    word = HARD if i % 5 == 0 else "plain"
    text = review_question(f"film {split} {i} is a {word} and {('dull', 'witty')[i % 2]} story of its time")
    return Question(id=f"sst2-{split}-{i}", set=SST2, text=text, gold=label)


def questions(problems: int, reviews: int, split: str) -> tuple[Question, ...]:
    both = [*(problem(i + 1, split) for i in range(problems)), *(review(i, split) for i in range(reviews))]
    return tuple(both[i] for i in sorted(range(len(both)), key=lambda i: (i * 7919) % 104729))


def end(request: GenerateRequest) -> Reply:
    return Reply("I like apples and films", logprobs=(-0.9,) * 5)


def edge(request: GenerateRequest) -> Reply:
    asked = question_of(request)
    if "apples" in asked:
        return Reply("positive", logprobs=(-1.5,))
    right = "positive" if "witty" in asked else "negative"
    if HARD in asked:
        return Reply("negative" if right == "positive" else "positive", logprobs=(-0.65,))
    return Reply(right, logprobs=(-0.02,))


def cloud(request: GenerateRequest) -> Reply:
    asked = question_of(request)
    if "apples" not in asked:
        return Reply("positive" if "witty" in asked else "negative", logprobs=(-0.1,))
    number = next(int(w) for w in asked.split() if w.isdigit())
    steps = f"Twice {number} is {2 * number}. " * 12
    return Reply(f"{steps}The answer is {3 * number}.", logprobs=(-0.05,) * 80)


SCRIPTS = {"phone": end, "roadside": edge, "centre": cloud}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    return tmp_path


def opened(folder: Path) -> Tiers:
    file = folder / "agora.toml"
    config = write_config(
        file, adapter=folder / "adapter", sha256="0123456789abcdef", policy=folder / "policy", threads=1
    )

    async def fake(name: str, node: Any, opening: Any) -> Backend:
        return FakeBackend(SCRIPTS[name], name=name, adapters=["sst2-01234567@v1"])

    openers = dict.fromkeys(("local", "llamacpp"), fake)
    return open_tiers(config, file, answers=folder / "answers", store=ModelStore(folder), openers=openers)


def watch() -> benchmark.Watch:
    return benchmark.Watch(Progress(console=Console(quiet=True)))


def test_the_configuration_is_one_that_agora_reads(folder: Path) -> None:
    tiers = opened(folder)
    assert [e.card.tier for e in tiers.square] == list(TIERS)
    assert [e.card.price_per_mtok for e in tiers.square] == [PRICES[t] for t in TIERS]
    assert str(tiers.expert(EDGE).adapter) == "sst2-01234567@v1"
    assert tiers.config.graph.name == "vertical"
    assert tiers.config.vertical.experts == TIERS


ROUTING = Routing(router=KeywordRouter())
STREAM = questions(10, 40, "test")
CALIBRATION = questions(12, 48, "train")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What a whole run left, and its result."""
    folder = tmp_path_factory.mktemp("tiers")
    (folder / "adapter").mkdir()

    async def whole() -> dict[str, Any]:
        tiers = opened(folder)
        material = Material(train=(), calibration=CALIBRATION, stream=STREAM)
        try:
            return await benchmark.measure(tiers, material, routing=ROUTING, watch=watch(), quick=False, seed=0)
        finally:
            await tiers.square.aclose()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "TRADE_OFFS", (0.5, 64))
        return folder, asyncio.run(whole())


def test_agora_learns_whom_to_ask_and_saves_what_can_be_saved(learned: tuple[Path, dict[str, Any]]) -> None:
    _, result = learned
    assert result["questions"] == {"gsm8k": 10, "sst2": 40}
    assert result["tiers"][END]["quality"] == 0
    assert result["tiers"][EDGE]["quality_sst2"] == 0.8
    assert result["tiers"][EDGE]["quality_gsm8k"] == 0
    assert result["tiers"][CLOUD]["quality"] == 1
    assert result["best_single"] == CLOUD
    agora = result["agora"]
    assert agora["quality"] >= 0.98
    assert agora["taken_gsm8k"] == {END: 0, EDGE: 0, CLOUD: 10}
    assert agora["taken_sst2"][EDGE] >= 28
    assert agora["cost"] < result["tiers"][CLOUD]["cost"]
    assert result["cost_saved"] == pytest.approx(1 - agora["cost"] / result["tiers"][CLOUD]["cost"], abs=1e-3)
    assert result["cost_saved_ci95"][0] > 0
    assert result["quality_kept"]
    assert "was saved" in result["verdict"]
    assert agora["policy"] is not None
    assert len(agora["curve"]) == 2
    assert agora["curve"][0]["cost"] <= agora["curve"][-1]["cost"]
    assert result["oracle"]["quality"] == 1
    assert result["oracle"]["cost"] <= agora["cost"]
    assert result["calibration"]["policy"]["rows"] == 60
    assert result["kept_from_before"] == {END: 0, EDGE: 0, CLOUD: 0}
    json.dumps(result, allow_nan=False)


async def test_a_further_run_opens_no_model_and_goes_by_what_was_calibrated(
    learned: tuple[Path, dict[str, Any]],
) -> None:
    folder, first = learned
    tiers = opened(folder)
    material = Material(train=(), calibration=CALIBRATION, stream=STREAM)
    second = await benchmark.measure(tiers, material, routing=ROUTING, watch=watch(), quick=True, seed=0)
    await tiers.square.aclose()
    assert not any(b.opened for b in tiers.backends.values())
    assert second["kept_from_before"] == dict.fromkeys(TIERS, len(STREAM))
    assert second["calibrated_on"] == {GSM8K: 0, SST2: 0}
    for key in ("tiers", "cost_saved", "verdict", "oracle"):
        assert first[key] == second[key]
    for key in ("policy", "asked", "taken", "quality", "cost", "cpu_seconds"):
        assert first["agora"][key] == second["agora"][key]


async def test_quick_says_that_nothing_is_calibrated(folder: Path) -> None:
    tiers = opened(folder)
    material = Material(train=(), calibration=CALIBRATION, stream=questions(2, 6, "test"))
    plain = await benchmark.measure(tiers, material, routing=ROUTING, watch=watch(), quick=True, seed=0)
    await tiers.square.aclose()
    assert plain["agora"]["policy"] is None
    assert benchmark.UNCALIBRATED in plain["agora"]["notes"]
    assert plain["calibration"] is None


async def test_agoras_cost_is_that_of_all_who_were_asked(folder: Path) -> None:
    tiers = opened(folder)
    stream = questions(2, 6, "test")
    together = await ask_together(tiers, stream)
    costs = {t: await ask_alone(tiers, t, stream) for t in TIERS}
    await tiers.square.aclose()
    for i, judged in enumerate(together):
        assert judged.cost == pytest.approx(sum(costs[t][i].cost for t in judged.asked))
        assert judged.taken in judged.asked
        assert judged.right == costs[judged.taken][i].right


def judged(right: bool, cost: float) -> Judged:
    return Judged(
        question=problem(1, "test"), right=right, text="", cost=cost, seconds=1, cpu_seconds=1, asked=(), taken=END
    )


def test_a_mix_of_tiers_lies_on_their_hull() -> None:
    alone = {
        END: [judged(False, 1), judged(False, 1)],
        EDGE: [judged(True, 2), judged(False, 2)],
        CLOUD: [judged(True, 4), judged(True, 4)],
    }
    expected = {1: 0.0, 1.5: 0.25, 2: 0.5, 3: 0.75, 4: 1.0, 9: 1.0}
    assert {c: figures.mixed_quality(alone, c) for c in expected} == pytest.approx(expected)
    useless = {END: [judged(True, 1)], EDGE: [judged(False, 2)], CLOUD: [judged(True, 3)]}
    assert figures.mixed_quality(useless, 2) == 1
    assert figures.best_single(useless) == END


def test_the_verdict_says_when_nothing_was_saved() -> None:
    alone = {END: [judged(False, 1)] * 4, EDGE: [judged(False, 2)] * 4, CLOUD: [judged(True, 4)] * 4}
    dearer = figures.compared(alone, [judged(True, 5)] * 4, seed=0)
    assert dearer["cost_saved"] < 0
    assert dearer["verdict"].startswith("nothing was saved")
    worse = figures.compared(alone, [judged(True, 1), *[judged(False, 1)] * 3], seed=0)
    assert not worse["quality_kept"]
    assert worse["verdict"].startswith("quality was not kept: -0.750")
    better = figures.compared(alone, [judged(True, 2)] * 4, seed=0)
    assert better["quality_kept"]
    assert better["verdict"].startswith("50% of the cost was saved")
    assert better["quality_over_mixing"] == pytest.approx(2 / 3, abs=1e-4)


async def test_the_plot_and_the_table_are_made(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    tiers = opened(folder)
    material = Material(train=(), calibration=(), stream=questions(2, 6, "test"))
    result = await benchmark.measure(tiers, material, routing=ROUTING, watch=watch(), quick=True, seed=0)
    await tiers.square.aclose()
    result |= {"quick": True, "seed": 0}
    plot(result, folder / "p.png")
    assert (folder / "p.png").stat().st_size > 5_000
    console = Console(file=io.StringIO(), record=True, width=120)
    console.print(benchmark.tables(result))
    shown = console.export_text()
    assert all(f"{t} alone" in shown for t in TIERS)
    assert result["verdict"][:40] in shown
