import math
from typing import Any

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import AgoraError, InvalidPlan, InvalidRequest, Overloaded, Rejected, Unavailable
from agora.types import (
    MAX_QUESTION_CHARS,
    MAX_SUBTASKS,
    AdapterRef,
    Answer,
    Attempt,
    Budget,
    ExpertCard,
    Failure,
    RunResult,
    Subtask,
    TaskGraph,
    Tier,
    Usage,
    checked_question,
    outcome_from_dict,
    outcome_to_dict,
)


def graph(**needs: str) -> TaskGraph:
    return TaskGraph(tuple(Subtask(id=i, question=f"do {i}", inputs=tuple(n.split())) for i, n in needs.items()))


def test_order_is_topological_and_keeps_the_writers_order_among_equals() -> None:
    g = graph(c="a b", b="", a="", d="c")
    assert [s.id for s in g] == ["b", "a", "c", "d"]
    assert [s.id for s in g.leaves] == ["d"]
    assert len(g) == 4


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"a": "b", "b": "a"}, "cycle"),
        ({"a": "a"}, "cycle"),
        ({"a": "x"}, "unknown input 'x'"),
        ({}, "at least one"),
    ],
)
def test_a_graph_that_breaks_a_rule_is_refused(needs: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidPlan, match=words):
        graph(**needs)


def test_duplicate_ids_and_too_many_subtasks_are_refused() -> None:
    s = Subtask(id="a", question="q")
    with pytest.raises(InvalidPlan, match="twice"):
        TaskGraph((s, s))
    many = tuple(Subtask(id=f"n{i}", question="q") for i in range(MAX_SUBTASKS + 1))
    with pytest.raises(InvalidPlan, match=f"at most {MAX_SUBTASKS}"):
        TaskGraph(many)
    with pytest.raises(InvalidPlan, match=f"at most {MAX_SUBTASKS}"):
        TaskGraph.from_dict({"subtasks": [{"id": "a", "question": "q"}] * 10_000})
    assert len(TaskGraph(many[:-1])) == MAX_SUBTASKS


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        ({}, "needs a list"),
        ({"subtasks": "abc"}, "needs a list"),
        ({"subtasks": [1]}, "must be an object"),
        ({"subtasks": [{"id": "a"}]}, "lacks"),
        ({"subtasks": [{"id": "a", "question": "q", "colour": 1}]}, "unknown keys"),
        ({"subtasks": [{"id": "a", "question": ""}]}, "empty"),
        ({"subtasks": [{"id": "a b", "question": "q"}]}, "must match"),
        ({"subtasks": [{"id": 7, "question": "q"}]}, "must match"),
        ({"subtasks": [{"id": "a", "question": "q", "inputs": "b"}]}, "list of ids"),
        ({"subtasks": [{"id": "a", "question": "q", "modality": "smell"}]}, "allowed: text"),
        ({"subtasks": [{"id": "a", "question": "q", "max_tokens": "9"}]}, "whole number"),
        ({"subtasks": [{"id": "a", "question": "q", "max_tokens": 0}]}, "allowed: 1 to"),
        ({"subtasks": [{"id": "a", "question": "q", "expert": 3}]}, "must be a name"),
    ],
)
def test_a_plan_that_is_no_plan_is_refused_in_words(plain: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidPlan, match=words):
        TaskGraph.from_dict(plain)


@given(st.integers(1, 30), st.randoms(use_true_random=False))
def test_any_dag_is_ordered_as_networkx_allows_and_survives_plain_values(size: int, rng: Any) -> None:
    subtasks = [
        Subtask(id=f"n{i}", question="q", inputs=tuple(f"n{j}" for j in range(i) if rng.random() < 0.3))
        for i in range(size)
    ]
    rng.shuffle(subtasks)
    g = TaskGraph(tuple(subtasks))
    place = {s.id: n for n, s in enumerate(g)}
    assert all(place[i] < place[s.id] for s in g for i in s.inputs)
    assert {s.id for s in g.leaves} == {n for n, d in g.to_networkx().out_degree() if d == 0}
    assert nx.is_directed_acyclic_graph(g.to_networkx())
    assert TaskGraph.from_dict(g.to_dict()) == g


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("x" * (MAX_QUESTION_CHARS + 1), "at most"),
        ("\ud800", "Unicode"),
        ("a\0", "NUL"),
    ],
)
def test_what_cannot_be_asked(text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        checked_question(text)


def test_what_can_be_asked_is_unchanged() -> None:
    assert checked_question(" Wie groß ist π? 🤖 ") == " Wie groß ist π? 🤖 "


@pytest.mark.parametrize(
    "values",
    [
        {"deadline_s": 0},
        {"cost": -1},
        {"tokens": 0},
        {"deadline_s": math.nan},
        {"cost": math.inf},
        {"tokens": True},
        {"tokens": 1.5},
        {"tokens": 10**26},
        {"cost": 10**400},
        {"deadline_s": "5"},
    ],
)
def test_a_budget_must_be_positive(values: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match="positive"):
        Budget(**values)  # type: ignore[arg-type]


def test_adapter_references() -> None:
    assert AdapterRef.parse("sst2@v17") == AdapterRef(name="sst2", version=17)
    assert str(AdapterRef.parse("sst2@v17")) == "sst2@v17"
    assert AdapterRef.parse("sst2").version is None
    for bad in ("", "a@v0", "a@17", "../a", "a@v1@v2", "a b"):
        with pytest.raises(InvalidRequest):
            AdapterRef.parse(bad)


def test_tiers_are_ordered() -> None:
    assert Tier.END.height < Tier.EDGE.height < Tier.CLOUD.height


def test_usage_adds_up() -> None:
    total = Usage.total([Usage(prompt_tokens=3, completion_tokens=4, cost=0.5, calls=1), Usage(calls=2)])
    assert total == Usage(prompt_tokens=3, completion_tokens=4, cost=0.5, calls=3)
    assert total.tokens == 7
    assert Usage.total([]) == Usage()


@pytest.mark.parametrize(
    "values",
    [
        {"name": "a b"},
        {"description": " "},
        {"price_per_mtok": -1},
        {"price_per_mtok": math.nan},
        {"max_tokens": 0},
    ],
)
def test_a_card_must_make_sense(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        ExpertCard(**{"name": "a", "description": "b", **values})


def test_money_for_tokens() -> None:
    assert ExpertCard(name="a", description="b", price_per_mtok=2.0).cost_of(500_000) == 1.0


def test_a_failure_keeps_what_its_error_said() -> None:
    for error in (
        Unavailable("down", backend="b1"),
        Rejected("no", status=400),
        Overloaded("full", retry_after_s=2),
    ):
        failure = Failure.of(error, expert="e")
        assert failure.transient == error.transient
        assert failure.code == error.code
        assert str(error) in failure.message
    assert isinstance(Unavailable("x"), AgoraError)


def test_errors_say_what_to_do_next() -> None:
    assert str(Unavailable("refused", backend="gpu", hint="is it running?")) == "gpu: refused (is it running?)"


def test_outcomes_and_results_survive_plain_values() -> None:
    answer = Answer(text="42", expert="e", usage=Usage(calls=1), mean_logprob=-0.1, notes=("n",))
    failure = Failure(code="timeout", message="late", transient=True, expert="e")
    for outcome in (answer, failure):
        assert outcome_from_dict(outcome_to_dict(outcome)) == outcome
    result = RunResult(
        run="r",
        question="q",
        text="42",
        graph=graph(a="", b="a"),
        planner="static",
        attempts={
            "a": (Attempt(expert="e", why="w", outcome=failure, started_at=1.0, seconds=2.0),),
            "b": (Attempt(expert=None, why="w", outcome=answer, started_at=1.0, seconds=2.0),),
        },
        missing=("a",),
        notes=("note",),
    )
    assert RunResult.from_dict(result.to_dict()) == result
    assert result.outcome("a") == failure and not result.complete
