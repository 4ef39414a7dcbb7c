"""The policy folder: what is learned is put in the place of what was learned before at once, or not at all.

    FOLDER/journal.jsonl     every outcome, as it came
    FOLDER/current.json      names the folder that counts; replaced last
    FOLDER/learned-7/        calibrators, policy and `fitted.json`, never changed once they count
    FOLDER/learned-6/        what counted before, for those who are reading it

So nobody ever reads half of what one calibration wrote and half of what another did, and one that is killed while it
writes leaves what was there.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from agora.errors import ConfigError
from agora.routing.trust.sealed import AGAIN, read_sealed, write_sealed

CURRENT: Final = "current.json"
"""What names the folder that counts."""

JOURNAL: Final = "journal.jsonl"
"""Every outcome, as it came; beside the folder that counts."""

CALIBRATORS: Final = "calibrators"
"""Folder of the calibrators."""

POLICY: Final = "policy"
"""Folder of the fitted policy."""

FITTED: Final = "fitted.json"
"""What the policy was fitted for, and what it lost on questions that it was not fitted to."""

_LEARNED: Final = re.compile(r"learned-([1-9][0-9]{0,11})")

KEPT: Final = 2
"""Folders kept: the one that counts, and the one before it."""


def current(folder: Path) -> Path:
    """The folder whose files count: `folder` itself where nothing was written yet, or by an early agora.

    Raises:
        ConfigError: If what names it is damaged.
    """
    path = folder / CURRENT
    if not path.exists():
        return folder
    body: Any = read_sealed(path)
    name = body.get("folder") if isinstance(body, dict) else None
    if not isinstance(name, str) or _LEARNED.fullmatch(name) is None:
        raise ConfigError(f"{path}: names no folder of what was learned", hint=AGAIN)
    return folder / name


def stamp(folder: Path) -> Hashable:
    """Changes whenever something else counts; blocking, one look at one file."""
    try:
        told = (folder / CURRENT).stat()
    except OSError:
        return None
    return told.st_mtime_ns, told.st_ino, told.st_size


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to write to, which begins as what counts now, and counts once the block ends without an error.

    One at a time: whoever calibrates holds the journal.

    Raises:
        ConfigError: If it cannot be written.
    """
    try:
        old = current(folder)
    except ConfigError:
        # What is damaged is what calibrating again is to mend.
        old = folder / "learned-0"
    try:
        new = folder / f"learned-{max(_numbers(folder), default=0) + 1}"
        new.mkdir(parents=True)
        _carry_over(old, new)
    except OSError as e:
        raise _cannot(folder, e) from e
    try:
        yield new
        write_sealed(folder / CURRENT, {"folder": new.name})
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for number in sorted(_numbers(folder))[:-KEPT]:
        # What somebody keeps open, or may not be deleted, is tried again next time.
        shutil.rmtree(folder / f"learned-{number}", ignore_errors=True)


def _numbers(folder: Path) -> list[int]:
    found = (_LEARNED.fullmatch(p.name) for p in folder.iterdir()) if folder.is_dir() else ()
    return [int(m[1]) for m in found if m is not None]


def _carry_over(old: Path, new: Path) -> None:
    """Files are replaced and never written into, so that both folders may share them."""
    for part in (CALIBRATORS, POLICY, FITTED):
        source = old / part
        for path in [source] if source.is_file() else sorted(source.glob("*")):
            if path.name.startswith(".") or not path.is_file():
                continue
            target = new / path.relative_to(old)
            target.parent.mkdir(exist_ok=True)
            with suppress(OSError):
                os.link(path, target)
                continue
            shutil.copyfile(path, target)


def _cannot(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{folder}: cannot be written: {error.strerror or error}", hint="choose another folder in [vertical] policy"
    )
