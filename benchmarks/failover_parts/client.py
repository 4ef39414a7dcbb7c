"""Asks a gateway in three ways, and judges each answer: whole, as a stream, and of the graph."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import aiohttp

Form = Literal["whole", "stream", "graph"]

FORMS: Final[tuple[Form, ...]] = ("whole", "stream", "graph")

REQUEST_S: Final = 60.0
"""Seconds after which a request has failed."""

WORDS: Final = "the quick brown fox jumps over the lazy dog and runs along the river until the evening sun goes down"
"""What is asked, and so what must be answered: as many words as there are tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """One request that came to its end.

    Attributes:
        form: How it was asked.
        began: When it was sent, on the monotonic clock.
        ended: When its answer was there.
        path: The path it came by, where the answer tells.
        notes: What the answer says of paths that could not be used.
        failure: What went wrong; empty if nothing did.
    """

    form: Form
    began: float
    ended: float
    path: str = ""
    notes: tuple[str, ...] = ()
    failure: str = ""

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def resumed(self) -> bool:
        """Whether it is a stream that went on after its path broke."""
        return any("broke off" in note for note in self.notes)


class Client:
    """Asks one gateway.

    Args:
        http: How.
        url: Where it listens.
        expert: The expert with several paths.
    """

    def __init__(self, http: aiohttp.ClientSession, url: str, expert: str) -> None:
        self._http = http
        self._url = url
        self._expert = expert

    async def get(self, path: str) -> str:
        async with self._http.get(f"{self._url}{path}", timeout=aiohttp.ClientTimeout(total=10)) as reply:
            reply.raise_for_status()
            return await reply.text()

    async def ask(self, number: int, form: Form) -> Done:
        """One request, to its end. An answer that is not word for word what it must be is a failure."""
        text = f"Question {number}: {WORDS}"
        body: dict[str, Any] = {
            "model": "agora" if form == "graph" else self._expert,
            "messages": [{"role": "user", "content": text}],
            "stream": form == "stream",
        }
        began = time.monotonic()
        try:
            async with self._http.post(
                f"{self._url}/v1/chat/completions", json=body, timeout=aiohttp.ClientTimeout(total=REQUEST_S)
            ) as reply:
                said = await reply.text()
                status = reply.status
        except (aiohttp.ClientError, TimeoutError) as e:
            return Done(form=form, began=began, ended=time.monotonic(), failure=f"{type(e).__name__}: {e}")
        ended = time.monotonic()
        if status != 200:
            return Done(form=form, began=began, ended=ended, failure=f"HTTP {status}: {said[:300]}")
        try:
            answer, about = READERS[form](said)
        except (ValueError, KeyError, IndexError, TypeError) as e:
            return Done(form=form, began=began, ended=ended, failure=f"unreadable ({e!r}): {said[-300:]}")
        failure = ""
        if about.get("missing"):
            failure = f"a part is missing: {answer[-300:]}"
        elif answer != text:
            failure = f"the answer is not what was asked for: {answer[:300]!r}"
        return Done(
            form=form,
            began=began,
            ended=ended,
            path=about.get("path") or "",
            notes=tuple(about.get("notes", ())),
            failure=failure,
        )


def _whole(said: str) -> tuple[str, dict[str, Any]]:
    reply = json.loads(said)
    return reply["choices"][0]["message"]["content"], reply.get("agora", {})


def _stream(said: str) -> tuple[str, dict[str, Any]]:
    text: list[str] = []
    about: dict[str, Any] = {}
    events = [line[6:] for line in said.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise ValueError("the stream did not come to its end")
    for event in events[:-1]:
        piece = json.loads(event)
        about = piece.get("agora", about)
        text += [c["delta"].get("content") or "" for c in piece["choices"]]
    return "".join(text), about


READERS: Final[dict[Form, Callable[[str], tuple[str, dict[str, Any]]]]] = {
    "whole": _whole,
    "graph": _whole,
    "stream": _stream,
}
"""How each form is read: the text, and what agora tells of it."""
