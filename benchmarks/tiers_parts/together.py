"""The three tiers together: what `agora calibrate` learns of them, and what `graphs.vertical` makes of the stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agora.types import Answer
from benchmarks.tiers_parts.alone import Judged, Step
from benchmarks.tiers_parts.experts import TIERS, Tiers
from benchmarks.tiers_parts.questions import GSM8K, Question
from graphs.build import Routing, build_graph
from graphs.calibrate import calibrate as learn
from graphs.calibration_fit import Result, Wishes
from graphs.calibration_questions import read_questions
from graphs.run import run

SUBTASK = "answer"
"""The only subtask of the configuration's plan."""


def write_questions(file: Path, questions: Sequence[Question]) -> None:
    """Writes questions as `agora calibrate --data FILE` reads them."""
    lines = [
        json.dumps({"question": q.text, "answer": q.gold, "grader": "number" if q.set == GSM8K else "contains"})
        for q in questions
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


async def calibrate(tiers: Tiers, file: Path, routing: Routing) -> Result:
    """Does what `agora calibrate --data FILE` does, with the tiers that are open.

    Args:
        tiers: Who is asked.
        file: What `write_questions` wrote.
        routing: What `open_router` gave: policies look at the questions' embeddings, where there are any.
    """
    vertical = tiers.config.vertical
    return await learn(
        tiers.square,
        read_questions(file),
        config=tiers.config,
        experts=TIERS,
        wishes=Wishes(trade_off=vertical.trade_off, max_risk=vertical.max_risk, confidence=vertical.confidence),
        embedder=routing.embedder,
        # Answers that were given before come out of the recordings anyway.
        fresh=True,
    )


async def ask_together(
    tiers: Tiers,
    questions: Sequence[Question],
    *,
    routing: Routing | None = None,
    trade_off: float | None = None,
    step: Step | None = None,
) -> list[Judged]:
    """Asks agora all questions, one after another, by the graph that the configuration describes.

    Args:
        tiers: Who is asked.
        questions: What.
        routing: What `open_router` gave.
        trade_off: Money that a right answer is worth; None for what calibrating chose.
        step: Told after every question.
    """
    vertical = tiers.config.vertical.model_copy(update={"trade_off": trade_off})
    graph = build_graph(tiers.config.model_copy(update={"vertical": vertical}), tiers.square, routing=routing)
    judged = []
    for question in questions:
        already = {t: len(b.taken) for t, b in tiers.backends.items()}
        result = await run(graph, question.text)
        taken = {t: b.taken[already[t] :] for t, b in tiers.backends.items()}
        outcome = result.outcome(SUBTASK)
        judged.append(
            Judged(
                question=question,
                right=isinstance(outcome, Answer) and question.grade(outcome.text),
                text=outcome.text if isinstance(outcome, Answer) else outcome.message,
                cost=result.usage.cost,
                seconds=sum(t.seconds for many in taken.values() for t in many),
                cpu_seconds=sum(t.cpu_seconds for many in taken.values() for t in many),
                # An answer that is taken after a later one stands there twice.
                asked=tuple(dict.fromkeys(a.expert for a in result.attempts[SUBTASK] if a.expert is not None)),
                taken=outcome.expert if outcome.expert is not None else "",
            )
        )
        if step is not None:
            step(question, all(t.recorded for many in taken.values() for t in many))
    return judged


def told(result: Result) -> dict[str, Any]:
    """What calibrating found, for the result."""
    plain = result.to_dict()
    return {
        "policy": plain["policy"],
        "experts": [
            {
                "expert": e["version"]["expert"],
                "questions": e["n"],
                "quality": e["accuracy"],
                "auroc": None if e["report"] is None else e["report"]["auroc"],
                "ece": None if e["report"] is None else e["report"]["ece"],
            }
            for e in plain["experts"]
        ],
        "notes": plain["notes"],
    }
