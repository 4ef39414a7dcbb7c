"""The promise is kept on any population; and it is worth something."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agora.errors import InvalidRequest
from agora.routing.risk import (
    Certificate,
    betting_p_values,
    certify,
    hoeffding_bentkus_p_values,
    rows_needed,
)
from agora.routing.risk.betting import MOST_OF_LIMIT, PRIOR_ROWS, PRIOR_VARIANCE

DRAWS = 3000
NASTY = {
    "rare and total": ([1.0, 0.0], [1, 0]),
    "wins and losses": ([1.0, -1.0], [1, 0]),
    "nearly always a little": ([0.3, -1.0], [1, 0]),
    "small wins, rare disaster": ([1.0, -0.05], [1, 0]),
    "mixed": ([1.0, 0.3, 0.0, -0.2, -1.0], [0.3, 0.2, 0, 0.2, 0.3]),
}
"""Losses, and weights that are shifted between the first and the last until the mean is the largest allowed."""


def at_the_border(name: str, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Values and probabilities of a population whose mean loss is `alpha`."""
    values, mixed = np.array(NASTY[name][0]), np.array(NASTY[name][1], dtype=float)
    if len(values) == 2:
        share = (alpha - values[1]) / (values[0] - values[1])
        return values, np.array([share, 1 - share])
    base = 0.4 * mixed / mixed.sum()
    base[2] = 0.6
    base[0] += (alpha - base @ values) / (values[0] - values[2])
    base[2] = 1 - (base.sum() - base[2])
    return values, base


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize(("alpha", "delta"), [(0.05, 0.05), (0.01, 0.1), (0.2, 0.01)])
def test_a_policy_at_the_border_is_seldom_certified(name: str, alpha: float, delta: float) -> None:
    values, shares = at_the_border(name, alpha)
    assert shares @ values == pytest.approx(alpha)
    rng = np.random.default_rng([*name.encode(), int(1000 * alpha)])
    # 4 standard errors: one false alarm in 30,000.
    allowed = delta + 4 * math.sqrt(delta * (1 - delta) / DRAWS)
    for n in (40, 250):
        losses = rng.choice(values, size=(n, DRAWS), p=shares)
        p = betting_p_values(losses, alpha, level=delta)
        assert (p <= delta * (1 + 1e-9)).mean() <= allowed
        # They are p-values at any level, not just at the one that was bet for.
        assert (p <= 0.3).mean() <= 0.3 + 4 * math.sqrt(0.21 / DRAWS)


def test_the_usual_test_by_a_normal_approximation_would_not_keep_it() -> None:
    # Were the populations above too tame, this would pass too.
    values, shares = at_the_border("rare and total", 0.01)
    losses = np.random.default_rng(0).choice(values, size=(100, DRAWS), p=shares)
    spread = np.maximum(losses.std(axis=0, ddof=1), 1e-12)
    z = (0.01 - losses.mean(axis=0)) / spread * 10
    assert (z > 1.645).mean() > 0.3


def one_by_one(losses: list[float], alpha: float, delta: float) -> float:
    """The same bets with plain numbers."""
    wealth = best = 1.0
    squares = PRIOR_ROWS * PRIOR_VARIANCE
    for i, loss in enumerate(losses):
        variance = squares / (PRIOR_ROWS + i)
        bet = 0.0
        if best < 1 / delta:
            bet = math.sqrt(2 * max(math.log(1 / (delta * wealth)), 0) / ((len(losses) - i) * variance))
        wealth *= 1 - min(bet, MOST_OF_LIMIT / (1 - alpha)) * (loss - alpha)
        best = max(best, wealth)
        squares += (loss - alpha) ** 2
    return 1 / best


@settings(max_examples=50)
@given(st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=1, max_size=40), st.floats(0.01, 0.5))
def test_wealth_is_what_the_bets_come_to(losses: list[float], alpha: float) -> None:
    [p] = betting_p_values(np.array(losses)[:, None], alpha, level=0.05)
    assert p == pytest.approx(one_by_one(losses, alpha, 0.05), rel=1e-6)
    assert 0 < p <= 1


def test_columns_do_not_touch_each_other() -> None:
    losses = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=(300, 6), p=[0.02, 0.93, 0.05])
    together = betting_p_values(losses, 0.05, level=0.05)
    assert together == pytest.approx([betting_p_values(losses[:, [j]], 0.05, level=0.05)[0] for j in range(6)])


def test_power_near_the_best_possible_and_far_above_hoeffding_bentkus() -> None:
    rng = np.random.default_rng(0)
    losses = rng.choice([-1.0, 0.0, 1.0], size=(1000, 400), p=[0.03, 0.91, 0.06])
    certified = (betting_p_values(losses, 0.05, level=0.05) <= 0.05 * (1 + 1e-9)).mean()
    assert certified > 0.55  # a normal approximation, which promises nothing, would have 0.68
    assert (hoeffding_bentkus_p_values(losses, 0.05) <= 0.05).mean() == 0


def test_hoeffding_bentkus_is_valid_and_falls_with_the_mean() -> None:
    rng = np.random.default_rng(0)
    border = rng.choice([-1.0, 1.0], size=(200, 2000), p=[0.4, 0.6])
    assert (hoeffding_bentkus_p_values(border, 0.2) <= 0.1).mean() <= 0.1
    steps = np.repeat(np.linspace(1, -1, 9)[None, :], 50, axis=0)
    p = hoeffding_bentkus_p_values(steps, 0.2)
    assert (np.diff(p) <= 1e-12).all()
    assert p[0] == 1 and p[-1] < 1e-10


# -- The whole procedure


def family(n: int, k: int, rng: np.random.Generator, alpha: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """A sample of thresholds on one score, from the one that takes every cheap answer to the one that takes few, and
    their true mean losses; one of them is exactly at the border."""
    shares = np.linspace(1, 1 / k, k)
    middle = shares[k // 2]
    # A cheap answer whose score has rank u loses with probability c·u: taking the lower share s loses c·s²/2.
    c = 2 * alpha / middle**2
    rank = rng.random(n)
    lost = rng.random(n) < np.minimum(c * rank, 1)
    true = np.array([np.mean(np.minimum(c * np.linspace(0, s, 2001), 1)) * s for s in shares])
    return np.where(rank[:, None] < shares[None, :], lost[:, None].astype(float), 0.0), true


@pytest.mark.parametrize("k", [5, 60])
def test_the_promise_is_broken_in_at_most_the_share_of_draws_that_it_allows(k: int) -> None:
    rng = np.random.default_rng(k)
    draws, broken, some = 150, 0, 0
    for _ in range(draws):
        losses, true = family(400, k, rng)
        certificate = certify(losses, max_risk=0.05, confidence=0.9)
        broken += any(true[i] > 0.05 + 1e-4 for i in certificate.certified)
        some += certificate.chosen is not None
    assert broken / draws <= 0.1 + 3 * math.sqrt(0.09 / draws)
    assert some / draws > 0.95


def test_tuning_on_the_sample_breaks_it_far_more_often() -> None:
    rng = np.random.default_rng(0)
    broken = 0
    for _ in range(200):
        losses, true = family(400, 60, rng)
        broken += true[np.flatnonzero(losses.mean(axis=0) <= 0.05)[0]] > 0.05
    assert broken / 200 > 0.3


def test_the_first_that_fails_ends_the_sequence() -> None:
    good, bad = np.zeros(500), np.ones(500)
    losses = np.column_stack([good, bad, good, good])
    certificate = certify(losses, max_risk=0.05, confidence=0.95)
    # The cheapest one is as good as any, but stands behind one that is not.
    assert certificate.certified == (2, 3)
    assert certificate.chosen == 2
    assert certificate.p_values[0] == 1.0
    assert certificate.mean_loss == 0
    assert certificate.why.startswith("certified: it loses at most 0.05")


def test_nothing_certified_is_said() -> None:
    certificate = certify(np.ones((500, 3)), max_risk=0.05, confidence=0.95)
    assert certificate.chosen is None
    assert certificate.certified == ()
    assert "nothing certified" in certificate.why
    assert "the top tier is always asked" in certificate.why


def test_a_family_of_nothing_but_the_top_tier() -> None:
    certificate = certify(np.zeros((10, 0)), max_risk=0.05, confidence=0.95)
    assert certificate.chosen is None
    assert "nothing certified" in certificate.why


def test_rows_in_order_of_their_losses_do_not_matter() -> None:
    losses = np.random.default_rng(0).choice([0.0, 1.0], size=(1000, 1), p=[0.98, 0.02])
    for rows in (losses, np.sort(losses, axis=0), np.sort(losses, axis=0)[::-1]):
        assert certify(rows, max_risk=0.05, confidence=0.95).chosen == 0


def test_same_rows_same_certificate_and_kept_as_json() -> None:
    losses, _ = family(800, 20, np.random.default_rng(1))
    certificate = certify(losses, max_risk=0.05, confidence=0.95)
    assert certificate == certify(losses, max_risk=0.05, confidence=0.95)
    assert Certificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate


@pytest.mark.parametrize(("alpha", "confidence"), [(0.05, 0.95), (0.01, 0.9), (0.3, 0.99)])
def test_rows_needed_are_just_enough_for_what_never_loses(alpha: float, confidence: float) -> None:
    rows = rows_needed(alpha, confidence)
    assert certify(np.zeros((rows, 1)), max_risk=alpha, confidence=confidence).chosen == 0
    assert certify(np.zeros((int(rows * 0.8), 1)), max_risk=alpha, confidence=confidence).chosen is None


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (np.zeros((0, 3)), "shape"),
        (np.zeros(3), "shape"),
        (np.array([[0.0, np.nan]]), "nan"),
        (np.array([[1.5]]), "1.5"),
        (np.array([[-np.inf]]), "inf"),
    ],
)
def test_losses_that_are_none_are_refused(losses: np.ndarray, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        certify(losses, max_risk=0.05, confidence=0.95)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, math.nan, 5.0])
def test_limits_outside_0_to_1_are_refused(value: float) -> None:
    with pytest.raises(InvalidRequest, match="max_risk"):
        certify(np.zeros((9, 1)), max_risk=value, confidence=0.95)
    with pytest.raises(InvalidRequest, match="confidence"):
        certify(np.zeros((9, 1)), max_risk=0.05, confidence=value)
