"""Making a text ready to leave the end tier, and what comes back ready to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from weakref import WeakKeyDictionary

from agora.square import Expert
from agora.types import Answer, Outcome, Usage
from graphs.departure.redact import Redacted, Redactor, Vault
from graphs.departure.shortened import Shortener, beside
from graphs.spend import Spend


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A text that is ready to leave.

    Attributes:
        text: What leaves.
        restore: Puts what was replaced back into a text that came back.
        private: Whether anything was replaced.
        notes: What the reader should know.
        usage: What preparing it cost; counted in the run's spending already.
    """

    text: str
    restore: Callable[[str], str]
    private: bool = False
    notes: tuple[str, ...] = ()
    usage: Usage = field(default_factory=Usage)

    def returned(self, outcome: Outcome) -> Outcome:
        """What came back, as those at home read it, with what preparing cost."""
        usage = outcome.usage + self.usage
        if not isinstance(outcome, Answer):
            return replace(outcome, message=self.restore(outcome.message), usage=usage)
        return replace(outcome, text=self.restore(outcome.text), notes=(*self.notes, *outcome.notes), usage=usage)


class Departure:
    """What is done to a text before an expert above the end tier sees it: first shortened, then redacted.

    In this order, so that whoever shortens works with the real text, on this tier, and nothing that it writes leaves
    unseen. What is personal is looked for in the whole text all the same: "Schmidt" alone is no name to a rule once
    "My name is Anna Schmidt" has been left out. Within one run the same value is always replaced by the same
    placeholder.

    Args:
        redactor: Replaces personal data; nobody's if None.
        shorteners: Make the text shorter, one after the other.
    """

    def __init__(self, *, redactor: Redactor | None = None, shorteners: Sequence[Shortener] = ()) -> None:
        self._redactor = redactor
        self._shorteners = tuple(shorteners)
        # A run is known here by its spending, and is forgotten with it.
        self._vaults: WeakKeyDictionary[Spend, Vault] = WeakKeyDictionary()

    async def learn(self, text: str, *, spend: Spend) -> None:
        """Takes note of what is personal in a text that a run will ask in parts. Never raises an `AgoraError`.

        Args:
            text: The text.
            spend: The run's spending, by which the run is known.
        """
        if self._redactor is not None:
            await beside(len(text), partial(self._redactor.learn, text, self._vault(spend)))

    async def redact(self, text: str, *, spend: Spend) -> Redacted:
        """A text without what is personal, for one who is asked by others than a crew: who plans, who puts together.

        Args:
            text: The text.
            spend: The run's spending, by which the run is known.
        """
        if self._redactor is None:
            return Redacted(text, {})
        return await beside(len(text), partial(self._redactor.redact, text, self._vault(spend)))

    async def prepare(self, question: str, expert: Expert, *, spend: Spend, deadline: float | None) -> Prepared:
        """Makes a text ready for an expert above the end tier. Never raises an `AgoraError`.

        Args:
            question: The text.
            expert: Who will see it.
            spend: The run's spending: pays for what an expert of the end tier helps with.
            deadline: Event-loop time at which to stop, or None.
        """
        text, usage = question, Usage()
        notes: list[str] = []
        if self._shorteners:
            await self.learn(question, spend=spend)
        for shortener in self._shorteners:
            done = await shortener.shorten(text, spend=spend, deadline=deadline)
            text, usage = done.text, usage + done.usage
            notes += done.notes
        if self._redactor is None:
            return Prepared(text=text, restore=_as_it_is, notes=tuple(notes), usage=usage)
        redacted = await self.redact(text, spend=spend)
        if redacted.replaced:
            notes.append(f"redacted before {expert.name} saw it: {redacted.told}")
        return Prepared(
            text=redacted.text,
            restore=redacted.restore,
            private=bool(redacted.replaced),
            notes=tuple(notes),
            usage=usage,
        )

    def _vault(self, spend: Spend) -> Vault:
        return self._vaults.setdefault(spend.of_run, Vault())


def _as_it_is(text: str) -> str:
    return text
