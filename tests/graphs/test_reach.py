"""Labels on data: nobody above the bound ever sees a text that was made of labelled data."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agora.config import parse_config
from agora.errors import InvalidPlan, InvalidRequest, NoExpert, OutOfReach, Unavailable
from agora.events import Event, Planned
from agora.protocols import GenerateRequest, Message
from agora.routing import Candidate, KeywordRouter, Ranking
from agora.routing.takers import beyond, takers
from agora.square import Expert, Square
from agora.types import (
    Answer,
    Budget,
    ExpertCard,
    Failure,
    RunResult,
    Subtask,
    TaskGraph,
    Tier,
    label_of,
    lowest,
    reach_of,
)
from experts.build import expert_cards
from experts.fake import FakeBackend, question_of
from graphs.crew import Crew
from graphs.horizontal import horizontal
from graphs.llm_planner import LLMPlanner
from graphs.named import Named
from graphs.plan import Plan, StaticPlanner
from graphs.plan_within import plan_within
from graphs.run import resume, run, stream
from graphs.solver import Job
from graphs.spend import Spend
from graphs.store import RunStore
from graphs.synthesise import LLMSynthesiser

ONE = Subtask(id="t1", question="why?")


def expert(name: str, tier: Tier, replies: Any = None, **card: Any) -> Expert:
    backend = FakeBackend(f"{name} says so" if replies is None else replies, name=name)
    return Expert(card=ExpertCard(name=name, description=f"{name} knows", tier=tier, **card), backend=backend)


def seen_by(e: Expert) -> list[str]:
    """Everything that an expert was shown."""
    assert isinstance(e.backend, FakeBackend)
    return ["\n".join(m.content for m in r.messages) for r in e.backend.requests if isinstance(r, GenerateRequest)]


@pytest.mark.parametrize(
    ("label", "tier"),
    [("local", Tier.END), ("end", Tier.END), ("edge", Tier.EDGE), ("cloud", Tier.CLOUD), (Tier.EDGE, Tier.EDGE)],
)
def test_labels_are_read(label: object, tier: Tier) -> None:
    assert reach_of(label) is tier
    assert reach_of(label_of(tier)) is tier


@pytest.mark.parametrize("label", ["", "Local", "secret", None, 3, ["local"], "x" * 1000])
def test_anything_else_is_refused_with_what_is_allowed(label: object) -> None:
    with pytest.raises(InvalidRequest, match=r"allowed: local, edge, cloud") as caught:
        reach_of(label)
    assert len(str(caught.value)) < 250


def test_the_lowest_label_holds() -> None:
    assert lowest() is Tier.CLOUD
    assert lowest(Tier.CLOUD, Tier.END, Tier.EDGE) is Tier.END


def test_a_plan_tells_its_labels_in_words_and_reads_them_back() -> None:
    graph = TaskGraph((replace(ONE, reach=Tier.END), Subtask(id="t2", question="so?", inputs=("t1",))))
    plain = graph.to_dict()
    assert [s["reach"] for s in plain["subtasks"]] == ["local", "cloud"]
    assert TaskGraph.from_dict(plain) == graph
    del plain["subtasks"][1]["reach"]  # written before there were labels
    assert TaskGraph.from_dict(plain) == graph
    with pytest.raises(InvalidPlan, match="reach of subtask 't1' is 'home'; allowed: local, edge, cloud"):
        TaskGraph.from_dict({"subtasks": [{"id": "t1", "question": "why?", "reach": "home"}]})


def test_a_label_given_as_text_is_a_label() -> None:
    assert Subtask(id="t1", question="why?", reach="local").reach is Tier.END  # type: ignore[arg-type]
    with pytest.raises(InvalidPlan, match="allowed: local"):
        Subtask(id="t1", question="why?", reach="nowhere")  # type: ignore[arg-type]


def test_what_uses_an_answer_goes_no_further_than_its_inputs_may() -> None:
    graph = TaskGraph(
        (
            Subtask(id="a", question="a", reach=Tier.END),
            Subtask(id="b", question="b"),
            Subtask(id="c", question="c #a", inputs=("a",)),
            Subtask(id="d", question="d #c #b", inputs=("c", "b")),
            Subtask(id="e", question="e #b", inputs=("b",)),
        )
    )
    bounded = graph.bounded(Tier.CLOUD)
    assert {s.id: s.reach for s in bounded} == {
        "a": Tier.END,
        "b": Tier.CLOUD,
        "c": Tier.END,
        "d": Tier.END,
        "e": Tier.CLOUD,
    }
    assert bounded.bounded(Tier.CLOUD) is bounded
    assert {s.reach for s in graph.bounded(Tier.EDGE)} == {Tier.END, Tier.EDGE}
    assert graph.reach is Tier.END


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("reach", Tier)
def test_an_expert_may_see_what_may_go_as_far_as_its_machine(tier: Tier, reach: Tier) -> None:
    reason = beyond(expert("e", tier).card, reach)
    assert (reason is None) == (list(Tier).index(tier) <= list(Tier).index(reach))
    if reason is not None:
        assert f"tier {tier}" in reason and f"no further than {label_of(reach)}" in reason


def test_who_is_out_of_reach_is_excluded_with_the_reason() -> None:
    square = Square([expert("phone", Tier.END), expert("big", Tier.CLOUD)])
    able, excluded = takers(replace(ONE, reach=Tier.EDGE), "why?", square)
    assert [e.name for e in able] == ["phone"]
    assert excluded == (("big", "it is on a machine of tier cloud, and the data may go no further than edge"),)


def test_nobody_within_reach_is_told_apart_from_nobody_able() -> None:
    square = Square([expert("big", Tier.CLOUD)])
    with pytest.raises(OutOfReach, match="no further than local"):
        takers(replace(ONE, reach=Tier.END), "why?", square)
    with pytest.raises(NoExpert) as caught:
        takers(replace(ONE, reach=Tier.END), "why?", Square())
    assert not isinstance(caught.value, OutOfReach)


async def test_a_named_expert_out_of_reach_is_a_failure_that_says_so_and_nobody_else_is_asked() -> None:
    big, phone = expert("big", Tier.CLOUD), expert("phone", Tier.END)
    planner = StaticPlanner([Subtask(id="t1", question="{question}", expert="big", reach=Tier.END)])
    result = await run(horizontal(Square([phone, big]), planner=planner), "my secret")
    outcome = result.outcome("t1")
    assert isinstance(outcome, Failure)
    assert outcome.code == "out_of_reach"
    assert "names expert 'big', which may not see it" in outcome.message
    assert seen_by(big) == seen_by(phone) == []


class Careless:
    """A router that knows nothing of labels."""

    async def rank(self, subtask: Subtask, question: str, square: Square) -> Ranking:
        return Ranking(
            candidates=tuple(Candidate(expert=e.name, similarity=0.5, load=0, price=0.0, score=0.0) for e in square)
        )


async def test_a_router_that_forgets_labels_is_caught_before_anything_leaves() -> None:
    big, phone = expert("big", Tier.CLOUD), expert("phone", Tier.END)
    result = await run(horizontal(Square([big, phone]), router=Careless()), "my secret?", reach="local")
    assert result.text == "phone says so"
    first = result.attempts["t1"][0].outcome
    assert isinstance(first, Failure) and first.code == "out_of_reach"
    assert seen_by(big) == []


async def test_an_expert_replaced_by_one_further_up_under_its_name_is_caught_too() -> None:
    big = expert("wise", Tier.CLOUD)
    square = Square([expert("first", Tier.END, Unavailable("down")), expert("wise", Tier.END)])

    class Slow(KeywordRouter):
        async def rank(self, subtask: Subtask, question: str, square: Square) -> Ranking:
            ranking = await super().rank(subtask, question, square)
            square.leave("wise")
            square.join(big)
            return ranking

    await Crew(square=square, router=Slow()).solve(
        Job(
            subtask=replace(ONE, reach=Tier.END),
            question="why?",
            spend=Spend(Budget()),
            deadline=None,
            on_start=lambda n, expert, why: None,
            on_end=lambda n, attempt, last: None,
        )
    )
    assert seen_by(big) == []


async def test_the_label_of_a_run_bounds_every_part_of_it_and_what_was_said_before() -> None:
    big, near = expert("big", Tier.CLOUD), expert("near", Tier.EDGE)
    graph = horizontal(Square([big, near]))
    result = await run(graph, "Who was Bach? Who was Cantor?", said_before="my secret", reach=Tier.EDGE)
    assert result.complete
    assert seen_by(big) == []
    assert len(seen_by(near)) == 2
    assert all("my secret" in text for text in seen_by(near))
    assert {s.reach for s in result.graph} == {Tier.EDGE}
    events: list[Event] = [e async for e in stream(graph, "Who was Bach?", reach="local")]
    assert any(isinstance(e, Planned) and e.graph.reach is Tier.END for e in events)
    assert seen_by(big) == [] and len(seen_by(near)) == 2


async def test_a_label_is_part_of_the_input_of_a_composed_graph() -> None:
    big, near = expert("big", Tier.CLOUD), expert("near", Tier.EDGE)
    graph = horizontal(Square([big, near]))
    await graph.ainvoke({"question": "why?", "reach": "edge"})
    assert (len(seen_by(big)), len(seen_by(near))) == (0, 1)
    with pytest.raises(InvalidRequest, match="allowed: local, edge, cloud"):
        await graph.ainvoke({"question": "why?", "reach": "mars"})


async def test_an_unknown_label_is_refused_before_anybody_is_asked() -> None:
    near = expert("near", Tier.EDGE)
    with pytest.raises(InvalidRequest, match="reach is 'mars'"):
        await run(horizontal(Square([near])), "why?", reach="mars")
    assert seen_by(near) == []


PLAN = '{"subtasks": [{"id": "t1", "question": "Who was Bach?", "inputs": []}]}'


async def test_a_planning_model_out_of_reach_is_not_asked_and_the_rules_plan() -> None:
    big, phone = expert("big", Tier.CLOUD, PLAN), expert("phone", Tier.END)
    square = Square([big, phone])
    for planner in (LLMPlanner(Named(square, "big"), experts=square), LLMPlanner(big.backend)):
        result = await run(horizontal(square, planner=planner), "Who was Bach?", reach="local")
        assert result.complete
        assert result.planner == "rules"
        assert "no further than local" in result.notes[0]
        assert seen_by(big) == []


async def test_a_planning_model_within_reach_plans_and_is_not_told_of_those_beyond() -> None:
    phone, big = expert("phone", Tier.END, PLAN), expert("big", Tier.CLOUD)
    square = Square([phone, big])
    result = await run(
        horizontal(square, planner=LLMPlanner(Named(square, "phone"), experts=square)), "Who was Bach?", reach="local"
    )
    assert result.planner == "llm"
    assert "big" not in seen_by(phone)[0] and "phone" in seen_by(phone)[0]


async def test_a_planner_that_cannot_be_told_the_label_is_not_asked() -> None:
    shown: list[str] = []

    class Chatty:
        name = "chatty"

        async def plan(self, question: str, *, timeout_s: float | None = None, budget: Budget | None = None) -> Plan:
            shown.append(question)
            return Plan(graph=TaskGraph((ONE,)), planner=self.name)

    plan = await plan_within(Chatty(), "my secret?", reach=Tier.END)
    assert (shown, plan.planner) == ([], "rules")
    assert "'chatty' cannot be told" in plan.notes[0]
    assert plan.graph.reach is Tier.END
    plan = await plan_within(Chatty(), "weather?", reach=Tier.CLOUD)
    assert (shown, plan.planner) == (["weather?"], "chatty")


TWO = (Subtask(id="t1", question="one?"), Subtask(id="t2", question="two?", reach=Tier.END))


async def test_a_writer_out_of_reach_of_any_part_is_not_asked_and_the_parts_are_given() -> None:
    big, phone = expert("big", Tier.CLOUD), expert("phone", Tier.END)
    square = Square([phone, big])
    for synthesiser in (LLMSynthesiser(big), LLMSynthesiser(Named(square, "big"))):
        result = await run(horizontal(square, planner=StaticPlanner(TWO), synthesiser=synthesiser), "why?")
        assert "two?\nphone says so" in result.text
        assert any("may not see them" in n for n in result.notes)
        assert all("two?" not in text for text in seen_by(big))


async def test_a_writer_within_reach_writes() -> None:
    phone = expert("phone", Tier.END)
    graph = horizontal(Square([phone]), planner=StaticPlanner(TWO), synthesiser=LLMSynthesiser(phone))
    result = await run(graph, "why?")
    assert result.text == "phone says so" and result.notes == ()


async def test_a_writer_that_was_replaced_while_the_budget_was_waited_for_is_not_asked() -> None:
    phone, big = expert("phone", Tier.END), expert("w", Tier.CLOUD)
    square = Square([phone, expert("w", Tier.END, "written")])

    class Late(LLMSynthesiser):
        looks = 0

        @property
        def asks(self) -> Expert:
            self.looks += 1
            # By the second look somebody else has come under the name.
            return big if self.looks > 3 else square.experts[1]

    await run(horizontal(square, planner=StaticPlanner(TWO), synthesiser=Late(big)), "why?")
    assert seen_by(big) == []


async def test_a_resumed_run_keeps_its_label(tmp_path: Path) -> None:
    """Stopped while its first subtask is asked; resumed, its second one goes no further than it was meant to."""
    hold = asyncio.Event()
    asked = asyncio.Event()

    async def reply(request: GenerateRequest) -> str:
        asked.set()
        await hold.wait()
        return "said"

    near, big = expert("near", Tier.EDGE, reply), expert("big", Tier.CLOUD)
    square = Square([big, near])
    planner = StaticPlanner(
        [Subtask(id="t1", question="{question}"), Subtask(id="t2", question="and #t1?", inputs=("t1",))]
    )
    async with RunStore.open(tmp_path / "runs.sqlite") as store:
        record = await store.create("r1", "my secret?", graph="horizontal", config_path=None, reach=Tier.EDGE)
        assert record.reach is Tier.EDGE and (await store.get("r1")).reach is Tier.EDGE
        graph = horizontal(square, planner=planner, checkpointer=store.checkpointer)
        work = asyncio.create_task(run(graph, "my secret?", run_id="r1", reach=record.reach))
        await asked.wait()
        work.cancel()
        await asyncio.wait([work])
        hold.set()
        graph = horizontal(square, planner=planner, checkpointer=store.checkpointer)
        result = await resume(graph, "r1")
    assert result.complete
    assert seen_by(big) == []
    assert {s.reach for s in result.graph} == {Tier.EDGE}


SECRETS = {Tier.END: "LOCALDATA", Tier.EDGE: "EDGEDATA", Tier.CLOUD: "OPENDATA"}


@st.composite
def worlds(draw: st.DrawFn) -> tuple[TaskGraph, list[Tier], Tier, Mapping[str, Any]]:
    """A random graph with labels, the tiers of those who are here, the label of the run, and who plans and writes."""
    n = draw(st.integers(1, 7))
    tiers = draw(st.lists(st.sampled_from(Tier), min_size=1, max_size=5))
    names = [f"e{i}" for i in range(len(tiers))]
    subtasks = []
    for i in range(n):
        inputs = tuple(f"t{j}" for j in range(i) if draw(st.booleans()))
        reach = draw(st.sampled_from(Tier))
        # Its text carries its own label: whoever sees the word sees the data.
        refer = " ".join(f"#{j}" for j in inputs)
        subtasks.append(
            Subtask(
                id=f"t{i}",
                question=f"{SECRETS[reach]} of t{i} {refer} {{question}}",
                inputs=inputs,
                reach=reach,
                expert=draw(st.one_of(st.none(), st.sampled_from(names))),
            )
        )
    order = draw(st.permutations(subtasks))
    more = {
        "synthesiser": draw(st.one_of(st.none(), st.sampled_from(names))),
        "careless": draw(st.booleans()),
        "failing": draw(st.sets(st.sampled_from(names))),
        "said_before": draw(st.booleans()),
    }
    return TaskGraph(tuple(order)), tiers, draw(st.sampled_from(Tier)), more


@settings(max_examples=80, deadline=None)
@given(world=worlds())
def test_nobody_above_the_bound_ever_sees_anything_made_of_labelled_data(
    world: tuple[TaskGraph, list[Tier], Tier, Mapping[str, Any]],
) -> None:
    graph, tiers, reach, more = world

    def parrot(request: GenerateRequest) -> str:
        # Whatever it was shown comes back, so that whoever sees its answer sees that, too.
        return question_of(request)

    people = [
        expert(f"e{n}", tier, Unavailable("down") if f"e{n}" in more["failing"] else parrot)
        for n, tier in enumerate(tiers)
    ]
    square = Square(people)
    writer = square.get(more["synthesiser"]) if more["synthesiser"] else None

    async def go() -> RunResult:
        built = horizontal(
            square,
            planner=StaticPlanner(graph),
            router=Careless() if more["careless"] else KeywordRouter(),
            synthesiser=LLMSynthesiser(writer) if writer else None,
        )
        question = f"{SECRETS[reach]} of the run"
        said = f"{SECRETS[reach]} said before" if more["said_before"] else ""
        return await run(built, question, said_before=said, reach=reach)

    asyncio.run(go())
    for person in people:
        for tier, secret in SECRETS.items():
            if list(Tier).index(person.card.tier) > list(Tier).index(tier):
                assert not any(secret in text for text in seen_by(person)), (person.card.tier, tier)


async def test_within_the_bound_everybody_may_still_be_asked() -> None:
    """The property above would hold of a graph that asks nobody: with somebody within reach, everything is answered."""
    people = [expert(f"e-{t}", t) for t in Tier]
    plan = [Subtask(id=f"t{n}", question="{question}", reach=t) for n, t in enumerate(Tier)]
    result = await run(horizontal(Square(people), planner=StaticPlanner(plan)), "why?")
    assert result.complete
    assert all(isinstance(result.outcome(s.id), Answer) for s in result.graph)
    message = Message(role="user", content="why?")
    assert all(r.messages[-1] == message for p in people for r in p.backend.requests)  # type: ignore[attr-defined]


def test_an_expert_that_is_also_on_machines_further_up_counts_as_the_highest_of_them() -> None:
    text = """
    [nodes.near]
    kind = "fake"
    tier = "edge"
    [nodes.far]
    kind = "fake"
    tier = "cloud"
    [experts.one]
    node = "near"
    description = "knows"
    [experts.both]
    node = "near"
    also = ["far"]
    description = "knows"
    """
    cards = {c.name: c.tier for c in expert_cards(parse_config(text, file=None))}
    assert cards == {"one": Tier.EDGE, "both": Tier.CLOUD}
