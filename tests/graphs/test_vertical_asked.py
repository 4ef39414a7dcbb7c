"""The vertical graph with what a question brings along: its worth, its asker, and a deadline in a new process."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from agora.errors import InvalidRequest
from agora.events import RunFailed, RunFinished
from agora.routing.cascade.policy import Ask, Decision, Query, Seen, Take
from agora.square import Expert, Square
from agora.types import Budget, ExpertCard, Tier
from experts.fake import FakeBackend, Hang
from graphs import horizontal, multi_access, resume, run, stream, vertical
from graphs.calibrating import Chosen
from graphs.guidance import MAX_WEIGHING
from graphs.once import Once
from graphs.store import RunStore

TIERS = {"small": Tier.END, "medium": Tier.EDGE, "large": Tier.CLOUD}


def square(**backends: Any) -> Square:
    """Three tiers that answer with their names, or as is said."""
    return Square(
        [
            Expert(
                card=ExpertCard(name=n, description=n, tier=tier, price_per_mtok=tier.height),
                backend=backends.get(n) or FakeBackend(n),
                node=n,
            )
            for n, tier in TIERS.items()
        ]
    )


class Only:
    """Asks one, and takes its answer."""

    def __init__(self, name: str) -> None:
        self.models = (name,)

    def decide(self, query: Query, seen: Sequence[Seen], *, allowed: Collection[int]) -> Decision:
        return Take(model=0, quality=0.9, why="done") if seen else Ask(model=0, quality=0.9, why="it is worth it")


class Priced:
    """Has a policy for every trade-off: the large one from 1.0 on, else the small one."""

    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.asked: list[float | None] = []

    def confidence(self, expert: str, signals: Mapping[str, float]) -> float | None:
        return None

    def policy(
        self, *, trade_off: float | None = None, max_risk: float | None = None, confidence: float = 0.95
    ) -> Chosen:
        self.asked.append(trade_off)
        name = "large" if (trade_off or 0.0) >= 1.0 else "small"
        return Chosen(policy=Only(name), kind=f"only {name}", why="", certified=max_risk is not None)


@pytest.mark.parametrize("checkpointed", [False, True])
async def test_a_question_may_say_what_a_right_answer_is_worth(checkpointed: bool) -> None:
    trust = Priced()
    saver = InMemorySaver() if checkpointed else None
    graph = vertical(square(), trust=trust, max_risk=0.05, trade_off=0.5, checkpointer=saver)
    assert (await run(graph, "what?")).text == "small"
    worth = (5.0, 0.1, 5.0, 0.1, None)
    many = await asyncio.gather(*(run(graph, "what?", trade_off=w) for w in worth))
    assert [r.text for r in many] == ["large", "small", "large", "small", "small"]
    # Every result tells of its own policy, whatever others ask at the same time.
    for result, w in zip(many, worth, strict=True):
        kind = "only large" if w == 5.0 else "only small"
        assert any(f"certified with a confidence of 0.95 ({kind})" in n for n in result.notes)
        assert not any("changes nothing" in n for n in result.notes)
    # Choosing takes a while: once for each.
    assert sorted(w for w in trust.asked if w is not None) == [0.1, 0.5, 5.0]
    finished = [e async for e in stream(graph, "what?", trade_off=5.0)][-1]
    assert isinstance(finished, RunFinished) and finished.result.text == "large"


async def test_of_trade_offs_that_questions_bring_only_some_are_kept() -> None:
    trust = Priced()
    graph = vertical(square(), trust=trust)
    for n in range(MAX_WEIGHING + 1):
        await run(graph, "what?", trade_off=1.0 + n)
    asked = len(trust.asked)
    await run(graph, "what?", trade_off=float(MAX_WEIGHING))
    assert len(trust.asked) == asked
    await run(graph, "what?", trade_off=1.0)
    assert len(trust.asked) == asked + 1


async def test_where_nothing_goes_by_it_the_result_says_so() -> None:
    for graph in (vertical(square(), accept=0.0), vertical(square(), policy=Only("medium"))):
        result = await run(graph, "what?", trade_off=2.0)
        assert any("what a right answer is worth (2) changes nothing" in n for n in result.notes)
        assert not any("changes nothing" in n for n in (await run(graph, "what?")).notes)


@pytest.mark.parametrize("worth", [0.0, -1.0, float("nan"), float("inf"), 1e10, True, "much"])
async def test_what_is_no_worth_is_refused(worth: Any) -> None:
    with pytest.raises(InvalidRequest, match="it must be a number above 0, at most 1e\\+09"):
        await run(vertical(square()), "what?", trade_off=worth)


async def test_a_graph_that_weighs_nothing_refuses_it() -> None:
    for graph in (horizontal(square()), multi_access(square())):
        with pytest.raises(InvalidRequest, match="does not weigh answers against money"):
            await run(graph, "what?", trade_off=1.0)
    *_, last = [e async for e in stream(horizontal(square()), "what?", trade_off=1.0)]
    assert isinstance(last, RunFailed) and last.code == InvalidRequest.code


async def test_what_was_said_before_and_its_worth_go_together() -> None:
    large = FakeBackend("large")
    graph = vertical(square(large=large), trust=Priced())
    result = await run(graph, "And now?", said_before="Rome was asked about.", trade_off=3.0)
    assert result.text == "large"
    assert "Rome was asked about." in large.requests[0].messages[-1].content  # type: ignore[union-attr]


@pytest.mark.looptime
@pytest.mark.parametrize("checkpointed", [False, True])
async def test_answers_are_shared_among_the_questions_of_one_asker(checkpointed: bool) -> None:
    small = FakeBackend("small", latency=1.0)
    once = Once(cache_entries=8)
    saver = InMemorySaver() if checkpointed else None
    graph = vertical(square(small=small), accept=0.0, once=once, checkpointer=saver)
    many = await asyncio.gather(*(run(graph, "what?", asker=a) for a in ("ann", "ben", "ann", None, None)))
    assert [r.usage.calls for r in many] == [1, 1, 0, 1, 0] and len(small.calls) == 3
    again = await run(graph, "what?", asker="ben")
    assert again.usage.calls == 0 and again.seconds < 1.0
    assert (await run(graph, "what?", asker="cy")).usage.calls == 1


@pytest.mark.parametrize("asker", ["", "x" * 257, 5])
async def test_what_is_no_asker_is_refused(asker: Any) -> None:
    with pytest.raises(InvalidRequest, match="asker must be a text"):
        await run(vertical(square()), "what?", asker=asker)


async def test_asker_and_worth_hold_when_a_run_is_resumed(tmp_path: Path) -> None:
    async with RunStore.open(tmp_path / "runs.sqlite") as store:
        stuck = FakeBackend(Hang())
        graph = vertical(square(large=stuck), trust=Priced(), checkpointer=store.checkpointer)
        working = asyncio.create_task(run(graph, "what?", run_id="r1", asker="ann", trade_off=5.0))
        while not stuck.calls:
            await asyncio.sleep(0.005)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        once, large = Once(cache_entries=8), FakeBackend("large")
        graph = vertical(square(large=large), trust=Priced(), once=once, checkpointer=store.checkpointer)
        assert (await resume(graph, "r1")).text == "large"
        assert (await run(graph, "what?", asker="ann", trade_off=5.0)).usage.calls == 0
        assert (await run(graph, "what?", asker="ben", trade_off=5.0)).usage.calls == 1


async def test_the_store_keeps_both(tmp_path: Path) -> None:
    async with RunStore.open(tmp_path / "runs.sqlite") as store:
        made = await store.create("r1", "what?", graph="g", config_path=None, asker="ann", trade_off=2.5)
        assert made == await store.get("r1") and (made.asker, made.trade_off) == ("ann", 2.5)
        plain = await store.create("r2", "what?", graph="g", config_path=None)
        assert (plain.asker, plain.trade_off) == (None, None)


@pytest.mark.looptime
async def test_in_a_new_process_a_tier_that_hangs_does_not_cost_the_whole_deadline() -> None:
    loop = asyncio.get_running_loop()
    graph = vertical(square(small=FakeBackend(Hang())), accept=0.0)
    result = await run(graph, "what?", budget=Budget(deadline_s=9.0))
    assert result.complete and result.text == "medium" and loop.time() == pytest.approx(3.0)
    assert [a.expert for a in result.attempts["t1"]] == ["small", "medium"]
    # The next one does not wait for it.
    result = await run(graph, "what now?", budget=Budget(deadline_s=9.0))
    assert result.complete and loop.time() == pytest.approx(3.0)
    assert [a.expert for a in result.attempts["t1"]] == ["medium"]
