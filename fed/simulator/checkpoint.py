"""Checkpoints on disk: whole or not there, whatever moment the process is killed at."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from agora.errors import StoreError

FORMAT: Final = 1
KEPT: Final = 2
"""Checkpoints kept: the newest, and the one before for the case that a disk damages the newest."""

MAX_BYTES: Final = 2**36
"""Of a file that is read: far more than any run writes, far less than an endless one."""

FACTS, ARRAYS, MANIFEST = "facts.json", "arrays.safetensors", "manifest.json"

_NAME: Final = re.compile(r"checkpoint-(\d{8,})")

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint holds.

    Attributes:
        number: Of the checkpoint; rises.
        facts: Fit for JSON.
        arrays: By name.
    """

    number: int
    facts: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def write(folder: Path, number: int, facts: Mapping[str, Any], arrays: Arrays) -> Path:
    """Writes a checkpoint beside the others, and removes those that are no longer needed.

    It is made in a folder of another name, brought to the disk, and only then renamed.

    Returns:
        Its folder.

    Raises:
        StoreError: If it cannot be written.
    """
    made, final = folder / ".checkpoint-in-the-making", folder / f"checkpoint-{number:08d}"
    files = {
        FACTS: orjson.dumps(facts),
        ARRAYS: save({name: np.ascontiguousarray(a) for name, a in sorted(arrays.items())}),
    }
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[MANIFEST] = orjson.dumps({"format": FORMAT, "sha256": digests})
    try:
        # What a killed process left behind.
        for left in (made, final):
            if left.exists():
                shutil.rmtree(left)
        made.mkdir()
        for name, data in files.items():
            with (made / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(made)
        made.rename(final)
        sync_folder(folder)
        for old in _numbers(folder)[:-KEPT]:
            shutil.rmtree(folder / f"checkpoint-{old:08d}")
    except OSError as e:
        raise StoreError(f"checkpoint {number} cannot be written to {str(folder)!r}: {e}") from e
    return final


def latest(folder: Path) -> Saved | None:
    """The newest checkpoint that is whole; None if there is none at all.

    Raises:
        StoreError: If there are some, and all are damaged.
    """
    problems = []
    for number in reversed(_numbers(folder)):
        try:
            return _read(folder / f"checkpoint-{number:08d}", number)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
            problems.append(f"checkpoint {number}: {e}")
    if problems:
        raise StoreError(
            f"every checkpoint in {str(folder)!r} is damaged: {'; '.join(problems)}",
            hint="begin again in another folder",
        )
    return None


def sync_folder(folder: Path) -> None:
    """Brings a folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    made = path.with_name(f".{path.name}-in-the-making")
    with made.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    made.replace(path)
    sync_folder(path.parent)


def _read(folder: Path, number: int) -> Saved:
    manifest = orjson.loads(_bounded(folder / MANIFEST))
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']!r}; this version reads {FORMAT}")
    files = {}
    for name in (FACTS, ARRAYS):
        files[name] = _bounded(folder / name)
        if hashlib.sha256(files[name]).hexdigest() != manifest["sha256"][name]:
            raise ValueError(f"{name} is not what was written")
    return Saved(number, orjson.loads(files[FACTS]), load(files[ARRAYS]))


def _bounded(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path.name} has {size} bytes; at most {MAX_BYTES} are read")
    return path.read_bytes()


def _numbers(folder: Path) -> list[int]:
    found = (_NAME.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in found if match)
