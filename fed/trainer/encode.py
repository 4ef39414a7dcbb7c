"""From examples to tokens: what the model reads, and which of its words count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from agora.errors import InvalidRequest
from agora.protocols import Message
from fed.data import Example
from fed.trainer.base import BaseModel

MARK: Final = "answer"
"""What an assistant says when the template is asked how a turn ends."""


@dataclass(frozen=True, slots=True)
class Row:
    """An example in tokens.

    Attributes:
        tokens: All that the model reads.
        start: Index of the first token that is to be predicted from those before. With `choices` that is one past the
            last: the answer is not read.
        choices: Tokens that an answer may begin with, one a label word; empty for free text.
        answer: Index of the right one in `choices`.
    """

    tokens: tuple[int, ...]
    start: int
    choices: tuple[int, ...] = ()
    answer: int = 0

    @property
    def targets(self) -> int:
        """Tokens to be predicted."""
        return 1 if self.choices else len(self.tokens) - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Examples in tokens.

    Attributes:
        rows: Those that fit.
        kept: Which examples they are.
        cut: Responses that were cut.
        left_out: Examples whose prompt alone is too long.
    """

    rows: tuple[Row, ...]
    kept: tuple[int, ...]
    cut: int
    left_out: int


class Encoder:
    """Turns examples into tokens as the model will see them when it is asked.

    Args:
        base: The model.
        max_tokens: Longest row.
        chat: See `TrainSettings.chat`.

    Raises:
        InvalidRequest: If a chat template is wanted and the tokenizer has none.
    """

    def __init__(self, base: BaseModel, *, max_tokens: int, chat: bool | None) -> None:
        if chat and not base.codec.chat:
            raise InvalidRequest(
                f"the tokenizer in {base.folder} has no chat template", hint="leave chat unset, or take a chat model"
            )
        self._codec = base.codec
        self._tokenizer = base.tokenizer
        self._max = max_tokens
        self._chat = chat
        self._eos: tuple[int, ...] = () if base.tokenizer.eos_token_id is None else (base.tokenizer.eos_token_id,)
        self._turn_end = self._end_of_turn() if base.codec.chat and chat is not False else ()

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Examples in tokens.

        Raises:
            InvalidRequest: If label words of one task begin alike and cannot be told apart, or the chat template
                refuses an example.
        """
        rows, kept, cut = [], [], 0
        for i, example in enumerate(examples):
            row = self._row(example)
            most = self._max if row.choices else max(self._max, row.start + 1)
            if (row.choices and len(row.tokens) > most) or (not row.choices and row.start >= self._max):
                continue
            if len(row.tokens) > most:
                row = Row(row.tokens[:most], row.start)
                cut += 1
            rows.append(row)
            kept.append(i)
        return Encoded(rows=tuple(rows), kept=tuple(kept), cut=cut, left_out=len(examples) - len(kept))

    def _row(self, example: Example) -> Row:
        chat = self._codec.chat and not example.choices if self._chat is None else self._chat
        messages, prompt = _asked(example, chat)
        if example.choices:
            words = [w.lstrip() if chat else w for w in example.choices]
            head, tails = self._codec.encode_continuations(messages, prompt, words)
            # Words that begin with the same token are told apart by the first that differs.
            while len({t[0] for t in tails}) == 1 and all(len(t) > 1 for t in tails):
                head, tails = [*head, tails[0][0]], [t[1:] for t in tails]
            first = tuple(t[0] for t in tails)
            if len(set(first)) < len(first):
                raise InvalidRequest(
                    f"the label words {', '.join(map(repr, words))} do not each begin with another token of this model",
                    hint="take other words",
                )
            return Row(tuple(head), len(head), first, example.choices.index(example.response))
        head, (tail,) = self._codec.encode_continuations(messages, prompt, (example.response,))
        return Row((*head, *tail, *(self._turn_end if chat else self._eos)), len(head))

    def _end_of_turn(self) -> tuple[int, ...]:
        """What a turn of the assistant ends with in this template; the end token where that cannot be seen."""
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": MARK}]
        text: str = self._tokenizer.apply_chat_template(turns, tokenize=False)
        after = text.rpartition(MARK)[2].strip()
        ids = self._tokenizer(after, add_special_tokens=False)["input_ids"] if after else ()
        return tuple(ids) or self._eos


def _asked(example: Example, chat: bool) -> tuple[tuple[Message, ...], str | None]:
    if not chat:
        return (), f"{example.system}\n\n{example.prompt}" if example.system else example.prompt
    asked = Message(role="user", content=example.prompt)
    return ((Message(role="system", content=example.system), asked) if example.system else (asked,)), None
