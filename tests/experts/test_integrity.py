import json
from collections.abc import Callable
from pathlib import Path

import pytest

from agora.errors import ModelError
from experts.integrity import (
    MANIFEST,
    check_hashes,
    check_model_folder,
    check_sizes,
    read_manifest,
    write_manifest,
)
from experts.progress import PullProgress, silent

MakeFolder = Callable[..., Path]


def test_whole_folder_passes(tmp_path: Path, make_folder: MakeFolder) -> None:
    check_model_folder(make_folder(tmp_path / "m"))


def test_shards_are_all_looked_at(tmp_path: Path, make_folder: MakeFolder) -> None:
    folder = make_folder(tmp_path / "m")
    shard = folder / "model-00001-of-00002.safetensors"
    (folder / "model.safetensors").rename(shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard.name}}))
    check_model_folder(folder)
    index.write_text(json.dumps({"weight_map": {"a": shard.name, "b": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        check_model_folder(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../w.safetensors"}}))
    with pytest.raises(ModelError, match="outside its folder"):
        check_model_folder(folder)
    index.write_text("[]")
    with pytest.raises(ModelError, match="no index"):
        check_model_folder(folder)


@pytest.mark.parametrize(
    ("without", "told"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no model.safetensors: it holds no weights"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, make_folder: MakeFolder, without: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        check_model_folder(make_folder(tmp_path / "m", without=without))


def test_pickled_weights_are_not_an_answer(tmp_path: Path, make_folder: MakeFolder) -> None:
    folder = make_folder(tmp_path / "m", without="model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelError, match=r"it holds pytorch_model\.bin") as caught:
        check_model_folder(folder)
    assert "safetensors only" in str(caught.value.hint)


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: body[:-1],
        lambda body: body + b"x",
        lambda body: body[:5],
        lambda body: b"",
        lambda body: b"\xff" * 8 + body[8:],
        lambda body: body[:8] + b"?" + body[9:],
        lambda body: body.replace(b'"data_offsets":[0,300000]', b'"data_offsets":[0,"    "]'),
    ],
)
def test_damaged_weights(tmp_path: Path, make_folder: MakeFolder, damage: Callable[[bytes], bytes]) -> None:
    folder = make_folder(tmp_path / "m")
    weights = folder / "model.safetensors"
    body = weights.read_bytes()
    assert damage(body) != body
    weights.write_bytes(damage(body))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        check_model_folder(folder)


@pytest.mark.parametrize("config", [b"{", b"[]", b"\xff"])
def test_damaged_config(tmp_path: Path, make_folder: MakeFolder, config: bytes) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        check_model_folder(make_folder(tmp_path / "m", **{"config.json": config}))


def test_manifest_finds_every_change(tmp_path: Path, make_folder: MakeFolder) -> None:
    folder = make_folder(tmp_path / "m")
    reports: list[PullProgress] = []
    write_manifest(folder, alias="a", source="s", recipe="r", progress=reports.append)
    manifest = read_manifest(folder)
    assert (manifest.alias, manifest.source, manifest.recipe) == ("a", "s", "r")
    assert set(manifest.files) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert reports[-1].done == reports[-1].total == sum(f.bytes for f in manifest.files.values())
    check_hashes(folder, manifest)

    weights = folder / "model.safetensors"
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(body)
    check_sizes(folder, manifest)  # cheap, and blind to this
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        check_hashes(folder, manifest)
    weights.write_bytes(body[:-1])
    with pytest.raises(ModelError, match="has 300071 bytes, it should have 300072"):
        check_sizes(folder, manifest)
    weights.unlink()
    with pytest.raises(ModelError, match="missing"):
        check_sizes(folder, manifest)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"alias": "a", "source": "s", "recipe": "r", "files": {"x": {"bytes": "many", "sha256": ""}}}',
        '{"alias": "a", "source": "s", "recipe": "r", "files": {"../x": {"bytes": 1, "sha256": ""}}}',
    ],
)
def test_damaged_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ModelError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_manifest_is_readable_by_other_users(tmp_path: Path, make_folder: MakeFolder) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").chmod(0o600)
    write_manifest(folder, alias="a", source="s", recipe="r", progress=silent)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
