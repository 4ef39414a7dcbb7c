"""A base model is told by its bytes; hashing is done once for files that have not changed."""

import hashlib
import os
from pathlib import Path

import pytest

from agora.errors import ModelError
from fed.trainer import fingerprint as module
from fed.trainer.fingerprint import fingerprint


def folder(path: Path, weights: bytes = b"weights", config: bytes = b"{}") -> Path:
    path.mkdir()
    (path / "config.json").write_bytes(config)
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_config_and_weights_count_and_nothing_else(tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    one = folder(tmp_path / "one")
    told = fingerprint(one, cache=cache)
    lines = [
        f"{name}:{hashlib.sha256((one / name).read_bytes()).hexdigest()}\n"
        for name in ("config.json", "model.safetensors")
    ]
    assert told == hashlib.sha256("".join(lines).encode()).hexdigest()
    (one / "README.md").write_text("hello")
    assert fingerprint(one, cache=cache) == told
    assert fingerprint(folder(tmp_path / "same"), cache=cache) == told
    assert fingerprint(folder(tmp_path / "other", weights=b"Weights"), cache=cache) != told
    assert fingerprint(folder(tmp_path / "config", config=b"{ }"), cache=cache) != told


def test_unchanged_files_are_hashed_once_and_changed_ones_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(module, "sha256_of", counted)
    cache, one = tmp_path / "deep" / "cache.json", folder(tmp_path / "one")
    told = fingerprint(one, cache=cache)
    assert fingerprint(one, cache=cache) == told
    assert hashed == ["config.json", "model.safetensors"]
    stat = (one / "model.safetensors").stat()
    (one / "model.safetensors").write_bytes(b"WEIGHTS")
    os.utime(one / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert fingerprint(one, cache=cache) != told
    assert hashed[2:] == ["model.safetensors"]


@pytest.mark.parametrize("spoilt", [b"{broken", b"[1]", b'{"x": 3}', b"\xff"])
def test_a_spoilt_cache_is_worked_out_again(tmp_path: Path, spoilt: bytes) -> None:
    cache, one = tmp_path / "cache.json", folder(tmp_path / "one")
    told = fingerprint(one, cache=cache)
    cache.write_bytes(spoilt)
    assert fingerprint(one, cache=cache) == told


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one = folder(tmp_path / "one")
    assert fingerprint(one, cache=tmp_path / "file" / "cache.json") == fingerprint(one, cache=tmp_path / "c.json")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no model"):
        fingerprint(tmp_path, cache=tmp_path / "c.json")
