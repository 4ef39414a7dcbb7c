"""Self-consistency: how many of several sampled answers come to the same as the answer (Wang et al. 2022)."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Final

from agora.routing.final_answer import final_answer
from graphs.signals.asking import Asking, NoSignal

TEMPERATURE: Final = 0.7
"""Temperature of the samples: what Wang et al. (arXiv 2203.11171, section 3.1) sample with from most models."""


async def self_consistency(asking: Asking) -> float:
    """The share of the samples that come to the same final answer; samples that say nothing clear do not.

    Samples that could not be had do not count, as long as there is one.

    Raises:
        NoSignal: If the answer comes to nothing clear, or no sample could be had.
    """
    wanted = final_answer(asking.answer)
    if wanted is None:
        raise NoSignal("no final answer can be read from the answer")
    seeded = asking.expert.backend.capabilities.seed
    request = asking.expert.request(asking.question, max_tokens=asking.max_tokens)
    request = replace(request, temperature=max(TEMPERATURE, request.temperature), logprobs=None)
    samples = await asyncio.gather(
        *(asking.generate(replace(request, seed=n if seeded else None)) for n in range(1, asking.samples + 1)),
        return_exceptions=True,
    )
    failed = [s for s in samples if isinstance(s, BaseException)]
    for failure in failed:
        if not isinstance(failure, NoSignal):
            raise failure
    texts = [s.text for s in samples if not isinstance(s, BaseException)]
    if not texts:
        raise NoSignal(f"none of {asking.samples} samples could be had: {failed[0]}")
    return sum(final_answer(t) == wanted for t in texts) / len(texts)
