import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.network import availability
from agora.network.availability import Availability
from agora.network.bandwidth import Bandwidth
from agora.network.ewma import Histogram, Mean, PeakEwma, Slope

TIMES = st.floats(-1e9, 1e9)
VALUES = st.floats(0, 1e12)


def test_a_peak_is_taken_at_once_and_comes_down_with_time() -> None:
    wait = PeakEwma(10.0, floor=0.1)
    wait.observe(0.2, 0.0)
    wait.observe(5.0, 1.0)
    assert wait.read(1.0) == 5.0
    wait.observe(0.2, 1.0)  # no time has passed: the peak stays
    assert wait.read(1.0) == 5.0
    wait.observe(0.2, 11.0)
    assert wait.read(11.0) == pytest.approx(0.2 + 4.8 / math.e)
    assert wait.read(1000.0) == pytest.approx(0.1)


def test_a_clock_that_goes_back_freezes_nothing() -> None:
    wait = PeakEwma(10.0)
    wait.observe(1.0, 1e6)
    assert wait.read(0.0) == 1.0  # it does not grow
    wait.observe(0.5, 0.0)
    assert wait.read(0.0) == 1.0
    assert wait.read(100.0) < 0.001  # it ages from there


def test_a_mean_leaves_its_prior_and_comes_back() -> None:
    rtt = Mean(10.0, prior_weight=1.0)
    assert rtt.read(0.0, None) is None and rtt.read(0.0, 0.2) == 0.2
    for at in range(20):
        rtt.observe(0.05, at)
    assert rtt.read(20.0, 0.2) == pytest.approx(0.05, abs=0.02)
    assert rtt.read(200.0, 0.2) == pytest.approx(0.2)
    assert rtt.read(200.0, None) == pytest.approx(0.05)


def test_a_slope_finds_what_a_prompt_token_costs() -> None:
    slope, rng = Slope(1000.0, ridge=100.0), random.Random(0)
    assert slope.read(0.0, 0.001) == 0.001
    for at in range(50):
        tokens = rng.randrange(10, 2000)
        slope.observe(tokens, 0.3 + 0.004 * tokens + rng.gauss(0, 0.05), at)
    assert slope.read(50.0, 0.001) == pytest.approx(0.004, rel=0.05)
    down = Slope(1000.0, ridge=1.0)
    for x in range(10):
        down.observe(x, -x, 0.0)
    assert down.read(0.0, 0.001) == 0.0  # more tokens never take less time


def test_a_histogram_learns_quantiles() -> None:
    seen, rng = Histogram(1e9, sigma=0.4, prior_weight=4.0), random.Random(1)
    assert seen.quantile(0.5, 0.0) == pytest.approx(1.0, rel=0.02)
    assert seen.quantile(0.95, 0.0) == pytest.approx(math.exp(0.4 * 1.645), rel=0.02)
    values = [rng.lognormvariate(1.0, 0.7) for _ in range(4000)]
    for value in values:
        seen.observe(value, 0.0)
    assert seen.quantile(0.5, 0.0) == pytest.approx(math.e, rel=0.25)
    assert seen.quantile(0.95, 0.0) == pytest.approx(math.exp(1.0 + 0.7 * 1.645), rel=0.3)
    assert seen.below(seen.quantile(0.8, 0.0), 0.0) == pytest.approx(0.8, abs=0.01)
    assert seen.weight(0.0) == pytest.approx(200, rel=0.01)
    assert seen.below(math.inf, 0.0) == pytest.approx(1.0) and seen.below(0.0, 0.0) == 0.0


@given(st.lists(st.tuples(VALUES, TIMES), max_size=20), TIMES, st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_a_histogram_is_a_distribution_whatever_it_is_given(
    entries: list[tuple[float, float]], at: float, a: float, b: float
) -> None:
    seen = Histogram(30.0, sigma=0.4, prior_weight=2.0)
    for value, when in entries:
        seen.observe(value, when)
    low, high = sorted((a, b))
    assert 0 <= seen.below(low, at) <= seen.below(high, at) + 1e-9 <= 1 + 2e-9
    assert math.isfinite(seen.quantile(0.95, at)) and math.isfinite(seen.spread(at))


@given(st.lists(st.tuples(VALUES, TIMES), min_size=1, max_size=20), TIMES)
def test_averages_stay_within_what_they_were_given(entries: list[tuple[float, float]], at: float) -> None:
    peak, mean = PeakEwma(10.0), Mean(10.0, prior_weight=1.0)
    for value, when in entries:
        peak.observe(value, when)
        mean.observe(value, when)
    most = max(value for value, _ in entries)
    assert 0 <= peak.read(at) <= most * (1 + 1e-9)
    read = mean.read(at, 1.0)
    assert read is not None and 0 <= read <= max(most, 1.0) * (1 + 1e-9)


def test_bandwidth_is_bytes_over_seconds_and_falls_within_one_bad_transfer() -> None:
    band = Bandwidth(15.0, prior_s=0.1)
    assert band.mbps(0.0, None) is None and band.mbps(0.0, 100.0) == 100.0
    for at in range(5):
        band.observe(5_000_000, 0.5, float(at), rtt_s=0.05, prior=100.0)  # 80 Mbit/s
    assert band.mbps(5.0, 100.0) == pytest.approx(80.0, rel=0.05)
    band.observe(100_000, 4.0, 9.0, rtt_s=0.05, prior=100.0)  # 0.2 Mbit/s
    fallen = band.mbps(9.0, 100.0)
    assert fallen is not None and fallen < 30
    later = band.mbps(200.0, 100.0)
    assert later is not None and later > 95


def test_transfers_shorter_than_a_round_trip_are_a_lower_bound_only() -> None:
    band = Bandwidth(15.0, prior_s=0.1)
    assert not band.observe(1_000, 0.01, 0.0, rtt_s=0.05, prior=50.0)  # 0.8 Mbit/s, all of it latency
    assert band.mbps(0.0, 50.0) == 50.0
    assert band.observe(2_000_000, 0.04, 0.0, rtt_s=0.05, prior=50.0)  # at least 400
    now = band.mbps(0.0, 50.0)
    assert now is not None and now > 200
    assert not band.observe(5, 0.0, 1.0, rtt_s=0.05, prior=50.0)


def test_a_transfer_that_moved_nothing_is_the_end_of_trust() -> None:
    band = Bandwidth(15.0, prior_s=0.1)
    band.observe(5_000_000, 0.2, 0.0, rtt_s=0.05, prior=200.0)
    band.observe(0, 5.0, 5.0, rtt_s=0.05, prior=200.0)
    now = band.mbps(5.0, 200.0)
    assert now is not None and 0 <= now < 15


def test_availability_believes_failures_and_forgives() -> None:
    works, rng = Availability(60.0, prior_weight=4.0), random.Random(0)
    assert availability.mean(*works.beta(0.0, 0.9)) == pytest.approx(0.9)
    for at in range(10):
        works.observe(False, float(at))
    bad = works.beta(10.0, 0.9)
    assert availability.mean(*bad) < 0.35
    draws = [availability.sample(*bad, rng) for _ in range(400)]
    assert sum(draws) / len(draws) == pytest.approx(availability.mean(*bad), abs=0.03)
    assert availability.mean(*works.beta(1000.0, 0.9)) == pytest.approx(0.9, abs=0.01)
    assert availability.sample(0.0, 4.0, rng) == 0.0 and availability.sample(4.0, 0.0, rng) == 1.0
    assert availability.mean(0.0, 0.0) == 0.0
