"""A run over a task graph, as a user sees it: timing, failures, budgets, events, composition."""

import asyncio
from typing import Any, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langgraph.graph import END, START, StateGraph

from agora.errors import DeadlineExceeded, InvalidPlan, InvalidRequest, Rejected, Unavailable
from agora.events import (
    AttemptEnded,
    AttemptStarted,
    Event,
    RunFailed,
    RunFinished,
    RunState,
    Status,
    apply,
    event_from_dict,
    event_to_dict,
)
from agora.protocols import Capabilities
from agora.square import Expert, Square
from agora.types import Answer, Budget, ExpertCard, Failure, RunResult, Subtask, TaskGraph
from experts.fake import FakeBackend, Hang, Reply
from graphs.horizontal import horizontal
from graphs.llm_planner import LLMPlanner
from graphs.plan import StaticPlanner
from graphs.run import run, stream


def expert(name: str, backend: FakeBackend, **card: Any) -> Expert:
    return Expert(card=ExpertCard(name=name, description=f"{name} knows things", **card), backend=backend)


def plan(*subtasks: Subtask) -> StaticPlanner:
    return StaticPlanner(TaskGraph(subtasks))


def task(name: str, *inputs: str, expert: str | None = None) -> Subtask:
    return Subtask(id=name, question=f"do {name}", inputs=inputs, expert=expert)


def timed(seconds: dict[str, float]) -> FakeBackend:
    """Answers `do X` with `did X` after that many seconds."""

    def reply(request: Any) -> Reply:
        name = request.messages[-1].content.rpartition("do ")[2]
        return Reply(f"did {name}", latency=seconds[name])

    return FakeBackend(reply)


def text_of(result: RunResult, subtask: str) -> str:
    outcome = result.outcome(subtask)
    assert isinstance(outcome, Answer), outcome
    return outcome.text


@pytest.mark.looptime
async def test_a_subtask_starts_when_its_own_inputs_are_there() -> None:
    backend = timed({"slow": 10, "quick": 1, "child": 1, "last": 1})
    graph = horizontal(
        Square([expert("one", backend)]),
        planner=plan(task("slow"), task("quick"), task("child", "quick"), task("last", "slow", "child")),
    )
    result = await run(graph, "everything")
    started = {c.request.messages[-1].content.rpartition("do ")[2]: c.asked_s for c in backend.calls if c.request}
    assert started["child"] == pytest.approx(1, abs=0.05)
    assert started["last"] == pytest.approx(10, abs=0.05)
    assert result.seconds == pytest.approx(11, abs=0.1)
    assert result.complete


@pytest.mark.looptime
async def test_every_result_belongs_to_its_own_subtask_whatever_the_order_of_finishing() -> None:
    names = [f"n{i}" for i in range(12)]
    backend = timed({n: 12 - i for i, n in enumerate(names)})
    graph = horizontal(Square([expert("one", backend)]), planner=plan(*(task(n) for n in names)))
    result = await run(graph, "all")
    assert {n: text_of(result, n) for n in names} == {n: f"did {n}" for n in names}


async def test_answers_of_inputs_reach_the_dependant() -> None:
    backend = FakeBackend({"capital": "Paris"})
    graph = horizontal(
        Square([expert("one", backend)]),
        planner=plan(
            Subtask(id="t1", question="What is the capital of France?"),
            Subtask(id="t2", question="How many people live in #t1?", inputs=("t1",)),
        ),
    )
    result = await run(graph, "How many people live in the capital of France?")
    assert text_of(result, "t2") == "How many people live in Paris?"
    assert result.text == "How many people live in Paris?"


async def test_a_failing_expert_is_replaced_by_another() -> None:
    bad, good = FakeBackend(Unavailable("down")), FakeBackend("fine")
    square = Square([expert("bad", bad), expert("good", good)])
    result = await run(horizontal(square, planner=plan(task("a", expert="bad"))), "q")
    assert [a.expert for a in result.attempts["a"]] == ["bad", "good"]
    assert result.text == "fine"
    assert result.complete
    assert "bad failed" in result.attempts["a"][1].why


async def test_what_cannot_be_answered_is_named_and_its_siblings_go_on() -> None:
    backend = FakeBackend({"do a": Rejected("too rude", status=400), "do b": "b it is"})
    graph = horizontal(
        Square([expert("only", backend)]), planner=plan(task("a"), task("b"), task("c", "a"), task("d", "c"))
    )
    result = await run(graph, "q")
    assert result.missing == ("a", "c", "d")
    assert not result.complete
    assert "b it is" in result.text
    assert "do a" in result.text and "too rude" in result.text
    last = result.outcome("d")
    assert isinstance(last, Failure) and last.code == "missing_input" and "c" in last.message
    # A refusal is no passing trouble: it is not asked again.
    assert sum("do a" in r.messages[-1].content for r in backend.requests) == 1


async def test_an_intermediate_answer_is_given_when_what_stood_on_it_failed() -> None:
    backend = FakeBackend({"do b": Rejected("no", status=400), "do a": "half way"})
    result = await run(horizontal(Square([expert("only", backend)]), planner=plan(task("a"), task("b", "a"))), "q")
    assert result.text.startswith("half way")
    assert result.missing == ("b",)


async def test_nothing_answered_says_so() -> None:
    result = await run(
        horizontal(Square([expert("only", FakeBackend(Unavailable("down")))]), planner=plan(task("a"))), "q"
    )
    assert result.missing == ("a",)
    assert result.text.startswith("No part of this could be answered")
    assert "down" in result.text


async def test_a_passing_failure_is_asked_again_after_the_others() -> None:
    backend = FakeBackend(
        {"do b": "b", "do c": "c", "do a": "a"},
        failures=lambda call: Unavailable("hiccup") if call.index == 0 else None,
    )
    graph = horizontal(
        Square([expert("only", backend)]), planner=plan(task("a"), task("b"), task("c", "a")), max_parallel=1
    )
    result = await run(graph, "q")
    assert result.complete
    assert [isinstance(a.outcome, Answer) for a in result.attempts["a"]] == [False, True]
    assert text_of(result, "c") == "c"


async def test_an_exception_that_is_not_agoras_is_a_failure_too(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeBackend):
        async def generate(self, request: Any) -> Any:
            raise ZeroDivisionError("oops")

    result = await run(horizontal(Square([expert("only", Broken())]), planner=plan(task("a"), task("b"))), "q")
    outcome = result.outcome("a")
    assert isinstance(outcome, Failure) and outcome.code == "internal" and "oops" in outcome.message


async def test_an_empty_answer_is_no_answer() -> None:
    result = await run(horizontal(Square([expert("only", FakeBackend("  "))]), planner=plan(task("a"))), "q")
    outcome = result.outcome("a")
    assert isinstance(outcome, Failure) and outcome.code == "bad_reply"


async def test_nobody_here() -> None:
    result = await run(horizontal(Square(), planner=plan(task("a"))), "q")
    outcome = result.outcome("a")
    assert isinstance(outcome, Failure) and outcome.code == "no_expert"


@pytest.mark.looptime
async def test_at_the_deadline_the_run_returns_what_it_has_and_cancels_the_rest() -> None:
    backend = timed({"a": 1, "b": 60, "c": 1})
    graph = horizontal(
        Square([expert("one", backend)]),
        planner=plan(task("a"), task("b"), task("c", "b")),
        budget=Budget(deadline_s=5),
    )
    result = await run(graph, "q")
    assert result.seconds == pytest.approx(5, abs=0.1)
    assert text_of(result, "a") == "did a"
    assert result.missing == ("b", "c")
    assert "deadline" in result.text
    assert {c.outcome for c in backend.calls} == {"done", "cancelled"} or "failed" in {c.outcome for c in backend.calls}
    assert backend.load.total == 0


@pytest.mark.looptime
async def test_a_backend_that_hangs_is_left_at_the_deadline() -> None:
    backend = FakeBackend(Hang())
    graph = horizontal(Square([expert("one", backend)]), planner=plan(task("a")))
    result = await run(graph, "q", budget=Budget(deadline_s=3))
    assert result.missing == ("a",)
    assert result.seconds == pytest.approx(3, abs=0.1)
    assert backend.load.total == 0


@pytest.mark.looptime
async def test_a_planner_that_hangs_meets_the_deadline() -> None:
    class Slow:
        name = "slow"

        async def plan(self, question: str, **limits: Any) -> Any:
            await asyncio.sleep(1000)

    graph = horizontal(Square([expert("one", FakeBackend())]), planner=Slow())
    with pytest.raises(DeadlineExceeded, match="planning"):
        await run(graph, "q", budget=Budget(deadline_s=2))


@pytest.mark.looptime
async def test_a_planning_model_that_hangs_leaves_time_to_answer() -> None:
    graph = horizontal(Square([expert("one", FakeBackend("fine"))]), planner=LLMPlanner(FakeBackend(Hang())))
    result = await run(graph, "What is a loan?", budget=Budget(deadline_s=10))
    assert result.text == "fine" and result.planner == "rules" and result.notes
    assert result.seconds == pytest.approx(5, abs=0.2)


@pytest.mark.looptime
async def test_no_more_than_max_parallel_at_once_and_waiting_for_inputs_takes_no_place() -> None:
    backend = timed({"a": 2, "b": 2, "c": 2, "d": 2})
    most = 0

    def watch(_: Event) -> None:
        nonlocal most
        most = max(most, backend.load.total)

    graph = horizontal(
        Square([expert("one", backend)]),
        # b waits for a in its body; it must not hold one of the two places meanwhile.
        planner=plan(task("a"), task("b", "a"), task("c"), task("d")),
        max_parallel=2,
    )
    result = await run(graph, "q", on_event=watch)
    assert most <= 2
    assert result.seconds == pytest.approx(4, abs=0.1)


async def test_the_token_budget_is_never_exceeded() -> None:
    backend = FakeBackend("one two three four five six seven eight nine ten")
    graph = horizontal(
        Square([expert("one", backend, max_tokens=8)]), planner=plan(*(task(f"n{i}") for i in range(20)))
    )
    result = await run(graph, "q", budget=Budget(tokens=60))
    assert result.usage.tokens <= 60
    assert any(isinstance(result.outcome(f"n{i}"), Answer) for i in range(20))
    refused = [o for i in range(20) if isinstance(o := result.outcome(f"n{i}"), Failure)]
    assert refused and all(o.code == "budget" for o in refused)


async def test_the_cost_budget_is_never_exceeded() -> None:
    backend = FakeBackend("one two three four five six seven eight nine ten")
    square = Square([expert("dear", backend, price_per_mtok=1e6, max_tokens=8)])
    graph = horizontal(square, planner=plan(*(task(f"n{i}") for i in range(20))))
    result = await run(graph, "q", budget=Budget(cost=50.0))
    assert 0 < result.usage.cost <= 50
    assert result.missing


async def test_planning_by_a_model_is_held_to_the_budget_too() -> None:
    """With too little for the planning model's prompt nobody asks it: the rules plan, and say why."""
    model = FakeBackend("no plan")
    planner = LLMPlanner(model, price_per_mtok=1.0)
    square = Square([expert("one", FakeBackend("two three", capabilities=Capabilities()), max_tokens=4)])
    result = await run(horizontal(square, planner=planner), "What is a loan?", budget=Budget(tokens=100))
    assert model.requests == [] and result.planner == "rules" and result.complete
    assert result.usage.tokens <= 100 and "tokens are left" in result.notes[0]
    result = await run(horizontal(square, planner=planner), "What is a loan?", budget=Budget(cost=1e-6))
    assert model.requests == [] and result.usage.cost <= 1e-6
    result = await run(horizontal(square, planner=planner), "What is a loan?")
    assert len(model.requests) == 2 and result.usage.cost > 0


@pytest.mark.looptime
async def test_a_tight_budget_waits_for_calls_in_flight_rather_than_refusing() -> None:
    """Each call may cost its worst case, and costs little: one after the other they all fit."""
    backend = FakeBackend("short", latency=1.0)
    graph = horizontal(Square([expert("one", backend)]), planner=plan(*(task(f"n{i}") for i in range(10))))
    result = await run(graph, "q", budget=Budget(tokens=700))
    assert result.complete and result.usage.tokens <= 700


async def test_an_answer_that_the_budget_cut_is_noted() -> None:
    backend = FakeBackend("one two three four five six seven eight nine ten")
    result = await run(
        horizontal(Square([expert("one", backend)]), planner=plan(task("a"))), "q", budget=Budget(tokens=47)
    )
    assert result.complete and any("cut short" in n for n in result.notes)


async def test_a_cheaper_expert_is_asked_when_the_money_is_short() -> None:
    dear, free = FakeBackend("gold"), FakeBackend("enough")
    square = Square([expert("dear", dear, price_per_mtok=1e6), expert("free", free)])
    result = await run(horizontal(square, planner=plan(task("a", expert="dear"))), "q", budget=Budget(cost=0.001))
    assert result.text == "enough" and dear.requests == []


async def test_a_reply_that_broke_off_counts_its_prompt() -> None:
    backend = FakeBackend(Reply("one two three", cut_after=1))
    square = Square([expert("dear", backend, price_per_mtok=1.0)])
    result = await run(horizontal(square, planner=plan(task("a"))), "q")
    assert result.missing and result.usage.cost > 0 and result.usage.calls == 2


async def test_a_backend_that_cancels_itself_is_a_failure_like_any_other() -> None:
    class Dropped(FakeBackend):
        async def generate(self, request: Any) -> Any:
            raise asyncio.CancelledError

    square = Square([expert("bad", Dropped()), expert("good", FakeBackend("fine"))])
    result = await run(horizontal(square, planner=plan(task("a", expert="bad"), task("b", expert="good"))), "q")
    assert result.complete and [a.expert for a in result.attempts["a"]] == ["bad", "good"]


@pytest.mark.looptime
async def test_a_synthesiser_that_fails_or_takes_for_ever_costs_no_answer() -> None:
    class Bad:
        name = "bad"

        def __init__(self, asks: Expert | None, seconds: float) -> None:
            self.asks, self.seconds = asks, seconds

        async def synthesise(self, *args: Any, **limits: Any) -> Answer:
            await asyncio.sleep(self.seconds)
            raise ZeroDivisionError("oops")

    writer = expert("writer", FakeBackend())
    square = Square([expert("one", FakeBackend("fine"))])
    for bad, words in ((Bad(writer, 0), "oops"), (Bad(None, 0), "oops"), (Bad(writer, 99), "deadline")):
        graph = horizontal(square, planner=plan(task("a"), task("b")), synthesiser=bad)
        result = await run(graph, "q", budget=Budget(deadline_s=5))
        assert result.complete and "fine" in result.text and words in result.notes[0]
        assert result.seconds < 5.5


async def test_a_synthesiser_of_ones_own_is_used() -> None:
    class Shout:
        name = "shout"
        asks = None

        async def synthesise(self, question: str, graph: Any, outcomes: Any, **limits: Any) -> Answer:
            return Answer(text="CUSTOM", expert=self.name)

    graph = horizontal(
        Square([expert("one", FakeBackend("fine"))]), planner=plan(task("a"), task("b")), synthesiser=Shout()
    )
    assert (await run(graph, "q")).text == "CUSTOM"


async def test_a_planner_that_breaks_is_an_error_of_agora() -> None:
    class Broken:
        name = "broken"

        async def plan(self, question: str, **limits: Any) -> Any:
            raise KeyError("nothing")

    graph = horizontal(Square([expert("one", FakeBackend())]), planner=Broken())
    last = [e async for e in stream(graph, "q")][-1]
    assert isinstance(last, RunFailed) and "broken" in last.message


async def test_langgraphs_own_limit_must_leave_a_place() -> None:
    graph = horizontal(Square([expert("one", FakeBackend())]), planner=plan(task("a"), task("b", "a")))
    with pytest.raises(InvalidRequest, match="max_concurrency"):
        await graph.ainvoke({"question": "q"}, {"max_concurrency": 1})
    async with asyncio.timeout(5):
        state = await graph.ainvoke({"question": "q"}, {"max_concurrency": 2})
    assert state["result"]["complete"]


async def test_a_listener_that_raises_ends_the_run() -> None:
    backend = FakeBackend(Hang())

    def listen(event: Event) -> None:
        if isinstance(event, AttemptStarted):
            raise RuntimeError("enough")

    graph = horizontal(Square([expert("one", backend)]), planner=plan(task("a")))
    with pytest.raises(RuntimeError, match="enough"):
        await run(graph, "q", on_event=listen)
    assert backend.load.total == 0


async def test_events_fold_into_the_state_that_the_result_tells() -> None:
    bad, good = FakeBackend(Rejected("no", status=400)), FakeBackend("fine")
    square = Square([expert("bad", bad), expert("good", good)])
    graph = horizontal(square, planner=plan(task("a", expert="bad"), task("b", "a", expert="good")))
    events: list[Event] = [e async for e in stream(graph, "q", run_id="r1")]
    assert isinstance(events[-1], RunFinished)
    state = RunState()
    for e in events:
        state = apply(state, e)
        assert apply(state, e) == state
    assert state.run == "r1" and state.status is Status.DONE
    assert {i: s.status for i, s in state.subtasks.items()} == {"a": Status.DONE, "b": Status.DONE}
    assert state.subtasks["a"].attempt == 2
    assert state.result is not None and state.result.text == "fine"
    for e in events:
        assert event_from_dict(event_to_dict(e)) == e
    kinds = [type(e) for e in events]
    assert kinds.count(AttemptStarted) == kinds.count(AttemptEnded) == 3


@pytest.mark.parametrize("question", ["", "   ", "x" * 200_000, "bad \udc80 surrogate"])
async def test_a_question_that_cannot_be_asked_is_one_clear_error(question: str) -> None:
    graph = horizontal(Square([expert("one", FakeBackend())]), planner=plan(task("a")))
    with pytest.raises(InvalidRequest):
        await run(graph, question)
    last = [e async for e in stream(graph, question)][-1]
    assert isinstance(last, RunFailed) and last.code == "invalid_request"
    assert (await run(graph, "next")).complete


@pytest.mark.parametrize("limit", [{"max_parallel": 0}, {"max_attempts": -1}])
def test_limits_must_be_positive(limit: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match="must be ≥ 1"):
        horizontal(Square(), **limit)


async def test_a_cyclic_or_huge_plan_is_refused() -> None:
    def cyclic(question: str) -> TaskGraph:
        return TaskGraph((task("a", "b"), task("b", "a")))

    def huge(question: str) -> TaskGraph:
        return TaskGraph(tuple(task(f"n{i}") for i in range(10_000)))

    for make, words in ((cyclic, "cycle"), (huge, "10,000")):
        graph = horizontal(Square([expert("one", FakeBackend())]), planner=StaticPlanner(make))
        with pytest.raises(InvalidPlan, match=words):
            await run(graph, "q")


async def test_it_is_a_node_of_a_users_own_graph() -> None:
    class State(TypedDict, total=False):
        question: str
        answer: str
        shouted: str

    async def shout(state: State) -> State:
        return {"shouted": state["answer"].upper()}

    builder = StateGraph(State)
    builder.add_node("reason", horizontal(Square([expert("one", FakeBackend("quiet"))]), planner=plan(task("a"))))
    builder.add_node("shout", shout)
    builder.add_edge(START, "reason")
    builder.add_edge("reason", "shout")
    builder.add_edge("shout", END)
    graph = builder.compile()
    state = await graph.ainvoke({"question": "q"})
    assert state["shouted"] == "QUIET"
    told = [e async for _, e in graph.astream({"question": "q"}, stream_mode="custom", subgraphs=True)]
    assert isinstance(told[-1], RunFinished)


async def test_closing_the_stream_cancels_the_run() -> None:
    backend = FakeBackend(Hang())
    graph = horizontal(Square([expert("one", backend)]), planner=plan(task("a")))
    events = stream(graph, "q")
    async for e in events:
        if isinstance(e, AttemptStarted):
            break
    await asyncio.sleep(0.01)
    assert backend.load.total == 1
    await events.aclose()
    assert backend.load.total == 0


async def test_two_hundred_runs_at_once_do_not_mix() -> None:
    graph = horizontal(
        Square([expert("one", FakeBackend())]), planner=StaticPlanner([Subtask(id="t1", question="{question}")])
    )
    results = await asyncio.gather(*(run(graph, f"question {n}") for n in range(200)))
    assert [r.text for r in results] == [f"question {n}" for n in range(200)]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_graph_any_failures_every_subtask_has_an_outcome_and_inputs_come_first(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 10))
    subtasks = []
    for i in range(size):
        needs = data.draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        subtasks.append(task(f"n{i}", *(f"n{j}" for j in sorted(needs))))
    failing = data.draw(st.sets(st.sampled_from([s.id for s in subtasks])))
    replies = {f"do {s.id}": Rejected("no", status=400) if s.id in failing else f"did {s.id}" for s in subtasks}

    def reply(request: Any) -> Any:
        return replies["do " + request.messages[-1].content.rpartition("do ")[2]]

    backend = FakeBackend(reply)
    graph = horizontal(Square([expert("one", backend)]), planner=plan(*subtasks))
    result = asyncio.run(run(graph, "q"))
    lost: set[str] = set()
    for s in result.graph.order:
        if s.id in failing or any(i in lost for i in s.inputs):
            lost.add(s.id)
    assert set(result.missing) == lost
    for s in subtasks:
        if s.id not in lost:
            assert text_of(result, s.id) == f"did {s.id}"
    assert RunResult.from_dict(result.to_dict()) == result
