"""What happens to a text before it leaves the end tier: shortened, redacted, and what comes back put right."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agora.errors import InvalidRequest, Unavailable
from agora.protocols import GenerateRequest
from agora.routing import KeywordRouter
from agora.square import Expert, Square
from agora.types import Answer, Attempt, Budget, ExpertCard, Failure, Subtask, Tier, Usage
from experts.fake import FakeBackend, Reply, question_of
from graphs.crew import Crew, ask_expert
from graphs.departure import Condenser, Departure, Extractor, Redactor
from graphs.departure.passages import GAP, Passages, best_within, tokens_in
from graphs.llm_planner import LLMPlanner
from graphs.once import Once
from graphs.plan import StaticPlanner
from graphs.run import run
from graphs.solver import Job
from graphs.spend import Spend
from graphs.synthesise import LLMSynthesiser
from graphs.vertical import vertical

ONE = Subtask(id="t1", question="why?")

REPORT = (
    "Answer with one word.\n\n"
    + " ".join(
        f"The {thing} on shelf {n} is {colour} and weighs {n + 3} kilograms."
        for n, (thing, colour) in enumerate(
            [
                ("kettle", "red"),
                ("lantern", "green"),
                ("anvil", "black"),
                ("violin", "brown"),
                ("compass", "silver"),
                ("basket", "yellow"),
                ("helmet", "blue"),
                ("mirror", "golden"),
            ]
            * 6
        )
    )
    + "\n\nWhich colour has the violin on shelf 3?"
)


def expert(replies: Any, tier: Tier, name: str = "wise", **card: Any) -> Expert:
    return Expert(
        card=ExpertCard(name=name, description="Knows.", tier=tier, price_per_mtok=1e6, **card),
        backend=FakeBackend(replies, name=name),
    )


def shown(e: Expert) -> list[str]:
    assert isinstance(e.backend, FakeBackend)
    return [question_of(r) for r in e.backend.requests if isinstance(r, GenerateRequest)]


async def ask(
    who: Expert, text: str, departure: Departure, spend: Spend | None = None, once: Once | None = None
) -> Attempt:
    return await ask_expert(
        who, ONE, text, why="", spend=spend or Spend(Budget()), deadline=None, departure=departure, once=once
    )


def answered(attempt: Attempt) -> Answer:
    assert isinstance(attempt.outcome, Answer), attempt.outcome
    return attempt.outcome


async def shorten(
    condenser: Condenser | Extractor, text: str, spend: Spend | None = None, deadline: float | None = None
) -> Any:
    return await condenser.shorten(text, spend=spend or Spend(Budget()), deadline=deadline)


# ---------------------------------------------------------------- redaction on the way


async def test_what_leaves_is_redacted_and_what_comes_back_is_put_right() -> None:
    big = expert("I wrote to [email_1].", Tier.CLOUD)
    answer = answered(await ask(big, "Write to anna@b.co!", Departure(redactor=Redactor(["email"]))))
    assert shown(big) == ["Write to <EMAIL_1>!"]
    assert answer.text == "I wrote to anna@b.co."
    assert answer.notes == ("redacted before wise saw it: 1 email",)


async def test_nothing_is_done_to_what_stays_at_the_end_tier() -> None:
    phone = expert("done", Tier.END)
    departure = Departure(redactor=Redactor(), shorteners=[Condenser(16)])
    answer = answered(await ask(phone, f"{REPORT} anna@b.co", departure))
    assert shown(phone) == [f"{REPORT} anna@b.co"]
    assert answer.notes == ()


async def test_the_edge_is_away_from_home_too() -> None:
    near = expert("done", Tier.EDGE)
    await ask(near, "anna@b.co?", Departure(redactor=Redactor()))
    assert shown(near) == ["<EMAIL_1>?"]


async def test_placeholders_are_stable_within_a_run_and_forgotten_with_it() -> None:
    big, departure, run = expert("ok", Tier.CLOUD), Departure(redactor=Redactor()), Spend(Budget())
    for text in ("a@b.co", "c@d.co", "c@d.co"):
        await ask(big, f"{text}?", departure, run)
    await ask(big, "c@d.co?", departure, Spend(Budget()))
    assert shown(big) == ["<EMAIL_1>?", "<EMAIL_2>?", "<EMAIL_2>?", "<EMAIL_1>?"]
    assert len(departure._vaults) <= 1, "only the run that still lives"


async def test_a_failure_tells_the_real_words_at_home() -> None:
    big = expert(Unavailable("cannot reach <EMAIL_1>"), Tier.CLOUD)
    outcome = (await ask(big, "a@b.co?", Departure(redactor=Redactor()))).outcome
    assert isinstance(outcome, Failure) and "a@b.co" in outcome.message


@pytest.mark.looptime
async def test_equal_texts_of_different_runs_are_shared_and_each_gets_its_own_words_back() -> None:
    big = expert(Reply("to <EMAIL_1>", latency=1.0), Tier.CLOUD)
    once, departure = Once(cache_entries=10), Departure(redactor=Redactor())
    many = await asyncio.gather(*(ask(big, f"{who}?", departure, once=once) for who in ("a@b.co", "c@d.co")))
    assert shown(big) == ["<EMAIL_1>?"]
    assert [answered(a).text for a in many] == ["to a@b.co", "to c@d.co"]
    assert once.kept == 0, "private answers are never kept"
    await ask(big, "weather?", departure, once=once)
    assert once.kept == 1


async def test_a_crew_sends_nothing_away_unprepared() -> None:
    phone, big = expert(Unavailable("down"), Tier.END, "phone"), expert("to <EMAIL_1>", Tier.CLOUD, "big")
    crew = Crew(
        square=Square([phone, big]), router=KeywordRouter(), departure=Departure(redactor=Redactor()), once=Once()
    )
    attempts = await crew.solve(
        Job(
            subtask=ONE,
            question="mail a@b.co?",
            spend=Spend(Budget()),
            deadline=None,
            on_start=lambda n, expert, why: None,
            on_end=lambda n, attempt, last: None,
        )
    )
    assert answered(attempts[-1]).text == "to a@b.co"
    assert (shown(phone), shown(big)) == (["mail a@b.co?"], ["mail <EMAIL_1>?"])


# ---------------------------------------------------------------- condensing


async def test_a_condensed_text_fits_keeps_what_is_asked_and_what_matters_to_it() -> None:
    done = await shorten(Condenser(120), REPORT)
    assert tokens_in(done.text) <= 120 < tokens_in(REPORT)
    assert done.text.startswith("Answer with one word.")
    assert done.text.endswith("Which colour has the violin on shelf 3?")
    assert "The violin on shelf 3 is brown and weighs 6 kilograms." in done.text
    assert GAP in done.text
    (note,) = done.notes
    assert "chosen by rules" in note and "% of the text was left out" in note
    assert done.usage == Usage()


async def test_a_text_within_the_budget_stays_as_it_is() -> None:
    done = await shorten(Condenser(10_000), REPORT)
    assert (done.text, done.notes) == (REPORT, ())


async def test_what_is_asked_is_never_cut_even_where_it_is_too_long() -> None:
    text = f"{'Long ago it rained. ' * 50}\n\n{'Tell me everything about the rain and the wind, ' * 6}please."
    done = await shorten(Condenser(16), text)
    assert done.text.endswith("please.") and "Tell me everything" in done.text
    assert "stays as it is" in done.notes[0]


TEXTS = st.lists(
    st.lists(
        st.sampled_from(
            ["the", "cat", "saw", "12", "red", "Mr.", "[x]", "é", "東京。", "a.b", "(yes)", "why?", "!", "-"]
        ),
        max_size=14,
    ).map(" ".join),
    max_size=40,
).flatmap(lambda s: st.sampled_from([". ", "\n", "\n\n", " "]).map(lambda sep: sep.join(s)))


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, budget=st.integers(16, 200))
def test_condensing_any_text_keeps_the_order_and_the_last_sentence(text: str, budget: int) -> None:
    done = asyncio.run(shorten(Condenser(budget), text))
    passages = Passages.of(text)
    if tokens_in(text) <= budget:
        assert done.text == text
        return
    assert len(done.text) <= len(text)
    if len(passages):
        assert done.text.rstrip().endswith(passages[len(passages) - 1].strip())
    at = 0
    for piece in done.text.replace(GAP, "\x00").split("\x00"):
        # Every stretch between two gaps stands in the text, behind the one before it.
        found = text.find(piece.strip(), at)
        assert found >= 0, piece
        at = found + len(piece.strip())
    asked = tokens_in(passages.question) + len(passages.asking) + tokens_in(GAP) * (1 + len(passages.asking))
    if done.text != text:
        assert tokens_in(done.text) <= max(budget, asked)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_passages_cover_the_text(text: str) -> None:
    passages = Passages.of(text)
    assert "".join("".join(passages[i].split()) for i in range(len(passages))) == "".join(text.split())


async def test_an_expert_of_the_end_tier_condenses_and_is_paid() -> None:
    def short(request: GenerateRequest) -> str:
        assert "Do not answer" in question_of(request)
        return "The violin on shelf 3 is brown."

    small, spend = expert(short, Tier.END, "small"), Spend(Budget())
    done = await shorten(Condenser(60, expert=small), REPORT, spend)
    assert (
        done.text
        == "Answer with one word.\n\nThe violin on shelf 3 is brown.\n\nWhich colour has the violin on shelf 3?"
    )
    assert "written by small" in done.notes[0]
    assert done.usage == spend.spent and spend.spent.calls == 1 and spend.spent.cost > 0


USELESS = {
    "down": (Unavailable("down"), "down"),
    "nothing": ("  ", "it wrote nothing"),
    "too much": (" ".join(f"w{'o' * 40}rd" for _ in range(20)), "tokens, and"),
    "no end": ("word " * 45, "did not come to an end"),
    "made up": ("The violin is 99 years old.", "numbers that the text does not have: 99"),
}


@pytest.mark.parametrize("what", USELESS)
async def test_an_expert_that_is_of_no_use_is_replaced_by_rules_and_it_is_said(what: str) -> None:
    reply, why = USELESS[what]
    spend = Spend(Budget())
    done = await shorten(Condenser(60, expert=expert(reply, Tier.END, "small", max_tokens=1000)), REPORT, spend)
    assert "is brown" in done.text and tokens_in(done.text) <= 60
    assert "small could not condense the text" in done.notes[0] and why in done.notes[0]
    assert "chosen by rules" in done.notes[1]
    assert done.usage == spend.spent


@pytest.mark.looptime
async def test_an_expert_that_hangs_leaves_time_for_the_answer() -> None:
    small = expert(Reply("late", latency=100.0), Tier.END, "small")
    deadline = asyncio.get_running_loop().time() + 10
    done = await shorten(Condenser(60, expert=small), REPORT, deadline=deadline)
    assert asyncio.get_running_loop().time() <= deadline - 4
    assert "small could not condense the text" in done.notes[0]


async def test_the_attempt_counts_what_condensing_cost() -> None:
    small, big, spend = expert("A brown one.", Tier.END, "small"), expert("brown", Tier.CLOUD), Spend(Budget())
    attempt = await ask(big, REPORT, Departure(shorteners=[Condenser(60, expert=small)]), spend)
    assert answered(attempt).usage == spend.spent
    assert spend.spent.calls == 2
    assert "A brown one." in shown(big)[0]


def test_who_condenses_must_be_at_the_end_tier_and_the_budget_must_hold_a_sentence() -> None:
    with pytest.raises(InvalidRequest, match="tier edge; who condenses must be on one of tier end"):
        Condenser(100, expert=expert("x", Tier.EDGE))
    with pytest.raises(InvalidRequest, match="allowed: 16 and more"):
        Condenser(15)


async def test_shortening_comes_before_redacting_so_that_nothing_written_anew_leaves_unseen() -> None:
    small = expert("Ask anna@b.co for it.", Tier.END, "small")
    big = expert("ok", Tier.CLOUD)
    await ask(big, f"{REPORT}", Departure(redactor=Redactor(), shorteners=[Condenser(60, expert=small)]))
    assert "<EMAIL_1>" in shown(big)[0] and "anna@b.co" not in shown(big)[0]


async def test_what_only_the_part_left_out_tells_to_be_personal_is_redacted_all_the_same() -> None:
    big = expert("ok", Tier.CLOUD)
    text = (
        "My name is Anna Schmidt. Rain fell on Tuesday. Bread is baked in ovens. Ships sail at night. "
        "Schmidt bought the red kettle in March.\n\nWho bought the red kettle?"
    )
    departure = Departure(redactor=Redactor(), shorteners=[Extractor(most=1)])
    answer = answered(await ask(big, text, departure))
    assert "bought the red kettle in March" in shown(big)[0] and "Schmidt" not in shown(big)[0]
    assert "My name is" not in shown(big)[0]
    assert answer.text == "ok"


@pytest.mark.parametrize("number", ["+49 170 1234567", "4111 1111 1111 1111"])
def test_a_long_piece_is_not_cut_within_a_number(number: str) -> None:
    for n in range(440, 500):
        words = ("word " * 100)[:n].rstrip() + " "
        text = f"{words}{number} {words}and so on"
        passages = Passages.of(text)
        assert len(passages) > 1
        assert any(number in passages[i] for i in range(len(passages)))


def test_choosing_from_many_short_passages_takes_no_time_that_grows_with_their_square() -> None:
    began = time.perf_counter()
    passages = Passages.of("a b.\n" * 10_000)
    assert len(best_within(passages, 4_000)) > 500
    # A third of a second on an idle core.
    assert time.perf_counter() - began < 3


# ---------------------------------------------------------------- asking by other ways than a crew

SECRET = "My name is Anna Schmidt. What is 2 + 2? And who is anna@b.co to Schmidt?"
PARTS = StaticPlanner(
    [Subtask(id="a", question="{question}"), Subtask(id="b", question="Who is anna@b.co to Schmidt?")]
)


async def test_a_planning_model_does_not_see_what_is_personal_and_its_plan_is_put_right() -> None:
    plan = '{"subtasks": [{"id": "t1", "question": "What is 2 + 2?"}, {"id": "t2", "question": "Who is <EMAIL_1>?"}]}'
    planning, phone = FakeBackend(plan, name="planning"), expert("four", Tier.END, "phone")
    graph = vertical(
        Square([phone]), planner=LLMPlanner(planning, experts=Square([phone])), departure=Departure(redactor=Redactor())
    )
    result = await run(graph, SECRET)
    assert result.planner == "llm", result.notes
    said = "\n".join(m.content for r in planning.requests if isinstance(r, GenerateRequest) for m in r.messages)
    assert "2 + 2" in said and "anna" not in said.lower() and "Schmidt" not in said
    assert [s.question for s in result.graph] == ["What is 2 + 2?", "Who is anna@b.co?"]
    assert shown(phone) == ["What is 2 + 2?", "Who is anna@b.co?"]


@pytest.mark.parametrize("tier", [Tier.EDGE, Tier.CLOUD])
async def test_who_puts_the_parts_together_does_not_see_what_is_personal(tier: Tier) -> None:
    phone, writer = (
        expert("Schmidt, of anna@b.co; no. 1 in <URL_7>", Tier.END, "phone"),
        expert("<EMAIL_1>: 4", tier, "w"),
    )
    departure = Departure(redactor=Redactor())
    graph = vertical(Square([phone]), planner=PARTS, synthesiser=LLMSynthesiser(writer), departure=departure)
    result = await run(graph, SECRET)
    assert len(shown(writer)) == 1
    assert "anna" not in shown(writer)[0].lower() and "Schmidt" not in shown(writer)[0]
    assert "no. 1 in <URL_7>" in shown(writer)[0]
    assert result.text == "anna@b.co: 4"
    assert any(n.startswith("redacted before w put the parts together: ") for n in result.notes)


async def test_who_puts_the_parts_together_at_home_sees_everything() -> None:
    phone, writer = expert("four", Tier.END, "phone"), expert("ok", Tier.END, "w")
    graph = vertical(
        Square([phone]), planner=PARTS, synthesiser=LLMSynthesiser(writer), departure=Departure(redactor=Redactor())
    )
    await run(graph, SECRET)
    assert "anna@b.co" in shown(writer)[0]


async def test_what_one_part_tells_to_be_personal_is_so_in_every_other_part() -> None:
    big = expert("ok", Tier.CLOUD)
    graph = vertical(Square([big]), planner=PARTS, departure=Departure(redactor=Redactor()))
    await run(graph, "What is 2 + 2?", said_before="user: My name is Anna Schmidt.")
    assert len(shown(big)) == 2
    assert not any("Schmidt" in text for text in shown(big))


# ---------------------------------------------------------------- extracting


async def test_what_has_to_do_with_the_question_is_extracted() -> None:
    done = await shorten(Extractor(most=6), REPORT)
    assert "The violin on shelf 3 is brown" in done.text
    assert done.text.startswith("Answer with one word.") and done.text.endswith("shelf 3?")
    assert "mirror" not in done.text
    assert "of 48 passages" in done.notes[0]


async def test_a_sentence_that_points_back_brings_the_one_before_it() -> None:
    text = (
        "Ada Lovelace was born in 1815. She wrote the first program. Rain fell on Tuesday. Bread is baked in ovens.\n\n"
        "Who wrote the program?"
    )
    done = await shorten(Extractor(most=1), text)
    assert "Ada Lovelace was born in 1815. She wrote the first program." in done.text
    assert "Rain" not in done.text and "Bread" not in done.text


async def test_where_the_question_chooses_nothing_all_stays() -> None:
    text = "Rain fell on Tuesday. Bread is baked in ovens. Ships sail at night.\n\nSummarise."
    assert (await shorten(Extractor(), text)).text == text


def test_extracting_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="must be ≥ 1"):
        Extractor(most=0)
