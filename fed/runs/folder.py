"""The folder of a run: what is in it, whether it may be used, and its files at the end."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from agora.errors import ConfigError, StoreError
from fed.config import FedConfig, parse_config, to_plain, to_toml
from fed.simulate import CONFIG, RECORD
from fed.simulator.checkpoint import write_whole
from fed.simulator.same import difference

SETTINGS: Final = "config.toml"
EVALUATIONS: Final = "evaluations.jsonl"
GROUPS: Final = "clusters.jsonl"
CLIENTS: Final = "clients.json"
RESULT: Final = "result.json"
ADAPTERS: Final = "adapters"
LOCK: Final = ".run.lock"

MAX_BYTES: Final = 2**28
"""Of a JSON file that is read: a million clients."""

_OURS: Final = (SETTINGS, CONFIG, RECORD, EVALUATIONS, GROUPS, CLIENTS, RESULT, ADAPTERS)

_FREE: Final[Mapping[str, tuple[str, ...]]] = {
    "run": ("out", "evaluate_every", "checkpoint_every", "checkpoint_s", "name"),
    "model": ("threads",),
}
"""Settings that may differ when a run goes on: they do not change its adapter, or are taken over from its beginning."""


def claim(folder: Path, config: FedConfig, *, resume: bool, fresh: bool) -> FedConfig | None:
    """Whether a run may use a folder; with `fresh` after what is left of another was taken away.

    Args:
        folder: Need not be there.
        config: Of the run.
        resume: Whether it may go on with what is there.
        fresh: Whether it may take away what is there.

    Returns:
        The configuration that the run there was begun with; None if it begins now.

    Raises:
        ConfigError: If another run is there, or this one and it is not to be gone on with.
        StoreError: If the folder cannot be used.
    """
    path = folder / SETTINGS
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file, not a folder", hint="name another place with --out")
        if fresh and path.exists():
            _clear(folder)
        if not path.exists():
            if there := [name for name in (RECORD, RESULT, ADAPTERS) if (folder / name).exists()]:
                raise ConfigError(f"{folder / there[0]} is there, but no {SETTINGS}: this is no run's folder")
            return None
        began = parse_config(path.read_text(encoding="utf-8"), file=None)
    except (OSError, UnicodeDecodeError) as e:
        raise StoreError(f"the folder {str(folder)!r} cannot be used: {e}") from e
    except ConfigError as e:
        raise ConfigError(
            f"{path} is not what a run of this version writes: {e.message}", hint="take another folder, or --fresh"
        ) from None
    if found := difference(core(began), core(config)):
        raise ConfigError(
            f"the run in {folder} was begun with another configuration: {found}",
            hint="take another folder with --out, or --fresh to lose what is there",
        )
    if not resume:
        raise ConfigError(
            f"there is a run of this configuration in {folder}", hint="--resume goes on with it, --fresh begins anew"
        )
    return began


def begin(folder: Path, config: FedConfig) -> None:
    """Writes what the run is begun with."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / SETTINGS, to_toml(config).encode())
    except OSError as e:
        raise StoreError(f"the folder {str(folder)!r} cannot be used: {e.strerror or e}") from e


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    try:
        write_whole(path, orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")
    except OSError as e:
        raise StoreError(f"{str(path)!r} cannot be written: {e.strerror or e}") from e


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file of a run; None if it is not there.

    Raises:
        StoreError: If it cannot be read, or is no JSON object.
    """
    try:
        with path.open("rb") as file:
            value = orjson.loads(file.read(MAX_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise StoreError(f"{str(path)!r} cannot be read: {e}") from e
    if not isinstance(value, dict):
        raise StoreError(f"{str(path)!r} holds no JSON object")
    return value


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(folder: Path) -> None:
    """Takes away a folder of results, to be written anew."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as e:
        raise StoreError(f"{str(folder)!r} cannot be written: {e.strerror or e}") from e


def _clear(folder: Path) -> None:
    """Takes away what a run wrote, and nothing else; its configuration last, so that it can be done again."""
    ours = [folder / name for name in _OURS if name != SETTINGS]
    ours += [p for p in folder.iterdir() if p.name.startswith(("checkpoint-", ".checkpoint-"))]
    for path in [*ours, folder / SETTINGS]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def core(config: FedConfig) -> dict[str, Any]:
    """All of a configuration that a run must be gone on with."""
    return {
        name: {k: v for k, v in table.items() if k not in _FREE[name]} if name in _FREE else table
        for name, table in to_plain(config).items()
    }
