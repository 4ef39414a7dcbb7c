"""What tells one base model from another: a hash over its configuration and its weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Final

from agora.errors import ModelError
from experts.files import sha256_of
from experts.models import default_cache_dir

CACHE_FILE: Final = "fingerprints.json"
"""In the folder that holds the models' cache."""

MAX_CACHE_BYTES: Final = 2**20
"""Longest cache that is read; about 5,000 files."""

MAX_ENTRIES: Final = 1000
"""Files remembered; the oldest are dropped."""


def fingerprint(folder: Path, *, cache: Path | None = None) -> str:
    """Sha256 over a model's config.json and safetensors files, each by name and hash.

    A file is hashed once and then known by its size and time of change: hashing takes a second or so for each GB.

    Args:
        folder: The model's folder.
        cache: File that remembers hashes; None for one in the user's cache. Where it cannot be written, nothing is
            remembered.

    Raises:
        ModelError: If the folder holds no such files.
    """
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    if len(files) < 2 or not files[0].is_file():
        raise ModelError(f"{folder} holds no model: config.json and safetensors weights are needed")
    cache = default_cache_dir().parent / CACHE_FILE if cache is None else cache
    known = _read(cache)
    digest, changed = hashlib.sha256(), False
    try:
        for file in files:
            stat, path = file.stat(), str(file.resolve())
            told = [stat.st_size, stat.st_mtime_ns]
            entry = known.get(path)
            if not (isinstance(entry, list) and len(entry) == 3 and entry[:2] == told and isinstance(entry[2], str)):
                known.pop(path, None)
                known[path] = entry = [*told, sha256_of(file)]
                changed = True
            digest.update(f"{file.name}:{entry[2]}\n".encode())
    except OSError as e:
        raise ModelError(f"{folder} cannot be read: {e.strerror}") from None
    if changed:
        _write(cache, known)
    return digest.hexdigest()


def _read(cache: Path) -> dict[str, Any]:
    try:
        with cache.open("rb") as file:
            known = json.loads(file.read(MAX_CACHE_BYTES + 1)[:MAX_CACHE_BYTES])
    except (OSError, ValueError, RecursionError):
        return {}  # Gone or spoilt: what it held is worked out again.
    return known if isinstance(known, dict) else {}


def _write(cache: Path, known: dict[str, Any]) -> None:
    kept = dict(list(known.items())[-MAX_ENTRIES:])
    # A cache that cannot be written costs time, and nothing else.
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{cache.name}-", dir=cache.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(kept, file)
        Path(name).replace(cache)
