import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.types import Answer, Subtask
from graphs.render import INLINE_CHARS, MAX_INPUT_CHARS, plain_question, render

CAPITAL = Subtask(id="t1", question="What is the capital of France?")
LONG = "It is a very long story. " * 10


def asked(question: str, *answers: str) -> str:
    ids = tuple(f"t{n}" for n in range(1, len(answers) + 1))
    earlier = {i: Subtask(id=i, question=f"question {i}?") for i in ids}
    return render(
        Subtask(id="last", question=question, inputs=ids),
        {i: (earlier[i], Answer(text=a, expert="e")) for i, a in zip(ids, answers, strict=True)},
    )


@pytest.mark.parametrize(
    ("question", "answers", "text"),
    [
        ("How big is #t1?", ["Paris."], "How big is Paris?"),
        ("When was he (#t1) born?", ["Nolan"], "When was he (Nolan) born?"),
        ("Tell me about #t1.", ["Paris"], "Tell me about Paris."),
        ("Is #t1 larger than #t2?", ["Rome", "Oslo"], "Is Rome larger than Oslo?"),
        ("Compare them (#t1; #t2).", ["Rome", "Oslo"], "Compare them (Rome; Oslo)."),
        ("Is #t1-based or #t1.Then?", ["Rome"], "Is Rome-based or Rome.Then?"),
        ("He (#t1) saw #t2.", ["issue #t2", "Oslo"], "He (issue #t2) saw Oslo."),
        ("Where is #t1?", ["..."], "Where is ...?"),
        ("Is #t10 a tag and #t1 not?", ["Rome"], "Is #t10 a tag and Rome not?"),
    ],
)
def test_short_answers_stand_in_the_question(question: str, answers: list[str], text: str) -> None:
    assert asked(question, *answers) == text


def test_long_answers_are_quoted_and_their_brackets_left_out() -> None:
    text = asked("Write a quiz about it (#t1).", LONG)
    assert text.startswith("Known so far:\nQ: question t1?\nA: It is a very long story.")
    assert text.endswith("answer: Write a quiz about it.")


def test_a_long_answer_in_place_of_a_word_is_named() -> None:
    assert asked("Shorten #t1.", LONG).endswith('answer: Shorten the answer to "question t1?".')


def test_an_input_that_is_not_referred_to_is_quoted() -> None:
    assert asked("And now?", "Paris") == (
        "Known so far:\nQ: question t1?\nA: Paris\n\nUse what is known to answer: And now?"
    )


def test_short_and_long_mixed() -> None:
    text = asked("Compare them (#t1; #t2).", "Rome", LONG)
    assert text.endswith("answer: Compare them (Rome).")
    assert "Q: question t2?" in text and "Q: question t1?" not in text


def test_what_is_passed_on_is_bounded() -> None:
    text = asked("And now?", "x" * (10 * MAX_INPUT_CHARS))
    assert len(text) < MAX_INPUT_CHARS + 200 and "[…]" in text


@pytest.mark.parametrize("value", ["anna.schmidt@example.org", "+49 170 1234567", "DE89 3704 0044 0532 0130 00"])
def test_nothing_is_cut_in_the_middle_of_an_address_or_a_number(value: str) -> None:
    for before in range(40, 82):
        question = f"{'word ' * 20}"[:before].rstrip() + f" {value} and what came of it in the end, as far as you know?"
        earlier = Subtask(id="t1", question=question)
        text = render(
            Subtask(id="t2", question="Is #t1 so?", inputs=("t1",)), {"t1": (earlier, Answer(text=LONG, expert="e"))}
        )
        told = text.partition('the answer to "')[2]
        assert "…" in told and len(told) < 110
        assert value in told or value[:4] not in told
    answer = "word " * (MAX_INPUT_CHARS // 5 - 3) + f"x {value} " + "word " * 50
    assert value[:4] not in asked("Is #t1 so?", answer) or value in asked("Is #t1 so?", answer)
    assert len(asked("Is #t1 so?", "字 " + "字" * 2 * MAX_INPUT_CHARS)) > MAX_INPUT_CHARS, "no spaces, no words"


def test_many_inputs_share_what_may_be_passed_on() -> None:
    text = asked("Sum it all up.", *["x" * MAX_INPUT_CHARS] * 200)
    assert len(text) < 60_000


def test_questions_for_people() -> None:
    by_id = {"t1": CAPITAL}
    behind = Subtask(id="t2", question="When was it (#t1) founded?", inputs=("t1",))
    instead = Subtask(id="t2", question="How big is #t1?", inputs=("t1",))
    assert plain_question(behind, by_id) == "When was it founded?"
    assert plain_question(instead, by_id) == 'How big is the answer to "What is the capital of France?"?'


@given(
    st.text(st.sampled_from("#t123() ;.ab"), min_size=1).filter(str.strip), st.text(min_size=1, max_size=INLINE_CHARS)
)
def test_any_question_any_answer_can_be_rendered(question: str, answer: str) -> None:
    text = asked(question, answer, LONG)
    assert "Known so far" in text
    assert "(#t1)" not in text.rpartition("answer: ")[2].replace(answer, "")
