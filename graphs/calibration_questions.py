"""Questions with known answers, and whether what an expert said is right."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from agora.errors import AgoraError, InvalidRequest
from agora.routing.final_answer import final_answer
from agora.types import Tier, checked_question, reach_of

MAX_LINE_BYTES: Final = 4 * 1024 * 1024
"""Longest line read: a question may have a book under it, but a file without line ends must not fill the memory."""

MAX_CHOICES: Final = 10
"""Choices of one question: the letters that `final_answer` reads."""

TOLERANCE: Final = 1e-6
"""Relative difference up to which two numbers are the same."""

MAX_SAID: Final = 4096
"""Characters of an answer, from its end, that are searched for a number."""

_NUMBERS: Final = re.compile(r"(?<![\w.])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")

FIELDS: Final = (
    'a line looks like {"question": "…", "answer": "…"}, with "choices", "grader" and "label" (local, edge, cloud) '
    "where wanted"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A question whose answer is known.

    Attributes:
        question: The question.
        answer: The right answer; for choices its letter or its text.
        choices: What to choose from; empty for an open question.
        grader: Name in `GRADERS`.
        labels: What grader `contains` tells it apart from, itself included; empty where that is not known.
        reach: The highest tier whose machines may see it.
    """

    question: str
    answer: str
    choices: tuple[str, ...] = ()
    grader: str = "exact"
    labels: tuple[str, ...] = ()
    reach: Tier = Tier.CLOUD

    @property
    def text(self) -> str:
        """What experts are asked: the question, and its choices by letter."""
        listed = [f"{_letter(i)}. {c}" for i, c in enumerate(self.choices)]
        return "\n".join([self.question, *listed])

    @property
    def key(self) -> str:
        """Stands for this question in a journal."""
        # Who may see it says nothing of what an expert makes of it.
        told = json.dumps([self.question, self.answer, self.choices, self.grader, *filter(None, [self.labels])])
        return hashlib.sha256(told.encode()).hexdigest()[:24]

    def is_right(self, said: str) -> bool:
        """Whether what was said is right."""
        return GRADERS[self.grader](self, said)


def _letter(place: int) -> str:
    return "ABCDEFGHIJ"[place]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'")


def _exact(asked: Labelled, said: str) -> bool:
    """The same text but for case, spaces and marks around it; or the same final answer."""
    if _plain(said) == _plain(asked.answer):
        return True
    found = final_answer(said)
    return found is not None and found == final_answer(asked.answer)


def _as_number(text: str) -> float | None:
    """The number that a text ends on: its final answer, or else the last number in it."""
    for found in (final_answer(text), *_NUMBERS.findall(text[-MAX_SAID:])[-1:]):
        try:
            above, _, below = (found or "").replace(",", "").partition("/")
            value = float(above) / float(below) if below else float(above)
        except (ValueError, ZeroDivisionError):
            continue
        if math.isfinite(value):
            return value
    return None


def _number(asked: Labelled, said: str) -> bool:
    """The same number at the end, to 1e-6."""
    wanted, found = _as_number(asked.answer), _as_number(said)
    return wanted is not None and found is not None and math.isclose(wanted, found, rel_tol=TOLERANCE, abs_tol=1e-9)


def _choice(asked: Labelled, said: str) -> bool:
    """The right letter, or the words of the right choice."""
    wanted = _right_letter(asked)
    found = final_answer(said)
    letters = [_letter(i) for i, c in enumerate(asked.choices) if _plain(c) in {_plain(found or ""), _plain(said)}]
    if letters:
        return letters == [wanted]
    if found in "ABCDEFGHIJ"[: len(asked.choices)] if found else False:
        return found == wanted
    # "Answer: (B) because …" has been read by now; a letter that opens the text is what is left.
    opening = re.match(r"\W{0,4}([A-J])(?:[).:]|\s*$)", said.strip())
    return opening is not None and opening[1] == wanted


def _right_letter(asked: Labelled) -> str:
    for i, choice in enumerate(asked.choices):
        if choice == asked.answer:
            return _letter(i)
    return asked.answer.strip().strip("().").upper()


def _contains(asked: Labelled, said: str) -> bool:
    """The answer's words occur, whole and in order, and those of no other label: "positive or negative" is no answer.

    Of labels that are parts of others, as "positive" of "very positive", the longest counts that stands there.
    """
    wanted = _plain(asked.answer)
    # A choice may be told by its letter: then its words are not another label.
    others = asked.labels if wanted in map(_plain, asked.labels) else ()
    labels = sorted({wanted, *map(_plain, others)} - {""}, key=lambda label: (-len(label), label))
    any_of_them = "|".join(map(re.escape, labels))
    named = re.findall(rf"(?<!\w)(?:{any_of_them})(?!\w)", " ".join(said.casefold().split()))
    return set(named) == {wanted}


GRADERS: Final[Mapping[str, Callable[[Labelled, str], bool]]] = MappingProxyType(
    {"exact": _exact, "number": _number, "choice": _choice, "contains": _contains}
)
"""How answers are graded, by name."""


def read_questions(path: Path, *, limit: int | None = None) -> list[Labelled]:
    """Reads a file with one JSON object a line, gzipped if its name ends in `.gz`.

    Without a `grader`, choices are graded as `choice`, answers that are numbers as `number`, and others as `exact`.
    Empty lines are passed over; a question that stands in it twice counts once: what is certified must not be tried on
    questions that it was fitted to.

    Args:
        path: The file.
        limit: Most questions; the first ones.

    Raises:
        InvalidRequest: If the file cannot be read, a line is not such an object, or gives a question another answer
            than an earlier one: it tells the line.
    """
    found: dict[str, tuple[int, Labelled]] = {}
    for number, line in _lines(path):
        if limit is not None and len(found) >= limit:
            break
        if line.strip():
            one = _labelled(line, f"{path}, line {number}")
            before, first = found.setdefault(one.text, (number, one))
            if first != one:
                raise InvalidRequest(
                    f"{path}, line {number} asks what line {before} asks, with another answer, grader or label",
                    hint="leave one of them out",
                )
    if not found:
        raise InvalidRequest(f"{path} has no questions", hint=FIELDS)
    return _with_labels([one for _, one in found.values()])


def _with_labels(questions: list[Labelled]) -> list[Labelled]:
    """The questions, those graded by `contains` with the labels that they are told apart by.

    Those are a question's own choices, if it has any; else all answers to such questions, if they are few and every one
    comes more than once: answers to open questions differ.
    """
    open_ = [q for q in questions if q.grader == "contains" and not q.choices]
    many = Counter(_plain(q.answer) for q in open_)
    closed = 1 < len(many) <= MAX_CHOICES and min(many.values()) > 1
    labels = tuple(sorted(many)) if closed else ()
    return [replace(q, labels=q.choices or labels) if q.grader == "contains" else q for q in questions]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise InvalidRequest(f"{path}, line {number} is longer than {MAX_LINE_BYTES} bytes", hint=FIELDS)
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError:
                    raise InvalidRequest(f"{path}, line {number} is not UTF-8", hint=FIELDS) from None
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except FileNotFoundError:
        raise InvalidRequest(f"there is no file {str(path)!r}", hint="give --data FILE, a JSONL file") from None
    except (OSError, EOFError, zlib.error) as e:
        raise InvalidRequest(f"{path} cannot be read: {e}", hint="give --data FILE, a JSONL file") from None


def _labelled(line: str, where: str) -> Labelled:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InvalidRequest(f"{where} is not JSON: {e}", hint=FIELDS) from None
    if not isinstance(row, dict):
        raise InvalidRequest(f"{where} is {type(row).__name__}; it must be an object", hint=FIELDS)
    for name in ("question", "answer"):
        if name not in row:
            raise InvalidRequest(
                f"{where} has no {name!r}; it has {', '.join(map(repr, row)) or 'nothing'}", hint=FIELDS
            )
    question, answer, choices = row["question"], row["answer"], row.get("choices") or ()
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise InvalidRequest(f"{where}: answer is {answer!r}; it must be a text or a number", hint=FIELDS)
    if not isinstance(question, str) or not question.strip():
        raise InvalidRequest(f"{where}: question is {question!r}; it must be a text that is not empty", hint=FIELDS)
    if not isinstance(choices, (list, tuple)) or len(choices) > MAX_CHOICES:
        raise InvalidRequest(f"{where}: choices must be a list of at most {MAX_CHOICES} texts", hint=FIELDS)
    try:
        checked_question(question)
    except AgoraError as e:
        raise InvalidRequest(f"{where}: {e.message}", hint=e.hint) from None
    made = Labelled(question=question, answer=str(answer), choices=tuple(map(str, choices)))
    grader = row.get("grader") or _usual(made)
    if grader not in GRADERS:
        raise InvalidRequest(f"{where}: grader is {grader!r}; allowed: {', '.join(GRADERS)}")
    reach = Tier.CLOUD if row.get("label") is None else reach_of(row["label"], what=f"{where}: label")
    made = replace(made, grader=grader, reach=reach)
    _check_fits(made, where)
    return made


def _usual(asked: Labelled) -> str:
    if asked.choices:
        return "choice"
    try:
        float(asked.answer.replace(",", ""))
    except ValueError:
        return "exact"
    return "number"


def _check_fits(asked: Labelled, where: str) -> None:
    """A label that no answer can meet is a mistake in the file, not an expert's."""
    if asked.grader == "number" and _as_number(asked.answer) is None:
        raise InvalidRequest(f"{where}: answer is {asked.answer!r}; for grader 'number' it must be a number")
    if asked.grader == "choice":
        letters = [_letter(i) for i in range(len(asked.choices))]
        if not letters:
            raise InvalidRequest(f"{where}: grader 'choice' needs choices", hint=FIELDS)
        if _right_letter(asked) not in letters:
            raise InvalidRequest(
                f"{where}: answer is {asked.answer!r}; it must be one of the choices, or of {', '.join(letters)}"
            )
