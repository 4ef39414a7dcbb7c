import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import Unavailable
from agora.network.choice import Chooser
from agora.network.estimates import Estimates, Expectation
from agora.network.jobs import Job, Observation
from agora.network.memory import Parts
from agora.network.path import Link, Path, Technology

JOB = Job(up_bytes=1_000_000)


class Now:
    def __init__(self) -> None:
        self.t = 0.0

    def __call__(self) -> float:
        return self.t


def path(name: str, price: float = 0.0) -> Path:
    link = Link(name=name, source="car", target="edge", technology=Technology.WIFI, price_per_mb=price)
    return Path(name=name, links=(link,), target="edge")


def expectation(
    seconds: float, *, on_time: float | None = None, works: float = 1.0, spread: float = 0.3, seen: float = 100.0
) -> Expectation:
    parts = Parts(rtt_s=seconds, up_s=0.0, queue_s=0.0, prefill_s=0.0, decode_s=0.0, down_s=0.0)
    return Expectation(
        seconds=seconds,
        spread=spread,
        on_time=on_time,
        first_token_p95_s=None,
        parts=parts,
        availability=(works * 50, (1 - works) * 50),
        seen=seen,
    )


def steady(now: Now | None = None, **more: float) -> Chooser:
    return Chooser(now or Now(), explore=False, **more)  # type: ignore[arg-type]


RNG = random.Random(0)


def test_the_quickest_is_taken_and_money_is_weighed_against_time() -> None:
    candidates = [(path("dear", price=0.01), expectation(0.5)), (path("cheap", price=0.001), expectation(0.9))]
    assert steady().choose(candidates, JOB, rng=RNG).path.name == "dear"
    thrifty = steady(seconds_per_money=100.0).choose(candidates, JOB, rng=RNG)
    assert thrifty.path.name == "cheap"
    assert [r.path.name for r in thrifty.ranked] == ["cheap", "dear"]
    assert thrifty.ranked[0].score == pytest.approx(0.9 + 100 * 0.001)
    fees = {"cheap": 0.02}
    assert steady(seconds_per_money=100.0).choose(candidates, JOB, fees=fees, rng=RNG).path.name == "dear"


def test_failures_are_paid_in_time() -> None:
    candidates = [(path("flaky"), expectation(0.5, works=0.3)), (path("sure"), expectation(1.0))]
    assert steady().choose(candidates, JOB, rng=RNG).path.name == "sure"


def test_the_deadline_comes_before_time_and_money() -> None:
    candidates = [(path("risky"), expectation(0.5, on_time=0.8)), (path("safe"), expectation(1.0, on_time=0.97))]
    job = Job(deadline_s=1.5)
    choice = steady().choose(candidates, job, rng=RNG)
    assert choice.path.name == "safe" and [r.meets for r in choice.ranked] == [True, False]
    relaxed = steady(on_time=0.75).choose(candidates, job, rng=RNG)
    assert relaxed.path.name == "risky"


def test_where_none_meets_the_deadline_the_likeliest_is_taken_and_that_is_said() -> None:
    candidates = [(path("a"), expectation(0.5, on_time=0.3)), (path("b"), expectation(2.0, on_time=0.6))]
    choice = steady().choose(candidates, Job(deadline_s=1.0), rng=RNG)
    assert choice.path.name == "b"
    assert "no path is likely enough" in choice.why and "0.60 likely within 1 s" in choice.why


def test_a_path_without_bandwidth_is_never_taken() -> None:
    candidates = [(path("dead"), expectation(math.inf, on_time=0.0)), (path("slow"), expectation(900.0, on_time=0.0))]
    choice = Chooser(Now()).choose(candidates, Job(deadline_s=1.0), rng=RNG)
    assert choice.path.name == "slow" and choice.ranked[-1].path.name == "dead"
    with pytest.raises(Unavailable, match="every path has a link without bandwidth: 'dead'"):
        steady().choose(candidates[:1], JOB, rng=RNG)
    with pytest.raises(Unavailable, match="there is no path that may be taken now"):
        steady().choose([], JOB, rng=RNG)


def test_small_wobbles_do_not_make_it_flap_and_a_lasting_difference_moves_it() -> None:
    now = Now()
    chooser, wobble = steady(now), random.Random(1)
    taken = []
    for _ in range(200):
        now.t += 0.2
        a, b = (expectation(1.0 + wobble.uniform(-0.06, 0.06)) for _ in range(2))
        taken.append(chooser.choose([(path("a"), a), (path("b"), b)], JOB, rng=RNG).path.name)
    assert len(set(taken)) == 1
    other = "b" if taken[0] == "a" else "a"
    better = [(path(taken[0]), expectation(1.0)), (path(other), expectation(0.6))]
    began = now.t
    while chooser.choose(better, JOB, rng=RNG).path.name != other:
        now.t += 0.2
    assert 0.9 <= now.t - began <= 1.5


def test_a_peak_that_is_over_at_once_moves_nothing() -> None:
    now = Now()
    chooser = steady(now)
    calm = [(path("a"), expectation(0.5)), (path("b"), expectation(0.6))]
    peak = [(path("a"), expectation(3.0)), (path("b"), expectation(0.6))]
    for candidates in (calm, peak, calm, peak, calm):
        now.t += 0.4
        assert chooser.choose(candidates, JOB, rng=RNG).path.name == "a"


def test_a_path_that_may_not_be_taken_any_more_is_left_at_once() -> None:
    chooser, job = steady(), Job(deadline_s=1.0)
    a, b = (path("a"), expectation(0.5, on_time=0.99)), (path("b"), expectation(0.7, on_time=0.99))
    assert chooser.choose([a, b], job, rng=RNG).path.name == "a"
    late = (path("a"), expectation(0.5, on_time=0.5))
    assert chooser.choose([late, b], job, rng=RNG).path.name == "b"
    assert chooser.choose([a], job, rng=RNG).path.name == "a"  # b's breaker is open
    assert "no longer among them" in chooser.choose([b], job, rng=RNG).why


def test_kinds_of_help_are_kept_apart_and_forgotten() -> None:
    chooser = steady()
    a, b = (path("a"), expectation(1.0)), (path("b"), expectation(0.95))
    assert chooser.choose([a], JOB, rng=RNG, key="x").path.name == "a"
    assert chooser.choose([a, b], JOB, rng=RNG, key="x").path.name == "a"
    assert chooser.choose([a, b], JOB, rng=RNG, key="y").path.name == "b"
    chooser.forget("x")
    assert chooser.choose([a, b], JOB, rng=RNG, key="x").path.name == "b"


def test_under_load_work_is_spread_over_those_nearly_as_good() -> None:
    chooser, rng, running = steady(), random.Random(5), Counter[str]()
    candidates = [(path(n), expectation(1.0 + i / 50)) for i, n in enumerate("abcd")] + [
        (path("far"), expectation(4.0))
    ]
    for _ in range(80):
        running[chooser.choose(candidates, JOB, running=running, rng=rng).path.name] += 1
    assert running["far"] == 0 and max(running.values()) - min(running[n] for n in "abcd") <= 8
    idle = Counter(chooser.choose(candidates, JOB, running={}, rng=rng).path.name for _ in range(20))
    assert idle == {"a": 20}


def test_what_is_little_known_is_tried_now_and_then_by_the_same_seed_alike() -> None:
    def tried(seed: int, seen: float, seconds: float = 1.2) -> Counter[str]:
        chooser, rng = Chooser(Now()), random.Random(seed)
        candidates = [(path("known"), expectation(1.0)), (path("new"), expectation(seconds, spread=0.6, seen=seen))]
        return Counter(chooser.choose(candidates, JOB, rng=rng).path.name for _ in range(300))

    assert tried(7, 0.0) == tried(7, 0.0)
    assert 20 < tried(7, 0.0)["new"] < 150
    assert tried(7, 99.0)["new"] < 5  # by now it is known not to be better
    assert tried(7, 0.0, seconds=20.0)["new"] == 0  # not everything is worth a try


def test_trying_is_said_and_does_not_change_the_path_in_use() -> None:
    chooser, rng = Chooser(Now()), random.Random(7)
    candidates = [(path("known"), expectation(1.0)), (path("new"), expectation(1.1, spread=0.8, seen=0.0))]
    choices = [chooser.choose(candidates, JOB, rng=rng) for _ in range(100)]
    tries = [c for c in choices if c.exploring]
    assert tries and all("to learn about 'new'" in c.why for c in tries)
    assert all(c.path.name == "known" for c in choices if not c.exploring)


def test_a_better_path_is_found_by_trying() -> None:
    """The prior of one path is wrong: only trying it can tell."""
    now, rng = Now(), random.Random(11)
    estimates, chooser = Estimates(now), Chooser(now)
    truth = {"a": 1.0, "b": 0.3}
    ways = {n: path(n) for n in truth}
    taken = []
    for _ in range(300):
        now.t += 1.0
        choice = chooser.choose([(p, estimates.expect(p, JOB)) for p in ways.values()], JOB, rng=rng)
        taken.append(choice.path.name)
        total = truth[choice.path.name] * rng.lognormvariate(0, 0.1)
        seen = {"up_bytes": JOB.up_bytes, "first_token_s": total, "total_s": total, "up_s": total - 0.05}
        estimates.observe(Observation(path=choice.path, at=now.t, ok=True, **seen))  # type: ignore[arg-type]
    assert Counter(taken[100:])["b"] > 180


@given(
    st.lists(
        st.tuples(
            st.one_of(st.just(math.inf), st.floats(0, 1e6)),
            st.floats(0, 1),
            st.floats(0, 1),
            st.floats(0, 3),
            st.floats(0, 1e4),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 2**31),
    st.dictionaries(st.sampled_from("012345"), st.integers(0, 5)),
)
def test_whatever_is_expected_a_path_with_bandwidth_is_chosen(
    numbers: list[tuple[float, float, float, float, float]], seed: int, running: dict[str, int]
) -> None:
    candidates = [
        (path(str(i)), expectation(s, on_time=p, works=w, spread=d, seen=n))
        for i, (s, p, w, d, n) in enumerate(numbers)
    ]
    chooser = Chooser(Now(), seconds_per_money=1.0)
    if all(math.isinf(s) for s, *_ in numbers):
        with pytest.raises(Unavailable):
            chooser.choose(candidates, Job(deadline_s=1.0), rng=random.Random(seed))
        return
    choice = chooser.choose(candidates, Job(deadline_s=1.0), running=running, rng=random.Random(seed))
    assert math.isfinite(numbers[int(choice.path.name)][0])
    assert len(choice.ranked) == len(candidates) and choice.why
    if any(p >= 0.95 and math.isfinite(s) for s, p, *_ in numbers):
        assert numbers[int(choice.path.name)][1] >= 0.95
