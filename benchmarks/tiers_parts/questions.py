"""The stream of the real tiers: grade-school maths and film reviews, asked as a user would ask them, and graded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.common import read_jsonl

GSM8K: Final = "gsm8k"
SST2: Final = "sst2"
SETS: Final = (GSM8K, SST2)

LABELS: Final = ("negative", "positive")
"""SST-2's labels 0 and 1 as words."""

LEAST_WORDS: Final = 8
"""Words of an SST-2 training phrase that is used. The dev split is whole sentences (its shortest tenth has 10 words);
the training split is mostly pieces like "when are bears bears and" that no user would ask about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of the stream.

    Attributes:
        id: Unique, like `gsm8k-test-17`.
        set: `gsm8k` or `sst2`.
        text: What the user asks.
        gold: The right answer: a number, or `positive` or `negative`.
    """

    id: str
    set: str
    text: str
    gold: str

    def grade(self, answer: str) -> bool:
        """Whether an answer is right, read as a person in a hurry would: what it comes down to."""
        return _READERS[self.set](answer) == _READERS[self.set](self.gold)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phrase:
    """A review and its label, for training the adapter."""

    text: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """Everything that is asked or trained on; no review and no problem is in two of the parts.

    Attributes:
        train: Reviews the adapter is trained on.
        calibration: What the policies are fitted to; of the training splits.
        stream: What everybody is judged on, mixed; of GSM8K's test and SST-2's dev split.
    """

    train: tuple[Phrase, ...]
    calibration: tuple[Question, ...]
    stream: tuple[Question, ...]


def review_question(review: str) -> str:
    """How a user asks about a review."""
    return f"Is this film review positive or negative? Answer with one word.\n\n{review.strip()}"


def material(data: Path, *, seed: int, train: int, calibration: tuple[int, int], stream: tuple[int, int]) -> Material:
    """Draws the questions; a smaller draw of the same seed is a part of a larger one.

    Args:
        data: Folder of the data sets.
        seed: Of the draw.
        train: Reviews for the adapter.
        calibration: Questions of GSM8K and of SST-2 to fit to.
        stream: Questions of GSM8K and of SST-2 to be judged on.

    Raises:
        InvalidRequest: If the data is missing.
    """
    rng = np.random.default_rng(seed)
    maths_train = _shuffled(read_jsonl(data / "gsm8k" / "train.jsonl.gz"), rng)
    maths_test = _shuffled(read_jsonl(data / "gsm8k" / "test.jsonl.gz"), rng)
    dev = _shuffled(read_jsonl(data / "glue-sst2" / "dev.jsonl.gz"), rng)
    phrases = _apart(_shuffled(read_jsonl(data / "glue-sst2" / "train.jsonl.gz"), rng), most=train + calibration[1])
    learned = tuple(Phrase(text=p["sentence"].strip(), label=LABELS[p["label"]]) for p in phrases[:train])
    fitted = [_maths(r, "train") for r in maths_train[: calibration[0]]]
    fitted += [_review(r, "train", i) for i, r in enumerate(phrases[train : train + calibration[1]])]
    asked = [_maths(r, "test") for r in maths_test[: stream[0]]]
    asked += [_review(r, "dev", i) for i, r in enumerate(dev[: stream[1]])]
    return Material(train=learned, calibration=_mixed(fitted, seed), stream=_mixed(asked, seed + 1))


def _shuffled(rows: Iterable[dict[str, Any]], rng: np.random.Generator) -> list[dict[str, Any]]:
    listed = list(rows)
    return [listed[int(i)] for i in rng.permutation(len(listed))]


def _mixed(questions: Sequence[Question], seed: int) -> tuple[Question, ...]:
    order = np.random.default_rng(seed).permutation(len(questions))
    return tuple(questions[int(i)] for i in order)


def _apart(rows: Sequence[dict[str, Any]], *, most: int) -> list[dict[str, Any]]:
    """The first long phrases of which none is a piece of another: GLUE cuts many out of one sentence."""
    kept: list[dict[str, Any]] = []
    texts: list[str] = []
    for row in rows:
        text = row["sentence"].strip()
        if len(text.split()) < LEAST_WORDS or any(text in t or t in text for t in texts):
            continue
        kept.append(row)
        texts.append(text)
        if len(kept) >= most:
            break
    return kept


def _maths(row: dict[str, Any], split: str) -> Question:
    return Question(id=f"{GSM8K}-{split}-{row['id']}", set=GSM8K, text=row["question"], gold=row["answer"])


def _review(row: dict[str, Any], split: str, number: int) -> Question:
    return Question(
        id=f"{SST2}-{split}-{number}", set=SST2, text=review_question(row["sentence"]), gold=LABELS[row["label"]]
    )


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARKED = re.compile(r"(?:####|answer is:?|answer:|\\boxed\{)[\s$*£€\\(]*(-?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE)


def final_number(text: str) -> Decimal | None:
    """The number that an answer to a maths problem comes down to: the one that is marked as such, else the last."""
    found = _MARKED.findall(text) or _NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", "").rstrip(".")).normalize()
    except InvalidOperation:
        return None


def final_label(text: str) -> str | None:
    """The first label that an answer names; None if it names none."""
    found = re.search(r"\b(positive|negative)\b", text.lower())
    return found[1] if found else None


_READERS: Final = {GSM8K: final_number, SST2: final_label}
