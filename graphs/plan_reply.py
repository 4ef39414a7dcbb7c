"""From a model's reply to a plan: finding the JSON in it, and holding it to the rules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from agora.errors import InvalidPlan
from agora.types import Subtask, TaskGraph

MAX_REPLY_CHARS: Final = 1_000_000
"""Characters of a reply that are looked at. Far more than a plan can be; a lying server may send anything."""

MAX_JSON_STARTS: Final = 32
"""Places in a reply where JSON may begin that are tried: each costs one pass over the rest."""

MAX_ERROR_CHARS: Final = 300
"""Characters of an error that are shown to the model and kept in notes."""

_FIELDS: Final = frozenset({"id", "question", "inputs", "expert"})
_THOUGHT = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_BEGIN = re.compile(r"[{\[]")
_OUR_ID = re.compile(r"t\d+")
_REFERENCE = re.compile(r"#([A-Za-z0-9][A-Za-z0-9_.-]*)")


def plan_schema(experts: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON schema of a plan. Plain enough for servers that know a part of JSON Schema only.

    Args:
        experts: Names a subtask may be given to; "" leaves the choice open.
    """
    fields: dict[str, Any] = {
        "id": {"type": "string"},
        "question": {"type": "string"},
        "inputs": {"type": "array", "items": {"type": "string"}},
    }
    if experts:
        fields["expert"] = {"type": "string", "enum": ["", *experts]}
    subtask = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"subtasks": {"type": "array", "items": subtask}},
        "required": ["subtasks"],
        "additionalProperties": False,
    }


def find_plan(text: str) -> Mapping[str, Any] | None:
    """The last JSON object with "subtasks" in a reply, whatever prose, thoughts or fences stand around it.

    A bare list of objects counts as the list of subtasks. Bounded effort: `MAX_REPLY_CHARS`, `MAX_JSON_STARTS`.
    """
    text = text[:MAX_REPLY_CHARS]
    if thoughts := [m.end() for m in _THOUGHT.finditer(text)]:
        text = text[thoughts[-1] :]
    found: Mapping[str, Any] | None = None
    for value in _json_values(text):
        if isinstance(value, Mapping) and "subtasks" in value:
            found = value
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) and "question" in v for v in value):
            found = {"subtasks": value}
    return found


def _json_values(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    at = 0
    for _ in range(MAX_JSON_STARTS):
        m = _BEGIN.search(text, at)
        if m is None:
            return
        try:
            value, at = decoder.raw_decode(text, m.start())
        except (ValueError, RecursionError):
            at = m.end()
            continue
        yield value


def checked_plan(plain: Mapping[str, Any], *, question: str, experts: Sequence[str], max_subtasks: int) -> TaskGraph:
    """The task graph that a model wrote down, its subtasks renamed `t1`, `t2`, … in the order they can run.

    An answer that a question refers to becomes an input if the model forgot to say so; an input that its question does
    not refer to is added at its end, so that the answer is read.

    Args:
        plain: The values of the JSON.
        question: What the plan is for; a "#t1" in it is text, and may come back as such.
        experts: Names that subtasks may be given to.
        max_subtasks: Most subtasks.

    Raises:
        InvalidPlan: If the values do not make a valid graph, are too many, name an unknown expert, or refer to the
            answer of a subtask that is not there.
    """
    items = plain.get("subtasks")
    if isinstance(items, list):
        if len(items) > max_subtasks:
            raise InvalidPlan(f"the plan has {len(items):,} subtasks; at most {max_subtasks} are allowed")
        plain = {**plain, "subtasks": [_without_blanks(i) for i in items]}
    if extra := set(plain) - {"subtasks"}:
        raise InvalidPlan(f"a plan has unknown keys {sorted(map(str, extra))}; allowed: ['subtasks']")
    graph = TaskGraph.from_dict(plain)
    for s in graph.subtasks:
        if s.expert is not None and s.expert not in experts:
            allowed = ", ".join(experts) or "none"
            raise InvalidPlan(f"subtask {s.id!r} names unknown expert {cut(repr(s.expert))}; allowed: {allowed}")
    known = {s.id for s in graph.subtasks}
    for s in graph.subtasks:
        for m in _REFERENCE.finditer(s.question):
            if _OUR_ID.match(m[1]) and _known(m[1], known) is None and m[0] not in question:
                raise InvalidPlan(f"subtask {s.id!r} refers to {cut(m[0])}, and there is no such subtask")
    # References make edges, so the order is known only afterwards.
    linked = TaskGraph(tuple(replace(s, inputs=_inputs(s, known)) for s in graph.subtasks))
    ids = {s.id: f"t{n}" for n, s in enumerate(linked.order, start=1)}
    return TaskGraph(tuple(_renamed(s, ids) for s in linked.order))


def _without_blanks(item: Any) -> Any:
    """A subtask without the fields that say nothing: `"expert": ""`, `"inputs": null`."""
    if not isinstance(item, Mapping):
        return item
    if unknown := set(item) - _FIELDS:
        raise InvalidPlan(f"a subtask has unknown keys {sorted(unknown)}; allowed: {sorted(_FIELDS)}")
    return {k: v for k, v in item.items() if v is not None and not (k == "expert" and v == "")}


def _inputs(subtask: Subtask, known: set[str]) -> tuple[str, ...]:
    said = [i for m in _REFERENCE.finditer(subtask.question) if (i := _known(m[1], known)) is not None]
    return tuple(dict.fromkeys([*subtask.inputs, *said]))


def _known(reference: str, known: set[str] | Mapping[str, str]) -> str | None:
    # "#t1." at the end of a sentence: the dot may belong to the sentence, not to the id.
    return next((r for r in (reference, reference.rstrip(".-_")) if r in known), None)


def _renamed(subtask: Subtask, ids: Mapping[str, str]) -> Subtask:
    said: set[str] = set()

    def reference(m: re.Match[str]) -> str:
        name = _known(m[1], ids)
        if name is None:
            # The user's own "#t3": it must not look like a reference.
            return f"# {m[1]}" if _OUR_ID.match(m[1]) else m[0]
        said.add(name)
        return f"#{ids[name]}{m[1][len(name) :]}"

    question = _REFERENCE.sub(reference, subtask.question)
    if unsaid := [ids[i] for i in subtask.inputs if i not in said]:
        question = f"{question.rstrip()} (known: {'; '.join(f'#{i}' for i in unsaid)})"
    return replace(subtask, id=ids[subtask.id], question=question, inputs=tuple(ids[i] for i in subtask.inputs))


def cut(text: str, most: int = MAX_ERROR_CHARS) -> str:
    """A text on one line, of so many characters at most."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
