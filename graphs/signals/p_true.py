"""P(True): the probability with which the expert calls its own answer true (Kadavath et al. 2022)."""

from __future__ import annotations

import math
from typing import Final

from agora.protocols import GenerateRequest, ScoreRequest, TokenLogprob
from graphs.signals.asking import Asking, NoSignal

WORDS: Final = "Is your answer true or false? Reply with one word, True or False."
"""What is asked; the two words are what is scored."""

TOP: Final = 20
"""Alternatives to the first token that are looked through where the two words cannot be scored: the most that
OpenAI's API and vLLM tell."""

LEAST_MASS: Final = 0.01
"""Probability of the two words together below which their ratio says nothing: the model would say something else."""


async def p_true(asking: Asking) -> float:
    """P(True) / (P(True) + P(False)), in [0, 1], by scoring both words where the backend can, else from the
    alternatives to the first token that it generates.

    Raises:
        NoSignal: If the backend tells no log-probabilities, or neither word is among them.
    """
    can = asking.expert.backend.capabilities
    if can.score:
        return await _scored(asking)
    if can.logprobs:
        return await _generated(asking)
    raise NoSignal("its backend claims neither score nor logprobs")


async def _scored(asking: Asking) -> float:
    messages, prompt = asking.about_it(WORDS)
    # After a prompt the word is set off by a space; in a chat it begins the turn.
    words = ("True", "False") if prompt is None else (" True", " False")
    if prompt is not None:
        prompt += "\nAnswer:"
    adapter = asking.expert.adapter
    scores = await asking.score(ScoreRequest(continuations=words, messages=messages, prompt=prompt, adapter=adapter))
    logprobs = [s.logprob for s in scores.scores]
    if any(math.isnan(v) for v in logprobs) or all(v == -math.inf for v in logprobs):
        raise NoSignal("neither word has a probability")
    return scores.probabilities()[0]


async def _generated(asking: Asking) -> float:
    messages, prompt = asking.about_it(WORDS)
    if prompt is not None:
        prompt += "\nAnswer:"
    done = await asking.generate(
        GenerateRequest(messages=messages, prompt=prompt, max_tokens=1, logprobs=TOP, adapter=asking.expert.adapter)
    )
    if not done.logprobs:
        raise NoSignal("no log-probabilities came with its reply")
    first: TokenLogprob = done.logprobs[0]
    alternatives = dict(first.top) | {first.token: first.logprob}
    true, false = (
        math.fsum(math.exp(v) for token, v in alternatives.items() if token.strip().casefold() == word and v <= 0)
        for word in ("true", "false")
    )
    if not true + false >= LEAST_MASS:
        raise NoSignal(f"asked whether its answer is true, it begins with {first.token.strip()[:30]!r}")
    return true / (true + false)
