"""Says what is wrong with a configuration: file, line, key, the value seen, and what is allowed."""

from __future__ import annotations

import difflib
import re
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from agora.config.nodes import NODE_KINDS
from agora.config.schema import Config
from agora.errors import ConfigError

MAX_PROBLEMS: Final = 20
"""Problems told at once: a screenful."""

MAX_VALUE_CHARS: Final = 60
"""Characters of a value repeated in a message: enough to recognise it, one line with the rest."""

MAX_STATEMENT_LINES: Final = 500
"""Lines of one TOML statement followed while looking for line numbers, which costs the square of it."""

_PLAIN: Final = {
    "must be a valid integer": "must be a whole number",
    "must be a valid number": "must be a number",
    "must be a valid string": "must be text in quotes",
    "must be a valid boolean": "must be true or false",
    "must be a valid tuple": "must be a list, written [ … ]",
    "must be a finite number": "must be a number, and not inf or nan",
}

_SECRET = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
_NOT_SECRET: Final = frozenset({"tokens", "max_tokens", "seconds_per_token", "first_token_timeout_s", "keywords"})

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        key: Where, from the top of the file; empty for the file as a whole.
        text: What is wrong and what is allowed.
        value: What was found there, as shown; empty if there is nothing to show.
    """

    key: Key
    text: str
    value: str = ""

    def line(self, lines: Mapping[Key, int]) -> int | None:
        """The line of the file it is on, or that of the nearest table around it, where that is known."""
        return next((lines[self.key[:n]] for n in range(len(self.key), 0, -1) if self.key[:n] in lines), None)

    def told(self, line: int | None) -> str:
        """The problem in one line."""
        where = f"line {line}: " if line else ""
        return f"{where}{dotted(self.key)}{f' = {self.value}' if self.value else ''}: {self.text}"


def error_of(problems: Iterable[Problem], *, origin: str, text: str = "") -> ConfigError:
    """One error that tells all problems.

    Args:
        problems: What is wrong; at least one.
        origin: Name of the file.
        text: Its content, to find line numbers in.
    """
    lines = lines_of(text)
    placed = sorted(((p.line(lines), p) for p in problems), key=lambda pair: pair[0] or 0)
    told = list(dict.fromkeys(p.told(line) for line, p in placed))
    if len(told) == 1:
        return ConfigError(f"{origin}: {told[0]}")
    more = [f"and {len(told) - MAX_PROBLEMS} more"] if len(told) > MAX_PROBLEMS else []
    body = "".join(f"\n  {p}" for p in [*told[:MAX_PROBLEMS], *more])
    return ConfigError(f"{origin}: {len(told)} problems{body}")


def problems_of(error: ValidationError, *, root: type[BaseModel] = Config) -> list[Problem]:
    """What pydantic found, in the words of this file.

    Args:
        error: What it raised.
        root: What it checked, to tell which keys are allowed.
    """
    return [_problem(e, root) for e in error.errors(include_url=False)]


def dotted(key: Key) -> str:
    """A key as TOML writes it: `models.small.dtype`."""
    return ".".join(k if re.fullmatch(r"[A-Za-z0-9_-]+", k) else f'"{shown(k)[1:-1]}"' for k in key) or "the file"


def shown(value: object) -> str:
    """A value as TOML would write it, cut to one short line."""
    match value:
        case bool():
            text = str(value).lower()
        case str():
            # repr keeps control characters from reaching the terminal.
            text = '"' + repr(_without_secrets(value))[1:-1] + '"'
        case Mapping():
            text = "a table"
        case list() | tuple():
            text = f"a list of {len(value)}"
        case _:
            text = str(value)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[: MAX_VALUE_CHARS - 1]}…"


def _without_secrets(value: str) -> str:
    """A URL without what may be a password in it."""
    return re.sub(r"(?<=\?).+", "…", re.sub(r"(?<=://)[^/]*@", "…@", value)) if "://" in value else value


def nearest(word: str, allowed: Collection[str]) -> str:
    """`; did you mean "x"? allowed: …`, without the question where nothing is near."""
    near = difflib.get_close_matches(word, allowed, n=1)
    meant = f"did you mean {shown(near[0])}? " if near else ""
    return f"{meant}allowed: {', '.join(allowed) or 'none'}"


def _problem(error: Any, root: type[BaseModel]) -> Problem:
    key = _key(error["loc"])
    kind, given = error["type"], error["input"]
    if kind == "extra_forbidden":
        return _unknown(key, error, root)
    describe: Callable[[Key, Any], Problem] | None = _TEXTS.get(kind)
    if describe is not None:
        return describe(key, error)
    text = error["msg"]
    text = re.sub(r"^(Value error, |Assertion failed, )", "", text)
    text = re.sub(r"^(Input|String|List|Tuple) should ", "must ", text)
    text = _PLAIN.get(text, text)
    shows = kind != "missing" and not isinstance(given, Mapping | BaseModel) and not is_secret(key)
    return Problem(key=key, text=text[:1].lower() + text[1:], value=shown(given) if shows else "")


def is_secret(key: Key) -> bool:
    """Whether a value under that key may be a secret, which no message repeats."""
    return bool(key) and key[-1] not in _NOT_SECRET and _SECRET.search(key[-1]) is not None


def _key(loc: tuple[int | str, ...]) -> Key:
    parts = [str(p) for p in loc if p != "[key]"]
    # pydantic puts the chosen kind of node between its name and its key.
    if len(parts) > 2 and parts[0] == "nodes" and parts[2] in NODE_KINDS and loc[-1] != "[key]":
        del parts[2]
    return tuple(parts)


def _missing(key: Key, error: Any) -> Problem:
    return Problem(key=key, text="is required")


def _unknown(key: Key, error: Any, root: type[BaseModel]) -> Problem:
    allowed = _allowed(tuple(str(p) for p in error["loc"][:-1]), root)
    hint = nearest(key[-1], allowed)
    if is_secret(key) and "api_key_env" in allowed:
        hint = f"keys do not belong in this file; name an environment variable in api_key_env. {hint}"
    return Problem(key=key, text=f"unknown key; {hint}")


def _no_kind(key: Key, error: Any) -> Problem:
    return Problem(key=(*key, "kind"), text=f"is required; allowed: {', '.join(NODE_KINDS)}")


def _bad_kind(key: Key, error: Any) -> Problem:
    tag = error["ctx"]["tag"]
    return Problem(key=(*key, "kind"), text=nearest(tag, list(NODE_KINDS)), value=shown(tag))


def _bad_name(key: Key, error: Any) -> Problem:
    if "[key]" in error["loc"] or error["ctx"]["pattern"].startswith("^[A-Za-z0-9]["):
        text = "a name must be 1 to 64 letters, digits or _ . - and begin with a letter or digit"
        return Problem(key=key, text=text, value="" if "[key]" in error["loc"] else shown(error["input"]))
    return Problem(key=key, text=f"must match {error['ctx']['pattern']}", value=shown(error["input"]))


def _not_table(key: Key, error: Any) -> Problem:
    value = "" if is_secret(key) else shown(error["input"])
    return Problem(key=key, text=f"must be a table, written [{dotted(key)}]", value=value)


_TEXTS: Final[Mapping[str, Callable[[Key, Any], Problem]]] = {
    "missing": _missing,
    "union_tag_not_found": _no_kind,
    "union_tag_invalid": _bad_kind,
    "string_pattern_mismatch": _bad_name,
    "model_type": _not_table,
    "model_attributes_type": _not_table,
    "dict_type": _not_table,
}


def _allowed(loc: tuple[str, ...], root: type[BaseModel]) -> list[str]:
    """The keys that may stand in the table at that place."""
    found: Any = root
    for part in loc:
        if isinstance(found, type) and issubclass(found, BaseModel) and part in found.model_fields:
            found = found.model_fields[part].annotation
        elif part in NODE_KINDS:
            found = NODE_KINDS[part]
        elif typing.get_origin(found) is dict:
            found = typing.get_args(found)[1]
        if typing.get_origin(found) in (typing.Union, types.UnionType):
            found = next((a for a in typing.get_args(found) if isinstance(a, type) and a is not type(None)), found)
    return list(found.model_fields) if isinstance(found, type) and issubclass(found, BaseModel) else []


def lines_of(text: str) -> dict[Key, int]:
    """The line, from 1, on which each key of a valid TOML text is written; empty if the text is not valid.

    `tomllib` does not tell lines. But TOML is a sequence of statements, each of which is a valid text by itself, so
    lines are gathered until they parse: that is one statement.
    """
    found: dict[Key, int] = {}
    table: Key = ()
    pending: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        pending.append(line)
        if len(pending) > MAX_STATEMENT_LINES:
            break
        try:
            statement = tomllib.loads("\n".join(pending))
        except tomllib.TOMLDecodeError:
            continue
        is_header = pending[0].lstrip().startswith("[")
        first = number - len(pending) + 1
        pending = []
        if is_header:
            table = _leaf(statement)
            found.setdefault(table, first)
            continue
        for key in _keys(statement):
            found.setdefault((*table, *key), first)
    return found


def _leaf(statement: Mapping[str, Any]) -> Key:
    path: list[str] = []
    here: Any = statement
    while isinstance(here, Mapping) and here:
        name, here = next(iter(here.items()))
        path.append(name)
        if isinstance(here, list):
            here = here[0]
    return tuple(path)


def _keys(statement: Mapping[str, Any], path: Key = ()) -> Iterable[Key]:
    for name, value in statement.items():
        yield (*path, name)
        if isinstance(value, Mapping):
            yield from _keys(value, (*path, name))


def read_text(path: Path, *, max_bytes: int) -> str:
    """The text of a file.

    Raises:
        ConfigError: If it cannot be read, is too large, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", hint="'agora init' writes a commented one") from None
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror or e}") from None
    if len(raw) > max_bytes:
        raise ConfigError(f"{path} has more than {max_bytes:,} bytes, which no configuration needs")
    try:
        # A byte order mark is what some editors put first.
        return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise ConfigError(
            f"{path}: line {line}: byte 0x{raw[e.start]:02x} is not valid UTF-8", hint="save the file as UTF-8"
        ) from None
