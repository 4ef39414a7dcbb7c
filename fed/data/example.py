"""What is trained on: a prompt and the answer to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from agora.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt and the answer to it; private to its client, so that printing one shows none of its words.

    Attributes:
        prompt: What the model reads. Nothing is learned from its words.
        response: What it should say. With `choices`, one of them.
        label: The class, or any other kind that a partition may skew by; empty if there is none.
        group: Task, discipline or source it belongs to; empty if there is none.
        system: What a chat model is told before the prompt.
        choices: The label words of a classification task (verbalisers), as they go on from the prompt, leading space
            included. Empty where the answer is free text.
    """

    prompt: str = field(repr=False)
    response: str = field(repr=False)
    label: str = ""
    group: str = ""
    system: str = field(default="", repr=False)
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt.strip() or not self.response.strip():
            raise InvalidRequest(f"an example's {'response' if self.prompt.strip() else 'prompt'} is empty")
        if self.choices and self.response not in self.choices:
            # The response itself is data, which no error may tell.
            raise InvalidRequest(
                f"an example's response of {len(self.response)} characters is none of its label words; "
                f"allowed: {', '.join(map(repr, self.choices))}"
            )


class Subset(Sequence[Example]):
    """Some rows of a list, without copying it.

    Args:
        examples: The list.
        rows: Which of it, in this order.
    """

    def __init__(self, examples: Sequence[Example], rows: Sequence[int]) -> None:
        self._examples = examples
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> Example: ...

    @overload
    def __getitem__(self, at: slice) -> Subset: ...

    def __getitem__(self, at: int | slice) -> Example | Subset:
        if isinstance(at, slice):
            return Subset(self._examples, self._rows[at])
        return self._examples[self._rows[at]]
