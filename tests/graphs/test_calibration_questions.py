"""Questions are read and answers graded, and what is wrong with a file is told with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from agora.errors import InvalidRequest
from agora.types import Tier
from graphs.calibration_questions import Labelled, read_questions


@pytest.mark.parametrize(
    ("asked", "right", "wrong"),
    [
        (Labelled(question="q", answer="18", grader="number"), "So she makes $18.00.", "So she makes 19."),
        (Labelled(question="q", answer="1,000", grader="number"), "#### 1000", "#### 100"),
        (Labelled(question="q", answer="0.5", grader="number"), r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{3}}"),
        (Labelled(question="q", answer="18", grader="number"), "The answer is 18", "I cannot say."),
        (Labelled(question="q", answer="-3", grader="number"), "It falls to -3 degrees.", "It rises to 3 degrees."),
        (Labelled(question="q", answer="Paris", grader="exact"), " paris. ", "Lyon"),
        (Labelled(question="q", answer="Paris", grader="exact"), "The answer is Paris.", "Paris or Lyon"),
        (Labelled(question="q", answer="positive", grader="contains"), "Clearly POSITIVE!", "positively not"),
        (Labelled(question="q", answer="C++", grader="contains"), "use c++ here", "use c+ here"),
        (Labelled(question="q", answer="B", choices=("a", "b"), grader="choice"), "(B)", "(A)"),
        (Labelled(question="q", answer="dog", choices=("cat", "dog"), grader="choice"), "The answer is B.", "A"),
        (Labelled(question="q", answer="B", choices=("cat", "dog"), grader="choice"), "Dog.", "Cat."),
        (Labelled(question="q", answer="B", choices=("5", "7"), grader="choice"), "the answer is 7", "the answer is 5"),
    ],
)
def test_answers_are_graded(asked: Labelled, right: str, wrong: str) -> None:
    assert asked.is_right(right)
    assert not asked.is_right(wrong)


def lines(path: Path, *rows: object) -> Path:
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
def test_questions_are_read_and_told_how_to_grade(tmp_path: Path, name: str) -> None:
    file = lines(
        tmp_path / name,
        {"question": "2 + 2?", "answer": 4},
        "",
        {"question": "Capital?", "answer": "Paris"},
        {"question": "Which?", "answer": "B", "choices": ["cat", "dog"]},
        {"question": "Which?", "answer": "dog", "grader": "contains"},
        {"question": "2 + 2?", "answer": 4},
    )
    found = read_questions(file)
    assert [q.grader for q in found] == ["number", "exact", "choice", "contains"]
    assert found[2].text == "Which?\nA. cat\nB. dog"
    assert len({q.key for q in found}) == 4
    assert read_questions(file, limit=2) == found[:2]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 2 is not JSON"),
        ([1], "line 2 is list; it must be an object"),
        ({"answer": "x"}, "line 2 has no 'question'; it has 'answer'"),
        ({"question": "x"}, "line 2 has no 'answer'"),
        ({"question": "", "answer": "x"}, "line 2: question is ''"),
        ({"question": "x", "answer": None}, "line 2: answer is None"),
        ({"question": "x", "answer": " "}, "line 2: answer is ' '"),
        ({"question": "x", "answer": True}, "line 2: answer is True"),
        ({"question": "x", "answer": "y", "grader": "magic"}, "grader is 'magic'; allowed: exact, number"),
        ({"question": "x", "answer": "y", "grader": "number"}, "must be a number"),
        ({"question": "x", "answer": "y", "grader": "choice"}, "needs choices"),
        ({"question": "x", "answer": "E", "choices": ["a", "b"]}, "must be one of the choices"),
        ({"question": "x", "answer": "A", "choices": "ab"}, "choices must be a list"),
        ({"question": "x", "answer": "y", "label": "mars"}, "label is 'mars'; allowed: local, edge, cloud"),
        ({"question": "x", "answer": "y", "label": 3}, "label is 3; allowed"),
        ({"question": "x", "answer": "A", "choices": list("abcdefghijk")}, "at most 10"),
    ],
)
def test_a_row_that_is_none_is_told_with_its_line(tmp_path: Path, row: object, said: str) -> None:
    file = lines(tmp_path / "q.jsonl", {"question": "fine", "answer": "yes"}, row)
    with pytest.raises(InvalidRequest, match=said):
        read_questions(file)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", None, "there is no file"),
        ("q.jsonl", b"", "has no questions"),
        ("q.jsonl", b"\n \n", "has no questions"),
        ("q.jsonl", b"\xff\xfe", "line 1 is not UTF-8"),
        ("q.jsonl.gz", b"no gzip", "cannot be read"),
        ("q.jsonl.gz", gzip.compress(b'{"question": "x", "answer": "y"}\n' * 500)[:60], "cannot be read"),
        ("folder", "dir", "cannot be read"),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path: Path, name: str, content: bytes | str | None, said: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "dir":
        path.mkdir()
    with pytest.raises(InvalidRequest, match=said):
        read_questions(path)


def test_a_question_counts_once_and_has_one_answer(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    rows = [{"question": q, "answer": a} for q, a in (("a", "1"), ("b", "2"), ("a", "1"))]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert [q.question for q in read_questions(file)] == ["a", "b"]
    file.write_text("\n".join(map(json.dumps, [*rows, {"question": "b", "answer": "3"}])))
    with pytest.raises(InvalidRequest, match="line 4 asks what line 2 asks"):
        read_questions(file)


def test_a_label_says_how_far_a_question_may_go(tmp_path: Path) -> None:
    rows = [{"question": q, "answer": "1", **more} for q, more in (("a", {"label": "local"}), ("b", {}))]
    found = read_questions(lines(tmp_path / "q.jsonl", *rows))
    assert [q.reach for q in found] == [Tier.END, Tier.CLOUD]
    # What was answered before it had a label is not asked again.
    assert found[0].key == Labelled(question="a", answer="1", grader="number").key
