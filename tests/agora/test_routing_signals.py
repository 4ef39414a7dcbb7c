"""What a generation's log-probabilities tell, against values computed another way."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.protocols import TokenLogprob
from agora.routing import signals

LOGPROBS = st.lists(st.floats(-30, 0), min_size=1, max_size=50)


def tokens(values: list[float]) -> list[TokenLogprob]:
    return [TokenLogprob(token=f"t{n}", logprob=v) for n, v in enumerate(values)]


@given(LOGPROBS)
def test_they_are_what_numpy_says(values: list[float]) -> None:
    told = signals.told(tokens(values))
    probabilities = np.exp(values)
    assert told[signals.MEAN_LOGPROB] == pytest.approx(np.mean(values))
    assert told[signals.MIN_LOGPROB] == min(values)
    assert told[signals.TOKENS] == len(values)
    for name, share in (("probability_q10", 0.1), ("probability_q25", 0.25), ("probability_q50", 0.5)):
        assert told[name] == pytest.approx(np.quantile(probabilities, share), abs=1e-12)
    assert signals.ENTROPY not in told
    assert all(math.isfinite(v) for v in told.values())


def test_entropy_of_alternatives() -> None:
    fair = TokenLogprob(token="a", logprob=math.log(0.5), top=(("a", math.log(0.5)), ("b", math.log(0.5))))
    sure = TokenLogprob(token="c", logprob=0.0, top=(("c", 0.0),))
    assert signals.entropy([fair, sure]) == pytest.approx(math.log(2) / 2)
    # The rest of the probability is one more alternative; the token itself counts where it is not among those told.
    rest = TokenLogprob(token="x", logprob=math.log(0.25), top=(("a", math.log(0.5)),))
    want = -(0.5 * math.log(0.5) + 0.25 * math.log(0.25) * 2)
    assert signals.entropy([rest]) == pytest.approx(want)
    assert signals.entropy([fair, TokenLogprob(token="d", logprob=-1.0)]) is None


def test_without_log_probabilities_nothing_is_told() -> None:
    assert signals.told([]) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.7])
def test_what_cannot_be_is_not_told(bad: float) -> None:
    assert signals.told(tokens([-0.1, bad])) == {signals.TOKENS: 2.0}


def test_a_token_thought_impossible_leaves_out_what_is_infinite() -> None:
    told = signals.told(tokens([-0.1, -math.inf]))
    assert signals.MEAN_LOGPROB not in told and signals.MIN_LOGPROB not in told
    assert told["probability_q50"] == pytest.approx(math.exp(-0.1) / 2)
