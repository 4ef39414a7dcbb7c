"""What the rules write down, and the task graph it becomes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from agora.types import MAX_QUESTION_CHARS, Subtask, TaskGraph

MAX_PLAN_CHARS: Final = 200_000
"""Characters of all questions of a plan: twice the longest question. Parts of a long text each repeat what they share,
and somebody pays for every token; beyond this the question stays whole."""

_MARK = re.compile("\x00(\\d+)\x00")
_LITERAL = re.compile(r"#(?=t\d)")


def mark(step: int) -> str:
    """What stands for the answer of a step, by its place, in the texts of later steps. No question contains a NUL."""
    return f"\x00{step}\x00"


@dataclass(frozen=True, slots=True)
class Step:
    """A subtask in the making: its text, with a `mark` for every answer it needs."""

    text: str

    @property
    def needs(self) -> tuple[int, ...]:
        """The places of the steps it needs, each once, in the order they are named."""
        return tuple(dict.fromkeys(int(m[1]) for m in _MARK.finditer(self.text)))

    def shifted(self, by: int) -> Step:
        """The same behind `by` other steps."""
        return Step(_MARK.sub(lambda m: mark(int(m[1]) + by), self.text))


def literal(text: str) -> str:
    """The user's own words: a "#t1" in them is text and not a reference."""
    return _LITERAL.sub("# ", text)


def fits(steps: Sequence[Step]) -> bool:
    """Whether every question may be asked, and all of them together are not too much."""
    sizes = [len(s.text) + 2 * len(s.needs) for s in steps]
    return max(sizes) <= MAX_QUESTION_CHARS and sum(sizes) <= MAX_PLAN_CHARS


def to_graph(steps: Sequence[Step]) -> TaskGraph:
    """The task graph: step 0 becomes `t1`, its mark `#t1`."""
    return TaskGraph(
        tuple(
            Subtask(
                id=f"t{n}",
                question=_MARK.sub(lambda m: f"#t{int(m[1]) + 1}", s.text),
                inputs=tuple(f"t{i + 1}" for i in s.needs),
            )
            for n, s in enumerate(steps, start=1)
        )
    )
