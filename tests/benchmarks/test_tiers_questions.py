"""The real tiers' questions: drawn apart, and graded as a person would."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from agora.errors import InvalidRequest
from benchmarks.tiers_parts.questions import GSM8K, LEAST_WORDS, SST2, Question, material, review_question
from benchmarks.tiers_parts.together import write_questions
from graphs.calibration_questions import read_questions


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(r) + "\n" for r in rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        rows = [{"id": i, "question": f"{split}: {i} and {i}?", "answer": str(2 * i)} for i in range(30)]
        write(tmp_path / "gsm8k" / f"{split}.jsonl.gz", rows)
    long = [" ".join(f"w{i}x{k}" for k in range(10)) for i in range(60)]
    pieces = [" ".join(t.split()[:8]) for t in long] + ["too short to be asked"] * 20
    train = [{"sentence": s, "label": i % 2} for i, s in enumerate([*pieces, *long])]
    write(tmp_path / "glue-sst2" / "train.jsonl.gz", train)
    write(tmp_path / "glue-sst2" / "dev.jsonl.gz", [{"sentence": f"dev {i} ", "label": i % 2} for i in range(40)])
    return tmp_path


def test_nothing_is_both_learned_and_asked(data: Path) -> None:
    drawn = material(data, seed=1, train=20, calibration=(5, 15), stream=(7, 11))
    assert len(drawn.train) == 20
    assert [sum(q.set == s for q in drawn.calibration) for s in (GSM8K, SST2)] == [5, 15]
    assert [sum(q.set == s for q in drawn.stream) for s in (GSM8K, SST2)] == [7, 11]
    reviews = [*(p.text for p in drawn.train), *(q.text.split("\n\n")[1] for q in drawn.calibration if q.set == SST2)]
    assert all(len(r.split()) >= LEAST_WORDS for r in reviews)
    assert not any(a in b for i, a in enumerate(reviews) for j, b in enumerate(reviews) if i != j)
    assert all(q.text.startswith("train") for q in drawn.calibration if q.set == GSM8K)
    assert all(q.text.startswith("test") for q in drawn.stream if q.set == GSM8K)
    assert all(q.text.split("\n\n")[1].startswith("dev") for q in drawn.stream if q.set == SST2)


def test_a_smaller_draw_is_part_of_a_larger_one(data: Path) -> None:
    small = material(data, seed=1, train=10, calibration=(2, 5), stream=(3, 4))
    large = material(data, seed=1, train=10, calibration=(6, 20), stream=(9, 12))
    assert small.train == large.train
    assert set(small.calibration) < set(large.calibration)
    assert set(small.stream) < set(large.stream)
    assert set(material(data, seed=2, train=10, calibration=(2, 5), stream=(3, 4)).stream) != set(small.stream)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("18", True),
        ("She makes 9 * 2 = $18.", True),
        ("She makes $18.00 every day", True),
        ("So the result is \\(\\boxed{18}\\), of 16 eggs.", True),
        ("The answer is 18. Check: 16 - 7 = 9.", True),
        ("#### 18", True),
        ("eighteen", False),
        ("17", False),
        ("180", False),
        ("18 eggs less 2 are 16", False),
        ("", False),
    ],
)
def test_problems_are_graded_by_their_final_number(said: str, right: bool) -> None:
    assert Question(id="a", set=GSM8K, text="?", gold="18").grade(said) is right


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("negative", True),
        ("Negative.", True),
        ("The review is negative, not positive.", True),
        ("positive", False),
        ("negatively", False),
        ("", False),
        ("I cannot say", False),
    ],
)
def test_reviews_are_graded_by_the_first_label(said: str, right: bool) -> None:
    assert Question(id="a", set=SST2, text="?", gold="negative").grade(said) is right


def test_calibration_reads_what_is_written_for_it(data: Path, tmp_path: Path) -> None:
    drawn = material(data, seed=1, train=5, calibration=(4, 9), stream=(1, 1))
    file = tmp_path / "calibration.jsonl"
    write_questions(file, drawn.calibration)
    read = read_questions(file)
    assert [q.text for q in read] == [q.text for q in drawn.calibration]
    for asked, known in zip(drawn.calibration, read, strict=True):
        assert known.is_right(f"The answer is {asked.gold}.")
        assert not known.is_right("The answer is 7777.")


def test_data_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"train\.jsonl\.gz is not in"):
        material(tmp_path, seed=0, train=1, calibration=(1, 1), stream=(1, 1))


def test_the_user_asks_for_one_word() -> None:
    asked = review_question(" a fine film . ")
    assert asked.endswith("\n\na fine film .")
    assert "one word" in asked
