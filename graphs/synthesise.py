"""From the answers of the subtasks to one answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

from agora.errors import AgoraError
from agora.square import Expert
from agora.types import Answer, Outcome, Subtask, TaskGraph, Usage
from graphs.named import Named
from graphs.render import plain_question


class Synthesiser(Protocol):
    """Makes one answer of several."""

    @property
    def name(self) -> str:
        """Its name in traces."""

    @property
    def asks(self) -> Expert | None:
        """The expert it asks, or None if it asks nobody and so costs nothing and never fails."""

    async def synthesise(
        self,
        question: str,
        graph: TaskGraph,
        outcomes: Mapping[str, Outcome],
        *,
        max_tokens: int | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """One answer to `question` from what was answered; at least one outcome is an `Answer`."""


def answered(graph: TaskGraph, outcomes: Mapping[str, Outcome]) -> tuple[tuple[Subtask, Answer], ...]:
    """The answers a reader wants, in topological order.

    Those of the leaves; and where a leaf has none, those of the nearest subtasks before it that have one.
    """
    by_id = {s.id: s for s in graph}
    wanted: set[str] = set()
    todo = [s.id for s in graph.leaves]
    seen: set[str] = set()
    while todo:
        i = todo.pop()
        if i in seen:
            continue
        seen.add(i)
        if isinstance(outcomes[i], Answer):
            wanted.add(i)
        else:
            todo.extend(by_id[i].inputs)
    return tuple((s, o) for s in graph if s.id in wanted and isinstance(o := outcomes[s.id], Answer))


def combine(question: str, graph: TaskGraph, outcomes: Mapping[str, Outcome]) -> str:
    """The answers as they are: one alone, several under their questions."""
    parts = answered(graph, outcomes)
    if len(parts) == 1:
        return parts[0][1].text
    by_id = {s.id: s for s in graph}
    return "\n\n".join(f"{plain_question(s, by_id)}\n{a.text}" for s, a in parts)


class SectionsSynthesiser:
    """Puts the answers one under the other, each under its question. No model, nothing invented."""

    name = "sections"
    asks: Expert | None = None

    async def synthesise(
        self,
        question: str,
        graph: TaskGraph,
        outcomes: Mapping[str, Outcome],
        *,
        max_tokens: int | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """See `Synthesiser`."""
        return Answer(text=combine(question, graph, outcomes), expert=self.name)


class LLMSynthesiser:
    """Has an expert write one answer from the parts; if it fails, the parts are given as they are, and it is said.

    Args:
        expert: Who writes; or its name, which is looked up every time. While it is not there, that is a failure.
    """

    name = "llm"

    def __init__(self, expert: Expert | Named) -> None:
        self._expert = expert

    @property
    def asks(self) -> Expert:
        """Who writes."""
        return self._expert.here_or_nobody() if isinstance(self._expert, Named) else self._expert

    async def synthesise(
        self,
        question: str,
        graph: TaskGraph,
        outcomes: Mapping[str, Outcome],
        *,
        max_tokens: int | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """See `Synthesiser`. One part alone is passed on without asking anybody."""
        if len(answered(graph, outcomes)) == 1:
            return Answer(text=combine(question, graph, outcomes), expert="sections")
        usage = Usage()
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self.asks.ask(
                    synthesis_prompt(question, graph, outcomes), max_tokens=max_tokens, timeout_s=timeout_s
                )
            if answer.text:
                return answer
            usage, why = answer.usage, "it wrote nothing"
        except TimeoutError:
            why = "its time was up"
        except AgoraError as e:
            why = str(e)
        note = f"{self._expert.name} could not put the parts together ({why}); they are given as they are"
        return Answer(text=combine(question, graph, outcomes), expert="sections", usage=usage, notes=(note,))


def synthesis_prompt(question: str, graph: TaskGraph, outcomes: Mapping[str, Outcome]) -> str:
    """What the writing expert is asked: the question, and every part that was answered."""
    by_id = {s.id: s for s in graph}
    parts = "\n\n".join(
        f"Question: {plain_question(s, by_id)}\nAnswer: {o.text}"
        for s in graph
        if isinstance(o := outcomes[s.id], Answer)
    )
    return (
        "Experts answered the parts of a question. Write one short answer to the whole question, using only what "
        f"they say.\n\nWhole question: {question}\n\n{parts}\n\nOne answer:"
    )
