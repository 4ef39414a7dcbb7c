"""What a query becomes: subtasks in a validated graph, and what a run may spend on them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

import networkx as nx

from agora.errors import InvalidPlan, InvalidRequest
from agora.types.reach import label_of, lowest, reach_of
from agora.types.words import ID, Modality, Tier, checked_question, to_plain

MAX_SUBTASKS: Final = 256
"""Subtasks in one task graph. Eight times the largest plan of the benchmarks; a planner gone wild hits it early."""


MOST: Final = sys.float_info.max
"""The largest finite number: more seconds or money are a mistake."""

MAX_TOKENS: Final = 10**9
"""More than any context or budget; a larger number is a mistake, and some stores and servers could not hold it."""


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
        reach: The highest tier whose machines may see it, and whatever uses its answer.
    """

    id: str
    question: str
    inputs: tuple[str, ...] = ()
    expert: str | None = None
    modality: Modality = Modality.TEXT
    max_tokens: int | None = None
    reach: Tier = Tier.CLOUD

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or ID.fullmatch(self.id) is None:
            raise InvalidPlan(f"subtask id {self.id!r} must match {ID.pattern}")
        try:
            checked_question(self.question, what=f"question of subtask {self.id!r}")
        except InvalidRequest as e:
            raise InvalidPlan(e.message, hint=e.hint) from None
        if self.max_tokens is not None and not 1 <= self.max_tokens <= MAX_TOKENS:
            raise InvalidPlan(f"max_tokens of subtask {self.id!r} is {self.max_tokens}; allowed: 1 to {MAX_TOKENS}")
        given: object = self.reach
        if not isinstance(given, Tier):
            # Plain text would be compared with nothing later on, and so forbid nothing.
            try:
                object.__setattr__(self, "reach", reach_of(given, what=f"reach of subtask {self.id!r}"))
            except InvalidRequest as e:
                raise InvalidPlan(e.message, hint=e.hint) from None


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

    @property
    def reach(self) -> Tier:
        """The highest tier whose machines may see all of it together."""
        return lowest(*(s.reach for s in self.subtasks))

    def bounded(self, reach: Tier) -> TaskGraph:
        """The graph with labels that hold for what each subtask really sees.

        No subtask may go further than `reach`, nor than any subtask whose answer it uses, however far back. Idempotent;
        the graph itself where nothing changes.

        Args:
            reach: The highest tier whose machines may see the question that the graph was made of.
        """
        if reach is Tier.CLOUD and all(s.reach is Tier.CLOUD for s in self.subtasks):
            return self
        may: dict[str, Tier] = {}
        for s in self._order:
            may[s.id] = lowest(reach, s.reach, *(may[i] for i in s.inputs))
        if all(s.reach is may[s.id] for s in self.subtasks):
            return self
        return TaskGraph(tuple(replace(s, reach=may[s.id]) for s in self.subtasks))

    def to_networkx(self) -> nx.DiGraph[str]:
        """A networkx copy: node = subtask id, edge = input → dependant."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from(s.id for s in self.subtasks)
        graph.add_edges_from((i, s.id) for s in self.subtasks for i in s.inputs)
        return graph

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {"subtasks": [{**to_plain(s), "reach": label_of(s.reach)} for s in self.subtasks]}

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
    known = {f.name for f in fields(Subtask)}
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
    try:
        reach = reach_of(item.get("reach", Tier.CLOUD), what=f"reach of subtask {item['id']!r}")
    except InvalidRequest as e:
        raise InvalidPlan(e.message, hint=e.hint) from None
    return Subtask(
        id=item["id"],
        question=item["question"],
        inputs=tuple(inputs),
        expert=expert,
        modality=modality,
        max_tokens=max_tokens,
        reach=reach,
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
            kinds = (int,) if name == "tokens" else (int, float)
            if value is None:
                continue
            most = MAX_TOKENS if name == "tokens" else MOST
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= most:
                what = f"whole number, at most {most}" if name == "tokens" else "number"
                raise InvalidRequest(
                    f"budget {name} is {value!r}; it must be a positive {what}, or absent for no limit"
                )
