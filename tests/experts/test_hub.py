"""A model hub on 127.0.0.1 that speaks as much of the hub's protocol as a download takes."""

import hashlib
import json
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agora.errors import ModelError
from experts.hub import Hub
from experts.progress import PullProgress

COMMIT = "c" * 40
REPO = "nobody/tiny"


class HubServer:
    """Serves one repository.

    Attributes:
        files: Path in the repository to content; `.safetensors` are told as large files.
        status: What the repository's description is answered with.
        broken: A file that cannot be had.
        served: Every file sent.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.status = 200
        self.broken = ""
        self.served: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0]
        if path.startswith(f"/api/models/{REPO}"):
            if self.status != 200:
                code = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}.get(self.status, "")
                return self.status, {"X-Error-Code": code}, b"{}"
            info = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": []}
            body = [self._entry(name) for name in self.files] if "/tree/" in path else info
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        prefix = f"/{REPO}/resolve/{COMMIT}/"
        if path.startswith(prefix) and (name := path.removeprefix(prefix)) in self.files:
            if name == self.broken:
                return 403, {}, b""
            etag = self._digest(name)
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, self.files[name]
        return (200, {}, b"") if path == "/" else (404, {"X-Error-Code": "EntryNotFound"}, b"")

    def _digest(self, name: str) -> str:
        large = name.endswith(".safetensors")
        return (hashlib.sha256 if large else hashlib.sha1)(self.files[name]).hexdigest()

    def _entry(self, name: str) -> dict[str, Any]:
        size = len(self.files[name])
        entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": self._digest(name)}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": self._digest(name), "size": size, "pointerSize": 100}
        return entry

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def _send(self, *, with_body: bool) -> None:
                status, headers, body = server.answer(self.path)
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(key, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)
                    if "/resolve/" in self.path and status == 200:
                        server.served.append(self.path.rpartition("/")[2])

            def do_GET(self) -> None:
                self._send(with_body=True)

            def do_HEAD(self) -> None:
                self._send(with_body=False)

        return Handler


@pytest.fixture
def server(make_folder: Any, tmp_path: Path) -> Iterator[HubServer]:
    folder = make_folder(tmp_path / "source")
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    hub = HubServer(files | {"README.md": b"no", "pytorch_model.bin": b"no", "onnx/config.json": b"no"})
    yield hub
    hub.close()


@pytest.fixture
def hub(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return Hub(endpoint=server.root, cache_dir=tmp_path / "hub", offline=False)


def test_only_the_files_of_a_model_come_and_stay(hub: Hub, server: HubServer, tmp_path: Path) -> None:
    assert hub.reachable()
    assert hub.cached(REPO) is None
    reports: list[PullProgress] = []
    folder = hub.download(REPO, progress=reports.append)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]
    total = sum(len(server.files[n]) for n in ("config.json", "model.safetensors", "tokenizer.json"))
    assert {r.total for r in reports} == {total}
    assert max(r.done for r in reports) == total
    server.close()
    assert hub.cached(REPO) == folder
    hub.verify(folder)


def test_interrupted_download_is_no_model_and_is_continued(hub: Hub, server: HubServer) -> None:
    server.broken = "model.safetensors"
    with pytest.raises(ModelError, match="could not be fetched") as caught:
        hub.download(REPO)
    assert "continues where it stopped" in str(caught.value.hint)
    assert hub.cached(REPO) is None
    server.broken = ""
    server.served.clear()
    assert hub.download(REPO) == hub.cached(REPO)
    assert "model.safetensors" in server.served


def test_damage_in_the_cache_is_found_and_repaired(hub: Hub, server: HubServer) -> None:
    folder = hub.download(REPO)
    blob = (folder / "model.safetensors").resolve()
    body = bytearray(blob.read_bytes())
    body[-1] ^= 1
    blob.write_bytes(body)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        hub.verify(folder)
    with pytest.raises(ModelError, match="is damaged"):
        Hub(endpoint="http://127.0.0.1:9", cache_dir=folder.parents[2], offline=False).pull(REPO)
    assert blob.exists()  # nobody is there to replace it
    assert hub.pull(REPO) == folder
    hub.verify(folder)
    served = len(server.served)
    assert hub.pull(REPO) == folder
    assert len(server.served) == served


@pytest.mark.parametrize(("status", "told"), [(401, "has no model"), (403, "gated"), (404, "has no model")])
def test_hub_that_refuses(hub: Hub, server: HubServer, status: int, told: str) -> None:
    server.status = status
    with pytest.raises(ModelError, match=told):
        hub.download(REPO)


def test_repository_without_weights(hub: Hub, server: HubServer) -> None:
    del server.files["model.safetensors"]
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        hub.download(REPO)


def test_full_disk_is_seen_before_anything_is_fetched(
    hub: Hub, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(ModelError, match=r"0\.00 GB free, 0\.07 GB are needed") as caught:
        hub.download(REPO)
    assert "HF_HOME" in str(caught.value.hint)
    assert server.served == []


def test_no_network(tmp_path: Path) -> None:
    dead = Hub(endpoint="http://127.0.0.1:9", cache_dir=tmp_path, offline=False)
    assert not dead.reachable()
    offline = Hub(endpoint="http://127.0.0.1:9", cache_dir=tmp_path, offline=True)
    assert not offline.reachable()
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        offline.download(REPO)


def test_snapshot_that_lacks_files_is_no_model(hub: Hub) -> None:
    folder = hub.download(REPO)
    (folder / "tokenizer.json").unlink()
    assert hub.cached(REPO) is None
    assert hub.pull(REPO) == folder == hub.cached(REPO)


def test_reference_cannot_lead_elsewhere(tmp_path: Path, make_folder: Any) -> None:
    make_folder(tmp_path / "elsewhere")
    repo = tmp_path / "hub" / "models--nobody--tiny"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("../../../elsewhere")
    assert Hub(cache_dir=tmp_path / "hub", offline=True).cached(REPO) is None


@pytest.mark.parametrize("ref", ["", "zz", "\xff"])
def test_damaged_cache_is_no_model(tmp_path: Path, ref: str) -> None:
    refs = tmp_path / "models--nobody--tiny" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(ref, encoding="latin-1")
    assert Hub(cache_dir=tmp_path, offline=True).cached(REPO) is None
