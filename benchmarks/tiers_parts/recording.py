"""A backend that remembers: what was asked before is answered from disk, word for word, with what it took then.

Every answer of a model is written down the moment it is there: a killed run goes on where it was, and everything
after it (policies, the graph, plots) can be run again in seconds. Only greedy answers are kept: they are the same
whenever they are asked for. The model itself is opened when the first question comes that was not asked before.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from agora.protocols import (
    Backend,
    Capabilities,
    Chunk,
    Completion,
    GenerateRequest,
    Health,
    Load,
    Message,
    ScoreRequest,
    Scores,
    TokenLogprob,
)
from agora.types import Usage

ALTERNATIVES: Final = 5
"""Alternatives recorded with each token. Every signal that is read from log-probabilities makes do with them, and the
file stays at some 20 KB for each grade-school problem."""

FORMAT: Final = 1
"""Of the file's lines; another number is another file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What one answer took.

    Attributes:
        request: Hash of what was asked.
        seconds: From request to answer, alone on its backend.
        cpu_seconds: Processor time of this process meanwhile: what other programs do does not count.
        tokens: Prompt and generated tokens.
        recorded: Whether it was on disk already.
    """

    request: str
    seconds: float
    cpu_seconds: float
    tokens: int
    recorded: bool


class RecordedBackend:
    """Implements `agora.protocols.Backend` over another one that is opened when it is needed.

    Questions go to the model one at a time, so that the processor time of each is its own.

    Args:
        opener: Opens the model.
        file: Where its answers are kept.
        name: What to call it.
        identity: What the model is, in words that change when its answers might: part of every request's hash.
        capabilities: What it can do; None to open it in order to know.
        fresh: Whether what is on disk is not to be used.
    """

    def __init__(
        self,
        opener: Callable[[], Awaitable[Backend]],
        file: Path,
        *,
        name: str,
        identity: str,
        capabilities: Capabilities,
        fresh: bool = False,
    ) -> None:
        self._opener = opener
        self._file = file
        self._name = name
        self._identity = identity
        self._capabilities = capabilities
        self._known: dict[str, dict[str, Any]] = {} if fresh else _read(file)
        self._backend: Backend | None = None
        self._turn = asyncio.Lock()
        self.taken: list[Taken] = []

    @property
    def name(self) -> str:
        """What to call it in errors and traces."""
        return self._name

    @property
    def capabilities(self) -> Capabilities:
        """What the model can do, streams and scores aside."""
        return self._capabilities

    @property
    def load(self) -> Load:
        """What the model is busy with."""
        return self._backend.load if self._backend is not None else Load()

    @property
    def opened(self) -> bool:
        """Whether the model itself had to be opened."""
        return self._backend is not None

    def knows(self, request: GenerateRequest) -> bool:
        """Whether it can be answered from disk."""
        return self._recorded(request, self._key(request)) is not None

    async def generate(self, request: GenerateRequest) -> Completion:
        """The recorded answer, or else the model's own, which is recorded if it is greedy."""
        key = self._key(request)
        if (line := self._recorded(request, key)) is not None:
            completion = _completion(line, request.logprobs)
            self._take(key, line, completion, recorded=True)
            return completion
        async with self._turn:
            backend = await self._open()
            wanted = request.logprobs
            if self._capabilities.logprobs and request.temperature == 0:
                wanted = max(request.logprobs or 0, ALTERNATIVES)
            started, cpu = time.perf_counter(), time.process_time()
            completion = await backend.generate(replace(request, logprobs=wanted))
            line = {
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - cpu,
                "alternatives": wanted,
                **asdict(completion),
                "key": key,
                "format": FORMAT,
            }
        if request.temperature == 0:
            self._known[key] = line
            # One short write at a time: it takes less than handing it to a thread would.
            _append(self._file, line)
        completion = _completion(json.loads(json.dumps(line)), request.logprobs)
        self._take(key, line, completion, recorded=False)
        return completion

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """The whole answer in one piece."""
        done = await self.generate(request)
        yield Chunk(text=done.text, logprobs=done.logprobs, finish_reason=done.finish_reason, usage=done.usage)

    async def score(self, request: ScoreRequest) -> Scores:
        """The model's own; not recorded."""
        return await (await self._open()).score(request)

    async def health(self) -> Health:
        """The model's own if it is open; recorded answers need no model."""
        return await self._backend.health() if self._backend is not None else Health(ok=True, detail="recorded")

    async def aclose(self) -> None:
        """Closes the model if it was opened."""
        backend, self._backend = self._backend, None
        if backend is not None:
            await backend.aclose()

    async def _open(self) -> Backend:
        if self._backend is None:
            self._backend = await self._opener()
        return self._backend

    def _take(self, key: str, line: Mapping[str, Any], completion: Completion, *, recorded: bool) -> None:
        self.taken.append(
            Taken(
                request=key,
                seconds=line["seconds"],
                cpu_seconds=line["cpu_seconds"],
                tokens=completion.usage.tokens,
                recorded=recorded,
            )
        )

    def _key(self, request: GenerateRequest) -> str:
        """Hash of all that an answer depends on. Who waits how long, and how much is told of it, is not part of it."""
        said = {
            "identity": self._identity,
            "messages": [(m.role, m.content) for m in request.messages],
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "stop": request.stop,
            "schema": request.json_schema,
            "adapter": None if request.adapter is None else str(request.adapter),
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def _recorded(self, request: GenerateRequest, key: str) -> dict[str, Any] | None:
        line = self._known.get(key)
        if line is None or request.temperature > 0:
            return None
        enough = request.logprobs is None or (line["alternatives"] or 0) >= request.logprobs
        return line if enough else None


def chat(system_prompt: str | None, question: str) -> tuple[Message, ...]:
    """The messages that an expert with that system prompt is asked with."""
    asked = Message(role="user", content=question)
    return (Message(role="system", content=system_prompt), asked) if system_prompt else (asked,)


def _completion(line: Mapping[str, Any], logprobs: int | None) -> Completion:
    """What was asked for of what was recorded."""
    tokens: tuple[TokenLogprob, ...] = ()
    if logprobs is not None:
        tokens = tuple(
            TokenLogprob(
                token=t["token"],
                logprob=t["logprob"],
                top=tuple((name, value) for name, value in t["top"][:logprobs]),
            )
            for t in line["logprobs"]
        )
    return Completion(
        text=line["text"],
        finish_reason=line["finish_reason"],
        usage=Usage(**line["usage"]),
        model=line["model"],
        logprobs=tokens,
        first_token_s=line["first_token_s"],
        seconds=line["seconds"],
    )


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The recorded answers by key; a last line that was cut off by a kill is not there."""
    known = {}
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    for written in text.split("\n"):
        try:
            line = json.loads(written)
        except ValueError:
            continue
        if isinstance(line, dict) and line.get("format") == FORMAT:
            known[line["key"]] = line
    return known


def _append(file: Path, line: Mapping[str, Any]) -> None:
    """Adds a line in one write. It begins with a line's end: what a kill cut off stays a line of its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    written = "\n" + json.dumps(line, allow_nan=True)
    with file.open("ab", buffering=0) as out:
        out.write(written.encode())
        os.fsync(out.fileno())
