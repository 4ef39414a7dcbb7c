"""API keys: made, kept as hashes, asked for, revoked."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agora.errors import ConfigError, InvalidRequest
from agora.serve import keys
from agora.serve.errors import ApiError
from agora.serve.keys import ANYBODY, Keyring, Role, new_key, read_keys, remove_key


def test_a_key_is_kept_as_a_hash_that_only_its_owner_reads(tmp_path: Path) -> None:
    file = tmp_path / "keys" / "keys.json"
    key = new_key(file, "laptop")
    assert key.startswith("agora-")
    assert len(key) >= 40
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [k.name for k in read_keys(file)] == ["laptop"]


def test_the_holder_of_a_key_is_known_by_it(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    mine, theirs = new_key(file, "me"), new_key(file, "node-b", role=Role.NEIGHBOUR)
    ring = Keyring(file)
    assert ring.caller(f"Bearer {mine}").name == "me"
    assert ring.caller(f"bearer   {theirs} ").role is Role.NEIGHBOUR


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic abc", "agora-abc", "Bearer agora-wrong", "Bearer \udcff"]
)
def test_anything_else_is_refused(tmp_path: Path, header: str | None) -> None:
    file = tmp_path / "keys.json"
    new_key(file, "me")
    with pytest.raises(ApiError) as refused:
        Keyring(file).caller(header)
    assert refused.value.status == 401


def test_without_a_file_anybody_may_ask() -> None:
    assert Keyring(None).caller(None) is ANYBODY


def test_a_revoked_key_stops_working_while_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "LOOK_AGAIN_S", 0.0)
    file = tmp_path / "keys.json"
    old, kept = new_key(file, "old"), new_key(file, "kept")
    ring = Keyring(file)
    remove_key(file, "old")
    with pytest.raises(ApiError):
        ring.caller(f"Bearer {old}")
    assert ring.caller(f"Bearer {kept}").name == "kept"
    added = new_key(file, "new")
    assert ring.caller(f"Bearer {added}").name == "new"


def test_a_file_that_breaks_while_the_server_runs_locks_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "LOOK_AGAIN_S", 0.0)
    file = tmp_path / "keys.json"
    key = new_key(file, "me")
    ring = Keyring(file)
    good = file.read_text()
    file.write_text('{"keys": [')
    assert ring.caller(f"Bearer {key}").name == "me"
    file.unlink()
    assert ring.caller(f"Bearer {key}").name == "me"
    file.write_text(good.replace('"me"', '"myself"'))
    file.chmod(0o600)
    assert ring.caller(f"Bearer {key}").name == "myself"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"keys": 5}',
        '{"keys": [{"name": "x"}]}',
        '{"keys": [{"name": "x", "sha256": "short"}]}',
        '{"keys": [{"name": "a b", "sha256": "' + "0" * 64 + '"}]}',
        '{"keys": [{"name": "x", "sha256": "' + "0" * 64 + '", "role": "king"}]}',
    ],
)
def test_a_file_that_holds_no_keys_is_refused_at_the_start(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=r"keys\.json"):
        Keyring(file)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    new_key(file, "me")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Keyring(file)


def test_a_missing_file_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="agora keys new"):
        Keyring(tmp_path / "none.json")


def test_names_are_unique_and_sound(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    new_key(file, "me")
    with pytest.raises(InvalidRequest, match="already"):
        new_key(file, "me")
    with pytest.raises(InvalidRequest, match="must match"):
        new_key(file, "a/b")
    with pytest.raises(InvalidRequest, match="there are: me"):
        remove_key(file, "you")


def test_keys_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: new_key(file, f"key-{n}"), range(16)))
    ring = Keyring(file)
    assert {ring.caller(f"Bearer {key}").name for key in made} == {f"key-{n}" for n in range(16)}


def test_there_are_only_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MAX_KEYS", 1)
    file = tmp_path / "keys.json"
    new_key(file, "me")
    with pytest.raises(InvalidRequest, match="limit"):
        new_key(file, "you")
    assert len(json.loads(file.read_text())["keys"]) == 1


async def test_the_gateway_asks_for_a_key(start: Any, tmp_path: Path) -> None:
    key = new_key(tmp_path / "keys.json", "me")
    gateway = await start('[server]\nkeys = "keys.json"')
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/runs", "/v1/agora/card"):
        status, body = await gateway.get(path)
        assert status == 401, path
        assert body["error"]["type"] == "authentication_error"
    async with gateway.http.get(f"{gateway.url}/v1/models") as reply:
        assert reply.headers["WWW-Authenticate"] == "Bearer"
    assert (await gateway.get("/v1/models", Authorization=f"Bearer {key}"))[0] == 200
    assert (await gateway.get("/healthz"))[0] == 200
    assert (await gateway.get("/readyz"))[0] == 200


async def test_the_rate_of_a_key_is_limited(start: Any, tmp_path: Path) -> None:
    key = new_key(tmp_path / "keys.json", "me")
    other = new_key(tmp_path / "keys.json", "other")
    gateway = await start('[server]\nkeys = "keys.json"\nrequests_per_minute = 2')
    told = [await gateway.get("/v1/models", Authorization=f"Bearer {key}") for _ in range(3)]
    assert [status for status, _ in told] == [200, 200, 429]
    assert (await gateway.get("/v1/models", Authorization=f"Bearer {other}"))[0] == 200


async def test_without_keys_only_this_machine_is_served(start: Any) -> None:
    gateway = await start()
    status, body = await gateway.get("/v1/models", Host="evil.example")
    assert status == 403
    assert body["error"]["code"] == "wrong_host"
    for host in ("[::1]evil", "localhost.evil.example", "127.0.0.1.evil.example:80"):
        assert (await gateway.get("/v1/models", Host=host))[0] in (400, 403)
    for host in ("localhost", "127.0.0.1:8711", "[::1]:5"):
        assert (await gateway.get("/v1/models", Host=host))[0] == 200
