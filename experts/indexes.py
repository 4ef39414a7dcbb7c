"""Where a wheel can be downloaded from: the package indexes the user's pip is set up with.

Sources: PEP 503 (simple repository API, HTML) and PEP 691 (the same in JSON).
"""

from __future__ import annotations

import ast
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import httpx

DEFAULT_INDEX: Final = "https://pypi.org/simple"
"""The index pip asks when it is told no other."""

ACCEPT: Final = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
"""Content types in order of preference, as PEP 691 asks installers to send them."""

MAX_PAGE_BYTES: Final = 64 * 2**20
"""Longest project page that is read; the longest on the public index are below 20 MB."""

PIP_CONFIG_TIMEOUT_S: Final = 60.0
"""Seconds `pip config list` may take; it takes under one, unless the machine is very busy."""

CONNECT_TIMEOUT_S: Final = 10.0
"""Seconds to wait for a connection to an index or file host."""

READ_TIMEOUT_S: Final = 60.0
"""Seconds without a single byte after which a download counts as stuck."""


class IndexUnusable(Exception):
    """No index could serve the file the direct way; `pip download` may still manage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSettings:
    """What pip is told about indexes.

    Attributes:
        urls: Simple-API roots over HTTP(S), the main one first. May hold credentials: never show them.
        cert: File or folder with the certificate authorities to trust, if set.
        proxy: Proxy for every request, if set.
    """

    urls: tuple[str, ...] = (DEFAULT_INDEX,)
    cert: str | None = None
    proxy: str | None = None


def without_credentials(url: str) -> str:
    """The URL without user name and password, fit to be shown."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


def _pip_config() -> dict[str, str]:
    """Every option pip sees, by name; the more specific section wins, as in pip: environment, download, global."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    try:
        done = subprocess.run(  # a fixed command line, no shell
            command, capture_output=True, text=True, timeout=PIP_CONFIG_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if done.returncode != 0:
        return {}
    found: dict[str, dict[str, str]] = {"global": {}, "download": {}, ":env:": {}}
    for line in done.stdout.splitlines():
        match = re.fullmatch(r"([^.]+)\.([^=]+)=(.*)", line)
        if match and match[1] in found:
            try:
                found[match[1]][match[2]] = str(ast.literal_eval(match[3]))
            except (ValueError, SyntaxError):
                continue
    return found["global"] | found["download"] | found[":env:"]


def _environment_config(environ: Mapping[str, str]) -> dict[str, str]:
    """Pip's own variables, for environments that have no pip in them."""
    prefix = "PIP_"
    return {k[len(prefix) :].lower().replace("_", "-"): v for k, v in environ.items() if k.startswith(prefix)}


def pip_settings(environ: Mapping[str, str] | None = None) -> IndexSettings:
    """Reads pip's configuration (files and environment) by asking pip; blocks for about half a second.

    Index URLs that are not HTTP are left out: `pip download` serves those.
    """
    environ = os.environ if environ is None else environ
    config = _pip_config() or _environment_config(environ)
    if config.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        urls: list[str] = []
    else:
        urls = config.get("index-url", DEFAULT_INDEX).split() + config.get("extra-index-url", "").split()
    cert = config.get("cert") or environ.get("SSL_CERT_FILE") or environ.get("REQUESTS_CA_BUNDLE")
    return IndexSettings(
        urls=tuple(u.rstrip("/") for u in urls if urlsplit(u).scheme in {"http", "https"}),
        cert=cert or None,
        proxy=config.get("proxy") or None,
    )


def open_client(settings: IndexSettings) -> httpx.Client:
    """An HTTP client that trusts and goes through what pip is told to.

    Raises:
        IndexUnusable: If the certificate file cannot be loaded.
    """
    verify: ssl.SSLContext | bool = True
    if settings.cert:
        is_folder = Path(settings.cert).is_dir()
        try:
            verify = ssl.create_default_context(
                cafile=None if is_folder else settings.cert, capath=settings.cert if is_folder else None
            )
        except (OSError, ssl.SSLError) as error:
            raise IndexUnusable(f"the certificate file {settings.cert} cannot be loaded: {error}") from error
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    return httpx.Client(verify=verify, proxy=settings.proxy, timeout=timeout, follow_redirects=True)


class _Anchors(HTMLParser):
    """Collects the links of a PEP 503 page."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.base = base
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if href and tag == "base":
            self.base = urljoin(self.base, href)
        elif href and tag == "a":
            self.links.append(urljoin(self.base, href))


def _links_html(page: httpx.Response, body: bytes) -> list[str]:
    anchors = _Anchors(str(page.url))
    anchors.feed(body.decode(page.encoding or "utf-8", errors="replace"))
    return anchors.links


def _links_json(page: httpx.Response, body: bytes) -> list[str]:
    files = httpx.Response(200, content=body).json()["files"]
    return [urljoin(str(page.url), str(file["url"])) for file in files]


_READERS: Final[Mapping[str, Callable[[httpx.Response, bytes], list[str]]]] = {
    "application/vnd.pypi.simple.v1+json": _links_json,
    "application/vnd.pypi.simple.v1+html": _links_html,
    "text/html": _links_html,
}


def _project_links(client: httpx.Client, index: str, project: str) -> list[str]:
    name = re.sub(r"[-_.]+", "-", project).lower()
    with client.stream("GET", f"{index}/{name}/", headers={"Accept": ACCEPT}) as page:
        if page.status_code != 200:
            raise IndexUnusable(f"HTTP {page.status_code}")
        content_type = page.headers.get("content-type", "").partition(";")[0].strip().lower()
        reader = _READERS.get(content_type)
        if reader is None:
            raise IndexUnusable(f"content type {content_type!r} is none of {', '.join(_READERS)}")
        body = bytearray()
        for block in page.iter_bytes():
            body += block
            if len(body) > MAX_PAGE_BYTES:
                raise IndexUnusable(f"its page is longer than {MAX_PAGE_BYTES} bytes")
        try:
            return reader(page, bytes(body))
        except (ValueError, KeyError, TypeError) as error:
            raise IndexUnusable(f"its page cannot be read: {error!r}") from error


def find_file(client: httpx.Client, settings: IndexSettings, project: str, filename: str) -> str:
    """The URL of a file of a project, from the first index that lists it.

    Args:
        client: From `open_client`.
        settings: The indexes to ask, in order.
        project: Name of the project.
        filename: The exact file wanted.

    Raises:
        IndexUnusable: If no index lists it; the text says what each one answered.
    """
    answers = []
    for index in settings.urls:
        try:
            links = _project_links(client, index, project)
        except (httpx.HTTPError, httpx.InvalidURL, IndexUnusable) as error:
            answers.append(f"{without_credentials(index)}: {error or type(error).__name__}")
            continue
        for link in links:
            if unquote(urlsplit(link).path).rpartition("/")[2] == filename:
                return urldefrag(link).url
        answers.append(f"{without_credentials(index)}: lists no {filename}")
    raise IndexUnusable("; ".join(answers) or "pip is set up with no index over HTTP")
