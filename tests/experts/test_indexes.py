from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from experts import indexes
from experts.indexes import (
    DEFAULT_INDEX,
    IndexSettings,
    IndexUnusable,
    find_file,
    open_client,
    pip_settings,
    without_credentials,
)

FILENAME = "tiny_model-1.0-py3-none-any.whl"


@pytest.fixture
def no_pip_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """An environment in which pip finds no configuration but what a test sets."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT", "PIP_PROXY", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    config = tmp_path / "pip.conf"
    config.write_text("[global]\ntimeout = 7\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    return monkeypatch


def test_pip_is_asked_for_its_configuration(no_pip_config: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://a.example/simple/\ncert = /tmp/ca.pem\n"
        "extra-index-url =\n  https://b.example/simple\n  file:///opt/wheels\n"
        "[download]\ncert = /tmp/other.pem\n[install]\nindex-url = https://no.example\n"
    )
    found = pip_settings()
    assert found.urls == ("https://a.example/simple", "https://b.example/simple")
    assert found.cert == "/tmp/other.pem"
    no_pip_config.setenv("PIP_INDEX_URL", "https://env.example/simple")
    no_pip_config.setenv("PIP_PROXY", "http://proxy.example:1")
    found = pip_settings()
    assert found.urls[0] == "https://env.example/simple"
    assert found.proxy == "http://proxy.example:1"


def test_without_pip_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "_pip_config", dict)
    assert pip_settings({}).urls == (DEFAULT_INDEX,)
    found = pip_settings({"PIP_INDEX_URL": "https://x.example/s/", "SSL_CERT_FILE": "/ca"})
    assert (found.urls, found.cert) == (("https://x.example/s",), "/ca")
    assert pip_settings({"PIP_NO_INDEX": "1"}).urls == ()


@pytest.mark.parametrize("page_type", ["application/vnd.pypi.simple.v1+json", "text/html; charset=utf-8"])
def test_file_is_found_on_json_and_html_pages(packages: Any, tiny: Any, page_type: str) -> None:
    packages.page_type = page_type
    settings = IndexSettings(urls=(packages.index,))
    with open_client(settings) as client:
        assert find_file(client, settings, "Tiny.Model", FILENAME) == f"{packages.root}/files/{FILENAME}"


def test_second_index_is_asked_and_every_answer_is_told(packages: Any, tiny: Any) -> None:
    settings = IndexSettings(urls=("http://user:secret@127.0.0.1:9/simple", packages.index))
    with open_client(settings) as client:
        assert find_file(client, settings, "tiny-model", FILENAME).endswith(FILENAME)
        with pytest.raises(IndexUnusable) as caught:
            find_file(client, settings, "tiny-model", "tiny_model-2.0-py3-none-any.whl")
        assert "lists no tiny_model-2.0" in str(caught.value)
        assert "127.0.0.1:9" in str(caught.value)
        assert "secret" not in str(caught.value)
        with pytest.raises(IndexUnusable, match="HTTP 404"):
            find_file(client, settings, "other", FILENAME)
        packages.page_type = "application/octet-stream"
        with pytest.raises(IndexUnusable, match="content type"):
            find_file(client, settings, "tiny-model", FILENAME)


@pytest.mark.parametrize("body", [b"[1]", b'{"files": [{}]}', b"<html>", b"\xff"])
def test_garbage_for_a_page(monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    reply = httpx.Response(200, content=body, headers={"content-type": "application/vnd.pypi.simple.v1+json"})
    settings = IndexSettings(urls=("https://x.example",))
    with (
        httpx.Client(transport=httpx.MockTransport(lambda _: reply)) as client,
        pytest.raises(IndexUnusable, match="cannot be read"),
    ):
        find_file(client, settings, "p", "p-1.whl")


def test_endless_page_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "MAX_PAGE_BYTES", 100)
    reply = httpx.Response(200, content=b"x" * 101, headers={"content-type": "text/html"})
    with (
        httpx.Client(transport=httpx.MockTransport(lambda _: reply)) as client,
        pytest.raises(IndexUnusable, match="longer than"),
    ):
        find_file(client, IndexSettings(urls=("https://x.example",)), "p", "p-1.whl")


def test_no_index_and_bad_certificate(tmp_path: Path) -> None:
    settings = IndexSettings(urls=())
    with open_client(settings) as client, pytest.raises(IndexUnusable, match="no index over HTTP"):
        find_file(client, settings, "p", "p-1.whl")
    with pytest.raises(IndexUnusable, match=r"none\.pem"):
        open_client(IndexSettings(cert=str(tmp_path / "none.pem")))


def test_urls_are_shown_without_credentials() -> None:
    assert without_credentials("https://u:p@h.example:1/s/?token=t#f") == "https://h.example:1/s/"
