"""Streams that break in the middle: going on somewhere else without a word too many or too few.

What was emitted is replayed to another backend, in one of two ways. A backend that can go on with a text that somebody
began is given it (`continued`): a raw prompt always, a chat where the backend claims `continues`, as vLLM's servers and
the models of this process do. Any other is asked the whole request again, and what was emitted is skipped as long as it
says the same (`Skipper`), which a greedy answer of the same model does. Where neither is possible, or the second answer
differs, the stream ends with an error.
"""

from __future__ import annotations

from dataclasses import replace

from agora.errors import BadReply
from agora.protocols import Capabilities, Chunk, GenerateRequest, Message


class Emitted:
    """What a stream has given to its reader so far."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.tokens = 0
        self.logprobs = 0

    def add(self, chunk: Chunk) -> None:
        """A chunk was given."""
        if chunk.text:
            self._texts.append(chunk.text)
        # A piece of a stream holds at least one token; where log-probabilities come, they count them.
        self.tokens += len(chunk.logprobs) or bool(chunk.text)
        self.logprobs += len(chunk.logprobs)

    @property
    def text(self) -> str:
        """All of it."""
        if len(self._texts) > 1:
            self._texts = ["".join(self._texts)]
        return self._texts[0] if self._texts else ""

    def __bool__(self) -> bool:
        return bool(self._texts) or self.logprobs > 0


def can_continue(request: GenerateRequest, capabilities: Capabilities) -> bool:
    """Whether the rest can be asked for by giving what was emitted, whatever it was drawn with.

    Not for JSON of a schema: the backend would hold the rest to the schema from its beginning.
    """
    if request.json_schema is not None:
        return False
    return request.prompt is not None or capabilities.continues


def can_repeat(request: GenerateRequest) -> bool:
    """Whether a backend asked again may say the same: greedy answers, and samples with a seed."""
    return request.temperature == 0 or request.seed is not None


def continued(request: GenerateRequest, emitted: Emitted) -> GenerateRequest | None:
    """The request for the rest: what was emitted stands at the end of the prompt, or as the assistant's words.

    Returns:
        None if no token may follow: then the answer ended with the last one emitted, by its length.
    """
    left = request.max_tokens - emitted.tokens
    if left < 1:
        return None
    if request.prompt is not None:
        return replace(request, prompt=request.prompt + emitted.text, max_tokens=left)
    # Chat templates trim what is said; white space at the end is taken off here so that it is known what went missing.
    said, before = emitted.text.rstrip(), request.messages
    if request.goes_on:
        before, said = before[:-1], before[-1].content + said
    return replace(request, messages=(*before, Message(role="assistant", content=said)), goes_on=True, max_tokens=left)


class Joint:
    """Where the rest of a continued chat is joined: white space that was emitted already is not emitted again.

    Args:
        emitted: What was emitted.
        chat: Whether the rest is of a chat; that of a raw prompt needs no care.
    """

    def __init__(self, emitted: Emitted, *, chat: bool) -> None:
        text = emitted.text
        self._again = text[len(text.rstrip()) :] if chat else ""

    def pass_on(self, chunk: Chunk) -> Chunk:
        """The chunk, as far as it is new."""
        if not self._again or not chunk.text:
            return chunk
        n = 0
        while n < min(len(chunk.text), len(self._again)) and chunk.text[n] == self._again[n]:
            n += 1
        whole = n == len(chunk.text)
        self._again = self._again[n:] if whole else ""
        return replace(chunk, text=chunk.text[n:]) if n else chunk


class Skipper:
    """Passes on the part of a repeated answer that was not emitted yet.

    Args:
        emitted: What was emitted.
        backend: Name of the backend that repeats it, for errors.
    """

    def __init__(self, emitted: Emitted, *, backend: str) -> None:
        self._emitted = emitted.text
        self._backend = backend
        self._seen = 0
        self._logprobs = emitted.logprobs

    def pass_on(self, chunk: Chunk) -> Chunk:
        """The chunk, as far as it is new; maybe nothing of it.

        Raises:
            BadReply: If it is not what was emitted: going on would garble the text.
        """
        same = chunk.text[: len(self._emitted) - self._seen]
        if not self._emitted.startswith(same, self._seen):
            raise self._differs(self._seen)
        self._seen += len(same)
        if chunk.finish_reason is not None and self._seen < len(self._emitted):
            raise self._differs(self._seen)
        old = min(self._logprobs, len(chunk.logprobs))
        self._logprobs -= old
        return replace(chunk, text=chunk.text[len(same) :], logprobs=chunk.logprobs[old:])

    def _differs(self, at: int) -> BadReply:
        return BadReply(
            f"the stream broke off after {len(self._emitted):,} characters, and another path's answer differs from it "
            f"after {at:,}",
            backend=self._backend,
            hint="ask again; what came so far is not the whole answer",
        )
