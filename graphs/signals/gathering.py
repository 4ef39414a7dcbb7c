"""Gathering the signals of one answer: what came with it, and what has to be asked for."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from agora.errors import InvalidRequest
from agora.routing.signals import finite
from agora.square import Expert
from agora.types import Answer, Budget, Usage
from graphs.signals.asking import Asking, NoSignal
from graphs.signals.registry import SIGNALS
from graphs.spend import Spend

log = logging.getLogger(__name__)

DEFAULT_SAMPLES: Final = 5
"""Answers sampled for self-consistency. Wang et al. 2022 (figure 2) have most of the gain with the first 5 to 10."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What was gathered of one answer.

    Attributes:
        signals: By name, those that came with the answer included; finite numbers only.
        usage: What asking cost, apart from the answer itself.
        notes: Which signals could not be had, and why.
        limited: Whether one of them could not be had, or not in full, for want of time or money.
    """

    signals: dict[str, float] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    notes: tuple[str, ...] = ()
    limited: bool = False

    def added_to(self, answer: Answer) -> Answer:
        """The answer with its signals, what they cost, and what could not be had."""
        return replace(
            answer,
            signals=self.signals,
            usage=answer.usage + self.usage,
            notes=(*answer.notes, *self.notes),
            limited=answer.limited or self.limited,
        )


def checked_signals(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once, if all can be asked for.

    Raises:
        InvalidRequest: If one cannot.
    """
    if unknown := [n for n in names if n not in SIGNALS]:
        raise InvalidRequest(f"signals {unknown} cannot be asked for; allowed: {', '.join(SIGNALS)}")
    return tuple(dict.fromkeys(names))


async def gather(
    expert: Expert,
    question: str,
    answer: Answer,
    names: Sequence[str],
    *,
    samples: int = DEFAULT_SAMPLES,
    spend: Spend | None = None,
    max_tokens: int | None = None,
    deadline: float | None = None,
) -> Gathered:
    """Gathers signals, all at the same time. A signal that cannot be had is left out, with a note.

    Args:
        expert: Who answered.
        question: What it was asked.
        answer: What it answered; its own `signals` are among those returned.
        names: Signals to ask for besides: any of `SIGNALS`. For entropy the answer must have been asked for with
            alternatives (`asked_with`).
        samples: Answers sampled for self-consistency, at least 1.
        spend: What the calls are paid from; None for no limit.
        max_tokens: Most tokens of a sampled answer; the card's limit if None or larger.
        deadline: Event-loop time at which to stop; None for no deadline.

    Raises:
        InvalidRequest: If a name is none of the signals that can be asked for, or `samples` is below 1.
    """
    names = checked_signals(names)
    if samples < 1:
        raise InvalidRequest(f"samples is {samples}; it must be ≥ 1")
    asking = Asking(
        expert=expert,
        question=question,
        answer=answer.text,
        told=finite(answer.signals),
        samples=samples,
        max_tokens=max_tokens,
        spend=spend or Spend(Budget()),
        deadline=deadline,
    )
    signals, notes = finite(answer.signals), []
    for name, value in zip(names, await asyncio.gather(*(_one(name, asking) for name in names)), strict=True):
        if isinstance(value, str):
            notes.append(f"{name} of {expert.name}'s answer could not be had: {value}")
        else:
            signals[name] = value
    return Gathered(signals=signals, usage=asking.usage, notes=tuple(notes), limited=asking.limited)


async def _one(name: str, asking: Asking) -> float | str:
    """The signal, or why it could not be had."""
    try:
        value = await SIGNALS[name](asking)
    except NoSignal as e:
        return str(e)
    except Exception as e:
        # A third-party backend may raise anything; the answer itself is there and must not be lost over it.
        log.exception("signal %s of %s failed", name, asking.expert.name)
        return f"{type(e).__name__}: {e}"
    return value if math.isfinite(value) else f"it is {value}"
