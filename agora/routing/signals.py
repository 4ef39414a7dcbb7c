"""What tells how far an answer can be trusted: the names, and what can be read from a generation's log-probabilities.

The functions here are pure and cost nothing to speak of. What must be asked for (`ASKED_FOR`) is in `graphs.signals`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from agora.protocols import TokenLogprob

MEAN_LOGPROB: Final = "mean_logprob"
"""Mean natural-log probability of the generated tokens, ≤ 0."""

MIN_LOGPROB: Final = "min_logprob"
"""Smallest natural-log probability of a generated token, ≤ 0."""

PROBABILITY_Q10: Final = "probability_q10"
"""Probability that 10 % of the generated tokens stay below: Gupta et al. 2024 (arXiv 2404.10136) find low quantiles
to tell more than the mean, since one bad token in a long answer is enough."""

PROBABILITY_Q25: Final = "probability_q25"
"""Probability that 25 % of the generated tokens stay below."""

PROBABILITY_Q50: Final = "probability_q50"
"""Median probability of the generated tokens."""

ENTROPY: Final = "entropy"
"""Mean over the tokens of the entropy in nats of what else might have stood there, from the alternatives told."""

TOKENS: Final = "tokens"
"""Generated tokens."""

SELF_CONSISTENCY: Final = "self_consistency"
"""Share of further, sampled answers that come to the same final answer (Wang et al. 2022, arXiv 2203.11171)."""

VERBALISED: Final = "verbalised"
"""How sure the model says it is, in [0, 1] (Lin et al. 2022, arXiv 2205.14334)."""

P_TRUE: Final = "p_true"
"""Probability of "True" against "False" where the model is shown its answer (Kadavath et al., arXiv 2207.05221)."""

ASKED_FOR: Final = (SELF_CONSISTENCY, VERBALISED, P_TRUE, ENTROPY)
"""Signals that do not come with an answer by themselves; `[vertical] signals` names those that are wanted. All but
entropy need further calls."""


def mean_logprob(tokens: Sequence[TokenLogprob]) -> float | None:
    """See `MEAN_LOGPROB`; None without tokens."""
    return math.fsum(t.logprob for t in tokens) / len(tokens) if tokens else None


def min_logprob(tokens: Sequence[TokenLogprob]) -> float | None:
    """See `MIN_LOGPROB`; None without tokens."""
    return min((t.logprob for t in tokens), default=None)


def probability_quantile(tokens: Sequence[TokenLogprob], share: float) -> float | None:
    """The quantile of the tokens' probabilities, between neighbours by linear interpolation; None without tokens."""
    if not tokens:
        return None
    ordered = sorted(t.logprob for t in tokens)
    at = share * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    low, high = math.exp(ordered[below]), math.exp(ordered[above])
    return low + (at - below) * (high - low)


def entropy(tokens: Sequence[TokenLogprob]) -> float | None:
    """See `ENTROPY`; None unless alternatives were told for every token.

    What the alternatives told leave of the probability counts as one more alternative, so that the value is a lower
    bound of the true entropy.
    """
    if not tokens or not all(t.top for t in tokens):
        return None
    return math.fsum(_entropy(t) for t in tokens) / len(tokens)


def _entropy(token: TokenLogprob) -> float:
    logprobs = [v for _, v in token.top]
    if token.token not in {name for name, _ in token.top}:
        logprobs.append(token.logprob)
    shares = [math.exp(v) for v in logprobs]
    total = math.fsum(shares)
    # More than 1 comes of rounding, or of a server that tells no true probabilities.
    shares = [s / total for s in shares] if total > 1 else [*shares, 1 - total]
    return -math.fsum(s * math.log(s) for s in shares if s > 0)


def _tokens(tokens: Sequence[TokenLogprob]) -> float | None:
    return float(len(tokens)) if tokens else None


READERS: Final[Mapping[str, Callable[[Sequence[TokenLogprob]], float | None]]] = MappingProxyType(
    {
        MEAN_LOGPROB: mean_logprob,
        MIN_LOGPROB: min_logprob,
        PROBABILITY_Q10: lambda tokens: probability_quantile(tokens, 0.10),
        PROBABILITY_Q25: lambda tokens: probability_quantile(tokens, 0.25),
        PROBABILITY_Q50: lambda tokens: probability_quantile(tokens, 0.50),
        ENTROPY: entropy,
        TOKENS: _tokens,
    }
)
"""The signals that come with an answer, by name."""


def told(tokens: Sequence[TokenLogprob]) -> dict[str, float]:
    """All signals that a generation's log-probabilities tell; those that are not finite numbers are left out."""
    if any(math.isnan(t.logprob) or t.logprob > 0 for t in tokens):
        # A probability above 1 or none at all: nothing that was told can be relied on.
        return {TOKENS: float(len(tokens))}
    read = {name: reader(tokens) for name, reader in READERS.items()}
    return finite({name: value for name, value in read.items() if value is not None})


def finite(signals: Mapping[str, float]) -> dict[str, float]:
    """Those of the signals that are finite numbers."""
    return {name: float(value) for name, value in signals.items() if math.isfinite(value)}
