"""The square: which experts are here, who may be asked, and how they are.

An expert is a card (how it describes itself), a backend (what generates), and how the backend is to be spoken to:
a system prompt and, where the backend takes one, an adapter.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from agora.errors import InvalidRequest
from agora.protocols import Backend, GenerateRequest, Health, Message
from agora.types import AdapterRef, Answer, ExpertCard

HEALTH_TIMEOUT_S: Final = 30.0
"""Seconds a health probe may take. One token of the slowest model of the catalogue takes ~1 s on a loaded CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """Someone who can be asked.

    Attributes:
        card: How it describes itself.
        backend: What generates its answers; several experts may share one.
        system_prompt: What it is told before every question.
        adapter: LoRA adapter to answer with.
        temperature: 0 for greedy decoding.
        alternatives: Likeliest alternatives that its backend tells of each token it generates, for signals that look
            at them.
        node: Name of the machine it is on.
    """

    card: ExpertCard
    backend: Backend = field(repr=False)
    system_prompt: str | None = None
    adapter: AdapterRef | None = None
    temperature: float = 0.0
    alternatives: int = 0
    node: str = "local"

    @property
    def name(self) -> str:
        """The card's name."""
        return self.card.name

    async def ask(self, question: str, *, max_tokens: int | None = None, timeout_s: float | None = None) -> Answer:
        """Asks one question.

        Args:
            question: What to answer.
            max_tokens: Most tokens to generate; the card's limit if None or larger.
            timeout_s: Seconds for the whole call.

        Raises:
            BackendError: What went wrong on the way.
            InvalidRequest: If the question cannot be asked.
        """
        # Not at the top of the file: routing knows the square.
        from agora.routing.signals import told

        started = time.monotonic()
        done = await self.backend.generate(self.request(question, max_tokens=max_tokens, timeout_s=timeout_s))
        # What the links took, where they take money, is in the backend's own figure.
        cost = self.card.cost_of(done.usage.tokens) + done.usage.cost
        usage = replace(done.usage, cost=cost, calls=max(1, done.usage.calls))
        mean = done.mean_logprob
        return Answer(
            text=_clean(done.text),
            expert=self.name,
            usage=usage,
            seconds=time.monotonic() - started,
            mean_logprob=mean if mean is not None and math.isfinite(mean) else None,
            signals=told(done.logprobs),
            finish_reason=done.finish_reason,
            adapter=str(self.adapter) if self.adapter else None,
            path=done.path or None,
            notes=done.notes,
        )

    def request(
        self, question: str, *, max_tokens: int | None = None, timeout_s: float | None = None
    ) -> GenerateRequest:
        """What `ask` asks the backend: the question as this expert is spoken to.

        Args:
            question: What to answer.
            max_tokens: Most tokens to generate; the card's limit if None or larger.
            timeout_s: Seconds for the whole call.

        Raises:
            InvalidRequest: If the question cannot be asked.
        """
        wants = self.backend.capabilities
        return GenerateRequest(
            messages=self._messages(question) if wants.chat else (),
            prompt=None if wants.chat else self._prompt(question),
            max_tokens=self.card.max_tokens if max_tokens is None else min(max_tokens, self.card.max_tokens),
            temperature=self.temperature,
            logprobs=self.alternatives if wants.logprobs else None,
            adapter=self.adapter,
            timeout_s=timeout_s,
        )

    def _messages(self, question: str) -> tuple[Message, ...]:
        asked = Message(role="user", content=question)
        if not self.system_prompt:
            return (asked,)
        return (Message(role="system", content=self.system_prompt), asked)

    def _prompt(self, question: str) -> str:
        head = f"{self.system_prompt}\n\n" if self.system_prompt else ""
        return f"{head}Question: {question}\nAnswer:"


class Square:
    """Who is here. Experts join and leave; owned by one event loop.

    Args:
        experts: Those who are here from the start.
    """

    def __init__(self, experts: Sequence[Expert] = ()) -> None:
        self._experts: dict[str, Expert] = {}
        self._version = 0
        for expert in experts:
            self.join(expert)

    def join(self, expert: Expert) -> None:
        """Lets an expert in.

        Raises:
            InvalidRequest: If its name is taken.
        """
        if expert.name in self._experts:
            raise InvalidRequest(f"an expert named {expert.name!r} is already here", hint="choose another name")
        self._experts[expert.name] = expert
        self._version += 1

    def leave(self, name: str) -> Expert:
        """Lets an expert go; what it is answering now goes on.

        Raises:
            InvalidRequest: If nobody of that name is here.
        """
        expert = self.get(name)
        if expert is None:
            raise InvalidRequest(f"no expert named {name!r} is here; here: {', '.join(self._experts) or 'nobody'}")
        del self._experts[name]
        self._version += 1
        return expert

    def recard(self, card: ExpertCard) -> None:
        """An expert describes itself anew; it keeps its place, and what it is answering goes on.

        Raises:
            InvalidRequest: If nobody of that name is here.
        """
        expert = self.get(card.name)
        if expert is None:
            raise InvalidRequest(f"no expert named {card.name!r} is here; here: {', '.join(self._experts) or 'nobody'}")
        self._experts[card.name] = replace(expert, card=card)
        self._version += 1

    def get(self, name: str) -> Expert | None:
        """The expert of that name, if it is here."""
        return self._experts.get(name)

    @property
    def experts(self) -> tuple[Expert, ...]:
        """Those who are here now, in the order they came."""
        return tuple(self._experts.values())

    @property
    def version(self) -> int:
        """Grows whenever someone joins or leaves; what is derived from the cards can be kept until it does."""
        return self._version

    def __iter__(self) -> Iterator[Expert]:
        return iter(self.experts)

    def __len__(self) -> int:
        return len(self._experts)

    async def health(self, *, timeout_s: float = HEALTH_TIMEOUT_S) -> dict[str, Health]:
        """Asks every backend for one token, each backend once, all at the same time.

        Returns:
            Health by expert name.
        """
        backends = {id(e.backend): e.backend for e in self}
        probes = dict(
            zip(backends, await asyncio.gather(*(_probe(b, timeout_s) for b in backends.values())), strict=True)
        )
        return {e.name: probes[id(e.backend)] for e in self}

    async def aclose(self) -> None:
        """Closes every backend once, all of them even if one fails; that one's error is raised at the end."""
        backends = {id(e.backend): e.backend for e in self}
        ends = await asyncio.gather(*(b.aclose() for b in backends.values()), return_exceptions=True)
        if failed := [e for e in ends if isinstance(e, BaseException)]:
            raise failed[0]


def _clean(text: str) -> str:
    """What can be asked on, stored and sent: no NUL, no lone surrogates (a third-party backend may return any)."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode("utf-8").strip()


async def _probe(backend: Backend, timeout_s: float) -> Health:
    try:
        async with asyncio.timeout(timeout_s):
            return await backend.health()
    except TimeoutError:
        return Health(ok=False, detail=f"no token within {timeout_s:g} s", seconds=timeout_s)
    except Exception as e:
        # A probe is asked of everybody; one backend that breaks its promise not to raise must not hide the others.
        return Health(ok=False, detail=f"{type(e).__name__}: {e}")
