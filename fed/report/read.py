"""The files of a run, as they are at the moment."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from agora.errors import InvalidRequest, StoreError
from fed.runs.folder import CLIENTS, EVALUATIONS, GROUPS, LOCK, RESULT, SETTINGS, read_json
from fed.runs.journal import read_lines
from fed.simulate import RECORD

MAX_CONFIG_BYTES = 2_000_000
"""Of `config.toml`: twice what `fed.toml` may have, all settings told."""

Rows = Sequence[Mapping[str, Any]]


class Standing(StrEnum):
    """How a run stands."""

    FINISHED = "finished"
    RUNNING = "running"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that a run's folder tells.

    Attributes:
        folder: The folder.
        name: What the run is called.
        standing: How the run stands.
        config: The text of `config.toml`.
        rows: The record: a row for each version.
        evaluations: Rows of versions that were judged.
        groups: Rows of when clients were moved between models.
        clients: Rows of `clients.json`.
        result: What `result.json` holds; None before the end.
    """

    folder: Path
    name: str
    standing: Standing
    config: str
    rows: Rows
    evaluations: Rows
    groups: Rows
    clients: Rows
    result: Mapping[str, Any] | None


def read_report(folder: Path) -> Report:
    """Reads a run's folder; nothing in it is changed.

    Raises:
        InvalidRequest: If it is no run's folder.
        StoreError: If a file in it cannot be read.
    """
    settings = folder / SETTINGS
    if not settings.is_file():
        raise InvalidRequest(
            f"{folder} is no folder of a run: it has no {SETTINGS}", hint="name the folder that 'agora fed run' told"
        )
    try:
        with settings.open("rb") as file:
            config = file.read(MAX_CONFIG_BYTES).decode("utf-8", "replace")
    except OSError as e:
        raise StoreError(f"{settings} cannot be read: {e.strerror}") from None
    result = read_json(folder / RESULT)
    rows = read_lines(folder / RECORD)
    newest = {row["model"]: row["version"] for row in rows}
    evaluations = [e for e in read_lines(folder / EVALUATIONS) if e["version"] <= newest.get(e["model"], 0)]
    return Report(
        folder=folder,
        name=_name(config) or folder.absolute().name,
        standing=Standing.FINISHED if result else Standing.RUNNING if _held(folder / LOCK) else Standing.STOPPED,
        config=config,
        rows=rows,
        evaluations=evaluations,
        groups=read_lines(folder / GROUPS),
        clients=(read_json(folder / CLIENTS) or {}).get("clients", []),
        result=result,
    )


def _name(config: str) -> str:
    try:
        return str(tomllib.loads(config)["run"]["name"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError):
        return ""


def _held(lock: Path) -> bool:
    """Whether a process runs there."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        # A folder that can only be read has no run in it that this user could disturb or ask.
        return False
