"""Fixed plans, and planners by name."""

import pytest

from agora.errors import InvalidPlan, InvalidRequest
from agora.types import Subtask, TaskGraph
from experts.fake import FakeBackend
from graphs.llm_planner import LLMPlanner
from graphs.plan import PLANNERS, StaticPlanner, make_planner
from graphs.rules import RulePlanner

FACTS_FIRST = (
    Subtask(id="t1", question="Which facts matter to answer this? {question}"),
    Subtask(id="t2", question="{question} What is known: #t1", inputs=("t1",), expert="health", max_tokens=9),
)


async def test_the_query_stands_where_the_plan_says() -> None:
    plan = await StaticPlanner(FACTS_FIRST).plan("Is tea healthy?")
    assert [s.question for s in plan.graph] == [
        "Which facts matter to answer this? Is tea healthy?",
        "Is tea healthy? What is known: #t1",
    ]
    assert (plan.graph.subtasks[1].expert, plan.graph.subtasks[1].max_tokens) == ("health", 9)
    assert (plan.planner, plan.notes, plan.usage.calls) == ("static", (), 0)


async def test_a_graph_without_the_placeholder_stays_as_it_is() -> None:
    graph = TaskGraph((Subtask(id="a", question="What is 1 + 1?"),))
    assert (await StaticPlanner(graph).plan("anything")).graph == graph


async def test_a_function_makes_the_plan_of_the_question() -> None:
    planner = StaticPlanner(lambda q: [Subtask(id=f"t{n}", question=w) for n, w in enumerate(q.split(), start=1)])
    assert [s.question for s in (await planner.plan("one two {question}")).graph] == ["one", "two", "{question}"]


async def test_a_reference_in_the_users_words_is_text() -> None:
    plan = await StaticPlanner(FACTS_FIRST).plan("What does #t1 mean?")
    assert plan.graph.subtasks[0].question.endswith("What does #t1 mean?"), (
        "t1 has no inputs: nothing is replaced there"
    )
    assert plan.graph.subtasks[1].question == "What does # t1 mean? What is known: #t1"


@pytest.mark.parametrize("question", ["", "  ", "x" * 100_001, "\ud800", "a\x00b"])
async def test_a_question_that_cannot_be_asked_is_refused(question: str) -> None:
    with pytest.raises(InvalidRequest):
        await StaticPlanner(FACTS_FIRST).plan(question)


async def test_a_bad_plan_is_refused_when_it_is_given() -> None:
    with pytest.raises(InvalidPlan, match="unknown input"):
        StaticPlanner([Subtask(id="t1", question="q", inputs=("t9",))])
    with pytest.raises(InvalidPlan, match="sequence of Subtask"):
        StaticPlanner("What is 1 + 1?")  # type: ignore[arg-type]
    with pytest.raises(InvalidPlan, match="NoneType"):
        await StaticPlanner(lambda q: None).plan("q")  # type: ignore[arg-type, return-value]


async def test_a_query_that_makes_a_subtask_too_long_is_refused_clearly() -> None:
    with pytest.raises(InvalidPlan, match="100,0"):
        await StaticPlanner(FACTS_FIRST).plan("x" * 99_990)


async def test_a_question_can_be_left_whole() -> None:
    plan = await make_planner("none").plan("What is a router, and what is #t1?")
    assert [(s.id, s.question, s.inputs) for s in plan.graph] == [("t1", "What is a router, and what is #t1?", ())]
    assert plan.planner == "none"


def test_planners_come_by_name() -> None:
    assert isinstance(make_planner("static", FACTS_FIRST), StaticPlanner)
    assert isinstance(make_planner("rules", max_subtasks=4), RulePlanner)
    assert isinstance(make_planner("llm", FakeBackend(), max_subtasks=4), LLMPlanner)
    made = [
        make_planner("static", FACTS_FIRST),
        make_planner("none"),
        make_planner("rules"),
        make_planner("llm", FakeBackend()),
    ]
    assert [p.name for p in made] == list(PLANNERS), "a planner's name is the one it is registered under"
    with pytest.raises(InvalidRequest, match="allowed: static, none, rules, llm"):
        make_planner("oracle")
