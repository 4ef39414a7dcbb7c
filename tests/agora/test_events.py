import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    Synthesising,
    apply,
    event_from_dict,
    event_to_dict,
)
from agora.types import Answer, Attempt, Failure, RunResult, Subtask, TaskGraph

GRAPH = TaskGraph((Subtask(id="a", question="q"), Subtask(id="b", question="q", inputs=("a",))))
BAD = Attempt(
    expert="x", why="best", outcome=Failure(code="timeout", message="late", transient=True), started_at=2, seconds=1
)
GOOD = Attempt(expert="y", why="next", outcome=Answer(text="42", expert="y"), started_at=3, seconds=1)
RESULT = RunResult(
    run="r", question="q", text="42", graph=GRAPH, planner="static", attempts={"a": (BAD, GOOD), "b": (GOOD,)}
)


def started(subtask: str, attempt: int, expert: str = "x") -> AttemptStarted:
    return AttemptStarted(run="r", at=2, subtask=subtask, position=0, attempt=attempt, expert=expert, why="best")


def ended(subtask: str, attempt: int, result: Attempt, final: bool = True) -> AttemptEnded:
    return AttemptEnded(run="r", at=4, subtask=subtask, position=0, attempt=attempt, result=result, final=final)


STORY: list[Event] = [
    RunStarted(run="r", at=1, question="q"),
    Planned(run="r", at=1, graph=GRAPH, planner="static", notes=("n",)),
    started("a", 1),
    ended("a", 1, BAD, final=False),
    started("a", 2, "y"),
    ended("a", 2, GOOD),
    started("b", 1),
    ended("b", 1, GOOD),
    Synthesising(run="r", at=5),
    RunFinished(run="r", at=6, result=RESULT),
]


def fold(events: list[Event]) -> RunState:
    state = RunState()
    for e in events:
        state = apply(state, e)
    return state


def test_a_story_folds_into_its_state() -> None:
    half = fold(STORY[:4])
    assert half.status is Status.RUNNING and half.subtasks["a"].status is Status.RUNNING
    assert half.subtasks["b"].status is Status.WAITING
    whole = fold(STORY)
    assert whole.status is Status.DONE and whole.result == RESULT and not whole.synthesising
    assert whole.subtasks["a"].attempt == 2 and whole.subtasks["a"].expert == "y"
    assert whole.notes == ("n",) and whole.question == "q"


def test_a_last_failure_is_a_failed_subtask() -> None:
    state = fold([*STORY[:3], ended("a", 1, BAD, final=True)])
    assert state.subtasks["a"].status is Status.FAILED
    # It may be asked again later, and answer.
    state = apply(apply(state, started("a", 2)), ended("a", 2, GOOD))
    assert state.subtasks["a"].status is Status.DONE


def test_a_failed_run_keeps_its_reason() -> None:
    state = apply(fold(STORY[:2]), RunFailed(run="r", at=3, code="store", message="disk full"))
    assert state.status is Status.FAILED and state.error == "disk full"


def test_a_second_leg_begins_anew_what_was_not_answered() -> None:
    """Killed during b's second attempt; the next leg's first attempt answers."""
    first = fold([*STORY[:7], ended("b", 1, BAD, final=False), started("b", 2)])
    failed = apply(first, RunFailed(run="r", at=5, code="store", message="disk full"))
    for state in (first, failed):
        again = apply(state, RunStarted(run="r", at=10, question="q"))
        assert again.status is Status.RUNNING and again.error is None
        assert again.subtasks["a"].status is Status.DONE and again.subtasks["b"].status is Status.WAITING
        again = apply(apply(again, started("b", 1)), ended("b", 1, GOOD))
        assert again.subtasks["b"].status is Status.DONE


@given(st.lists(st.integers(0, len(STORY) - 1), max_size=30))
def test_telling_events_again_changes_nothing(again: list[int]) -> None:
    whole = fold(STORY)
    for n in again:
        assert apply(whole, STORY[n]) == whole


@given(st.data())
def test_an_event_may_be_doubled_anywhere(data: st.DataObject) -> None:
    doubled: list[Event] = []
    for e in STORY:
        doubled += [e] * data.draw(st.integers(1, 3))
    assert fold(doubled) == fold(STORY)


def test_events_survive_plain_values() -> None:
    for e in [*STORY, RunFailed(run="r", at=3, code="store", message="disk full")]:
        assert event_from_dict(event_to_dict(e)) == e
    with pytest.raises(ValueError, match="RunStarted"):
        event_from_dict({"type": "Nonsense"})
