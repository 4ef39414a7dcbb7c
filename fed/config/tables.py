"""Tables of `fed.toml` from the dataclasses they become: pydantic checks keys and types, the dataclass its limits."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, create_model

from agora.config.problems import Key, Problem, problems_of, shown
from agora.config.table import Table
from agora.errors import AgoraError

T = TypeVar("T")

NONE: Final = "none"
"""What stands in the file where a setting is to be absent although it has a default: TOML has no null."""

APART: Final[Mapping[str, Any]] = types.MappingProxyType({"apart": True})
"""Metadata of a field that is no value, but a table that is read apart."""

_SAYS_WHAT_IS: Final = re.compile(r"(?:\w+: )?(?P<name>\w+) (?:is|are) .*?; (?:it )?(?P<rest>.+)", re.DOTALL)


class Wrong(Exception):
    """What is wrong with a table; caught where all problems of the file are gathered.

    Args:
        problems: One at least.
    """

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems


def read(into: type[T], plain: object, key: Key, *, folder: Path, make: Callable[..., T] | None = None) -> T:
    """A table as the dataclass it stands for.

    Args:
        into: A frozen dataclass whose annotations pydantic understands.
        plain: What the file has there.
        key: Where in the file that is.
        folder: What relative paths count from.
        make: Makes it of the settings that are given; None for the dataclass itself.

    Raises:
        Wrong: If a key or a value is not allowed.
    """
    if not isinstance(plain, Mapping):
        text = f"must be a table, written [{'.'.join(key)}]"
        raise Wrong([Problem(key=key, text=text, value=shown(plain))])
    wanted: Any = into
    model = table_of(wanted)
    try:
        checked = model.model_validate(dict(plain), context={"folder": folder})
    except ValidationError as e:
        raise Wrong([_within(p, key) for p in problems_of(e, root=model)]) from None
    given = _given(checked)
    try:
        return (into if make is None else make)(**given)
    except AgoraError as e:
        raise Wrong([told(e, key, given)]) from None


def told(error: AgoraError, key: Key, given: Mapping[str, Any]) -> Problem:
    """An error of the code as a problem of the file: at the setting that it names, if it names one.

    Args:
        error: What was raised.
        key: Of the table.
        given: The table's settings.
    """
    hint = f"; {error.hint}" if error.hint else ""
    found = _SAYS_WHAT_IS.match(error.message)
    if found and found["name"] in given:
        value = shown(given[found["name"]])
        return Problem(key=(*key, found["name"]), text=f"{found['rest']}{hint}", value=value)
    named = next((name for name in given if re.match(rf"(the )?{re.escape(name)}\b", error.message)), None)
    return Problem(key=key if named is None else (*key, named), text=f"{error.message}{hint}")


def plain(value: Any) -> Any:
    """A dataclass as a table of the file, read again to the same; settings that are absent by default are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {}
        for field in dataclasses.fields(value):
            own = getattr(value, field.name)
            if own is None:
                default = None if field.default is dataclasses.MISSING else field.default
                if default is not None:
                    out[field.name] = NONE
                continue
            out[field.name] = plain(own)
        return out
    if isinstance(value, Mapping):
        return {str(name): plain(own) for name, own in value.items()}
    if isinstance(value, tuple | list):
        return [plain(own) for own in value]
    return str(value) if isinstance(value, Enum | Path) else value


@functools.cache
def table_of(into: type[Any]) -> type[Table]:
    """The pydantic model of a dataclass: its fields, their types, and which of them are required."""
    hints = typing.get_type_hints(into, include_extras=True)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(into):
        absent = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        kind = Any if field.metadata == APART else _loose(hints[field.name])
        # Values that are not given are left to the dataclass; what stands here is only "not required".
        fields[field.name] = (kind, ... if absent else None)
    return create_model(into.__name__, __base__=Table, **fields)


def _loose(kind: Any) -> Any:
    """The same type as TOML can write it: lists for tuples, words for enums, `NONE` for None."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        return kind
    if origin in (typing.Union, types.UnionType):
        members = [_loose(a) for a in typing.get_args(kind)]
        joined: Any = members[0]
        for member in members[1:]:
            joined = joined | member
        absent = type(None) in members
        return Annotated[joined, BeforeValidator(lambda v: None if v == NONE else v)] if absent else joined
    if origin is tuple:
        inner = tuple(_loose(a) if a is not ... else a for a in typing.get_args(kind))
        return Annotated[tuple[inner], Field(strict=False)]  # type: ignore[valid-type]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return Annotated[kind, Field(strict=False)]
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return Annotated[table_of(kind), AfterValidator(lambda table: kind(**_given(table)))]
    return kind


def _given(table: Table) -> dict[str, Any]:
    return {name: getattr(table, name) for name in table.model_fields_set}


def _within(problem: Problem, key: Key) -> Problem:
    return dataclasses.replace(problem, key=(*key, *problem.key))
