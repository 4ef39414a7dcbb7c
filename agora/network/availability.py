"""How likely a way works: a Beta distribution whose evidence fades."""

from __future__ import annotations

import random

from agora.network.ewma import Age, fading


class Availability:
    """Successes and failures, discounted with time: the posterior of a coin that drifts.

    After discounted Thompson sampling (Raj and Kalyani 2017, arXiv 1707.09727). What fades leaves the prior, so a way
    that was given up is believed in again.

    Args:
        tau_s: Seconds in which an outcome's weight falls to 1/e.
        prior_weight: How many outcomes the configured availability stands for.
    """

    __slots__ = ("_age", "_bad", "_good", "_prior_weight", "_tau")

    def __init__(self, tau_s: float, prior_weight: float) -> None:
        self._tau = tau_s
        self._prior_weight = prior_weight
        self._good = 0.0
        self._bad = 0.0
        self._age = Age()

    def observe(self, ok: bool, at: float) -> None:
        """Takes in whether it worked."""
        kept = fading(self._age.touch(at), self._tau)
        self._good = self._good * kept + ok
        self._bad = self._bad * kept + (not ok)

    def beta(self, at: float, prior: float) -> tuple[float, float]:
        """Parameters of the distribution now; `prior` in [0, 1] is the configured share of the time that it works."""
        kept = fading(self._age.of(at), self._tau)
        return prior * self._prior_weight + self._good * kept, (1 - prior) * self._prior_weight + self._bad * kept


def mean(alpha: float, beta: float) -> float:
    """Mean of a Beta distribution; of one without any evidence 0."""
    return alpha / (alpha + beta) if alpha + beta > 0 else 0.0


def sample(alpha: float, beta: float, rng: random.Random) -> float:
    """Draws from a Beta distribution; of one whose one parameter is 0 the only value it has."""
    return rng.betavariate(alpha, beta) if alpha > 0 and beta > 0 else mean(alpha, beta)
