"""HTTP to a language-model server: time-outs that say which, retries where they are safe, and bounded replies."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import socket
import ssl
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from agora.errors import (
    BackendError,
    BackendTimeout,
    BadReply,
    InvalidRequest,
    Overloaded,
    Rejected,
    Unavailable,
)
from experts.http_reply import Patience, Reply
from experts.openai_wire import error_of, parse_json, shown
from experts.retry import Retry, retry_after_s
from experts.sockets import Sockets

_log = logging.getLogger(__name__)

MAX_ERROR_BYTES: Final = 64 * 1024
"""Bytes read of an error's body; OpenAI's and vLLM's have hundreds."""

KEPT_ERROR_CHARS: Final = 2_000
"""Characters of an error's body that are kept: enough for every error of vLLM with a validation report."""

ERROR_BODY_S: Final = 1.0
"""Seconds to wait for the body of an error. It comes with the headers; the status alone says enough without it."""

MIN_SECRET_CHARS: Final = 6
"""Shorter header values are taken for settings, not for keys: hiding every "1" would hide what went wrong."""

HINTS: Final[Mapping[int, str]] = {
    401: "check the API key",
    403: "the API key may not use this model; check its rights",
    404: "check the url and the model's name; probe() lists what is served",
    413: "the prompt is too long",
}
"""What to do next, by HTTP status."""

_ASK: Final[Mapping[str, str]] = {"Accept": "application/json, text/event-stream"}
_SEND: Final[Mapping[str, str]] = {**_ASK, "Content-Type": "application/json"}


class _Again(Exception):
    """Not an error but a request: the try failed in a way that makes another one safe."""

    def __init__(self, error: BackendError, after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.after_s = after_s


class Http:
    """Speaks to one server; opens its connections on first use, on the loop that uses it first.

    Args:
        url: Base of the API, as `normal_url` returns it.
        backend: The backend's name, for errors.
        headers: Sent with every request. Their values never appear in an error or a log.
        connect_timeout_s: Seconds to connect, name look-up and TLS included.
        retry: When to ask again.
        max_reply_bytes: Largest body taken.
        rng: Where the jitter comes from.
        local_address: IP address of this machine that connections go out from; None for any.
    """

    def __init__(
        self,
        url: str,
        *,
        backend: str,
        headers: Mapping[str, str],
        connect_timeout_s: float,
        retry: Retry,
        max_reply_bytes: int,
        rng: random.Random,
        local_address: str | None = None,
    ) -> None:
        self._url = url
        self._local = None if local_address is None else (local_address, 0)
        self._backend = backend
        self._headers = {"User-Agent": "agora-llm", "Accept-Encoding": "identity", **headers}
        self._secrets = _secrets_in(headers)
        self._connect_timeout_s = connect_timeout_s
        self._retry = retry
        self._limit = max_reply_bytes
        self._rng = rng
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = asyncio.Event()
        self._sockets = Sockets()
        self._urls: dict[tuple[str, bool], URL] = {}
        self._replies: weakref.WeakSet[aiohttp.ClientResponse] = weakref.WeakSet()

    async def post(
        self,
        path: str,
        body: Mapping[str, Any],
        patience: Patience,
        *,
        streamed: bool = False,
        root: bool = False,
        retry: bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Sends a JSON body; returns the reply once it has a good status.

        Args:
            path: Below the base of the API.
            body: Plain JSON values.
            patience: How long it may take.
            streamed: Whether the reply is a stream, so that the time for the first token counts.
            root: Whether `path` is below the server's root, outside `/v1`.
            retry: Whether another try may be made where that is safe.
            headers: Sent with this request besides those of the server.

        Raises:
            BackendTimeout: If the time is up; it says for what.
            Overloaded: If the server asks to be left alone for longer than may be waited.
            Rejected: If the server refuses the request.
            Unavailable: If it cannot be reached, or fails.
            BadReply: If what comes back is not HTTP.
        """
        try:
            payload = json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as e:
            raise InvalidRequest(f"the request cannot be written as JSON: {e}") from None
        return await self.send(path, payload, patience, streamed=streamed, root=root, retry=retry, headers=headers)

    async def send(
        self,
        path: str,
        payload: bytes,
        patience: Patience,
        *,
        streamed: bool = False,
        root: bool = False,
        retry: bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Like `post`, with a body that is JSON already."""
        return await self._ask(
            "POST", path, payload, patience, streamed=streamed, root=root, retry=retry, headers=headers
        )

    async def get(
        self, path: str, patience: Patience, *, root: bool = False, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Like `post`, without a body."""
        return await self._ask("GET", path, None, patience, streamed=False, root=root, retry=True, headers=headers)

    async def aclose(self) -> None:
        """Closes the connections; requests that run or wait fail with `Unavailable`."""
        self._closing.set()
        for response in list(self._replies):
            # The session's own end does not wake those who are reading a body.
            response.close()
        if self._session is not None:
            await self._session.close()
            self._sockets.end()

    @contextmanager
    def redacting(self) -> Iterator[None]:
        """Takes the key out of every error that leaves the block, should the server have repeated it."""
        try:
            yield
        except BackendError as e:
            self.redact(e)
            raise

    def redact(self, error: BackendError) -> None:
        """Takes the key out of an error."""
        error.message = self._redacted(error.message)
        error.args = (error.message,)
        if isinstance(error, Rejected):
            error.body = self._redacted(error.body)

    def _redacted(self, text: str) -> str:
        return self._secrets.sub("***", text) if self._secrets is not None else text

    async def _ask(
        self,
        method: str,
        path: str,
        payload: bytes | None,
        patience: Patience,
        *,
        streamed: bool,
        root: bool,
        retry: bool,
        headers: Mapping[str, str] | None,
    ) -> Reply:
        url = self._urls.get((path, root))
        if url is None:
            url = URL(f"{self._url.removesuffix('/v1') if root else self._url}/{path}")
            self._urls[path, root] = url
        tried = 0
        while True:
            session = self._open_session()
            tried += 1
            patience.begin_try(streamed=streamed)
            try:
                response = await self._try(session, method, url, payload, patience, headers)
            except _Again as again:
                wait = self._retry.wait(tried, self._rng, again.after_s) if retry else None
                if wait is None or asyncio.get_running_loop().time() + wait >= patience.until:
                    raise again.error from None
                _log.info("%s; try %d follows in %.2f s", self._redacted(str(again.error)), tried + 1, wait)
                await self._sleep(wait)
            else:
                self._replies.add(response)
                return Reply(response, patience, backend=self._backend, limit=self._limit, closing=self._closing)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._closing.is_set():
            raise Unavailable("the backend was closed", backend=self._backend)
        loop = asyncio.get_running_loop()
        if self._session is None:
            self._loop = loop
            self._session = aiohttp.ClientSession(
                # How many requests run at once is the backend's to limit, where it also shows in its load.
                connector=aiohttp.TCPConnector(limit=0, local_addr=self._local, socket_factory=self._sockets.make),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_timeout_s),
                headers=self._headers,
            )
        elif self._loop is not loop:
            raise BackendError(
                "it was first used on another event loop",
                backend=self._backend,
                hint="make one backend per asyncio.run",
            )
        return self._session

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            return
        raise Unavailable("the backend was closed", backend=self._backend)

    async def _try(
        self,
        session: aiohttp.ClientSession,
        method: str,
        url: URL,
        payload: bytes | None,
        patience: Patience,
        headers: Mapping[str, str] | None,
    ) -> aiohttp.ClientResponse:
        """One try: the reply with a good status, or an error; `_Again` if another try is safe."""
        usual = _ASK if payload is None else _SEND
        headers = {**headers, **usual} if headers else usual
        try:
            async with patience.wait(first=True):
                try:
                    # A redirect would carry the prompt, and maybe the key, to another place: it is an error.
                    response = await session.request(method, url, data=payload, headers=headers, allow_redirects=False)
                except aiohttp.ConnectionTimeoutError:
                    raise BackendTimeout(
                        f"no connection to {self._url} within {self._connect_timeout_s:g} s", backend=self._backend
                    ) from None
        except (aiohttp.ClientError, OSError) as e:
            self._no_reply(e)
        if not 200 <= response.status < 300:
            try:
                await self._refuse(response, patience)
            finally:
                response.close()
        return response

    def _no_reply(self, error: Exception) -> NoReturn:
        """Says what kept a reply from coming; none of its bytes has been seen, unless it is garbage."""
        if self._closing.is_set():
            raise Unavailable("the backend was closed", backend=self._backend) from None
        where = f"{self._url}: {_reason(error)}"
        if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
            raise Unavailable(
                f"no secure connection to {where}", backend=self._backend, hint="check the server's certificate"
            ) from None
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            raise Unavailable(
                f"no such host: {where}", backend=self._backend, hint="check the url and the network"
            ) from None
        if isinstance(error, aiohttp.ClientConnectorError):
            hint = "check that the server is running and the url is right"
            raise _Again(Unavailable(f"cannot connect to {where}", backend=self._backend, hint=hint))
        if isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str):
            raise BadReply("the connection broke within the reply's headers", backend=self._backend) from None
        if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError | OSError):
            raise _Again(Unavailable(f"no reply from {where}", backend=self._backend))
        # A parser's words about the bytes it did not expect help nobody but its authors.
        raise BadReply(
            f"no HTTP reply from {self._url}: what came is not valid HTTP",
            backend=self._backend,
            hint="check that the url is that of an HTTP server, and its port",
        ) from None

    async def _refuse(self, response: aiohttp.ClientResponse, patience: Patience) -> NoReturn:
        """Turns a bad status into an error that keeps the server's own words."""
        status = response.status
        body = await self._error_body(response, patience)
        message, code = "", ""
        try:
            message, code = error_of(parse_json(body, backend=self._backend))
        except BadReply:
            message = "" if not body.strip() or body.lstrip().startswith(b"<") else shown(body)
        # A used-up quota is a 429 too, at OpenAI; waiting does not fill it.
        no_quota = code == "insufficient_quota"
        said = " ".join((message or response.reason or "").split())[:KEPT_ERROR_CHARS]
        text = f"HTTP {status}: {_printable(said) or 'no reason given'}"
        hint = HINTS.get(status)
        if 300 <= status < 400:
            target = response.headers.get("Location", "").partition("?")[0]
            text, hint = f"HTTP {status}: the server redirects to {shown(target)}", "set the url to where the API is"
        after_s = retry_after_s(response.headers.get("Retry-After"), date=response.headers.get("Date"))
        error: BackendError
        if (status == 429 and not no_quota) or (status in (503, 529) and after_s is not None):
            error = Overloaded(text, backend=self._backend, retry_after_s=after_s)
        elif status >= 500 or status in (408, 425):
            error = Unavailable(text, backend=self._backend)
        else:
            kept = body.decode("utf-8", "replace")[:KEPT_ERROR_CHARS]
            error = Rejected(text, backend=self._backend, status=status, body=kept, hint=hint)
        if status in self._retry.statuses and not no_quota:
            raise _Again(error, after_s)
        raise error

    async def _error_body(self, response: aiohttp.ClientResponse, patience: Patience) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout_at(min(asyncio.get_running_loop().time() + ERROR_BODY_S, patience.until)):
                while len(body) < MAX_ERROR_BYTES and (piece := await response.content.readany()):
                    body += piece
        except (aiohttp.ClientError, OSError):
            # The status alone says enough; a body that breaks off must not hide it.
            _log.debug("the body of HTTP %d broke off after %d bytes", response.status, len(body))
        return bytes(body[:MAX_ERROR_BYTES])


def _reason(error: Exception) -> str:
    """Why there is no reply, in the words of the operating system or of TLS, without those of the HTTP library."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        error = error.certificate_error
    elif isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or "TLS failed").replace("_", " ").lower()
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the server closed the connection"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return str(getattr(error, "strerror", None) or "the connection failed")


def _printable(text: str) -> str:
    """The text with every character escaped that would do something other than be shown."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _secrets_in(headers: Mapping[str, str]) -> re.Pattern[str] | None:
    """Finds the headers' values in a text, also where the text was cut in their second half."""
    values = [v.removeprefix("Bearer ") for v in headers.values()]
    heads = [re.escape(v[: max(MIN_SECRET_CHARS, len(v) // 2)]) for v in values if len(v) >= MIN_SECRET_CHARS]
    return re.compile(f"(?:{'|'.join(heads)})[^\\s'\"]*") if heads else None


def normal_url(url: str) -> str:
    """The base of an OpenAI-compatible API, without a slash at its end.

    `http://host:8000`, `http://host:8000/`, `http://host:8000/v1` and `http://host:8000/v1/chat/completions` all mean
    `http://host:8000/v1`. A path that names a version (`/openai/v1`, `/v1beta/openai`) is kept as it is.

    Raises:
        InvalidRequest: If it is no http(s) URL of a host, or carries a user, a query or a fragment.
    """
    hint = "write it like http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError as e:
        raise InvalidRequest(f"url {url!r} cannot be read: {e}", hint=hint) from None
    if parts.username is not None or parts.password is not None:
        raise InvalidRequest("the url holds a user or a password", hint="give it as api_key or headers")
    if parts.scheme not in ("http", "https"):
        raise InvalidRequest(f"url {url!r} must begin with http:// or https://", hint=hint)
    if not host or any(c.isspace() for c in parts.netloc) or port == 0:
        raise InvalidRequest(f"url {url!r} names no host", hint=hint)
    if parts.query or parts.fragment:
        raise InvalidRequest("the url holds a query or a fragment", hint=hint)
    path = parts.path.rstrip("/")
    for endpoint in ("/chat/completions", "/completions"):
        path = path.removesuffix(endpoint)
    versioned = any(s[:1] == "v" and s[1:2].isdigit() for s in path.split("/"))
    return f"{parts.scheme}://{parts.netloc}{path if versioned else path + '/v1'}"
