import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import InvalidRequest
from agora.network.estimates import Estimates, Expectation
from agora.network.jobs import Job, Observation, ServerLoad
from agora.network.path import Link, Path, Technology

JOB = Job(up_bytes=1_000_000, down_bytes=2_000, prompt_tokens=200, completion_tokens=50)


class Now:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.t = 0.0

    def __call__(self) -> float:
        return self.t


def path(name: str = "5g", target: str = "edge", **more: float | None) -> Path:
    values: dict[str, float | None] = {"up_mbps": 80.0, "down_mbps": 160.0, "rtt_s": 0.04, "availability": 0.99}
    link = Link(name=name, source="car", target=target, technology=Technology.NR, **(values | more))  # type: ignore[arg-type]
    return Path(name=name, links=(link,), target=target)


def answered(way: Path, at: float, **more: object) -> Observation:
    values: dict[str, object] = {"up_bytes": JOB.up_bytes, "down_bytes": 2_000, "prompt_tokens": 200}
    values |= {"completion_tokens": 50, "first_token_s": 0.5, "total_s": 1.5}
    return Observation(path=way, at=at, ok=True, **(values | more))  # type: ignore[arg-type]


def test_before_anything_is_seen_the_configured_values_count() -> None:
    parts = Estimates(Now()).expect(path(), JOB).parts
    assert parts.rtt_s == 0.04
    assert parts.up_s == pytest.approx(8 / 80)
    assert parts.down_s == pytest.approx(0.016 / 160)
    assert parts.queue_s == 0.0 and parts.prefill_s > 0 and parts.decode_s > 0
    assert parts.total_s == pytest.approx(parts.rtt_s + parts.up_s + parts.prefill_s + parts.decode_s)


def test_relays_add_up_and_the_slowest_link_bounds_the_answer() -> None:
    first, second = path("v2v", "truck", rtt_s=0.01).links[0], path("5g", "edge", up_mbps=20.0, down_mbps=40.0).links[0]
    both = Path(name="v2v+5g", links=(first, second), target="edge")
    parts = Estimates(Now()).expect(both, JOB).parts
    assert parts.rtt_s == pytest.approx(0.05)
    assert parts.up_s == pytest.approx(8 / 80 + 8 / 20)
    assert parts.down_s == pytest.approx(0.016 / 40)


def test_the_very_machine_is_not_on_any_network() -> None:
    parts = Estimates(Now()).expect(Path(name="here", links=(), target="car"), JOB).parts
    assert parts.rtt_s == parts.up_s == parts.down_s == 0.0 and parts.total_s > 0


def test_observations_override_what_is_configured_and_fade() -> None:
    now = Now()
    estimates, way = Estimates(now), path()
    for _ in range(20):
        now.t += 3.0
        estimates.observe(answered(way, now.t, up_s=0.8, first_token_s=1.2, total_s=2.0, rtt_s=0.1))
    seen = estimates.expect(way, JOB)
    assert seen.parts.up_s == pytest.approx(0.8, rel=0.2)
    assert seen.parts.rtt_s == pytest.approx(0.1, rel=0.3)
    assert seen.seconds == pytest.approx(2.0, rel=0.2)
    now.t += 3600
    assert estimates.expect(way, JOB).parts.up_s == pytest.approx(0.1, rel=0.01)


def test_bandwidth_is_told_from_the_first_token_of_a_large_upload() -> None:
    now = Now()
    estimates, way = Estimates(now), path(up_mbps=20.0)
    big = {"up_bytes": 4_000_000, "prompt_tokens": 0, "completion_tokens": 0}
    for _ in range(6):
        now.t += 2.0
        estimates.observe(answered(way, now.t, first_token_s=0.84, total_s=0.85, **big))  # 40 Mbit/s and the round trip
    assert estimates.expect(way, Job(up_bytes=4_000_000)).parts.up_s == pytest.approx(0.8, rel=0.1)


def test_a_wait_in_a_queue_is_a_peak_that_comes_down() -> None:
    now = Now()
    estimates, way = Estimates(now), path()
    for _ in range(10):
        now.t += 1.0
        estimates.observe(answered(way, now.t, up_s=0.1, first_token_s=0.35))
    calm = estimates.expect(way, JOB).parts.queue_s
    estimates.observe(answered(way, now.t, up_s=0.1, first_token_s=4.35, total_s=5.5))
    peak = estimates.expect(way, JOB).parts.queue_s
    assert calm < 0.3 and peak > 3
    now.t += 30
    assert estimates.expect(way, JOB).parts.queue_s < peak / 10


def test_a_servers_pace_is_learned_whichever_way_it_is_reached() -> None:
    now = Now()
    estimates, one, other = Estimates(now), path("5g"), path("4g")
    rng = random.Random(0)
    for _ in range(40):
        now.t += 1.0
        tokens, told = rng.randrange(10, 1000), rng.randrange(10, 200)
        first = 0.04 + 0.1 + 0.002 * tokens
        total = first + 0.05 * (told - 1)
        more = {"prompt_tokens": tokens, "completion_tokens": told, "first_token_s": first, "total_s": total}
        estimates.observe(answered(one, now.t, up_s=0.1, **more))
    parts = estimates.expect(other, Job(prompt_tokens=500, completion_tokens=100)).parts
    assert parts.prefill_s == pytest.approx(1.0, rel=0.15)
    assert parts.decode_s == pytest.approx(5.0, rel=0.1)
    said = ServerLoad(running=4, waiting=8, prefill_tps=5000.0, decode_tps=50.0)
    parts = estimates.expect(other, Job(prompt_tokens=500, completion_tokens=100), load=said).parts
    assert parts.prefill_s == pytest.approx(0.1) and parts.decode_s == pytest.approx(2.0)
    assert parts.queue_s > 1  # eight wait, four run, and each takes some seconds (Little's law)


def test_failures_make_a_path_unlikely_and_cancelling_does_not() -> None:
    now = Now()
    estimates, way = Estimates(now), path()
    for _ in range(5):
        now.t += 1.0
        estimates.observe(Observation(path=way, at=now.t, ok=False, cancelled=True, up_bytes=10, total_s=0.2))
    assert estimates.expect(way, JOB).works == pytest.approx(0.99)
    for _ in range(5):
        now.t += 1.0
        estimates.observe(Observation(path=way, at=now.t, ok=False, total_s=2.0))
    broken = estimates.expect(way, Job(deadline_s=100.0))
    assert broken.works < 0.5 and broken.on_time is not None and broken.on_time <= broken.works
    now.t += 600
    assert estimates.expect(way, JOB).works > 0.98


def test_a_cancelled_transfer_tells_the_bandwidth() -> None:
    now = Now()
    estimates, way = Estimates(now), path(up_mbps=400.0)
    estimates.observe(Observation(path=way, at=1.0, ok=False, cancelled=True, up_bytes=0, total_s=2.0, up_s=2.0))
    now.t = 1.0
    assert estimates.expect(way, JOB).parts.up_s > 0.3


def test_the_chance_to_be_on_time_is_what_it_turns_out_to_be() -> None:
    now, rng = Now(), random.Random(3)
    estimates, way = Estimates(now), path(availability=1.0)
    job = Job(prompt_tokens=200, completion_tokens=50, deadline_s=2.5)
    told, kept = [], []
    for i in range(600):
        now.t += 2.0
        total = 1.5 * rng.lognormvariate(0, 0.5)
        if i >= 200:
            told.append(estimates.expect(way, job).on_time or 0.0)
            kept.append(total <= 2.5)
        more = {"up_bytes": 0, "down_bytes": 0, "up_s": 0.0, "first_token_s": total / 3, "total_s": total}
        estimates.observe(answered(way, now.t, **more))
    assert sum(told) / len(told) == pytest.approx(sum(kept) / len(kept), abs=0.07)


def test_the_95th_percentile_of_the_first_token_is_learned_and_scales_with_the_job() -> None:
    now, rng = Now(), random.Random(4)
    estimates, way = Estimates(now), path()
    assert estimates.expect(way, JOB).first_token_p95_s is None
    firsts = []
    for _ in range(300):
        now.t += 1.0
        first = 0.05 + 0.1 + 0.2 * rng.lognormvariate(0, 0.6)
        firsts.append(first)
        estimates.observe(answered(way, now.t, up_s=0.1, first_token_s=first, total_s=first + 1))
    now.t += 60  # so that the last one's wait is forgotten
    p95 = estimates.expect(way, JOB).first_token_p95_s
    assert p95 is not None and p95 == pytest.approx(sorted(firsts)[285], rel=0.5)
    larger = estimates.expect(way, Job(up_bytes=20_000_000)).first_token_p95_s
    assert larger is not None and larger > p95


def test_a_link_without_bandwidth_takes_for_ever() -> None:
    for more in ({"up_mbps": 0.0}, {"down_mbps": 0.0}):
        dead = Estimates(Now()).expect(path(**more), Job(up_bytes=1, deadline_s=1e9))
        assert dead.seconds == math.inf and dead.on_time == 0.0


def test_configured_changes_are_news() -> None:
    now = Now()
    estimates = Estimates(now)
    for _ in range(5):
        now.t += 1.0
        estimates.observe(answered(path(), now.t, up_s=0.1, rtt_s=0.04))
    moved = path(up_mbps=2.0)
    before, after = estimates.expect(path(), JOB).parts.up_s, estimates.expect(moved, JOB).parts.up_s
    assert after > before
    now.t += 30
    assert estimates.expect(moved, JOB).parts.up_s > 10 * before


def test_running_requests_share_the_bandwidth() -> None:
    estimates, big = Estimates(Now()), Job(up_bytes=10_000_000)
    alone, shared = estimates.expect(path(), big).seconds, estimates.expect(path(), big, running=3).seconds
    assert alone * 3 < shared < alone * 4.01


def test_answers_whose_bytes_nobody_counted_say_nothing_of_the_bandwidth() -> None:
    now, way = Now(), path(rtt_s=0.0)
    estimates = Estimates(now)
    for i in range(20):
        estimates.observe(Observation(path=way, at=float(i), ok=True, first_token_s=0.5, total_s=0.9))
    now.t = 20.0
    parts = estimates.expect(way, Job(up_bytes=1_000_000, down_bytes=1_000_000)).parts
    assert parts.up_s == pytest.approx(8 / 80) and parts.down_s == pytest.approx(8 / 160)


def test_a_server_that_tells_next_to_no_pace_is_slow_and_not_nan() -> None:
    load = ServerLoad(prefill_tps=5e-324, decode_tps=5e-324)
    assert Estimates(Now()).expect(path(), Job(), load=load).seconds == pytest.approx(0.04)
    assert Estimates(Now()).expect(path(), JOB, load=load).seconds > 1e15


def test_forgetting_a_path() -> None:
    now = Now()
    estimates, way = Estimates(now), path()
    estimates.observe(answered(way, 0.0, up_s=5.0, first_token_s=5.5, total_s=6.0))
    assert estimates.expect(way, JOB).seen > 0
    estimates.forget(way)
    assert estimates.expect(way, JOB).seen == 0 and estimates.expect(way, JOB).parts.up_s == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["up_bytes", "total_s", "first_token_s", "up_s", "down_s", "rtt_s", "completion_tokens"]
)
def test_observations_that_cannot_be_are_refused(name: str, bad: float) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} of an observation on path '5g' is"):
        answered(path(), 0.0, **{name: bad})
    with pytest.raises(InvalidRequest, match="give a clock's time"):
        answered(path(), math.nan)


NUMBERS = st.one_of(st.just(0.0), st.floats(0, 1e15), st.floats(0, 10))
MAYBE = st.one_of(st.none(), NUMBERS)
CLOCK = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([0.0, 1e300, -1e300]))


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    count = st.one_of(st.integers(0, 10**15), st.integers(0, 100))
    return Observation(
        path=path(**{n: draw(st.sampled_from([None, 0.0, 1e-12, 50.0, 1e12])) for n in ("up_mbps", "rtt_s")}),
        at=draw(CLOCK),
        ok=draw(st.booleans()),
        cancelled=draw(st.booleans()),
        up_bytes=draw(count),
        down_bytes=draw(count),
        prompt_tokens=draw(count),
        completion_tokens=draw(count),
        first_token_s=draw(MAYBE),
        total_s=draw(NUMBERS),
        up_s=draw(MAYBE),
        down_s=draw(MAYBE),
        rtt_s=draw(MAYBE),
    )


def sound(e: Expectation) -> bool:
    parts = e.parts
    numbers = [e.seconds, parts.rtt_s, parts.up_s, parts.queue_s, parts.prefill_s, parts.decode_s, parts.down_s]
    probable = e.on_time is not None and -1e-9 <= e.on_time <= 1 + 1e-9 and 0 <= e.works <= 1
    p95 = e.first_token_p95_s
    finite = math.isfinite(e.spread) and all(math.isfinite(v) and v >= 0 for v in (*e.availability, e.seen))
    return probable and finite and all(n >= 0 for n in numbers) and (p95 is None or p95 >= 0)


@given(st.lists(observations(), max_size=8), st.one_of(CLOCK, st.sampled_from([math.nan, math.inf, -math.inf])))
def test_whatever_is_seen_and_however_the_clock_leaps_expectations_are_sound(
    seen: list[Observation], at: float
) -> None:
    now = Now()
    estimates = Estimates(now)
    for one in seen:
        now.t = one.at
        estimates.observe(one)
    now.t = at
    job = Job(up_bytes=1000, down_bytes=1000, prompt_tokens=10, completion_tokens=10, deadline_s=2.0)
    for way in [path(), path(up_mbps=0.0), *(one.path for one in seen)]:
        assert sound(estimates.expect(way, job, running=3, load=ServerLoad(running=1, waiting=2)))


def test_a_clock_that_leaps_hours_costs_no_more_than_what_was_learned() -> None:
    now = Now()
    estimates, way = Estimates(now), path()
    fresh = estimates.expect(way, JOB).seconds
    for _ in range(30):
        now.t += 1.0
        estimates.observe(answered(way, now.t, up_s=3.0, first_token_s=3.5, total_s=4.0))
    now.t += 5 * 3600
    assert estimates.expect(way, JOB).parts.up_s == pytest.approx(0.1, rel=0.01)
    now.t -= 5 * 3600 + 100
    estimates.observe(answered(way, now.t, up_s=0.1, first_token_s=0.35, total_s=1.9))
    now.t += 60
    estimates.observe(answered(way, now.t, up_s=0.1, first_token_s=0.35, total_s=1.9))
    assert estimates.expect(way, JOB).seconds < 2 * fresh
