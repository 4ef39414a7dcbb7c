"""Hashing files, and what a disk may say: full, or not to be written to."""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from agora.errors import ModelError

BLOCK_BYTES: Final = 2**20
"""Bytes read at a time; big enough that hashing and writing cost no more than reading."""

DISK_MARGIN_BYTES: Final = 64 * 2**20
"""Free space to leave after a download, so that other programs keep running."""


def sha256_of(path: Path, on_block: Callable[[int], None] = lambda _: None) -> str:
    """Hash of a file, lower-case hex; `on_block` is told the bytes of each block read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            on_block(len(block))
    return digest.hexdigest()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns whatever a disk complains of (full, read-only, failing) into one clear `ModelError`."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            hint = "free some space and run the same command again; what was downloaded is kept"
            raise ModelError(f"the disk is full at {folder}", hint=hint) from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}:
            hint = "set AGORA_CACHE to a folder you may write to"
            raise ModelError(f"{folder} cannot be written to: {error.strerror}", hint=hint) from error
        if error.errno is None:  # no complaint of the system, but a library's error of another kind
            raise
        raise ModelError(f"{folder} cannot be used: {error}", hint="check that disk") from error


def check_free_disk(folder: Path, needed: int, *, setting: str) -> None:
    """Checks that a folder's disk has room before anything is written to it.

    Args:
        folder: An existing folder.
        needed: Bytes that will be written.
        setting: The environment variable that moves the folder.

    Raises:
        ModelError: If there is too little room.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + DISK_MARGIN_BYTES:
        raise ModelError(
            f"{folder} has {free / 1e9:.2f} GB free, {(needed + DISK_MARGIN_BYTES) / 1e9:.2f} GB are needed",
            hint=f"free some space, or set {setting} to a folder on a larger disk",
        )
