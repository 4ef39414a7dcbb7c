"""What comes back: answers and failures, what they cost, and what a run came to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from agora.errors import AgoraError
from agora.types.tasks import TaskGraph
from agora.types.words import to_plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What was spent: tokens read, tokens generated, money, and calls made."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    calls: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and generated tokens together."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cost=self.cost + other.cost,
            calls=self.calls + other.calls,
        )

    @classmethod
    def total(cls, usages: Iterable[Usage]) -> Usage:
        """The sum, zero for none."""
        return sum(usages, cls())


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an expert answered.

    Attributes:
        text: The answer.
        expert: Who answered.
        usage: What it cost.
        seconds: From being asked to having answered, waiting in queues included.
        confidence: Probability in [0, 1] that the answer is right, where someone estimated it.
        mean_logprob: Mean natural-log probability of the generated tokens, where the backend tells.
        signals: What tells how far it can be trusted, by name (`agora.routing.signals`); finite numbers only.
        finish_reason: `stop` (the model ended) or `length` (it was cut at its token limit).
        adapter: The adapter version that answered, `name@vN`.
        notes: What the reader should know, e.g. that something fell back.
        path: The path it came by, where there were several.
        limited: Whether it, or what tells how far it can be trusted, fell short for want of time or money.
    """

    text: str
    expert: str
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0
    confidence: float | None = None
    mean_logprob: float | None = None
    signals: Mapping[str, float] = field(default_factory=dict)
    finish_reason: str = "stop"
    adapter: str | None = None
    notes: tuple[str, ...] = ()
    path: str | None = None
    limited: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no answer. A value, never raised: a failed subtask does not stop its siblings.

    Attributes:
        code: Stable word; the `code` of the error behind it, or `missing_input`.
        message: What happened, for people.
        transient: Whether asking again, later or elsewhere, may help.
        expert: Who failed, if one was asked.
        usage: What the failed attempts cost.
        seconds: Time spent.
    """

    code: str
    message: str
    transient: bool = False
    expert: str | None = None
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0

    @classmethod
    def of(
        cls, error: AgoraError, *, expert: str | None = None, usage: Usage | None = None, seconds: float = 0.0
    ) -> Failure:
        """The value that stands for `error`."""
        return cls(
            code=error.code,
            message=str(error),
            transient=error.transient,
            expert=expert,
            usage=usage or Usage(),
            seconds=seconds,
        )


Outcome = Answer | Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One time that one expert was asked for one subtask.

    Attributes:
        expert: Who was asked; None if nobody could be.
        why: Why this expert, in words a person can check.
        outcome: What came of it.
        started_at: Wall-clock time, seconds since the epoch.
        seconds: How long it took.
    """

    expert: str | None
    why: str
    outcome: Outcome
    started_at: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run over a task graph came to.

    Attributes:
        run: The run's id.
        question: What was asked.
        text: The one answer. If something is missing it says so.
        graph: The plan that was followed.
        planner: Who made the plan.
        attempts: For every subtask id, all attempts in order; the last one's outcome counts.
        missing: Ids of the subtasks without an answer, in topological order.
        notes: What the reader should know, e.g. that a planner or the synthesis fell back.
        usage: All that was spent, planning and synthesis included.
        seconds: Wall-clock seconds of the run (of the last leg, if it was resumed).
    """

    run: str
    question: str
    text: str
    graph: TaskGraph
    planner: str
    attempts: Mapping[str, tuple[Attempt, ...]]
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether every subtask was answered."""
        return not self.missing

    def outcome(self, subtask: str) -> Outcome:
        """The outcome that counts for that subtask."""
        return self.attempts[subtask][-1].outcome

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        plain: dict[str, Any] = {f.name: to_plain(getattr(self, f.name)) for f in fields(self)}
        plain["graph"] = self.graph.to_dict()
        plain["attempts"] = {i: [attempt_to_dict(a) for a in many] for i, many in self.attempts.items()}
        plain["complete"] = self.complete
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> RunResult:
        """Reads what `to_dict` wrote."""
        values = {f.name: plain[f.name] for f in fields(cls)}
        values["graph"] = TaskGraph.from_dict(plain["graph"])
        values["attempts"] = {i: tuple(attempt_from_dict(a) for a in many) for i, many in plain["attempts"].items()}
        values["usage"] = Usage(**plain["usage"])
        values["missing"] = tuple(plain["missing"])
        values["notes"] = tuple(plain["notes"])
        return cls(**values)


def outcome_to_dict(outcome: Outcome) -> dict[str, Any]:
    """Plain JSON values of an outcome; `outcome_from_dict` reads them back."""
    return {"kind": "answer" if isinstance(outcome, Answer) else "failure", **to_plain(outcome)}


def outcome_from_dict(plain: Mapping[str, Any]) -> Outcome:
    """Reads what `outcome_to_dict` wrote."""
    values = dict(plain)
    kind = values.pop("kind")
    values["usage"] = Usage(**values["usage"])
    if kind == "answer":
        values["notes"] = tuple(values["notes"])
        return Answer(**values)
    return Failure(**values)


def attempt_to_dict(attempt: Attempt) -> dict[str, Any]:
    """Plain JSON values of an attempt; `attempt_from_dict` reads them back."""
    return {
        "expert": attempt.expert,
        "why": attempt.why,
        "outcome": outcome_to_dict(attempt.outcome),
        "started_at": attempt.started_at,
        "seconds": attempt.seconds,
    }


def attempt_from_dict(plain: Mapping[str, Any]) -> Attempt:
    """Reads what `attempt_to_dict` wrote."""
    return Attempt(**{**plain, "outcome": outcome_from_dict(plain["outcome"])})
