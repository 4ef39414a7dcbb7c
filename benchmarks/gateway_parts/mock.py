"""An OpenAI-compatible server that answers at once with a fixed text: what stands behind the servers compared.

Raw asyncio, its replies built beforehand, so that it costs far less than what it measures. It prints its URL when it
accepts requests.

    python -m benchmarks.gateway_parts.mock [--port 0]
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from typing import Any, Final

MODEL: Final = "mock"
"""Answers at once."""

PACED: Final = "mock-paced"
"""The same answer; streamed, its tokens come `PACE_S` apart, as those of a model do."""

PACE_S: Final = 0.005
"""Seconds between two tokens of `PACED`: 200 tokens/s, what a GPU gives one request with a small model."""

ANSWER: Final = "Lutetia lies on an island in the river that Romans called Sequana and we the Seine"
TOKENS: Final = tuple(ANSWER.split())
FIRST, LAST = TOKENS[0], TOKENS[-1]
"""What tells that the first token, and the whole answer, have arrived: neither word occurs elsewhere in a reply."""

_USAGE: Final = {"prompt_tokens": 12, "completion_tokens": len(TOKENS), "total_tokens": 12 + len(TOKENS)}
_CREATED: Final = 1_700_000_000
MAX_HEAD: Final = 64 * 1024


def _dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _reply(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        status.encode(),
        len(body),
        body,
    )


def _refusal(status: str, message: str) -> bytes:
    return _reply(_dumps({"error": {"message": message, "type": "invalid_request_error", "code": None}}), status)


def _event(data: bytes) -> bytes:
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(event), event)


def _whole(path: str, model: str) -> bytes:
    chat = path == "/v1/chat/completions"
    said = {"message": {"role": "assistant", "content": ANSWER}} if chat else {"text": ANSWER}
    return _reply(
        _dumps(
            {
                "id": "chatcmpl-1" if chat else "cmpl-1",
                "object": "chat.completion" if chat else "text_completion",
                "created": _CREATED,
                "model": model,
                "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": "stop"}],
                "usage": _USAGE,
            }
        )
    )


def _stream(path: str, model: str, usage: bool) -> tuple[bytes, ...]:
    """The pieces of a streamed reply: head and first token, each further token, and the end."""
    chat = path == "/v1/chat/completions"

    def event(said: dict[str, Any] | None, finish: str | None = None, used: Any = None) -> bytes:
        choices = [] if said is None else [{"index": 0, **said, "logprobs": None, "finish_reason": finish}]
        shape = {
            "id": "chatcmpl-1" if chat else "cmpl-1",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": _CREATED,
            "model": model,
            "choices": choices,
        }
        return _event(_dumps(shape | ({"usage": used} if usage else {})))

    def token(text: str, finish: str | None = None) -> bytes:
        return event({"delta": {"content": text} if text else {}} if chat else {"text": text}, finish)

    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
    if chat:
        head += event({"delta": {"role": "assistant", "content": ""}})
    end = token("", "stop") + (event(None, used=_USAGE) if usage else b"") + _event(b"[DONE]") + b"0\r\n\r\n"
    return (head + token(FIRST), *(token(f" {t}") for t in TOKENS[1:]), end)


class Replies:
    """What is answered, built once, and how often it was."""

    def __init__(self) -> None:
        self.answered = 0
        kinds = [(p, m) for p in ("/v1/chat/completions", "/v1/completions") for m in (MODEL, PACED)]
        self._whole = {k: _whole(*k) for k in kinds}
        self._streams = {(*k, usage): _stream(*k, usage) for k in kinds for usage in (False, True)}
        models = [{"id": m, "object": "model", "created": _CREATED, "owned_by": "mock"} for m in (MODEL, PACED)]
        self._models = _reply(_dumps({"object": "list", "data": models}))

    def to(self, method: str, path: str, body: bytes) -> tuple[tuple[bytes, ...], float]:
        """The pieces of the reply, and the seconds between two of them."""
        if method == "GET" and path == "/v1/models":
            return (self._models,), 0.0
        if method == "GET" and path == "/answered":
            return (_reply(_dumps({"answered": self.answered})),), 0.0
        if method != "POST" or path not in ("/v1/chat/completions", "/v1/completions"):
            return (_refusal("404 Not Found", f"no {method} {path} here"),), 0.0
        try:
            asked = json.loads(body)
            model = asked["model"]
        except (ValueError, KeyError, TypeError):
            return (_refusal("400 Bad Request", "the body is no JSON object with a model"),), 0.0
        if (path, model) not in self._whole:
            return (_refusal("404 Not Found", f"model {model!r} is not served"),), 0.0
        self.answered += 1
        if not asked.get("stream"):
            return (self._whole[path, model],), 0.0
        usage = bool((asked.get("stream_options") or {}).get("include_usage"))
        return self._streams[path, model, usage], PACE_S if model == PACED else 0.0


class MockProtocol(asyncio.Protocol):
    """One HTTP/1.1 connection, kept alive; the requests on it are answered one after the other."""

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._later: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._later is not None:
            self._later.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        self._serve()

    def _serve(self) -> None:
        while self._transport is not None and self._later is None and self._buffer:
            head_end = self._buffer.find(b"\r\n\r\n")
            if head_end < 0:
                if len(self._buffer) > MAX_HEAD:
                    self._close(_refusal("431 Request Header Fields Too Large", "the head is too long"))
                return
            head = self._buffer[:head_end].lower()
            length = 0
            if (at := head.find(b"\r\ncontent-length:")) >= 0:
                length = int(head[at + 17 :].partition(b"\r\n")[0])
            elif b"\r\ntransfer-encoding:" in head:
                self._close(_refusal("411 Length Required", "give the length of the body"))
                return
            end = head_end + 4 + length
            if len(self._buffer) < end:
                return
            method, target, _ = self._buffer[: self._buffer.index(b"\r\n")].decode("latin-1").split(" ", 2)
            body, self._buffer = self._buffer[head_end + 4 : end], self._buffer[end:]
            pieces, pace = self._replies.to(method, target.partition("?")[0], body)
            if pace:
                self._piece(pieces, 0, asyncio.get_running_loop().time(), pace)
            else:
                self._transport.writelines(pieces)

    def _piece(self, pieces: tuple[bytes, ...], n: int, began: float, pace: float) -> None:
        assert self._transport is not None
        self._transport.write(pieces[n])
        if n + 1 == len(pieces):
            self._later = None
            self._serve()
            return
        # By the clock of the first one, so that a late piece does not delay all that follow.
        when = began + (n + 1) * pace
        self._later = asyncio.get_running_loop().call_at(when, self._piece, pieces, n + 1, began, pace)

    def _close(self, last: bytes) -> None:
        assert self._transport is not None
        self._transport.write(last)
        self._transport.close()


async def start(host: str = "127.0.0.1", port: int = 0) -> tuple[asyncio.Server, str]:
    """Starts to listen; gives the server and its URL."""
    replies = Replies()
    factory: Callable[[], MockProtocol] = lambda: MockProtocol(replies)  # noqa: E731
    server = await asyncio.get_running_loop().create_server(factory, host, port, backlog=1024)
    return server, f"http://{host}:{server.sockets[0].getsockname()[1]}"


async def _main(port: int) -> None:
    server, url = await start(port=port)
    print(url, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--port", type=int, default=0)
    asyncio.run(_main(options.parse_args().port))
