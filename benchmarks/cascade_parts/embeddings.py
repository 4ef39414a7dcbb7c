"""Sentence embeddings of the sets' questions, kept in the user's cache: they take long, and are always the same."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import numpy as np
import platformdirs
from numpy.typing import NDArray

from experts.embed import DEFAULT_MODEL, DIMENSION, MiniLM
from experts.models import ModelStore

CHUNK: Final = 256
"""Texts that are embedded before they are stored, so that an interrupted run loses little."""


def cache_path() -> Path:
    """Where embeddings are kept."""
    return platformdirs.user_cache_path("agora") / "embeddings" / f"{DEFAULT_MODEL}.sqlite"


def weights_digest() -> str:
    """SHA-256 of the model's weights: other weights, other embeddings.

    Raises:
        ModelError: If the model is not on this machine.
    """
    digest = hashlib.sha256()
    for path in sorted(ModelStore().resolve(DEFAULT_MODEL).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


async def embeddings(texts: Sequence[str], *, path: Path | None = None) -> NDArray[np.float32]:
    """Unit vectors of texts, shape (n, 384), from the cache as far as it has them.

    Args:
        texts: The texts.
        path: The cache's file; None for the user's.

    Raises:
        ModelError: If the model is not on this machine.
    """
    where = cache_path() if path is None else path
    where.parent.mkdir(parents=True, exist_ok=True)
    model = weights_digest()
    keys = [hashlib.sha256(f"{model}\0{text}".encode("utf-8", "surrogatepass")).digest() for text in texts]
    with closing(sqlite3.connect(where, timeout=60)) as cache:
        cache.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL)")
        found: dict[bytes, NDArray[np.float32]] = {}
        for key in keys:
            row = cache.execute("SELECT vector FROM vectors WHERE key = ?", (key,)).fetchone()
            if row is not None and len(row[0]) == 4 * DIMENSION:
                found[key] = np.frombuffer(row[0], dtype=np.float32)
        missing = list({key: text for key, text in zip(keys, texts, strict=True) if key not in found}.items())
        if missing:
            embedder = MiniLM(cache_size=0)
            try:
                for start in range(0, len(missing), CHUNK):
                    part = missing[start : start + CHUNK]
                    vectors = await embedder.embed([text for _, text in part])
                    rows = [(key, vector.tobytes()) for (key, _), vector in zip(part, vectors, strict=True)]
                    with cache:
                        cache.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)
                    found.update((key, vector) for (key, _), vector in zip(part, vectors, strict=True))
            finally:
                await embedder.aclose()
    return np.stack([found[key] for key in keys])
