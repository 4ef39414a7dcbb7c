"""The vertical graph from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agora.config import Config, parse_config
from agora.errors import ConfigError
from agora.square import Square
from agora.types import Answer, RunResult
from experts.build import open_square
from experts.fake import FakeBackend, question_of
from graphs.build import Routing, build_graph, graph_names, open_router
from graphs.calibrating import FITTED
from graphs.run import run

BASE = """
[nodes.phone]
kind = "fake"
reply = "41"
[nodes.cabinet]
kind = "fake"
reply = "42?"
tier = "edge"
[nodes.centre]
kind = "fake"
reply = "forty-two"
tier = "cloud"
[experts.large]
node = "centre"
description = "Answers best."
price_per_mtok = 10.0
[experts.small]
node = "phone"
description = "Answers quickly."
[experts.medium]
node = "cabinet"
description = "Answers well."
price_per_mtok = 1.0
[graph]
name = "vertical"
router = "keywords"
"""


THINGS = [(a, b) for a in ("red", "old", "heavy") for b in ("lamp", "chair", "mirror", "table", "carpet")]


def config(tmp_path: Path, vertical: str = "") -> Config:
    return parse_config(f'{BASE}\n[vertical]\npolicy = "{tmp_path}/policy"\n{vertical}', file=None)


async def answers(config: Config, *questions: str, shared: bool = True) -> tuple[list[RunResult], Square]:
    square = await open_square(config)
    results = []
    async with open_router(config) as routing:
        for question in questions:
            # As a node does: one graph for answers that are waited for, one for runs.
            graph = build_graph(config, square, routing=routing if shared else Routing(router=routing.router))
            results.append(await run(graph, question))
    await square.aclose()
    return results, square


def asked(square: Square) -> dict[str, list[str]]:
    backends: dict[str, Any] = {e.name: e.backend for e in square}
    assert all(isinstance(b, FakeBackend) for b in backends.values())
    return {name: [question_of(r) for r in b.requests] for name, b in backends.items()}


async def test_it_climbs_by_tier_and_price_and_says_what_is_not_known(tmp_path: Path) -> None:
    assert "vertical" in graph_names()["graph.name"]
    (result,), _ = await answers(config(tmp_path), "What is 6 times 7?")
    assert [a.expert for a in result.attempts["t1"]] == ["small", "medium", "large"]
    assert result.text == "forty-two"
    assert any("nothing is calibrated" in n and "agora calibrate" in n for n in result.notes)
    (result,), _ = await answers(config(tmp_path, "accept = 0.5"), "What is 6 times 7?")
    assert [a.expert for a in result.attempts["t1"]] == ["small"]
    (result,), _ = await answers(config(tmp_path, 'experts = ["medium", "small"]'), "What is 6 times 7?")
    assert [a.expert for a in result.attempts["t1"]] == ["medium", "small"]
    (result,), _ = await answers(config(tmp_path, "max_risk = 0.05"), "What is 6 times 7?")
    assert [a.expert for a in result.attempts["t1"]] == ["large"]
    assert any("nothing cheaper than the top tier is certified" in n for n in result.notes)


async def test_signals_are_asked_for(tmp_path: Path) -> None:
    (result,), square = await answers(
        config(tmp_path, 'signals = ["self_consistency"]\nsamples = 3'), "What is 6 times 7?"
    )
    outcome = result.outcome("t1")
    assert isinstance(outcome, Answer) and outcome.expert == "small"
    assert outcome.signals["self_consistency"] == 1.0 and outcome.confidence == 1.0
    assert len(asked(square)["small"]) == 4 and result.usage.calls == 4


async def test_graphs_of_one_process_share_one_budget(tmp_path: Path) -> None:
    # Enough for one question up to the top tier, not for two.
    limited = config(tmp_path, "stream_cost = 2.3e-3")
    (first, second), _ = await answers(limited, "What is 6 times 7?" * 10, "What is 6 times 8?" * 10)
    assert first.text == "forty-two" and first.outcome("t1").usage.calls == 1
    (alone, other), _ = await answers(limited, "What is 6 times 7?", "What is 6 times 8?", shared=False)
    assert (alone.text, other.text) == ("forty-two", "forty-two")
    assert second.usage.cost + first.usage.cost <= 2.3e-3


async def test_answers_are_kept_only_where_that_is_wanted(tmp_path: Path) -> None:
    for table, calls in (("", 2), ("cache = true", 1)):
        (_, again), square = await answers(config(tmp_path, table), "What is 6 times 7?", "What is 6 times 7?")
        assert again.text == "forty-two"
        assert [len(q) for q in asked(square).values()] == [calls] * 3


async def test_what_has_nothing_to_do_with_the_question_does_not_leave_the_end_tier(tmp_path: Path) -> None:
    facts = " ".join(f"The {a} {b} weighs {n} kilograms." for n, (a, b) in enumerate(THINGS))
    question = f"{facts} The violin on the shelf is brown.\n\nWhat colour is the violin on the shelf?"
    told = {}
    for key in ("", "extract = 1", "extract = 1\ncondense_tokens = 16"):
        (result,), square = await answers(config(tmp_path, f"accept = 1.0\n{key}"), question)
        asked = {e.name: [question_of(r) for r in e.backend.requests] for e in square}  # type: ignore[attr-defined]
        assert asked["small"] == [question], "on the end tier itself all of it may be read"
        told[key] = asked["large"][0]
        assert any("extracted" in note for note in result.notes) == bool(key)
    assert told[""] == question
    assert "violin on the shelf is brown" in told["extract = 1"]
    assert "kilograms" not in told["extract = 1"]
    assert len(told["extract = 1\ncondense_tokens = 16"]) <= len(told["extract = 1"]), "first one, then the other"


async def test_what_leaves_the_end_tier_is_redacted_and_condensed(tmp_path: Path) -> None:
    question = "Write to jane@example.com. What is 6 times 7?"
    (result,), square = await answers(config(tmp_path, 'redact = ["email"]'), question)
    texts = asked(square)
    assert "jane@example.com" in texts["small"][0]
    assert texts["medium"] and texts["large"]
    assert not any("jane" in t for name in ("medium", "large") for t in texts[name])
    assert any("redacted before large saw it" in n for n in result.notes)
    # Nor do the questions about an answer say it.
    (_,), square = await answers(
        config(tmp_path, 'redact = ["email"]\nsignals = ["verbalised"]\naccept = 1.0'), question
    )
    backends: dict[str, Any] = {e.name: e.backend for e in square}
    for name in ("medium", "large"):
        sent = [m.content for r in backends[name].requests for m in r.messages]
        assert len(backends[name].requests) == 4  # two parts, each asked and asked about
        assert not any("jane" in text for text in sent)
    story = "The weather was fine that day in the valley. " * 200 + "\n\nWhat is 6 times 7?"
    (result,), square = await answers(config(tmp_path, "condense_tokens = 64"), story)
    texts = asked(square)
    assert len(texts["large"][0]) < 600 < len(texts["small"][0]) and "6 times 7" in texts["large"][0]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('experts = ["small", "nobody"]', r'vertical\.experts = "nobody": .*allowed: large, small, medium'),
        ('signals = ["mood"]', r"vertical\.signals: unknown \['mood'\]; allowed: self_consistency, verbalised, p_true"),
        ('redact = ["face"]', r"vertical\.redact: .*'face'; allowed: secret"),
    ],
)
async def test_names_that_do_not_exist_are_told_with_what_is_allowed(tmp_path: Path, table: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        await answers(config(tmp_path, table), "What?")


async def test_a_damaged_policy_folder_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / FITTED).write_text("{]")
    square = await open_square(config(tmp_path))
    with pytest.raises(ConfigError, match=FITTED):
        build_graph(config(tmp_path), square)
    await square.aclose()
