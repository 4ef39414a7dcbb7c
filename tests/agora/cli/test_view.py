"""What a run looks like while it runs and afterwards."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence

from rich.console import Console

from agora.cli.text import clean, seconds, size
from agora.cli.view import ASCII, COMPACT_FROM, attempts_tree, lines, render, signs_for, summary
from agora.events import (
    AttemptEnded,
    AttemptStarted,
    Event,
    Planned,
    RunFailed,
    RunFinished,
    RunStarted,
    RunState,
    Synthesising,
    apply,
)
from agora.types import Answer, Attempt, Failure, RunResult, Subtask, TaskGraph, Usage

GRAPH = TaskGraph(
    (
        Subtask(id="t1", question="Who wrote Faust?"),
        Subtask(id="t2", question="When was #t1 born?", inputs=("t1",)),
        Subtask(id="t3", question="What is a bond?"),
    )
)

STARTED = RunStarted(run="r", at=100.0, question="Who wrote Faust and when was he born? What is a bond?")
PLANNED = Planned(run="r", at=100.0, graph=GRAPH, planner="rules", notes=("the model's plan was no JSON",))


def begun(subtask: str, expert: str, *, attempt: int = 1, at: float = 100.0, why: str = "closest card") -> Event:
    position = [s.id for s in GRAPH].index(subtask)
    return AttemptStarted(run="r", at=at, subtask=subtask, position=position, attempt=attempt, expert=expert, why=why)


def ended(subtask: str, outcome: Answer | Failure, *, attempt: int = 1, at: float = 102.0, final: bool = True) -> Event:
    position = [s.id for s in GRAPH].index(subtask)
    result = Attempt(expert=outcome.expert, why="closest card", outcome=outcome, started_at=100.0, seconds=at - 100)
    return AttemptEnded(run="r", at=at, subtask=subtask, position=position, attempt=attempt, result=result, final=final)


def drawn(*events: Event, now: float = 103.0, width: int = 100) -> str:
    state = functools.reduce(apply, events, RunState())
    console = Console(record=True, width=width, file=io.StringIO(), color_system=None)
    with console.file:
        console.print(render(state, now=now))
        return console.export_text()


def line_of(text: str, what: str) -> str:
    return next(line for line in text.splitlines() if what in line)


def test_before_the_plan_it_says_that_it_is_planning() -> None:
    assert "planning" in drawn()
    text = drawn(STARTED, now=101.5)
    assert "Who wrote Faust" in text
    assert "planning · 1.50 s" in text


def test_a_subtask_stands_under_its_input_with_its_state_expert_time_and_reason() -> None:
    text = drawn(STARTED, PLANNED, begun("t1", "literature"), begun("t3", "finance"))
    assert "0 of 3 subtasks answered · plan by rules · 3.00 s" in text
    assert line_of(text, "t1  Who wrote Faust?").startswith("├── ")
    assert line_of(text, "t2  When was #t1 born?").startswith("│   └── · ")
    assert "waits for t1" in text
    assert "literature · 3.00 s · closest card" in text
    assert "note: the model's plan was no JSON" in text


def test_answers_and_failures_are_shown_where_they_belong() -> None:
    answer = Answer(text="Goethe.\nMore lines.", expert="literature")
    failure = Failure(code="unavailable", message="finance: connection refused", expert="finance", transient=True)
    text = drawn(
        STARTED,
        PLANNED,
        begun("t1", "literature"),
        begun("t3", "finance"),
        ended("t1", answer),
        ended("t3", failure, final=False),
        begun("t3", "economics", attempt=2, at=102.0, why="finance failed; next best"),
        now=105.0,
    )
    assert "✓ t1" in text
    assert "literature · 2.00 s" in text
    assert "Goethe." in text
    assert "More lines" not in text
    assert "economics · 5.00 s · attempt 2 · finance failed; next best" in text
    assert "1 of 3 subtasks answered" in text
    assert "✗ t3" in drawn(STARTED, PLANNED, begun("t3", "finance"), ended("t3", failure))
    assert "connection refused" in drawn(STARTED, PLANNED, begun("t3", "finance"), ended("t3", failure))


def test_an_answer_tells_how_far_it_can_be_trusted_and_by_which_path_it_came() -> None:
    answer = Answer(text="Goethe.", expert="literature", confidence=0.876, path="wifi")
    end = ended("t1", answer)
    assert "literature · 2.00 s · confidence 0.88 · over wifi" in drawn(
        STARTED, PLANNED, begun("t1", "literature"), end
    )
    assert any("confidence 0.88, over wifi: Goethe." in line for line in lines(end))


def test_the_sign_of_what_runs_moves() -> None:
    events = (STARTED, PLANNED, begun("t1", "a"))
    assert line_of(drawn(*events, now=103.0), " t1 ") != line_of(drawn(*events, now=103.2), " t1 ")


def test_a_large_plan_takes_one_line_for_each_subtask() -> None:
    graph = TaskGraph(tuple(Subtask(id=f"s{i}", question=f"question {i}") for i in range(COMPACT_FROM)))
    text = drawn(STARTED, Planned(run="r", at=100.0, graph=graph, planner="rules"))
    assert len(text.strip().splitlines()) == 2 + COMPACT_FROM


def test_long_questions_are_cut_to_the_terminal() -> None:
    graph = TaskGraph((Subtask(id="t1", question="why " * 500),))
    text = drawn(STARTED, Planned(run="r", at=100.0, graph=graph, planner="rules"), width=40)
    assert max(map(len, text.splitlines())) <= 40
    assert "…" in text


def test_escape_sequences_and_markup_in_questions_and_answers_are_only_text() -> None:
    graph = TaskGraph((Subtask(id="t1", question="[red]a[/] \x1b[2Jb"),))
    answer = Answer(text="\x1b]0;title\x07[bold]x", expert="a\x1b[31m")
    events = (
        STARTED,
        Planned(run="r", at=100.0, graph=graph, planner="rules"),
        AttemptEnded(
            run="r",
            at=101.0,
            subtask="t1",
            position=0,
            attempt=1,
            result=Attempt(expert=answer.expert, why="\x9b31m", outcome=answer, started_at=100.0, seconds=1.0),
            final=True,
        ),
    )
    text = drawn(*events)
    assert "[red]a[/] �[2Jb" in text
    assert "[bold]x" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    plain = "\n".join(line for e in events for line in lines(e))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", plain)


def result(*, missing: Sequence[str] = ()) -> RunResult:
    usage = Usage(prompt_tokens=1000, completion_tokens=234, cost=0.5, calls=4)
    dead = Failure(code="unavailable", message="a: connection refused", expert="a", transient=True)
    found = Answer(text="yes", expert="b", usage=Usage(prompt_tokens=5, completion_tokens=2))
    first = Attempt(expert="a", why="closest", outcome=dead, started_at=1.0, seconds=0.1)
    second = Attempt(expert="b", why="a failed; next", outcome=found, started_at=1.1, seconds=2.0)
    attempts = {s.id: (first,) if s.id in missing else (first, second) for s in GRAPH}
    return RunResult(
        run="r1",
        question="q?",
        text="all of it",
        graph=GRAPH,
        planner="rules",
        attempts=attempts,
        missing=tuple(missing),
        usage=usage,
        seconds=3.25,
    )


def test_the_summary_tells_tokens_cost_time_and_the_run() -> None:
    assert summary(result()) == (
        "3 of 3 subtasks answered · 4 calls · 1,234 tokens (1,000 read, 234 written) · cost 0.5 · 3.25 s · run r1"
    )
    assert summary(result(missing=["t3"])).startswith("2 of 3 subtasks answered")


def test_a_finished_run_shows_every_attempt_of_every_subtask() -> None:
    console = Console(record=True, width=100, color_system=None)
    console.print(attempts_tree(result(missing=["t3"])))
    text = console.export_text()
    assert text.count("1. a · 0.10 s · unavailable · closest") == 3
    assert text.count("2. b · 2.00 s · 7 tokens · a failed; next") == 2
    assert "✗ t3" in text
    assert "✓ t1" in text


def test_without_a_terminal_each_event_is_a_plain_line() -> None:
    answer = Answer(text="Goethe", expert="literature")
    failure = Failure(code="unavailable", message="connection refused", expert="finance")
    told = [
        line
        for event in (
            STARTED,
            PLANNED,
            begun("t1", "literature"),
            ended("t1", answer),
            ended("t3", failure, attempt=2),
            Synthesising(run="r", at=103.0),
            RunFinished(run="r", at=103.0, result=result()),
            RunFailed(run="r", at=103.0, code="config", message="no"),
        )
        for line in lines(event)
    ]
    assert told == [
        "run r",
        "plan by rules: 3 subtasks",
        "  t1: Who wrote Faust?",
        "  t2: When was #t1 born? (after t1)",
        "  t3: What is a bond?",
        "t1: asking literature (closest card)",
        "t1: literature answered in 2.00 s: Goethe",
        "t3: finance failed in 2.00 s: connection refused",
        "putting the answers together",
        "failed: no",
    ]


def test_terminals_without_unicode_get_plain_signs() -> None:
    assert signs_for("UTF-8") is not ASCII
    assert signs_for("latin-1") is ASCII
    assert "".join((ASCII.waiting, ASCII.done, ASCII.failed, ASCII.frames, ASCII.between)).isascii()


def test_amounts_read_like_people_write_them() -> None:
    assert [seconds(s) for s in (0.123, 12.34, 125, 7325)] == ["0.12 s", "12.3 s", "2 min 05 s", "2 h 02 min"]
    assert [size(b) for b in (12, 92_871_040, 1_117_320_768)] == ["12 B", "92.9 MB", "1.12 GB"]
    assert clean("a\u202eb\r\nc\td") == "a�b\nc\td"


def test_a_subtask_that_nobody_was_asked_says_so_and_why() -> None:
    failure = Failure(code="no_expert", message="every expert is too small")
    event = ended("t1", failure)
    assert tuple(lines(event)) == ("t1: not asked: every expert is too small",)
