"""Condensing a text to a number of tokens before it leaves: by an expert of the end tier, or by choosing from it."""

from __future__ import annotations

import asyncio
import re
from typing import Final

from agora.errors import AgoraError, DeadlineExceeded, InvalidRequest
from agora.square import Expert
from agora.types import Answer, Tier, Usage
from graphs.departure.passages import Passages, best_within, share_left_out, tokens_in
from graphs.departure.shortened import Shortened, beside
from graphs.spend import Spend, used_by_failed

MIN_TOKENS: Final = 16
"""The smallest budget: a sentence."""

TIME_SHARE: Final = 0.5
"""Share of the time to the deadline that an expert may take to condense; who is then asked needs the rest."""

WORDS_PER_TOKEN: Final = 0.7
"""Words asked for per token of the budget. English has 0.75 words to a token; models write a little more than asked."""

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")

_PROMPT: Final = """\
Shorten the text below to at most {words} words. Keep every fact, name and number that matters to this request: \
{asked}
Do not answer the request. Add nothing that the text does not say. Write the shortened text only.

Text:
{text}

Shortened text:"""


class Condenser:
    """Condenses texts of more than so many tokens; shorter ones stay as they are.

    What is asked (the last sentence or a short last paragraph; a short first paragraph, or an instruction at the
    beginning) stays word for word. By choosing (without an expert): the passages that matter most to it are kept, in
    their order, and gaps are marked. By an expert: it writes what lies between anew; its words are taken only if they
    are short enough and bring no number that the text does not have, and otherwise passages are chosen, and a note says
    why.

    Args:
        tokens: Most tokens, by the estimate of `tokens_in`.
        expert: Who condenses; on a machine of tier end, since it sees the text before anything is taken out of it.

    Raises:
        InvalidRequest: If the budget is too small, or the expert is above the end tier.
    """

    def __init__(self, tokens: int, *, expert: Expert | None = None) -> None:
        if tokens < MIN_TOKENS:
            raise InvalidRequest(f"texts cannot be condensed to {tokens} tokens; allowed: {MIN_TOKENS} and more")
        if expert is not None and expert.card.tier is not Tier.END:
            raise InvalidRequest(
                f"expert {expert.name!r} is on a machine of tier {expert.card.tier}; who condenses must be on one of "
                f"tier {Tier.END}",
                hint="the text must not leave before it is condensed",
            )
        self._tokens = tokens
        self._expert = expert

    async def shorten(self, text: str, *, spend: Spend, deadline: float | None) -> Shortened:
        """See `graphs.departure.departing.Shortener`."""
        had = tokens_in(text)
        if had <= self._tokens:
            return Shortened(text=text)
        passages = await beside(len(text), lambda: Passages.of(text))
        notes: tuple[str, ...] = ()
        usage = Usage()
        short: str | None = None
        how = "chosen by rules"
        if self._expert is not None:
            try:
                answer = await self._asked(self._expert, passages, spend, deadline)
                usage, short = answer.usage, self._composed(passages, answer.text)
                how = f"written by {self._expert.name}"
            except _NoUse as e:
                usage = e.usage
                notes = (f"{self._expert.name} could not condense the text ({e}); passages of it were chosen instead",)
        if short is None:
            short = await beside(len(text), lambda: passages.joined(best_within(passages, self._tokens)))
        if len(short) >= len(text):
            return Shortened(text=text, notes=notes, usage=usage)
        note = f"condensed from about {had:,} tokens to {tokens_in(short):,}, {how}: {share_left_out(text, short)}"
        if tokens_in(short) > self._tokens:
            note += f"; what is asked has more than {self._tokens:,} tokens by itself, and stays as it is"
        return Shortened(text=short, notes=(*notes, note), usage=usage)

    def _composed(self, passages: Passages, written: str) -> str:
        rest = [i for i in range(len(passages)) if i not in passages.asking]
        first = rest[0] if rest else 0
        before = [passages[i] for i in sorted(passages.asking) if i < first]
        after = [passages[i] for i in sorted(passages.asking) if i > first]
        return "\n\n".join(filter(None, (" ".join(before), written.strip(), "\n".join(after))))

    async def _asked(self, expert: Expert, passages: Passages, spend: Spend, deadline: float | None) -> Answer:
        room = self._tokens - tokens_in(passages.question) - 2
        if room < MIN_TOKENS:
            raise _NoUse("what is asked takes all the room")
        text = passages.joined(i for i in range(len(passages)) if i not in passages.asking)
        prompt = _PROMPT.format(words=int(room * WORDS_PER_TOKEN), asked=passages.question, text=text)
        chars = len(prompt) + len(expert.system_prompt or "")
        left = None if deadline is None else (deadline - asyncio.get_running_loop().time()) * TIME_SHARE
        try:
            async with asyncio.timeout(left), spend.grant(expert.card, chars, room) as most:
                answer = await expert.ask(prompt, max_tokens=most, timeout_s=left)
                spend.add(answer.usage)
        except TimeoutError:
            raise _failed(DeadlineExceeded("its time was up"), expert, chars, spend) from None
        except AgoraError as e:
            raise _failed(e, expert, chars, spend) from e
        if not answer.text.strip():
            raise _NoUse("it wrote nothing", answer.usage)
        if answer.finish_reason == "length":
            raise _NoUse("it did not come to an end", answer.usage)
        if tokens_in(answer.text) > room:
            raise _NoUse(f"it wrote about {tokens_in(answer.text):,} tokens, and {room:,} are allowed", answer.usage)
        if made_up := set(_NUMBER.findall(answer.text)) - set(_NUMBER.findall(passages.text)):
            raise _NoUse(
                f"it wrote numbers that the text does not have: {', '.join(sorted(made_up)[:3])}", answer.usage
            )
        return answer


class _NoUse(Exception):
    """An expert's condensed text cannot be used; says why, and what it cost."""

    def __init__(self, why: str, usage: Usage | None = None) -> None:
        super().__init__(why)
        self.usage = usage or Usage()


def _failed(error: AgoraError, expert: Expert, chars: int, spend: Spend) -> _NoUse:
    usage = used_by_failed(error, expert.card, chars)
    spend.add(usage)
    return _NoUse(error.message, usage)
