"""From a subtask and the answers it stands on to the text that an expert, or a person, reads.

Planners refer to the answer of an input as `#id`, in two ways: in place of a word ("How many people live in #t1?") and
in brackets behind one ("When was he (#t1) born?").
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from agora.types import Answer, Subtask

INLINE_CHARS: Final = 80
"""A one-line answer up to this length replaces its `#id` in the question; a longer one is quoted beside it. A name, a
number or a date is well below; a sentence in the middle of a question reads badly."""

MAX_INPUT_CHARS: Final = 4_000
"""Characters of one input's answer that are passed on: ~1,000 tokens, so that several fit an 8k context."""

_REFERENCE: Final = re.compile(r"#([A-Za-z0-9][A-Za-z0-9_.-]*)")
_IN_BRACKETS: Final = re.compile(r" ?\((#[A-Za-z0-9][A-Za-z0-9_.-]*(?:[;,] #[A-Za-z0-9][A-Za-z0-9_.-]*)*)\)")


def render(subtask: Subtask, inputs: Mapping[str, tuple[Subtask, Answer]]) -> str:
    """The text to ask: short answers in place of their references, longer ones quoted before the question.

    Args:
        subtask: What to ask.
        inputs: For every input id, the input's subtask and its answer.
    """
    referred = set(_REFERENCE.findall(subtask.question))
    referred |= {name.rstrip(".-_") for name in referred}
    inline: dict[str, str] = {}
    quoted: dict[str, str] = {}
    for i in subtask.inputs:
        earlier, answer = inputs[i]
        text = answer.text.strip()
        if len(text) <= INLINE_CHARS and "\n" not in text and i in referred:
            inline[i] = text.rstrip(".")
        else:
            if len(text) > MAX_INPUT_CHARS:
                text = text[:MAX_INPUT_CHARS].rstrip() + " […]"
            quoted[i] = f"Q: {_told(earlier.question, {}, ())}\nA: {text}"
    names = {i: f'the answer to "{_short(_told(inputs[i][0].question, {}, ()))}"' for i in quoted}
    question = _told(subtask.question, {**names, **inline}, quoted)
    if not quoted:
        return question
    return "Known so far:\n" + "\n".join(quoted.values()) + f"\n\nUse what is known to answer: {question}"


def plain_question(subtask: Subtask, by_id: Mapping[str, Subtask]) -> str:
    """The subtask's question for people to read: references in brackets left out, others told in words."""
    names = {i: f'the answer to "{_short(_told(by_id[i].question, {}, ()))}"' for i in subtask.inputs}
    return _told(subtask.question, names, subtask.inputs)


def _told(question: str, names: Mapping[str, str], silent: Collection[str]) -> str:
    """`question` with references replaced by `names`; in brackets, those in `silent` or not named are left out."""

    def brackets(found: re.Match[str]) -> str:
        told = [names[i] for i in _REFERENCE.findall(found[1]) if i in names and i not in silent]
        return f" ({'; '.join(told)})" if told else ""

    return _REFERENCE.sub(lambda m: _replaced(m[1], names), _IN_BRACKETS.sub(brackets, question))


def _replaced(reference: str, names: Mapping[str, str]) -> str:
    # "#t1." at the end of a sentence: the dot may belong to the sentence, not to the id.
    for name in (reference, reference.rstrip(".-_")):
        if name in names:
            return names[name] + reference[len(name) :]
    return f"#{reference}"


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
