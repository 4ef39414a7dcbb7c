"""The vocabulary: what a query becomes, who answers it, and what comes back."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import networkx as nx

from agora.errors import AgoraError, InvalidPlan, InvalidRequest

MAX_SUBTASKS: Final = 256
"""Subtasks in one task graph. Eight times the largest plan of the benchmarks; a planner gone wild hits it early."""

MAX_QUESTION_CHARS: Final = 100_000
"""Characters of one question: ~25,000 tokens, past the context of every model in the catalogue."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_VERSIONED = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]{0,63})(@v(?P<version>[1-9][0-9]{0,8}))?")


class Tier(StrEnum):
    """Where a machine stands, from the user's hand to the data centre. Order: end < edge < cloud."""

    END = "end"
    EDGE = "edge"
    CLOUD = "cloud"

    @property
    def height(self) -> int:
        """0 for end, 1 for edge, 2 for cloud."""
        return list(Tier).index(self)


class Modality(StrEnum):
    """What a subtask brings to an expert."""

    TEXT = "text"
    IMAGE = "image"
    AUDIO = "audio"
    SENSOR = "sensor"


def checked_question(text: str, *, what: str = "question") -> str:
    """Returns `text` if it can be asked at all.

    Args:
        text: What the user or a planner wants answered.
        what: What to call it in the error.

    Raises:
        InvalidRequest: If it is empty, too long, or not valid Unicode text.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"{what} must be text, got {type(text).__name__}")
    if not text.strip():
        raise InvalidRequest(f"{what} is empty", hint="write a question")
    if len(text) > MAX_QUESTION_CHARS:
        raise InvalidRequest(
            f"{what} has {len(text):,} characters; at most {MAX_QUESTION_CHARS:,} are allowed",
            hint="shorten it or split it",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise InvalidRequest(
            f"{what} is not valid Unicode text: lone surrogate at character {e.start}",
            hint="send it as UTF-8",
        ) from None
    if "\x00" in text:
        raise InvalidRequest(f"{what} contains a NUL character", hint="remove it")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """An immutable adapter, `name@vN`; a bare `name` is an alias that stands for its newest published version."""

    name: str
    version: int | None = None

    def __post_init__(self) -> None:
        if _ID.fullmatch(self.name) is None:
            raise InvalidRequest(f"adapter name {self.name!r} must match {_ID.pattern}")
        if self.version is not None and self.version < 1:
            raise InvalidRequest(f"adapter version {self.version} must be ≥ 1")

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Reads `name` or `name@v17`.

        Raises:
            InvalidRequest: If `text` has another form.
        """
        found = _VERSIONED.fullmatch(text)
        if found is None:
            raise InvalidRequest(f"adapter {text!r} must look like 'name' or 'name@v17'")
        version = found["version"]
        return cls(name=found["name"], version=int(version) if version else None)

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@v{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subtask:
    """One question for one expert.

    Attributes:
        id: Unique in its graph; letters, digits, `_ . -`.
        question: What to answer. `#id` stands for the answer of the input of that id.
        inputs: Ids of the subtasks whose answers are needed first.
        expert: Name of the expert to ask, or None to let routing choose.
        modality: What the expert must be able to take.
        max_tokens: Most tokens to generate, or None for the expert's own limit.
    """

    id: str
    question: str
    inputs: tuple[str, ...] = ()
    expert: str | None = None
    modality: Modality = Modality.TEXT
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or _ID.fullmatch(self.id) is None:
            raise InvalidPlan(f"subtask id {self.id!r} must match {_ID.pattern}")
        try:
            checked_question(self.question, what=f"question of subtask {self.id!r}")
        except InvalidRequest as e:
            raise InvalidPlan(e.message, hint=e.hint) from None
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidPlan(f"max_tokens of subtask {self.id!r} is {self.max_tokens}; it must be ≥ 1")


@dataclass(frozen=True, slots=True)
class TaskGraph:
    """A validated directed acyclic graph of subtasks; an edge runs from an input to what needs it.

    Raises:
        InvalidPlan: On no subtasks, more than `MAX_SUBTASKS`, duplicate ids, unknown inputs, or a cycle.
    """

    subtasks: tuple[Subtask, ...]
    _order: tuple[Subtask, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # The size first: nothing below may cost more than a bounded amount.
        if not self.subtasks:
            raise InvalidPlan("a plan needs at least one subtask")
        if len(self.subtasks) > MAX_SUBTASKS:
            raise InvalidPlan(f"the plan has {len(self.subtasks):,} subtasks; at most {MAX_SUBTASKS} are allowed")
        by_id: dict[str, Subtask] = {}
        for s in self.subtasks:
            if s.id in by_id:
                raise InvalidPlan(f"subtask id {s.id!r} appears twice")
            by_id[s.id] = s
        for s in self.subtasks:
            for i in s.inputs:
                if i not in by_id:
                    raise InvalidPlan(f"subtask {s.id!r} needs unknown input {i!r}; known: {', '.join(by_id)}")
        graph = self.to_networkx()
        position = {s.id: n for n, s in enumerate(self.subtasks)}
        try:
            order = tuple(by_id[i] for i in nx.lexicographical_topological_sort(graph, key=position.__getitem__))
        except nx.NetworkXUnfeasible:
            cycle = [edge[0] for edge in nx.find_cycle(graph)]
            raise InvalidPlan(f"the plan has a cycle: {' → '.join([*cycle, cycle[0]])}") from None
        object.__setattr__(self, "_order", order)

    @property
    def order(self) -> tuple[Subtask, ...]:
        """The subtasks in topological order, ties broken by their place in `subtasks`."""
        return self._order

    @property
    def leaves(self) -> tuple[Subtask, ...]:
        """The subtasks that no other one needs, in topological order: their answers make the final one."""
        needed = {i for s in self.subtasks for i in s.inputs}
        return tuple(s for s in self._order if s.id not in needed)

    def to_networkx(self) -> nx.DiGraph[str]:
        """A networkx copy: node = subtask id, edge = input → dependant."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from(s.id for s in self.subtasks)
        graph.add_edges_from((i, s.id) for s in self.subtasks for i in s.inputs)
        return graph

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {"subtasks": [to_plain(s) for s in self.subtasks]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> TaskGraph:
        """Reads what `to_dict` wrote.

        Raises:
            InvalidPlan: If the values do not make a valid graph.
        """
        items = plain.get("subtasks")
        if not isinstance(items, Sequence) or isinstance(items, str):
            raise InvalidPlan(f"a plan needs a list 'subtasks', got {type(items).__name__}")
        if len(items) > MAX_SUBTASKS:
            raise InvalidPlan(f"the plan has {len(items):,} subtasks; at most {MAX_SUBTASKS} are allowed")
        return cls(tuple(_subtask_from_dict(i) for i in items))

    def __iter__(self) -> Iterator[Subtask]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self.subtasks)


def _subtask_from_dict(item: Any) -> Subtask:
    if not isinstance(item, Mapping):
        raise InvalidPlan(f"a subtask must be an object, got {type(item).__name__}")
    known = {f.name for f in dataclasses.fields(Subtask)}
    if unknown := set(item) - known:
        raise InvalidPlan(f"a subtask has unknown keys {sorted(unknown)}; allowed: {sorted(known)}")
    if missing := {"id", "question"} - set(item):
        raise InvalidPlan(f"a subtask lacks {sorted(missing)}")
    inputs = item.get("inputs", ())
    if not isinstance(inputs, Sequence) or isinstance(inputs, str) or not all(isinstance(i, str) for i in inputs):
        raise InvalidPlan(f"inputs of subtask {item['id']!r} must be a list of ids, got {inputs!r}")
    try:
        modality = Modality(item.get("modality", Modality.TEXT))
    except ValueError:
        allowed = ", ".join(Modality)
        raise InvalidPlan(f"modality {item['modality']!r} of subtask {item['id']!r}; allowed: {allowed}") from None
    max_tokens = item.get("max_tokens")
    if max_tokens is not None and (not isinstance(max_tokens, int) or isinstance(max_tokens, bool)):
        raise InvalidPlan(f"max_tokens of subtask {item['id']!r} must be a whole number, got {max_tokens!r}")
    expert = item.get("expert")
    if expert is not None and not isinstance(expert, str):
        raise InvalidPlan(f"expert of subtask {item['id']!r} must be a name, got {expert!r}")
    return Subtask(
        id=item["id"],
        question=item["question"],
        inputs=tuple(inputs),
        expert=expert,
        modality=modality,
        max_tokens=max_tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one run may spend. None means no limit.

    Attributes:
        deadline_s: Seconds from the start of the run.
        cost: Money, in the currency of the experts' prices.
        tokens: Prompt and generated tokens together.
    """

    deadline_s: float | None = None
    cost: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("deadline_s", "cost", "tokens"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InvalidRequest(f"budget {name} is {value}; it must be a positive number, or absent for no limit")


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
        finish_reason: `stop` (the model ended) or `length` (it was cut at its token limit).
        adapter: The adapter version that answered, `name@vN`.
        notes: What the reader should know, e.g. that something fell back.
    """

    text: str
    expert: str
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0
    confidence: float | None = None
    mean_logprob: float | None = None
    finish_reason: str = "stop"
    adapter: str | None = None
    notes: tuple[str, ...] = ()


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
        plain: dict[str, Any] = {f.name: to_plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        plain["graph"] = self.graph.to_dict()
        plain["attempts"] = {i: [attempt_to_dict(a) for a in many] for i, many in self.attempts.items()}
        plain["complete"] = self.complete
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> RunResult:
        """Reads what `to_dict` wrote."""
        values = {f.name: plain[f.name] for f in dataclasses.fields(cls)}
        values["graph"] = TaskGraph.from_dict(plain["graph"])
        values["attempts"] = {i: tuple(attempt_from_dict(a) for a in many) for i, many in plain["attempts"].items()}
        values["usage"] = Usage(**plain["usage"])
        values["missing"] = tuple(plain["missing"])
        values["notes"] = tuple(plain["notes"])
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCard:
    """How an expert describes itself to those who route.

    Attributes:
        name: Unique in the square.
        description: One or two sentences: what it is good at.
        examples: Questions it answers well; routing compares new questions with these.
        keywords: Words of its field, for routing without embeddings.
        tier: Where it runs.
        modalities: What it takes.
        price_per_mtok: Money per million tokens, prompt and generated alike; 0 for a machine of one's own.
        max_tokens: Most tokens it generates for one answer.
        context_tokens: Most tokens it can read and generate in one request, if known.
    """

    name: str
    description: str
    examples: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    tier: Tier = Tier.END
    modalities: tuple[Modality, ...] = (Modality.TEXT,)
    price_per_mtok: float = 0.0
    max_tokens: int = 256
    context_tokens: int | None = None

    def __post_init__(self) -> None:
        if _ID.fullmatch(self.name) is None:
            raise InvalidRequest(f"expert name {self.name!r} must match {_ID.pattern}")
        if not self.description.strip():
            raise InvalidRequest(f"expert {self.name!r} needs a description: routing reads it")
        if not (self.price_per_mtok >= 0 and math.isfinite(self.price_per_mtok)):
            raise InvalidRequest(f"price_per_mtok of expert {self.name!r} is {self.price_per_mtok}; it must be ≥ 0")
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens of expert {self.name!r} is {self.max_tokens}; it must be ≥ 1")

    def cost_of(self, tokens: int) -> float:
        """Money for that many tokens."""
        return self.price_per_mtok * tokens / 1e6


def to_plain(value: Any) -> Any:
    """Dataclasses, enums and tuples as plain JSON values, nested ones too."""
    if isinstance(value, StrEnum):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value


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
