"""From a subtask and the answers it stands on to the text that an expert, or a person, reads.

Planners refer to the answer of an input as `#id`, in two ways: in place of a word ("How many people live in #t1?") and
in brackets behind one ("When was he (#t1) born?").
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from agora.types import Answer, Subtask

_GAP: Final = re.compile(r"\s")

LONGEST_WORD: Final = 200
"""Characters of what is not cut in the middle: addresses have fewer (e-mail: 254 at most, hardly ever above 60), and
scripts without spaces must not be cut where the last one happens to stand."""

INLINE_CHARS: Final = 80
"""A one-line answer up to this length replaces its `#id` in the question; a longer one is quoted beside it. A name, a
number or a date is well below; a sentence in the middle of a question reads badly."""

MAX_INPUT_CHARS: Final = 4_000
"""Characters of one input's answer that are passed on: ~1,000 tokens, so that several fit an 8k context."""

MAX_CONTEXT_CHARS: Final = 24_000
"""Characters of all inputs' answers together: ~6,000 tokens. Many inputs get a smaller share each."""


def render(subtask: Subtask, inputs: Mapping[str, tuple[Subtask, Answer]]) -> str:
    """The text to ask: short answers in place of their references, longer ones quoted before the question.

    Args:
        subtask: What to ask.
        inputs: For every input id, the input's subtask and its answer.
    """
    referred = _referred(subtask.question, subtask.inputs)
    share = min(MAX_INPUT_CHARS, MAX_CONTEXT_CHARS // max(1, len(inputs)))
    inline: dict[str, str] = {}
    quoted: dict[str, str] = {}
    for i in subtask.inputs:
        earlier, answer = inputs[i]
        text = answer.text.strip()
        if len(text) <= min(INLINE_CHARS, share) and "\n" not in text and i in referred:
            inline[i] = text.rstrip(".") or text
        else:
            if len(text) > share:
                text = _head(text, share) + " […]"
            quoted[i] = f"Q: {_short(_told(earlier.question, {}, earlier.inputs, ()), share)}\nA: {text}"
    names = {i: f'the answer to "{_short(_told(inputs[i][0].question, {}, inputs[i][0].inputs, ()))}"' for i in quoted}
    question = _told(subtask.question, {**names, **inline}, subtask.inputs, quoted)
    if not quoted:
        return question
    return "Known so far:\n" + "\n".join(quoted.values()) + f"\n\nUse what is known to answer: {question}"


def plain_question(subtask: Subtask, by_id: Mapping[str, Subtask]) -> str:
    """The subtask's question for people to read: references in brackets left out, others told in words."""
    names = {i: f'the answer to "{_short(_told(by_id[i].question, {}, by_id[i].inputs, ()))}"' for i in subtask.inputs}
    return _told(subtask.question, names, subtask.inputs, subtask.inputs)


def _references(ids: Collection[str]) -> str:
    """A pattern that matches references to these ids and to no longer ones that begin alike ("#t1" in "#t10")."""
    longest_first = "|".join(re.escape(i) for i in sorted(ids, key=len, reverse=True))
    return rf"#(?P<id>{longest_first})(?![A-Za-z0-9_])"


def _referred(question: str, ids: Collection[str]) -> set[str]:
    return {m["id"] for m in re.finditer(_references(ids), question)} if ids else set()


def _told(question: str, names: Mapping[str, str], ids: Collection[str], silent: Collection[str]) -> str:
    """`question` with references to `ids` replaced by `names`.

    A group of references in brackets loses those in `silent` and those without a name, and goes if none is left. One
    pass: what an answer says is never taken for a reference.
    """
    if not ids:
        return question
    one = _references(ids)
    plain = one.replace("?P<id>", "?:")
    group = rf" ?\((?P<group>{plain}(?:[;,] {plain})*)\)"

    def replaced(m: re.Match[str]) -> str:
        if m["group"] is None:
            return names.get(m["id"], m[0])
        said = [names[i] for i in (f["id"] for f in re.finditer(one, m["group"])) if i in names and i not in silent]
        return f"{' ' if m[0].startswith(' ') else ''}({'; '.join(said)})" if said else ""

    return re.sub(f"{group}|{one}", replaced, question)


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else _head(text, limit - 1) + "…"


def _head(text: str, limit: int) -> str:
    """The beginning of a text, cut between words where there are any near: half an address or number is none to whoever
    takes those out before the text leaves."""
    gaps = [m.start() for m in _GAP.finditer(text, max(1, limit // 4, limit - LONGEST_WORD), limit + 1)]
    between = (g for g in reversed(gaps) if not (text[g - 1].isdigit() and text[g + 1 : g + 2].isdigit()))
    return text[: next(between, limit)].rstrip()
