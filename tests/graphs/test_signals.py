"""Signals that are asked for: what they come to, what they cost, and what happens where they cannot be had."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest

from agora.errors import InvalidRequest, Unavailable
from agora.protocols import Capabilities, Completion, GenerateRequest, ScoreRequest, TokenLogprob
from agora.routing.signals import ENTROPY, MEAN_LOGPROB, P_TRUE, SELF_CONSISTENCY, VERBALISED
from agora.square import Expert
from agora.types import AdapterRef, Answer, Budget, ExpertCard, Usage
from experts.fake import FakeBackend, Hang, Reply, question_of
from graphs.signals import asked_with, gather
from graphs.signals.verbalised import WORDS as HOW_SURE
from graphs.signals.verbalised import read_percent
from graphs.spend import Spend

QUESTION = "How much is 6 times 7?"


def expert(backend: Any, **card: Any) -> Expert:
    return Expert(
        card=ExpertCard(name="small", description="Knows.", price_per_mtok=1e6, **card),
        backend=backend,
        system_prompt="Be brief.",
    )


async def answered(who: Expert, text: str = "42") -> Answer:
    return Answer(text=text, expert=who.name, signals={MEAN_LOGPROB: -0.2})


async def test_self_consistency_is_the_share_of_samples_that_agree() -> None:
    backend = FakeBackend(["the answer is 42", "41", "It is 42.", "no idea, really, none at all"])
    who = expert(backend)
    spend = Spend(Budget())
    got = await gather(who, QUESTION, await answered(who), [SELF_CONSISTENCY], samples=4, spend=spend)
    assert got.signals == {MEAN_LOGPROB: -0.2, SELF_CONSISTENCY: 0.5}
    assert got.notes == ()
    requests = [r for r in backend.requests if isinstance(r, GenerateRequest)]
    assert all(r.temperature > 0 and question_of(r) == QUESTION for r in requests)
    assert {r.messages[0].content for r in requests} == {"Be brief."}
    assert sorted(r.seed or 0 for r in requests) == [1, 2, 3, 4]
    # All of it is paid, at the expert's price.
    assert got.usage.calls == 4 and got.usage.cost == got.usage.tokens == spend.spent.tokens > 0
    assert spend.spent == got.usage


async def test_samples_that_fail_do_not_count_as_disagreement() -> None:
    who = expert(FakeBackend(["42", Unavailable("down"), "42", "7"]))
    got = await gather(who, QUESTION, await answered(who), [SELF_CONSISTENCY], samples=4)
    assert got.signals[SELF_CONSISTENCY] == pytest.approx(2 / 3)
    who = expert(FakeBackend(Unavailable("down")))
    got = await gather(who, QUESTION, await answered(who), [SELF_CONSISTENCY], samples=3)
    assert SELF_CONSISTENCY not in got.signals
    assert "none of 3 samples could be had: down" in got.notes[0]


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("85", 0.85),
        ("I am 100% sure", 1.0),
        ("about 7 out of 10", 0.07),
        ("0.9", 0.9),
        ("99.5 percent", 0.995),
        ("0", 0.0),
        ("150", None),
        ("-20", None),
        ("very sure", None),
        ("1,000", None),
        ("", None),
    ],
)
def test_reading_how_sure_it_says_it_is(said: str, read: float | None) -> None:
    assert read_percent(said) == read


async def test_verbalised_asks_after_the_answer() -> None:
    backend = FakeBackend({HOW_SURE: "80"})
    who = expert(backend)
    got = await gather(who, QUESTION, await answered(who), [VERBALISED])
    assert got.signals[VERBALISED] == 0.8
    (request,) = backend.requests
    assert isinstance(request, GenerateRequest)
    assert [m.role for m in request.messages] == ["system", "user", "assistant", "user"]
    assert [m.content for m in request.messages[1:3]] == [QUESTION, "42"]
    unsure = expert(FakeBackend({HOW_SURE: "quite"}))
    got = await gather(unsure, QUESTION, await answered(unsure), [VERBALISED])
    assert VERBALISED not in got.signals and "it said 'quite'" in got.notes[0]


async def test_p_true_scores_both_words() -> None:
    backend = FakeBackend(scores={"True": -0.5, "False": -1.5}, adapters=("tuned@v2",))
    who = Expert(
        card=ExpertCard(name="small", description="Knows."), backend=backend, adapter=AdapterRef.parse("tuned@v2")
    )
    got = await gather(who, QUESTION, await answered(who), [P_TRUE])
    assert got.signals[P_TRUE] == pytest.approx(1 / (1 + math.exp(-1.0)))
    (request,) = backend.requests
    assert isinstance(request, ScoreRequest) and request.adapter == who.adapter


async def test_p_true_of_a_backend_without_chat() -> None:
    plain = Capabilities(chat=False, completion=True, score=True)
    who = expert(FakeBackend(scores={" True": -1.0, " False": -1.0}, capabilities=plain))
    got = await gather(who, QUESTION, await answered(who), [P_TRUE])
    assert got.signals[P_TRUE] == pytest.approx(0.5)


class Alternatives(FakeBackend):
    """Tells these alternatives to the first token."""

    def __init__(self, *top: tuple[str, float]) -> None:
        super().__init__("x", capabilities=Capabilities(logprobs=True))
        self.top = top

    async def generate(self, request: GenerateRequest) -> Completion:
        first = TokenLogprob(token=self.top[0][0], logprob=self.top[0][1], top=self.top)
        return Completion(text=first.token, finish_reason="length", usage=Usage(prompt_tokens=9), logprobs=(first,))


async def test_p_true_without_score_looks_at_the_alternatives() -> None:
    who = expert(Alternatives((" True", math.log(0.6)), ("False", math.log(0.1)), ("true", math.log(0.1))))
    got = await gather(who, QUESTION, await answered(who), [P_TRUE])
    assert got.signals[P_TRUE] == pytest.approx(0.7 / 0.8)
    vague = expert(Alternatives(("Well", math.log(0.9)), ("True", math.log(1e-4))))
    got = await gather(vague, QUESTION, await answered(vague), [P_TRUE])
    assert P_TRUE not in got.signals and "begins with 'Well'" in got.notes[0]


async def test_a_missing_capability_is_a_note_and_costs_nothing() -> None:
    backend = FakeBackend(capabilities=Capabilities())
    who = expert(backend)
    got = await gather(who, QUESTION, await answered(who), [P_TRUE])
    assert P_TRUE not in got.signals
    assert "p_true of small's answer could not be had: its backend claims neither" in got.notes[0]
    assert not backend.calls and got.usage == Usage()


async def test_nonsense_scores_are_no_signal() -> None:
    for scores in ({"True": math.nan, "False": -1.0}, {"True": -math.inf, "False": -math.inf}):
        who = expert(FakeBackend(scores=scores))
        got = await gather(who, QUESTION, await answered(who), [P_TRUE])
        assert P_TRUE not in got.signals and got.notes


async def test_what_came_with_the_answer_is_kept_only_if_it_is_a_number() -> None:
    who = expert(FakeBackend())
    answer = Answer(text="42", expert="small", signals={"a": math.nan, "b": math.inf, "c": 0.5})
    assert (await gather(who, QUESTION, answer, [])).signals == {"c": 0.5}


@pytest.mark.looptime
async def test_the_deadline_bounds_all_of_it_and_the_rest_is_kept() -> None:
    backend = FakeBackend(lambda r: Reply("80") if question_of(r) == HOW_SURE else Hang())
    who = expert(backend)
    loop = asyncio.get_running_loop()
    started = loop.time()
    spend = Spend(Budget())
    got = await gather(
        who, QUESTION, await answered(who), [SELF_CONSISTENCY, VERBALISED], deadline=started + 3, spend=spend
    )
    assert loop.time() - started == pytest.approx(3, abs=0.1)
    assert got.signals[VERBALISED] == 0.8 and SELF_CONSISTENCY not in got.signals
    # Prompts that were read before they broke off are paid.
    assert got.usage.calls == 6 and spend.spent == got.usage
    late = await gather(who, QUESTION, await answered(who), [VERBALISED], deadline=loop.time() - 1)
    assert VERBALISED not in late.signals and "no time left" in late.notes[0]


async def test_the_budget_bounds_it() -> None:
    backend = FakeBackend("42")
    who = expert(backend)
    spend = Spend(Budget(cost=130.0))  # one sample's prompt of ~60 tokens and some answer, at 1 a token
    got = await gather(who, QUESTION, await answered(who), [SELF_CONSISTENCY], samples=20, spend=spend)
    assert spend.spent.cost <= 130.0
    assert 0 < len(backend.requests) < 20
    assert got.signals[SELF_CONSISTENCY] == 1.0


async def test_a_backend_that_raises_anything_loses_no_answer() -> None:
    def broken(request: Any) -> str:
        raise RuntimeError("boom")

    who = expert(FakeBackend(broken))
    got = await gather(who, QUESTION, await answered(who), [VERBALISED, SELF_CONSISTENCY], samples=2)
    assert got.signals == {MEAN_LOGPROB: -0.2}
    assert len(got.notes) == 2 and all("RuntimeError: boom" in n for n in got.notes)


async def test_unknown_names_are_refused() -> None:
    who = expert(FakeBackend())
    with pytest.raises(InvalidRequest, match=r"\['mood'\] cannot be asked for; allowed: self_consistency"):
        await gather(who, QUESTION, await answered(who), ["mood"])
    with pytest.raises(InvalidRequest, match="samples"):
        await gather(who, QUESTION, await answered(who), [SELF_CONSISTENCY], samples=0)


async def test_experts_tell_the_signals_of_their_answers() -> None:
    backend = FakeBackend(Reply("four words of answer", logprobs=(-0.1, -0.2, -0.3, -0.4)))
    answer = await expert(backend).ask(QUESTION)
    assert answer.signals[MEAN_LOGPROB] == pytest.approx(-0.25) == answer.mean_logprob
    assert answer.signals["tokens"] == 4
    assert (await expert(FakeBackend(capabilities=Capabilities())).ask(QUESTION)).signals == {}


async def test_entropy_comes_with_an_answer_that_was_asked_for_with_alternatives() -> None:
    backend = FakeBackend(Reply("yes", logprobs=(math.log(0.5),)))
    who = asked_with(expert(backend), [ENTROPY])
    got = await gather(who, QUESTION, await who.ask(QUESTION), [ENTROPY])
    (request,) = backend.requests
    assert isinstance(request, GenerateRequest) and request.logprobs == 10
    # The fake's alternatives are each one nat less likely than the one before.
    shares = [0.5 * math.exp(-k) for k in range(10)]
    shares.append(1 - sum(shares))
    assert got.signals[ENTROPY] == pytest.approx(-sum(s * math.log(s) for s in shares))
    assert got.usage == Usage() and got.notes == ()
    plain = expert(FakeBackend())
    assert asked_with(plain, [P_TRUE]) is plain
    got = await gather(plain, QUESTION, await plain.ask(QUESTION), [ENTROPY])
    assert ENTROPY not in got.signals and "told no alternatives" in got.notes[0]


async def test_what_links_take_is_paid_for_signals_too() -> None:
    class Linked(FakeBackend):
        async def generate(self, request: GenerateRequest) -> Completion:
            done = await super().generate(request)
            return replace(done, usage=replace(done.usage, cost=500.0))

    who = expert(Linked("42"))
    spend = Spend(Budget())
    got = await gather(who, QUESTION, await answered(who), [SELF_CONSISTENCY], samples=2, spend=spend)
    assert got.usage.cost == spend.spent.cost == got.usage.tokens + 1000.0
