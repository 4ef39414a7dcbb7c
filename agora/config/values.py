"""Kinds of values that stand in `agora.toml`, each checked where it is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, ValidationInfo

from agora.errors import AgoraError
from agora.types import AdapterRef, Tier

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _folder_of_file(info: ValidationInfo) -> Path:
    context = info.context
    return Path(context["folder"]) if isinstance(context, Mapping) and "folder" in context else Path.cwd()


def _path(value: object, info: ValidationInfo) -> object:
    """Paths count from the folder of the file they are written in; `~` is the user's home."""
    if not isinstance(value, str):
        raise ValueError("must be a path in quotes")
    if not value.strip() or "\x00" in value:
        raise ValueError("must be a path, and not empty")
    try:
        path = Path(value).expanduser()
    except RuntimeError:
        raise ValueError("starts with the home folder of a user who does not exist") from None
    return path if path.is_absolute() else _folder_of_file(info) / path


def _source(value: str, info: ValidationInfo) -> str:
    """What looks like a path counts from the folder of the file; an alias or a hub id stays as it is."""
    return str(_path(value, info)) if value.startswith((".", "/", "~")) else value


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as e:
        raise ValueError(f"is not a URL: {e}") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not contain a password; name an environment variable in api_key_env instead")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError("must look like http://host:port/v1 or https://host/v1")
    if parts.query or parts.fragment:
        raise ValueError("must end before any '?' or '#'")
    return value.rstrip("/")


def _database(value: str) -> str:
    """A PostgreSQL server; its password comes from where libpq looks for one, never from the file."""
    try:
        parts = urlsplit(value)
    except ValueError as e:
        raise ValueError(f"is not a URL: {e}") from None
    if parts.password is not None or "password" in parts.query:
        raise ValueError("must not contain a password; put it into PGPASSWORD or ~/.pgpass")
    if parts.scheme not in ("postgresql", "postgres"):
        raise ValueError("must look like postgresql://user@host/database; for a file use path")
    return value


def _device(value: str) -> str:
    if re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d{1,3})?", value) is None:
        raise ValueError("must be cpu, cuda, cuda:1, xpu or mps")
    return value


def _variable(value: str) -> str:
    if _VARIABLE.fullmatch(value) is None:
        # The value may be the key itself, put here by mistake: it must not be repeated.
        raise ValueError("must be the NAME of an environment variable (letters, digits, _), never the key itself")
    return value


def _adapter_name(value: str) -> str:
    try:
        ref = AdapterRef.parse(value)
    except AgoraError as e:
        raise ValueError(e.message) from None
    if ref.version is None:
        raise ValueError("needs a version, like 'finance@v1'")
    return value


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100_000)]
FilePath = Annotated[Path, BeforeValidator(_path), Field(strict=False)]
Source = Annotated[Text, AfterValidator(_source)]
Url = Annotated[Text, AfterValidator(_url)]
Variable = Annotated[str, AfterValidator(_variable)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Texts = Annotated[tuple[Text, ...], Field(strict=False)]
AnyTier = Annotated[Tier, Field(strict=False)]
AdapterName = Annotated[Text, AfterValidator(_adapter_name)]
Database = Annotated[Text, AfterValidator(_database)]
Device = Annotated[str, AfterValidator(_device)]
