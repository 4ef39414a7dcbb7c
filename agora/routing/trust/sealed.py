"""JSON files that are whole or not there, and that notice damage."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Final

from agora.errors import ConfigError

MAX_BYTES: Final = 64 * 1024 * 1024
"""Largest file read: losses of 100 policies on 30,000 questions are a quarter of that."""

AGAIN: Final = "calibrate again: agora calibrate --data FILE"


def write_sealed(path: Path, body: Any) -> None:
    """Writes a JSON value with its checksum; a reader sees the old file or the new one, never half of one.

    Raises:
        ConfigError: If it cannot be written.
        ValueError: If the value holds NaN or infinity, which JSON has no words for.
    """
    text = _canonical(body)
    seal = hashlib.sha256(text.encode()).hexdigest()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(f'{{"sha256":"{seal}","body":{text}}}\n')
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as e:
        raise ConfigError(f"{path}: cannot be written: {e}", hint="check the folder's rights and space") from e


def read_sealed(path: Path) -> Any:
    """Reads what `write_sealed` wrote.

    Raises:
        ConfigError: If the file cannot be read, is too large, is no such file, or does not fit its checksum.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e}", hint=AGAIN) from e
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_BYTES} bytes, which no such file is", hint=AGAIN)
    try:
        sealed = json.loads(raw)
        seal, body = sealed["sha256"], sealed["body"]
        text = _canonical(body)
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ConfigError(f"{path}: is damaged: {type(e).__name__}: {e}", hint=AGAIN) from e
    if hashlib.sha256(text.encode()).hexdigest() != seal:
        raise ConfigError(f"{path}: is damaged: it does not fit its checksum", hint=AGAIN)
    return body


def _canonical(body: Any) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
