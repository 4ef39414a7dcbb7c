"""Between text and tokens: prompts in, pieces of text out, stop strings in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from agora.errors import InvalidRequest
from agora.protocols import Message

CONTEXT_TOKENS: Final = 6
"""Prompt tokens that the first generated ones are decoded with, so that a leading space is seen; vLLM takes 5."""

MAX_SCORE_CHARS: Final = 4_000_000
"""Characters tokenised for one scoring: the prompt once more for each continuation. About two seconds of work, in which
the backend tokenises nothing else."""

UNFINISHED: Final = "�"
"""What a tokenizer decodes the first bytes of an unfinished character to."""

UNFINISHED_TOKENS: Final = 8
"""Tokens after which bytes that still make no character are told as they are; a character has at most 4 bytes."""


class Codec:
    """A tokenizer, with what the engine needs of it.

    Args:
        tokenizer: From transformers.
        vocabulary: Tokens the model has embeddings for.
    """

    def __init__(self, tokenizer: Any, *, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._anchor: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        self._names: dict[int, str] = {}

    @property
    def chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self._tokenizer.chat_template)

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a chat, up to where the assistant's answer starts.

        Raises:
            InvalidRequest: If the model's template refuses the messages.
        """
        from jinja2 import TemplateError

        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as e:
            raise InvalidRequest(f"the model's chat template refuses these messages: {e}") from None
        return text

    def encode(self, messages: Sequence[Message], prompt: str | None, *, goes_on: bool = False) -> list[int]:
        """Tokens of a chat or a raw prompt.

        A raw prompt gets the special tokens its tokenizer adds (a start token, for some); a chat template writes
        its own.

        Args:
            messages: The chat.
            prompt: The raw prompt; None for a chat.
            goes_on: Whether the last message is the beginning of the answer. It stands as it is where the assistant's
                answer starts: the very place at which the model wrote it, which a template's own way of going on
                (transformers' `continue_final_message`) need not be, say where a prompt to think is written before.

        Raises:
            InvalidRequest: If there is nothing to read, or the template refuses the messages.
        """
        if prompt is None and goes_on:
            text, said = self.render(messages[:-1]), messages[-1].content
            head = self._checked(self._ids(text))
            return self._checked([*head, *self._tail(head, text, said)])
        if prompt is None:
            return self._checked(self._ids(self.render(messages)))
        return self._checked(self._ids(prompt, special=True))

    def encode_continuations(
        self, messages: Sequence[Message], prompt: str | None, continuations: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """Tokens of a prompt, and of each continuation after it.

        The prompt's tokens are the ones `encode` gives, so a score is the probability that generation would go this
        way. A continuation's tokens are what follows them when prompt and continuation are tokenised as one text.
        Where that would change the prompt's own tokens (a word cut by the boundary), the continuation is tokenised
        alone. Special tokens never come between.

        Raises:
            InvalidRequest: If prompt or a continuation comes to no tokens, the template refuses the messages, or there
                is too much to tokenise.
        """
        text = self.render(messages) if prompt is None else prompt
        work = sum(len(text) + len(c) for c in continuations)
        if work > MAX_SCORE_CHARS:
            raise InvalidRequest(
                f"{len(continuations):,} continuations of a prompt of {len(text):,} characters are {work:,} characters "
                f"to read; at most {MAX_SCORE_CHARS:,} are allowed",
                hint="ask for fewer continuations at a time",
            )
        head = self._checked(self._ids(text, special=prompt is not None))
        tails = []
        for c in continuations:
            tail = self._tail(head, text, c, special=prompt is not None)
            if not tail:
                raise InvalidRequest(f"continuation {c!r} comes to no tokens", hint="leave it out")
            tails.append(self._checked(tail))
        return head, tails

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def name(self, token: int) -> str:
        """Text of one token, leading space and special tokens included."""
        name = self._names.get(token)
        if name is None:
            # After another token, since some tokenizers drop the leading space of a text's first word.
            anchor, both = (
                self._tokenizer.decode(
                    [*self._anchor, *more], skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
                for more in ([], [token])
            )
            name = both[len(anchor) :]
            self._names[token] = name
        return name

    def _tail(self, head: Sequence[int], text: str, more: str, *, special: bool = False) -> list[int]:
        """Tokens of a text after another one, whose own tokens stay as they are."""
        whole = self._ids(text + more, special=special)
        return whole[len(head) :] if whole[: len(head)] == head else self._ids(more)

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _checked(self, tokens: list[int]) -> list[int]:
        if not tokens:
            raise InvalidRequest("the prompt comes to no tokens for this model", hint="write more text")
        if (worst := max(tokens)) >= self._vocabulary:
            raise InvalidRequest(f"the prompt has token {worst}, but the model knows only {self._vocabulary:,} tokens")
        return tokens


class Detokenizer:
    """Turns tokens into text as they come, each character as soon as its last byte is there.

    Two windows over the tokens, as vLLM does it: text is the difference between decoding the tokens up to now and
    those already told, each time with the tokens before them, because a token's text depends on its neighbours.

    Args:
        codec: The tokenizer.
        prompt: What was read before.
    """

    def __init__(self, codec: Codec, prompt: Sequence[int]) -> None:
        self._codec = codec
        self._tokens = self._context(prompt)
        self._told = len(self._tokens)

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._tokens.append(token)
        before, now = self._texts()
        waiting = now.endswith(UNFINISHED) and len(self._tokens) - self._told < UNFINISHED_TOKENS
        if waiting or len(now) <= len(before):
            return ""
        # From here on, the tokens just told are context enough.
        self._tokens = self._tokens[self._told :]
        self._told = len(self._tokens)
        return now[len(before) :]

    def flush(self) -> str:
        """What an unfinished character leaves behind."""
        before, now = self._texts()
        self._told = len(self._tokens)
        return now[len(before) :]

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The end of the prompt, from the start of a character: half a one spoils what is decoded with it."""
        for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + UNFINISHED_TOKENS):
            tokens = list(prompt[-count:])
            if not self._codec.decode(tokens).startswith(UNFINISHED):
                return tokens
        return []

    def _texts(self) -> tuple[str, str]:
        return self._codec.decode(self._tokens[: self._told]), self._codec.decode(self._tokens)


class StopFilter:
    """Lets text through up to the first stop string, holding back what may be the start of one.

    Generation ends as soon as any stop string is complete, however the text was cut into pieces; if several end at the
    same character, the longest counts.

    Args:
        stops: Strings that end a generation.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be told now, and whether a stop string was found."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max(_overlap(text, s) for s in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back and turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a start of `stop`, but not all of it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-n:]):
            return n
    return 0
