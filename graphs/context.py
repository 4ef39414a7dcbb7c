"""What was said before a question: told to whoever is asked for a part of it, planned over by nobody.

A planner that read it with the question would make subtasks of old questions and of instructions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from agora.errors import InvalidRequest
from agora.types import MAX_QUESTION_CHARS, Attempt, checked_question
from graphs.how import Ask, How
from graphs.solver import Job, Solver


@dataclass(frozen=True, slots=True, kw_only=True)
class Informed:
    """A crew whose every member is told the same before its question.

    Attributes:
        crew: Who can be asked.
        said_before: What they are told.
    """

    crew: Solver
    said_before: str

    @property
    def most_steps(self) -> int:
        """Those of the crew."""
        return self.crew.most_steps

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the crew."""
        return self.crew.notes

    async def solve(self, job: Job) -> tuple[Attempt, ...]:
        """See `Solver.solve`; who is chosen depends on what was said before, too."""
        return await self.crew.solve(replace(job, question=f"{self.said_before}\n\n{job.question}"))


def informed(how: How, state: Ask) -> How:
    """How a run goes whose question comes with something that was said before it; `how` itself if nothing was.

    Raises:
        InvalidRequest: If it is no text, or too long together with the question.
    """
    said_before = state.get("said_before")
    if not said_before:
        return how
    checked_question(said_before, what="what was said before")
    if (many := len(said_before) + len(state["question"])) > MAX_QUESTION_CHARS:
        raise InvalidRequest(
            f"the question and what was said before it have {many:,} characters; at most {MAX_QUESTION_CHARS:,} are "
            "allowed",
            hint="leave out the oldest of it",
        )
    return replace(how, crew=Informed(crew=how.crew, said_before=said_before))
