"""The graph over several paths: its order, what a subtask wants of its path, and what its answers tell."""

from __future__ import annotations

import asyncio
from pathlib import Path as File
from typing import Any

import pytest

from agora.config import parse_config
from agora.errors import ConfigError, InvalidRequest, Unavailable
from agora.network.multipath import MultipathBackend
from agora.network.path import Link, Path, Technology
from agora.network.wanted import wanted_at
from agora.network.ways import Way
from agora.protocols import GenerateRequest
from agora.square import Expert, Square
from agora.types import Answer, Budget, ExpertCard, Subtask, TaskGraph
from experts.build import open_square
from experts.fake import FakeBackend
from graphs import horizontal, multi_access, run
from graphs.build import build_graph
from graphs.plan import StaticPlanner
from graphs.store import RunStore


def path(name: str) -> Path:
    link = Link(name=name, source="here", target="cloud", technology=Technology.NR)
    return Path(name=name, links=(link,), target="cloud")


def square_of(*backends: FakeBackend) -> Square:
    ways = [Way(path=path(b.name), backend=b) for b in backends]
    backend = MultipathBackend(ways, name="one")
    return Square([Expert(card=ExpertCard(name="one", description="one", max_tokens=8), backend=backend)])


def chain() -> TaskGraph:
    """A chain of three, planned last, beside three that nobody waits for."""
    alone = [Subtask(id=f"alone{n}", question=f"alone {n}?") for n in range(3)]
    first = Subtask(id="first", question="first?")
    then = Subtask(id="then", question="then #first?", inputs=("first",))
    last = Subtask(id="last", question="last #then?", inputs=("then",))
    return TaskGraph((*alone, first, then, last))


async def test_answers_tell_their_path_and_what_could_not_be_used() -> None:
    wifi, nr = FakeBackend(Unavailable("no carrier"), name="wifi"), FakeBackend("said", name="5g")
    graph = multi_access(square_of(wifi, nr), planner=StaticPlanner(chain()))
    result = await run(graph, "what?")
    assert result.complete
    answers = [result.outcome(s.id) for s in result.graph]
    assert all(isinstance(a, Answer) and a.path == "5g" for a in answers)
    assert any("wifi" in note for a in answers if isinstance(a, Answer) for note in a.notes)
    # Each subtask was asked of one expert once: paths are changed below.
    assert all(len(many) == 1 for many in result.attempts.values())


async def test_a_result_with_paths_survives_being_written_down() -> None:
    result = await run(multi_access(square_of(FakeBackend("said", name="5g")), planner=StaticPlanner(chain())), "what?")
    plain = result.to_dict()
    again = type(result).from_dict(plain)
    assert again == result
    # One that was written before there were paths can still be read.
    for many in plain["attempts"].values():
        for attempt in many:
            del attempt["outcome"]["path"]
    old = type(result).from_dict(plain).outcome("first")
    assert isinstance(old, Answer)
    assert old.path is None


@pytest.mark.looptime
@pytest.mark.parametrize(("scheduler", "seconds"), [("heft", 3.0), ("fifo", 4.0)])
async def test_the_longest_way_to_the_end_is_asked_first(scheduler: str, seconds: float) -> None:
    square = square_of(FakeBackend("said", name="5g", latency=1.0))
    graph = multi_access(square, planner=StaticPlanner(chain()), scheduler=scheduler, max_parallel=2)
    loop = asyncio.get_running_loop()
    began = loop.time()
    result = await run(graph, "what?")
    assert result.complete
    # Two places: the chain takes three seconds beside the others, or begins a second late.
    assert loop.time() - began == pytest.approx(seconds, abs=0.5)


@pytest.mark.looptime
@pytest.mark.parametrize("stored", [False, True])
async def test_subtasks_with_much_behind_them_are_wanted_sooner(stored: bool, tmp_path: File) -> None:
    wanted: dict[str, float] = {}
    timeouts: dict[str, float | None] = {}
    loop = asyncio.get_running_loop()
    began = loop.time()

    def reply(request: GenerateRequest) -> str:
        name = request.messages[-1].content.split()[0].strip("?")
        wanted[name] = wanted_at() - began
        timeouts[name] = request.timeout_s
        return "said"

    square = square_of(FakeBackend(reply, name="5g"))
    planner = StaticPlanner(chain())
    budget = Budget(deadline_s=9.0)
    if stored:
        async with RunStore.open(tmp_path / "runs.sqlite") as store:
            graph = multi_access(square, planner=planner, budget=budget, checkpointer=store.checkpointer)
            await graph.ainvoke({"question": "what?"}, config={"configurable": {"thread_id": "1"}})
    else:
        await run(multi_access(square, planner=planner, budget=budget), "what?")
    assert wanted["first"] == pytest.approx(3.0, abs=0.2)
    assert wanted["then"] == pytest.approx(6.0, abs=0.2)
    assert wanted["last"] == pytest.approx(9.0, abs=0.2)
    assert wanted["alone"] == pytest.approx(9.0, abs=0.2)
    # It is a wish: nothing is broken off before the run's own deadline.
    assert all(t == pytest.approx(9.0, abs=0.5) for t in timeouts.values())
    assert wanted_at() == float("inf")


async def test_other_graphs_use_the_paths_as_well() -> None:
    square = square_of(FakeBackend(Unavailable("no carrier"), name="wifi"), FakeBackend("said", name="5g"))
    result = await run(horizontal(square, planner=StaticPlanner(chain())), "what?")
    assert {getattr(result.outcome(s.id), "path", None) for s in result.graph} == {"5g"}


def test_a_scheduler_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="scheduler is 'lifo'; allowed: heft, fifo"):
        multi_access(Square(), scheduler="lifo")


CONFIG = """
[nodes.a]
kind = "fake"
fail = "unavailable"
[nodes.b]
kind = "fake"
reply = "from b"
[experts.law]
node = "a"
also = ["b"]
description = "law"
[links.near]
target = "a"
technology = "wifi"
[links.far]
target = "b"
technology = "5g"
price_per_mb = 1000.0
[graph]
name = "multi_access"
router = "keywords"
[multi_access]
scheduler = "fifo"
"""


async def test_it_is_built_from_a_configuration_and_links_cost_money() -> None:
    config = parse_config(CONFIG, file=File("/somewhere/agora.toml"))
    square = await open_square(config)
    try:
        result = await run(build_graph(config, square), "What does the law say?")
        outcome: Any = result.outcome(result.graph.order[0].id)
        assert (outcome.text, outcome.path) == ("from b", "b.5g")
        assert result.usage.cost > 0.5, "a kilobyte at 1000 a megabyte"
    finally:
        await square.aclose()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('scheduler = "fifo"', 'scheduler = "lifo"', r"multi_access\.scheduler"),
        ('scheduler = "fifo"', "hedge_share = 1.5", r"multi_access\.hedge_share"),
        ('technology = "wifi"', 'technology = "pigeon"', r"links\.near\.technology"),
        ('target = "a"', 'target = "nowhere"', r"links\.near\.target"),
    ],
)
def test_wrong_keys_are_named(old: str, new: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(CONFIG.replace(old, new), file=File("/somewhere/agora.toml"))
