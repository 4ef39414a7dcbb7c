"""Tells whether a model folder is whole: cheaply on every use, byte by byte on request."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from agora.errors import ModelError
from experts.files import sha256_of
from experts.progress import ProgressCallback, PullProgress, silent

MANIFEST: Final = "manifest.json"
"""Written last into a folder of the model cache; a folder without it is no model."""

MAX_JSON_BYTES: Final = 64 * 2**20
"""Longest JSON file that is read: index files of models with 100,000 tensors take about 10 MB."""

MAX_HEADER_BYTES: Final = 100_000_000
"""Longest safetensors header; the limit of the format's own reader."""

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of these is in every model folder that can tokenize."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size and sha256 of one file of a model."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a folder of the model cache holds and where it came from.

    Attributes:
        alias: The model's short name.
        source: Where the weights came from, for people.
        recipe: Names catalogue entry and converter; another recipe makes another model.
        files: Every file of the folder except the manifest.
    """

    alias: str
    source: str
    recipe: str
    files: Mapping[str, FileRecord]


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable; no more than a wish where folders cannot be synced."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, *, alias: str, source: str, recipe: str, progress: ProgressCallback) -> None:
    """Hashes every file of a finished model folder, makes them durable, and writes the manifest."""
    paths = sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    meter = _HashMeter("hashing", sum(p.stat().st_size for p in paths), progress)
    files = {}
    for path in paths:
        path.chmod(0o644)
        files[path.name] = FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path, meter.add))
        with path.open("rb") as file:
            os.fsync(file.fileno())
    manifest = Manifest(alias=alias, source=source, recipe=recipe, files=files)
    with (folder / MANIFEST).open("w", encoding="utf-8") as out:
        json.dump(asdict(manifest), out, indent=2)
        out.flush()
        os.fsync(out.fileno())
    sync_folder(folder)


class _HashMeter:
    def __init__(self, phase: str, total: int, progress: ProgressCallback) -> None:
        self._phase, self._total, self._progress, self._done = phase, total, progress, 0

    def add(self, count: int) -> None:
        self._done += count
        self._progress(PullProgress(phase=self._phase, done=self._done, total=self._total))


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path} is longer than {MAX_JSON_BYTES} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def read_manifest(folder: Path) -> Manifest:
    """Reads a folder's manifest.

    Raises:
        ModelError: If it is missing or not a manifest.
    """
    raw = _read_json(folder / MANIFEST)
    try:
        files = {str(k): FileRecord(bytes=int(v["bytes"]), sha256=str(v["sha256"])) for k, v in raw["files"].items()}
        if any(Path(name).name != name for name in files):
            raise ValueError("a file name holds a path")
        return Manifest(alias=str(raw["alias"]), source=str(raw["source"]), recipe=str(raw["recipe"]), files=files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / MANIFEST} is no manifest: {error!r}") from error


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Checks that every file is there and as long as the manifest says.

    Raises:
        ModelError: Naming the first file that is not.
    """
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{path} is missing")
        size = path.stat().st_size
        if size != record.bytes:
            raise ModelError(f"{path} has {size} bytes, it should have {record.bytes}")


def check_hashes(folder: Path, manifest: Manifest, progress: ProgressCallback = silent) -> None:
    """Reads every byte and checks it against the manifest; about a second per gigabyte.

    Raises:
        ModelError: Naming the first file that differs.
    """
    check_sizes(folder, manifest)
    meter = _HashMeter("checking", sum(r.bytes for r in manifest.files.values()), progress)
    for name, record in manifest.files.items():
        seen = sha256_of(folder / name, meter.add)
        if seen != record.sha256:
            raise ModelError(f"{folder / name} is damaged: its sha256 is {seen}, it should be {record.sha256}")


def _check_safetensors(path: Path) -> None:
    """Checks the header of a safetensors file against its length, as the format defines both."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ModelError(f"{path} is no safetensors file, or it is cut short ({size} bytes)")
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        end = max((int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path} has a damaged header: {error}") from error
    if size != 8 + length + end:
        raise ModelError(f"{path} is damaged: it has {size} bytes, its header describes {8 + length + end}")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(_read_json(index)["weight_map"].values())
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is no index of weights: {error!r}") from error
        if not shards or any(Path(str(s)).name != s for s in shards):
            raise ModelError(f"{index} names no shards, or shards outside its folder")
        return [folder / str(s) for s in sorted(shards)]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    others = [p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".gguf"}]
    seen = f"it holds {', '.join(sorted(others)[:3])}" if others else "it holds no weights"
    raise ModelError(
        f"{folder} has no model.safetensors: {seen}",
        hint="agora loads safetensors only, since pickled weights can run code: use save_pretrained",
    )


def check_model_folder(folder: Path) -> None:
    """Checks that a folder holds a model that can be loaded: configuration, tokenizer, and whole weights.

    Reads headers only, no weights.

    Raises:
        ModelError: Saying what is missing or damaged.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json")
    if not isinstance(_read_json(folder / "config.json"), dict):
        raise ModelError(f"{folder / 'config.json'} is no JSON object")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there")
    for path in _weight_files(folder):
        if not path.is_file():
            raise ModelError(f"{path} is missing")
        _check_safetensors(path)
