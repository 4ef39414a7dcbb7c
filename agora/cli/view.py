"""What a run looks like in a terminal: pure functions from its state, events or result to something to print."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from agora.cli.text import clean, counted, first_line, seconds
from agora.events import (
    AttemptEnded,
    AttemptStarted,
    Event,
    Planned,
    RunFailed,
    RunFinished,
    RunStarted,
    RunState,
    Status,
    SubtaskState,
    Synthesising,
)
from agora.types import Answer, Attempt, Failure, RunResult, Subtask, TaskGraph

COMPACT_FROM: Final = 9
"""Subtasks from which on each gets one line instead of three: eight fill a terminal of 24 lines."""

CUT: Final = "cut at its token limit"
"""Said of an answer that the model had not ended."""

_FRAMES_PER_S: Final = 8.0
"""Steps of the moving sign per second; the live view is drawn about as often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """The signs that stand before a subtask."""

    waiting: str = "·"
    done: str = "✓"
    failed: str = "✗"
    frames: str = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
    between: str = " · "

    def of(self, status: Status, now: float) -> str:
        """The sign for a status; `now` in seconds moves the running one."""
        if status is Status.RUNNING:
            return self.frames[int(now * _FRAMES_PER_S) % len(self.frames)]
        return {Status.WAITING: self.waiting, Status.DONE: self.done, Status.FAILED: self.failed}[status]


ASCII: Final = Signs(waiting=".", done="+", failed="x", frames="|/-\\", between=" | ")
"""For terminals that cannot show more."""

_STYLES: Final[Mapping[Status, str]] = {
    Status.WAITING: "dim",
    Status.RUNNING: "cyan",
    Status.DONE: "green",
    Status.FAILED: "red",
}


def signs_for(encoding: str) -> Signs:
    """The signs that an encoding can show."""
    return Signs() if encoding.lower().replace("-", "").startswith("utf") else ASCII


def render(state: RunState, *, now: float, signs: Signs | None = None) -> RenderableType:
    """A run as it stands: its subtasks as a tree, each under the last of its inputs.

    Args:
        state: The run's state.
        now: Wall-clock seconds since the epoch, for running times.
        signs: The signs to use.
    """
    signs = signs or Signs()
    tree = Tree(_head(state, now, signs), guide_style="dim")
    if state.graph is not None:
        _grow(tree, state.graph, lambda s: _subtask(s, state, now, signs))
    # A result's notes are printed below its answer; until then they are shown here.
    notes = [Text(f"note: {first_line(n)}", style="yellow") for n in state.notes if state.result is None]
    return Group(tree, *notes)


def _head(state: RunState, now: float, signs: Signs) -> Text:
    status = Status.RUNNING if state.status is Status.WAITING else state.status
    if state.result is not None and not state.result.complete:
        status = Status.FAILED
    head = _line(signs.of(status, now), first_line(state.question), _STYLES[status], bold=True)
    if state.error is not None:
        doing = first_line(state.error)
    elif state.result is not None:
        doing = _answered(state.result)
    elif state.synthesising:
        doing = "putting the answers together"
    elif state.graph is None:
        doing = "planning"
    else:
        done = sum(s.status is Status.DONE for s in state.subtasks.values())
        doing = f"{done} of {counted(len(state.graph), 'subtask')} answered"
    parts = [doing]
    if state.planner:
        parts.append(f"plan by {clean(state.planner)}")
    if state.result is not None:
        parts.append(seconds(state.result.seconds))
    elif state.started_at is not None and state.error is None:
        parts.append(seconds(max(0.0, now - state.started_at)))
    return _under(head, "", signs.between.join(parts), "dim")


def _subtask(subtask: Subtask, state: RunState, now: float, signs: Signs) -> Text:
    it = state.subtasks.get(subtask.id, SubtaskState())
    assert state.graph is not None
    line = _line(signs.of(it.status, now), f"{subtask.id}  {first_line(subtask.question)}", _STYLES[it.status])
    facts = []
    if it.expert:
        facts.append(clean(it.expert))
    if it.started_at is not None:
        facts.append(seconds(max(0.0, (it.ended_at or now) - it.started_at)))
    if it.attempt > 1:
        facts.append(f"attempt {it.attempt}")
    if isinstance(it.outcome, Answer):
        facts += _of_the_answer(it.outcome)
        if it.outcome.finish_reason == "length":
            facts.append(CUT)
    if it.status is Status.WAITING:
        waits = [i for i in subtask.inputs if state.subtasks.get(i, it).status not in (Status.DONE, Status.FAILED)]
        facts.append(f"waits for {', '.join(waits)}" if waits else "waits for a free place")
    if len(state.graph) >= COMPACT_FROM:
        return line.append(f"  {signs.between.join(facts)}", "dim")
    if it.why and it.status is not Status.WAITING:
        facts.append(first_line(it.why))
    _under(line, "  ", signs.between.join(facts), "dim")
    match it.outcome:
        case Answer():
            _under(line, "  ", first_line(it.outcome.text))
        case Failure():
            _under(line, "  ", first_line(it.outcome.message), "red")
    return line


def _grow(tree: Tree, graph: TaskGraph, label: Callable[[Subtask], RenderableType]) -> None:
    branches: dict[str, Tree] = {}
    position = {s.id: n for n, s in enumerate(graph)}
    for s in graph:
        under = branches[max(s.inputs, key=position.__getitem__)] if s.inputs else tree
        branches[s.id] = under.add(label(s))


def _line(sign: str, text: str, style: str, *, bold: bool = False) -> Text:
    return Text(no_wrap=True, overflow="ellipsis").append(f"{sign} ", style).append(text, "bold" if bold else "")


def _under(line: Text, indent: str, text: str, style: str = "") -> Text:
    return line.append(f"\n{indent}").append(text, style) if text else line


def attempts_tree(result: RunResult, *, signs: Signs | None = None) -> Tree:
    """A finished run as a tree of its subtasks, each with all its attempts."""
    signs = signs or Signs()

    def label(subtask: Subtask) -> Text:
        attempts = result.attempts.get(subtask.id, ())
        last = attempts[-1].outcome if attempts else None
        status = Status.DONE if isinstance(last, Answer) else Status.FAILED
        line = _line(signs.of(status, 0), f"{subtask.id}  {first_line(subtask.question)}", _STYLES[status])
        for number, attempt in enumerate(attempts, start=1):
            _under(line, "  ", f"{number}. {_attempt(attempt, signs)}", "dim")
            text = attempt.outcome.text if isinstance(attempt.outcome, Answer) else attempt.outcome.message
            _under(line, "     ", first_line(text), "" if isinstance(attempt.outcome, Answer) else "red")
        return line

    status = Status.DONE if result.complete else Status.FAILED
    head = _line(signs.of(status, 0), first_line(result.question), _STYLES[status], bold=True)
    tree = Tree(_under(head, "", f"plan by {clean(result.planner)}", "dim"), guide_style="dim")
    _grow(tree, result.graph, label)
    return tree


def _attempt(attempt: Attempt, signs: Signs) -> str:
    facts = [clean(attempt.expert), seconds(attempt.seconds)] if attempt.expert else ["not asked"]
    if attempt.outcome.usage.tokens:
        facts.append(f"{attempt.outcome.usage.tokens:,} tokens")
    if isinstance(attempt.outcome, Failure):
        facts.append(attempt.outcome.code)
    else:
        facts += _of_the_answer(attempt.outcome)
        if attempt.outcome.finish_reason == "length":
            facts.append(CUT)
    return signs.between.join([*facts, first_line(attempt.why)])


def _of_the_answer(answer: Answer) -> Iterator[str]:
    """What is known of an answer besides its text: how far it can be trusted, and by which path it came."""
    if answer.confidence is not None:
        yield f"confidence {answer.confidence:.2f}"
    if answer.path:
        yield f"over {clean(answer.path)}"


def answer_text(result: RunResult) -> str:
    """The answer, cleaned; it says itself what is missing."""
    return clean(result.text).strip()


def summary(result: RunResult, *, signs: Signs | None = None) -> str:
    """What was answered and what it took, in one line."""
    usage = result.usage
    parts = [
        _answered(result),
        f"{counted(usage.calls, 'call')}",
        f"{usage.tokens:,} tokens ({usage.prompt_tokens:,} read, {usage.completion_tokens:,} written)",
    ]
    if usage.cost:
        parts.append(f"cost {usage.cost:.6g}")
    return (signs or Signs()).between.join([*parts, seconds(result.seconds), f"run {result.run}"])


def _answered(result: RunResult) -> str:
    total = len(result.graph)
    return f"{total - len(result.missing)} of {counted(total, 'subtask')} answered"


def lines(event: Event) -> Sequence[str]:
    """An event as plain lines, for where there is no terminal; none for what needs no saying."""
    return tuple(_LINES[type(event)](event))


def told(event: Event) -> Sequence[str]:
    """An event as one or more plain lines, for a list of all that happened."""
    if isinstance(event, RunFinished):
        return (f"ended: {_answered(event.result)} in {seconds(event.result.seconds)}",)
    return lines(event)


def _of_run_started(e: RunStarted) -> Iterator[str]:
    yield f"run {e.run}"


def _of_planned(e: Planned) -> Iterator[str]:
    yield f"plan by {clean(e.planner)}: {counted(len(e.graph), 'subtask')}"
    for s in e.graph:
        after = f" (after {', '.join(s.inputs)})" if s.inputs else ""
        yield f"  {s.id}: {first_line(s.question)}{after}"


def _of_attempt_started(e: AttemptStarted) -> Iterator[str]:
    again = f", attempt {e.attempt}" if e.attempt > 1 else ""
    yield f"{e.subtask}: asking {clean(e.expert)}{again} ({first_line(e.why)})"


def _of_attempt_ended(e: AttemptEnded) -> Iterator[str]:
    outcome = e.result.outcome
    who = clean(e.result.expert or "")
    if isinstance(outcome, Answer):
        more = "".join(f", {fact}" for fact in _of_the_answer(outcome))
        yield f"{e.subtask}: {who} answered in {seconds(e.result.seconds)}{more}: {first_line(outcome.text)}"
    elif not who:
        yield f"{e.subtask}: not asked: {first_line(outcome.message)}"
    else:
        yield f"{e.subtask}: {who} failed in {seconds(e.result.seconds)}: {first_line(outcome.message)}"


def _of_synthesising(e: Synthesising) -> Iterator[str]:
    yield "putting the answers together"


def _of_run_finished(e: RunFinished) -> Iterator[str]:
    yield from ()


def _of_run_failed(e: RunFailed) -> Iterator[str]:
    yield f"failed: {first_line(e.message)}"


_LINES: Final[Mapping[type[Any], Callable[[Any], Iterator[str]]]] = {
    RunStarted: _of_run_started,
    Planned: _of_planned,
    AttemptStarted: _of_attempt_started,
    AttemptEnded: _of_attempt_ended,
    Synthesising: _of_synthesising,
    RunFinished: _of_run_finished,
    RunFailed: _of_run_failed,
}
