"""The number of replicas: up in time, down with patience, never to and fro, never out of bounds."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agora.errors import InvalidRequest
from agora.scheduling.scaling import MAX_SAMPLES, Observation, ScalingState, Targets, decide

EVERY_S = 2.0
TARGETS = Targets(least=1, most=8, queue=10.0, up_after_s=10.0, down_after_s=60.0, cooldown_s=20.0)


def play(targets: Targets, loads: list[float], *, start: int = 1, ttft: float | None = None) -> list[int]:
    state, wanted = ScalingState(wanted=start), []
    for n, load in enumerate(loads):
        state, now, _ = decide(state, Observation(at=n * EVERY_S, requests=load, ttft_s=ttft), targets)
        assert now == state.wanted
        wanted.append(now)
    return wanted


def changes(wanted: list[int], start: int = 1) -> list[int]:
    return [b - a for a, b in zip([start, *wanted], wanted, strict=False) if a != b]


@settings(max_examples=60, deadline=None)
@given(level=st.floats(0.0, 100.0), seed=st.integers(0, 10_000), start=st.integers(1, 8))
def test_noise_within_the_band_never_makes_it_turn_round(level: float, seed: int, start: int) -> None:
    rng = random.Random(seed)
    loads = [level * (1 + rng.uniform(-0.99, 0.99) * TARGETS.band) for _ in range(400)]
    made = changes(play(TARGETS, loads, start=start), start)
    assert all(c > 0 for c in made) or all(c < 0 for c in made)


@settings(max_examples=60, deadline=None)
@given(
    loads=st.lists(st.floats(0.0, 1e6), min_size=1, max_size=200),
    ttft=st.none() | st.floats(0.0, 1e4),
    start=st.integers(0, 20),
    least=st.integers(1, 4),
    more=st.integers(0, 6),
)
def test_never_out_of_bounds_never_faster_than_allowed(
    loads: list[float], ttft: float | None, start: int, least: int, more: int
) -> None:
    targets = replace(TARGETS, least=least, most=least + more, ttft_s=1.0, up_after_s=0.0, down_after_s=0.0)
    wanted = play(targets, loads, start=start, ttft=ttft)
    assert all(least <= w <= least + more for w in wanted)
    # The first look brings it within the bounds.
    made = [(n, b - a) for n, (a, b) in enumerate(pairwise(wanted)) if a != b]
    assert all(-targets.step_down <= c <= targets.step_up for _, c in made)
    assert all((b - a) * EVERY_S >= targets.cooldown_s for (a, _), (b, _) in pairwise(made))


@settings(max_examples=60, deadline=None)
@given(load=st.floats(0.0, 200.0), start=st.integers(1, 8))
def test_a_load_that_stays_gets_its_replicas_in_bounded_time(load: float, start: int) -> None:
    needed = min(max(math.ceil(load / (TARGETS.queue * (1 + TARGETS.band)) - 1e-9), 1), TARGETS.most)
    steps = math.ceil(max(needed - start, 0) / TARGETS.step_up)
    within_s = TARGETS.up_after_s + max(steps - 1, 0) * TARGETS.cooldown_s + 2 * EVERY_S
    wanted = play(TARGETS, [load] * (int(within_s / EVERY_S) + 1), start=start)
    assert wanted[-1] >= needed


def test_a_peak_shorter_than_the_patience_changes_nothing() -> None:
    assert play(TARGETS, [100.0] * 4 + [5.0] * 50) == [1] * 54


def test_down_only_when_fewer_were_enough_all_the_while() -> None:
    quiet = [5.0] * 31  # 62 s
    assert play(TARGETS, quiet, start=3)[-1] == 2
    disturbed = [*quiet[:20], 28.0, *quiet[:20]]
    assert set(play(TARGETS, disturbed, start=3)) == {3}


def test_time_to_the_first_token_alone_makes_it_more() -> None:
    targets = replace(TARGETS, ttft_s=1.0)
    assert play(targets, [5.0] * 10, ttft=3.0)[-1] == 3
    assert play(targets, [5.0] * 10, ttft=1.1)[-1] == 1, "within the band"
    assert play(targets, [1.0] * 10, ttft=3.0)[-1] == 1, "one request at a time: it cannot be faster"
    assert play(targets, [5.0] * 100, start=2, ttft=0.6)[-1] == 2, "with one fewer it would be over the target"
    assert play(targets, [5.0] * 100, start=2, ttft=0.2)[-1] == 1


def test_the_words_say_what_was_seen() -> None:
    targets = replace(TARGETS, up_after_s=0.0, ttft_s=2.0)
    _, wanted, why = decide(ScalingState(wanted=1), Observation(at=0.0, requests=36.0, ttft_s=3.0), targets)
    assert wanted == 3
    assert why == "1 → 3: 36 requests per replica, 10 are aimed at; 3 s to the first token, 2 are aimed at"


def test_a_clock_that_goes_back_does_not_stop_it() -> None:
    state = ScalingState(wanted=1, changed_at=1e9)
    wanted = 1
    for n in range(20):
        state, wanted, _ = decide(state, Observation(at=n * EVERY_S, requests=100.0), TARGETS)
    assert wanted > 1


def test_what_is_remembered_is_bounded() -> None:
    targets = replace(TARGETS, down_after_s=1e6)
    state = ScalingState(wanted=2)
    for n in range(3 * MAX_SAMPLES):
        state, _, _ = decide(state, Observation(at=n * 0.01, requests=15.0), targets)
        assert len(state.samples) <= MAX_SAMPLES + 1
    assert state.samples[0].at == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"least": 0},
        {"least": 3, "most": 2},
        {"queue": 0.0},
        {"queue": math.nan},
        {"ttft_s": -1.0},
        {"band": 1.0},
        {"cooldown_s": -1.0},
        {"up_after_s": math.inf},
        {"step_up": 0},
    ],
)
def test_targets_that_cannot_be_are_told(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        Targets(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"requests": math.nan}, {"requests": -1.0}, {"ttft_s": math.inf}, {"at": math.nan}])
def test_observations_that_cannot_be_are_told(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        Observation(**{"at": 0.0, "requests": 0.0, **wrong})
