"""Texts with named fields in braces, filled from the rows of a file. Fields are names and nothing else.

`str.format` would follow `{row.__class__}` and `{row[0]}` into the objects it is given; a template may come from a
configuration file, so only plain names are read here.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from agora.errors import InvalidRequest
from fed.data.example import Example

FIELDS_TOLD: Final = 20
"""Names of a row's fields that an error tells."""


class Text:
    """A text with fields like `{title}`; braces that are meant as such are doubled.

    Args:
        template: The text.

    Raises:
        InvalidRequest: If it is no such text: a lone brace, an empty name, an attribute, an index or a format.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        self._parts: list[tuple[str, str | None]] = []
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as e:
            raise InvalidRequest(
                f"the template {template!r} cannot be read: {e}", hint="write {{ and }} for braces that are no fields"
            ) from None
        for literal, name, spec, conversion in parsed:
            if name is not None and (not name or spec or conversion or any(c in name for c in ".[]{}")):
                told = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                raise InvalidRequest(
                    f"the template {template!r} has the field {{{told}}}; allowed: the plain name of a field",
                    hint="write {{ and }} for braces that are no fields",
                )
            self._parts.append((literal, name))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of its fields, each once, in order."""
        return tuple(dict.fromkeys(name for _, name in self._parts if name is not None))

    def fill(self, row: Mapping[str, Any], where: str) -> str:
        """The text with a row's values.

        Args:
            row: Values by field.
            where: What to call the row in an error.

        Raises:
            InvalidRequest: If the row lacks a field, or has something else there than a text, number or truth value.
        """
        out = []
        for literal, name in self._parts:
            out.append(literal)
            if name is not None:
                out.append(_value(row, name, where))
        return "".join(out)


def _value(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        has = ", ".join(map(repr, list(row)[:FIELDS_TOLD])) or "nothing"
        raise InvalidRequest(f"{where}: no field {name!r}; the row has {has}", hint="correct the template or the row")
    value = row[name]
    if not isinstance(value, str | int | float):
        raise InvalidRequest(
            f"{where}: field {name!r} holds {'null' if value is None else type(value).__name__}; "
            "allowed: texts, numbers and truth values",
            hint="leave the row out, or put a text there",
        )
    return value if isinstance(value, str) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How rows of a file become examples. All are texts with fields in braces.

    Attributes:
        prompt: See `Example`.
        response: See `Example`. With `choices`, it comes to one of their keys, like `{label}`.
        label: See `Example`.
        group: See `Example`.
        system: See `Example`.
        choices: For classification: label words by what `response` comes to, like `{"0": " negative"}`.
    """

    prompt: str
    response: str
    label: str = ""
    group: str = ""
    system: str = ""
    choices: Mapping[str, str] | None = None

    def reader(self) -> Reader:
        """Checks the template, once for all rows.

        Raises:
            InvalidRequest: If a part of it is no template, or it has fewer than two different label words.
        """
        return Reader(self)


class Reader:
    """A checked template; see `Template.reader`."""

    def __init__(self, template: Template) -> None:
        self._prompt, self._response = Text(template.prompt), Text(template.response)
        self._label, self._group, self._system = Text(template.label), Text(template.group), Text(template.system)
        self._words = dict(template.choices or {})
        self._choices = tuple(self._words.values())
        if template.choices is not None and (len(set(self._choices)) < 2 or len(set(self._choices)) < len(self._words)):
            raise InvalidRequest(
                f"a classification task with the label words {', '.join(map(repr, self._choices)) or '(none)'}; "
                "at least two are needed, each different"
            )

    def read(self, row: Mapping[str, Any], where: str) -> Example:
        """A row as an example.

        Raises:
            InvalidRequest: If the row lacks a field, has an empty text, or a label that is not among the choices.
        """
        response = self._response.fill(row, where)
        label = self._label.fill(row, where)
        if self._words:
            if response not in self._words:
                allowed = ", ".join(map(repr, self._words))
                told = ", ".join(f"{{{name}}}" for name in self._response.fields)
                raise InvalidRequest(
                    f"{where}: {told} comes to none of the labels; allowed: {allowed}",
                    hint="correct the row, or add its label to the choices",
                )
            label = label or response
            response = self._words[response]
        prompt = self._prompt.fill(row, where)
        if not prompt.strip() or not response.strip():
            raise InvalidRequest(
                f"{where}: the {'response' if prompt.strip() else 'prompt'} is empty", hint="leave the row out"
            )
        return Example(
            prompt=prompt,
            response=response,
            label=label,
            group=self._group.fill(row, where),
            system=self._system.fill(row, where),
            choices=self._choices,
        )
