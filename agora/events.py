"""The typed events of a run, and the one function that folds them into the run's state.

Events tell what happened; they decide nothing. What a resumed run repeats is decided by its checkpoint, and the
events of finished subtasks are told again from there. So `apply` is idempotent: an event that the state already
contains changes nothing, and one of an earlier attempt never undoes a later one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, cast

from agora.types import (
    Answer,
    Attempt,
    Outcome,
    RunResult,
    TaskGraph,
    attempt_from_dict,
    attempt_to_dict,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """A question was accepted. `at`: wall-clock seconds since the epoch, here and in every event."""

    run: str
    at: float
    question: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The question became a task graph."""

    run: str
    at: float
    graph: TaskGraph
    planner: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStarted:
    """An expert was asked. `attempt` counts from 1 within the subtask; `position` is topological, from 0."""

    run: str
    at: float
    subtask: str
    position: int
    attempt: int
    expert: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEnded:
    """An attempt came to an answer or a failure. `final` tells that no further attempt follows in this pass."""

    run: str
    at: float
    subtask: str
    position: int
    attempt: int
    result: Attempt
    final: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthesising:
    """The answers are being made into one."""

    run: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished:
    """The run came to its result."""

    run: str
    at: float
    result: RunResult


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFailed:
    """The run ended without a result."""

    run: str
    at: float
    code: str
    message: str


Event = RunStarted | Planned | AttemptStarted | AttemptEnded | Synthesising | RunFinished | RunFailed

_BY_NAME: Mapping[str, type[Any]] = {
    c.__name__: c for c in (RunStarted, Planned, AttemptStarted, AttemptEnded, Synthesising, RunFinished, RunFailed)
}

# Fields that are not plain JSON values: how to write and how to read them.
_SPECIAL: Mapping[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "Planned.graph": (TaskGraph.to_dict, TaskGraph.from_dict),
    "Planned.notes": (list, tuple),
    "AttemptEnded.result": (attempt_to_dict, attempt_from_dict),
    "RunFinished.result": (RunResult.to_dict, RunResult.from_dict),
}


def event_to_dict(event: Event) -> dict[str, Any]:
    """Plain JSON values with the event's name under `type`; `event_from_dict` reads them back."""
    name = type(event).__name__
    plain: dict[str, Any] = {"type": name}
    for f in dataclasses.fields(event):
        value = getattr(event, f.name)
        special = _SPECIAL.get(f"{name}.{f.name}")
        plain[f.name] = special[0](value) if special else value
    return plain


def event_from_dict(plain: Mapping[str, Any]) -> Event:
    """Reads what `event_to_dict` wrote.

    Raises:
        ValueError: If `type` names no event.
    """
    name = plain.get("type", "")
    if name not in _BY_NAME:
        raise ValueError(f"unknown event type {name!r}; known: {', '.join(_BY_NAME)}")
    values = {k: v for k, v in plain.items() if k != "type"}
    for key, value in values.items():
        special = _SPECIAL.get(f"{name}.{key}")
        if special:
            values[key] = special[1](value)
    return cast(Event, _BY_NAME[name](**values))


class Status(StrEnum):
    """Where a run or a subtask stands."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SubtaskState:
    """What is known of one subtask."""

    status: Status = Status.WAITING
    attempt: int = 0
    expert: str | None = None
    why: str = ""
    started_at: float | None = None
    ended_at: float | None = None
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What is known of one run."""

    run: str = ""
    question: str = ""
    status: Status = Status.WAITING
    started_at: float | None = None
    graph: TaskGraph | None = None
    planner: str = ""
    notes: tuple[str, ...] = ()
    subtasks: Mapping[str, SubtaskState] = field(default_factory=dict)
    synthesising: bool = False
    result: RunResult | None = None
    error: str | None = None


def _run_started(state: RunState, e: RunStarted) -> RunState:
    if state.result is not None or (state.started_at is not None and e.at <= state.started_at):
        return state
    # The first leg, or one more after an interruption: what had been answered stays, everything else begins anew.
    kept = {i: s if s.status is Status.DONE else SubtaskState() for i, s in state.subtasks.items()}
    return dataclasses.replace(
        state,
        run=e.run,
        question=e.question,
        status=Status.RUNNING,
        started_at=e.at,
        subtasks=kept,
        synthesising=False,
        error=None,
    )


def _planned(state: RunState, e: Planned) -> RunState:
    if state.graph is not None:
        return state
    return dataclasses.replace(
        state,
        graph=e.graph,
        planner=e.planner,
        notes=e.notes,
        subtasks={s.id: SubtaskState() for s in e.graph},
    )


def _with(state: RunState, subtask: str, new: SubtaskState) -> RunState:
    return dataclasses.replace(state, subtasks={**state.subtasks, subtask: new})


def _attempt_started(state: RunState, e: AttemptStarted) -> RunState:
    old = state.subtasks.get(e.subtask, SubtaskState())
    if old.status is Status.DONE or e.attempt <= old.attempt:
        return state
    return _with(
        state,
        e.subtask,
        SubtaskState(
            status=Status.RUNNING,
            attempt=e.attempt,
            expert=e.expert,
            why=e.why,
            started_at=e.at if old.started_at is None else old.started_at,
        ),
    )


def _attempt_ended(state: RunState, e: AttemptEnded) -> RunState:
    old = state.subtasks.get(e.subtask, SubtaskState())
    if old.status is Status.DONE or e.attempt < old.attempt or (e.attempt == old.attempt and old.outcome is not None):
        return state
    # An answer after which someone else is asked is not the last word.
    answered = isinstance(e.result.outcome, Answer)
    return _with(
        state,
        e.subtask,
        SubtaskState(
            status=Status.RUNNING if not e.final else Status.DONE if answered else Status.FAILED,
            attempt=e.attempt,
            expert=e.result.expert,
            why=e.result.why,
            started_at=e.result.started_at if old.started_at is None else old.started_at,
            ended_at=e.at if e.final else None,
            outcome=e.result.outcome,
        ),
    )


def _synthesising(state: RunState, e: Synthesising) -> RunState:
    if state.synthesising or state.status is not Status.RUNNING:
        return state
    return dataclasses.replace(state, synthesising=True)


def _run_finished(state: RunState, e: RunFinished) -> RunState:
    if state.result is not None:
        return state
    return dataclasses.replace(state, status=Status.DONE, result=e.result, synthesising=False)


def _run_failed(state: RunState, e: RunFailed) -> RunState:
    if state.result is not None or state.error is not None:
        return state
    return dataclasses.replace(state, status=Status.FAILED, error=e.message, synthesising=False)


_APPLY: Mapping[type[Any], Callable[[RunState, Any], RunState]] = {
    RunStarted: _run_started,
    Planned: _planned,
    AttemptStarted: _attempt_started,
    AttemptEnded: _attempt_ended,
    Synthesising: _synthesising,
    RunFinished: _run_finished,
    RunFailed: _run_failed,
}


def apply(state: RunState, event: Event) -> RunState:
    """The state after `event`. Pure and idempotent."""
    return _APPLY[type(event)](state, event)
