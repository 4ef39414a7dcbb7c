"""Grader `contains`: an answer that names several of the labels is no answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import InvalidRequest
from graphs.calibration_questions import Labelled, read_questions


def read(path: Path, *rows: dict[str, object], limit: int | None = None) -> list[Labelled]:
    path.write_text("".join(json.dumps({"grader": "contains", **row}) + "\n" for row in rows))
    return read_questions(path, limit=limit)


def rated(*answers: str) -> list[dict[str, object]]:
    return [{"question": f"Review {n}?", "answer": a} for n, a in enumerate(answers)]


@pytest.mark.parametrize(
    ("answer", "said", "right"),
    [
        ("positive", "Positive.", True),
        ("positive", "It is clearly positive, very positive indeed", True),
        ("positive", "positive or negative", False),
        ("negative", "positive or negative", False),
        ("positive", "Positive/Negative/Neutral: neutral", False),
        ("neutral", "Neutral", True),
        ("positive", "nonpositive", False),
        ("positive", "negative", False),
        ("positive", "", False),
    ],
)
def test_of_the_labels_of_a_file_only_the_right_one_may_be_named(
    tmp_path: Path, answer: str, said: str, right: bool
) -> None:
    found = read(tmp_path / "q.jsonl", *rated("positive", "negative", "neutral", "Positive", "negative", "neutral"))
    assert next(q for q in found if q.answer == answer).is_right(said) is right


def test_a_label_that_is_part_of_another_is_not_named_by_that() -> None:
    labels = ("positive", "very positive", "negative")
    for answer, said, right in (
        ("very positive", "Very positive!", True),
        ("positive", "Very positive!", False),
        ("positive", "positive", True),
        ("very positive", "positive", False),
        ("very positive", "very positive, or just positive", False),
    ):
        assert Labelled(question="q", answer=answer, grader="contains", labels=labels).is_right(said) is right


def test_a_questions_own_choices_are_its_labels(tmp_path: Path) -> None:
    cat, letter = read(
        tmp_path / "q.jsonl",
        {"question": "Which?", "answer": "cat", "choices": ["cat", "dog"]},
        {"question": "Which one?", "answer": "B", "choices": ["cat", "dog"]},
    )
    assert cat.is_right("a cat") and not cat.is_right("a cat or a dog")
    assert letter.is_right("(B) dog") and not letter.is_right("(A) cat")


def test_answers_to_open_questions_are_no_labels(tmp_path: Path) -> None:
    found = read(tmp_path / "q.jsonl", *rated("Paris", "Rome", "Paris"))
    assert {q.labels for q in found} == {()}
    assert found[0].is_right("Paris, and not Rome")
    many = [f"city{n}" for n in range(11)]
    assert {q.labels for q in read(tmp_path / "q.jsonl", *rated(*many, *many))} == {()}


def test_answers_graded_with_other_labels_are_asked_anew(tmp_path: Path) -> None:
    """A journal has whether they were right, not their words."""
    plain = read(tmp_path / "q.jsonl", *rated("positive", "negative"))
    labelled = read(tmp_path / "q.jsonl", *rated("positive", "negative", "positive", "negative"))
    more = read(tmp_path / "q.jsonl", *rated("positive", "negative", "positive", "negative", "negative"))
    assert plain[0].key != labelled[0].key == more[0].key


def test_the_same_question_with_another_answer_is_still_refused(tmp_path: Path) -> None:
    rows = [*rated("positive", "negative"), {"question": "Review 0?", "answer": "negative"}]
    with pytest.raises(InvalidRequest, match="line 3 asks what line 1 asks"):
        read(tmp_path / "q.jsonl", *rows)


@given(st.lists(st.sampled_from(["red", "green", "dark green", "blue"]), min_size=1, max_size=4))
def test_right_is_who_names_the_answer_and_nothing_else(named: list[str]) -> None:
    labels = ("red", "green", "dark green", "blue")
    for answer in labels:
        asked = Labelled(question="q", answer=answer, grader="contains", labels=labels)
        assert asked.is_right(" / ".join(named)) is (set(named) == {answer})
