"""What routing is: a ranking of the experts for one subtask, that can explain itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from agora.square import Square
from agora.types import Subtask


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One expert, as seen for one subtask.

    Attributes:
        expert: Its name.
        similarity: How well it matches the question, at most 1; 0 where nobody needed to know (a pinned subtask).
        load: Requests running and waiting on its backend.
        price: Money per million tokens.
        score: What the ranking sorts by; see `agora.routing.order`.
    """

    expert: str
    similarity: float
    load: int
    price: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Whom to ask, best first.

    Attributes:
        candidates: Those who can take the subtask, best first; at least one.
        excluded: Those who cannot, each with the reason.
        named: The expert that the plan names, if that decided.
        close: Whether anyone matches closely enough to speak of an expert for this question.
        generalists: Candidates whose cards claim no field.
        basis: What similarity measures, in words.
        note: What else the reader should know, e.g. that another way of matching was used.
    """

    candidates: tuple[Candidate, ...]
    excluded: tuple[tuple[str, str], ...] = ()
    named: str | None = None
    close: bool = True
    generalists: frozenset[str] = frozenset()
    basis: str = "match"
    note: str = ""

    def why(self, expert: str) -> str:
        """Why this expert stands where it does, in one line that a person can check.

        For example `best match 0.62 (next: finance 0.31), idle, free`. Of an expert that was excluded it is the
        reason; of one that is not here, that it was not ranked.
        """
        found = next((c for c in self.candidates if c.expert == expert), None)
        if found is None:
            return dict(self.excluded).get(expert, "not ranked: not here when the subtask was")
        parts = [self._head(found), _state(found)]
        return ", ".join([*parts, self.note] if self.note else parts)

    def _head(self, this: Candidate) -> str:
        if self.named is not None:
            return "named by the plan" if this.expert == self.named else f"next in line after {self.named}"
        if len(self.candidates) == 1:
            return f"the only one who can take it, {self.basis} {this.similarity:.2f}"
        best = max(self.candidates, key=lambda c: c.similarity)
        is_best = this.similarity == best.similarity
        if not self.close:
            known = f" (best: {best.expert} {best.similarity:.2f})" if best.similarity > 0 else ""
            return f"no close {self.basis}{known}" + ("; a general expert" if this.expert in self.generalists else "")
        if is_best:
            second = max((c for c in self.candidates if c is not this), key=lambda c: c.similarity)
            return f"best {self.basis} {this.similarity:.2f} (next: {second.expert} {second.similarity:.2f})"
        return f"{self.basis} {this.similarity:.2f} (best: {best.expert} {best.similarity:.2f}, {_state(best)})"


@runtime_checkable
class Router(Protocol):
    """Chooses experts."""

    async def rank(self, subtask: Subtask, question: str, square: Square) -> Ranking:
        """Ranks the experts in the square for one subtask.

        Deterministic: same cards, loads and question, same ranking.

        Args:
            subtask: What to solve.
            question: Its question with the inputs' answers filled in.
            square: Who is here.

        Raises:
            NoExpert: If nobody can take it.
        """


def _state(candidate: Candidate) -> str:
    work = f"{candidate.load} in work" if candidate.load else "idle"
    return f"{work}, {f'{candidate.price:g} per million tokens' if candidate.price else 'free'}"
