"""Equal answers are equal texts, and nobody's text can hold the reader up."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.routing.final_answer import final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("9 * 2 = 18\n#### 18", "18"),
        (r"so \boxed{\frac{1}{2}} it is", "0.5"),
        (r"first \boxed{3}, no: \boxed{\dfrac{1}{3}}", "1/3"),
        ('```json\n{"reasoning": "step 1", "answer": "$70,000"}\n```', "70000"),
        ('{"answer": 12.0}', "12"),
        ("I think the answer is (B).", "B"),
        ("The answer is 18 because 9 twos are that, with 2 left", "18"),
        ("Answer: c", "C"),
        ("(A) the first of them", "A"),
        ("that is $25,000.", "25000"),
        ("She pays 3 times. In the end, he has to add it all up, and gets -10,000.50 dollars", "-10000.5"),
        ("540 meters", "540"),
        ("-$10,000", "-10000"),
        ("50%", "50"),
        ("Positive.", "positive"),
        (" Kate   Montgomery ", "kate montgomery"),
        ("12/25/1937", "12/25/1937"),
        ('{"b": 1, "a": [2]}', '{"a":[2],"b":1}'),
        ("", None),
        (" \n ", None),
        ("words and words without an end " * 20, None),
    ],
)
def test_reads(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("18", "The answer is 18.0"),
        ("#### 1,000", r"\boxed{1000}"),
        ("0.5", r"$\frac{1}{2}$"),
        ("B", "The answer is B."),
    ],
)
def test_equal_answers_are_equal(one: str, other: str) -> None:
    assert final_answer(one) == final_answer(other) is not None


@pytest.mark.parametrize(
    "part",
    ["####", '"answer":', '"answer": "\\', "\\boxed{", "1,", "answer is ", "(", " ", "[", "-", "9", "1.", "{", "\\"],
)
def test_hostile_texts_take_no_time(part: str) -> None:
    text = part * 200_000
    started = time.perf_counter()
    final_answer(text)
    assert time.perf_counter() - started < 1.0


@given(st.text(max_size=300))
def test_any_text_is_read(text: str) -> None:
    said = final_answer(text)
    assert said is None or said


@given(st.integers(-(10**9), 10**9))
def test_a_number_is_itself_however_it_is_written(number: int) -> None:
    assert final_answer(f"We get {number:,} in all, as anybody can see who adds it up.\n#### {number:,}") == str(number)
    assert final_answer(f"\\boxed{{{number}.00}}") == str(number)
