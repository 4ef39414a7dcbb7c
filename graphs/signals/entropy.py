"""Entropy: how many other words might have stood in the answer's place. It comes with the answer, if asked for then."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Final

from agora.routing.signals import ENTROPY
from agora.square import Expert
from graphs.signals.asking import Asking, NoSignal

ALTERNATIVES: Final = 10
"""Alternatives told of each token: half of the most that OpenAI's API and vLLM tell, since they make replies longer.
What they leave of the probability counts as one more alternative."""


def asked_with(expert: Expert, signals: Collection[str]) -> Expert:
    """The expert as it must be asked for these signals to be had."""
    return replace(expert, alternatives=max(expert.alternatives, ALTERNATIVES)) if ENTROPY in signals else expert


async def entropy(asking: Asking) -> float:
    """What the answer told of it, in nats.

    Raises:
        NoSignal: If it told nothing.
    """
    if ENTROPY not in asking.told:
        if not asking.expert.backend.capabilities.logprobs:
            raise NoSignal("its backend does not claim logprobs")
        raise NoSignal("its backend told no alternatives to the words of the answer")
    return asking.told[ENTROPY]
