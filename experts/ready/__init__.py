"""The ready experts: cards, prompts and sample queries for five fields, one TOML file each, in this folder.

The fields are applications of federated intelligence at the wireless edge: communications, robotics, healthcare,
finance, education. The same kind of file describes an expert of one's own; `read_ready` checks it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from agora.errors import AgoraError, ConfigError
from agora.types import ExpertCard, checked_question

ORDER: Final = ("communications", "robotics", "healthcare", "finance", "education")
"""The names of the ready experts, in the order in which they are listed."""

MAX_FILE_BYTES: Final = 256 * 1024
"""Bytes of one file; fifty times the largest that ships."""

_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyExpert:
    """An expert but for the model that answers.

    Attributes:
        card: How it describes itself.
        system_prompt: What it is told before every question; short, so that a small model can follow it.
        samples: Queries to try it with, none of them among the card's examples.
    """

    card: ExpertCard
    system_prompt: str
    samples: tuple[str, ...]


class _File(BaseModel):
    """What such a file may hold."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: _Text
    description: _Text
    system_prompt: _Text
    examples: list[_Text] = Field(min_length=1)
    keywords: list[_Text] = Field(min_length=1)
    samples: list[_Text] = Field(min_length=1)


def ready_experts() -> Mapping[str, ReadyExpert]:
    """The five ready experts by name, in the order of `ORDER`.

    Raises:
        ConfigError: If one of the files that ship with agora is damaged.
    """
    here = files(__name__)
    found = {name: read_ready(here / f"{name}.toml") for name in ORDER}
    for name, ready in found.items():
        if ready.card.name != name:
            raise ConfigError(f"{name}.toml: name is {ready.card.name!r}; it must be that of the file, {name!r}")
    return MappingProxyType(found)


def read_ready(file: Path | Traversable) -> ReadyExpert:
    """Reads and checks one file.

    Args:
        file: TOML with `name`, `description`, `system_prompt`, and lists `examples`, `keywords`, `samples`.

    Raises:
        ConfigError: If it cannot be read or breaks a rule; the message names file, key, value and what is allowed.
    """
    plain = _toml(file)
    try:
        content = _File.model_validate(plain)
    except ValidationError as e:
        raise ConfigError(
            f"{file.name}: {'; '.join(_in_words(p) for p in e.errors(include_url=False))}",
            hint=f"allowed keys: {', '.join(_File.model_fields)}",
        ) from None
    for key in ("examples", "keywords", "samples"):
        _refuse_doubles(file, key, getattr(content, key))
    if both := {_plain(e) for e in content.examples} & {_plain(s) for s in content.samples}:
        raise ConfigError(
            f"{file.name}: {sorted(both)[0]!r} is among examples and samples",
            hint="a sample that routing has already seen shows nothing: change one of them",
        )
    try:
        for sample in content.samples:
            checked_question(sample, what="a sample")
        card = ExpertCard(
            name=content.name,
            description=content.description,
            examples=tuple(content.examples),
            keywords=tuple(content.keywords),
        )
    except AgoraError as e:
        raise ConfigError(f"{file.name}: {e.message}", hint=e.hint) from None
    return ReadyExpert(card=card, system_prompt=content.system_prompt, samples=tuple(content.samples))


def _toml(file: Path | Traversable) -> Mapping[str, Any]:
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"{file.name}: cannot be read: {e.strerror or e}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{file.name}: larger than {MAX_FILE_BYTES:,} bytes")
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ConfigError(f"{file.name}: not UTF-8 at byte {e.start}") from None
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{file.name}: not valid TOML: {e}") from None
    except RecursionError:
        raise ConfigError(f"{file.name}: not valid TOML: nested too deeply") from None


def _in_words(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key {key!r}"
        case "missing":
            return f"{key} is missing"
        case _:
            return f"{key} is {str(problem['input'])[:80]!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _refuse_doubles(file: Path | Traversable, key: str, texts: list[str]) -> None:
    seen: set[str] = set()
    for text in texts:
        if _plain(text) in seen:
            raise ConfigError(f"{file.name}: {key} has {text!r} twice")
        seen.add(_plain(text))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
