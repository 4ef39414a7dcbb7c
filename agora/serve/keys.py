"""API keys: made once, kept as hashes, compared in constant time.

A key is 32 random bytes, so a plain SHA-256 keeps it as well as a slow hash would: there is nothing to guess. The file
is JSON, readable by its owner only; it is read again when it changes, so that a key can be revoked without a restart.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from agora.errors import ConfigError, InvalidRequest
from agora.serve.errors import ApiError
from agora.types.words import ID

PREFIX: Final = "agora-"
"""What every key begins with, so that scanners for leaked secrets can find one."""

KEY_BYTES: Final = 32
"""Random bytes of a key: 256 bits, as much as its hash keeps."""

MAX_KEYS: Final = 1_000
"""Keys of one server. Every one is compared with at every request: 1,000 of them take 0.2 ms."""

MAX_FILE_BYTES: Final = 1_000_000
"""Bytes of a file of keys: `MAX_KEYS` of them take a quarter of that."""

LOOK_AGAIN_S: Final = 1.0
"""Seconds after which the file is looked at again: how long a revoked key may still work."""

LOCK_S: Final = 10.0
"""Seconds to wait for another process that changes the file; it takes a few milliseconds."""

_HASH = re.compile(r"[0-9a-f]{64}")


class Role(StrEnum):
    """Whose key it is: a client's, or that of a neighbouring node, whose work must not starve this node's own."""

    CLIENT = "client"
    NEIGHBOUR = "neighbour"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key as it is kept.

    Attributes:
        name: What to call its holder in logs and metrics.
        sha256: Hash of the key, in hexadecimal digits.
        role: Whose it is.
        created_at: Wall-clock seconds since the epoch.
    """

    name: str
    sha256: str
    role: Role = Role.CLIENT
    created_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sent a request."""

    name: str
    role: Role = Role.CLIENT


ANYBODY: Final = Caller(name="anybody")
"""The caller of a server that asks for no key."""


class Keyring:
    """The keys that a server accepts.

    Args:
        file: Where they are kept; None for a server that asks for none.

    Raises:
        ConfigError: If the file cannot be read, is not one, or may be read by others.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._holders: tuple[tuple[bytes, Caller], ...] = ()
        self._seen: tuple[int, int, int] | None = None
        self._looked = -LOOK_AGAIN_S
        if file is not None:
            self._read(file)

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return self._file is not None

    def caller(self, authorization: str | None) -> Caller:
        """Who holds the key of an `Authorization: Bearer …` header.

        Raises:
            ApiError: 401, if there is no key or it is unknown.
        """
        if self._file is None:
            return ANYBODY
        if time.monotonic() - self._looked >= LOOK_AGAIN_S:
            self._look_again(self._file)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                401,
                "no API key was sent",
                code="missing_api_key",
                hint="send the header 'Authorization: Bearer KEY'; 'agora keys new NAME' makes a key",
            )
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest().encode()
        found: Caller | None = None
        for known, caller in self._holders:
            # All of them, found or not: how long it takes tells nothing.
            if hmac.compare_digest(digest, known):
                found = caller
        if found is None:
            raise ApiError(401, "the API key is unknown", code="invalid_api_key", hint="check it; it may be revoked")
        return found

    def _look_again(self, file: Path) -> None:
        self._looked = time.monotonic()
        try:
            seen = _identity(file.stat())
        except OSError:
            # Gone for the moment while somebody edits it; the keys that were known stay.
            return
        if seen != self._seen:
            try:
                self._read(file)
            except ConfigError:
                # Half written, or broken by hand. To lock everybody out would help nobody; it is read again soon.
                self._seen = None

    def _read(self, file: Path) -> None:
        self._looked = time.monotonic()
        keys, seen = _load(file)
        self._holders = tuple((k.sha256.encode(), Caller(name=k.name, role=k.role)) for k in keys)
        self._seen = seen


def read_keys(file: Path) -> list[Key]:
    """The keys of a file, in the order they were made; none if there is no such file.

    Raises:
        ConfigError: If it cannot be read, is not a file of keys, or may be read by others.
    """
    return _load(file)[0] if file.exists() else []


def new_key(file: Path, name: str, *, role: Role = Role.CLIENT) -> str:
    """Makes a key and keeps its hash.

    Returns:
        The key. It is kept nowhere: who loses it needs a new one.

    Raises:
        InvalidRequest: If the name is taken or malformed, or there are too many keys.
        ConfigError: If the file cannot be read or written.
    """
    if ID.fullmatch(name) is None:
        raise InvalidRequest(f"key name {name!r} must match {ID.pattern}")
    with _alone(file):
        keys = read_keys(file)
        if any(k.name == name for k in keys):
            raise InvalidRequest(
                f"there is already a key named {name!r}", hint="remove it first, or choose another name"
            )
        if len(keys) >= MAX_KEYS:
            raise InvalidRequest(f"there are {len(keys)} keys, which is the limit", hint="remove some")
        key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
        kept = Key(name=name, sha256=hashlib.sha256(key.encode()).hexdigest(), role=role, created_at=time.time())
        _write(file, [*keys, kept])
    return key


def remove_key(file: Path, name: str) -> None:
    """Revokes a key; running servers notice within a second.

    Raises:
        InvalidRequest: If there is none of that name.
        ConfigError: If the file cannot be read or written.
    """
    with _alone(file):
        keys = read_keys(file)
        left = [k for k in keys if k.name != name]
        if len(left) == len(keys):
            some = ", ".join(k.name for k in keys) or "none"
            raise InvalidRequest(f"there is no key named {name!r}; there are: {some}")
        _write(file, left)


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Keeps other processes from changing the file: of two keys made at the same time, none is lost."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f"{file.name}.lock"), timeout=LOCK_S):
            yield
    except Timeout:
        raise ConfigError(f"{file}: another process is changing it", hint="try again") from None
    except OSError as e:
        raise ConfigError(f"cannot write the file of keys {file}: {e.strerror}") from e


def _identity(of: os.stat_result) -> tuple[int, int, int]:
    return of.st_ino, of.st_mtime_ns, of.st_size


def _load(file: Path) -> tuple[list[Key], tuple[int, int, int]]:
    try:
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            if os.name == "posix" and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigError(f"{file}: may be read by others than its owner", hint=f"chmod 600 {file}")
            text = opened.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise ConfigError(
            f"cannot read the file of keys {file}: {e.strerror}", hint="make one with: agora keys new NAME"
        ) from e
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"{file}: larger than {MAX_FILE_BYTES:,} bytes")
    try:
        plain = json.loads(text)["keys"]
        return [_key(k) for k in plain], _identity(status)
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{file}: not a file of keys: {e}", hint="make one with: agora keys new NAME") from None


def _key(plain: Any) -> Key:
    key = Key(**{**plain, "role": Role(plain.get("role", Role.CLIENT))})
    if not isinstance(key.name, str) or ID.fullmatch(key.name) is None:
        raise ValueError(f"name {key.name!r}")
    if not isinstance(key.sha256, str) or _HASH.fullmatch(key.sha256) is None:
        raise ValueError(f"the hash of {key.name!r} is none")
    return key


def _write(file: Path, keys: list[Key]) -> None:
    text = json.dumps({"keys": [asdict(k) for k in keys]}, indent=2) + "\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Beside it and moved into its place: a server that reads it now sees the old one or the new one. Made by
        # mkstemp, nobody else can ever read it.
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(handle, "w") as out:
                out.write(text)
                out.flush()
                os.fsync(out.fileno())
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as e:
        raise ConfigError(f"cannot write the file of keys {file}: {e.strerror}") from e
