"""Requests over several paths: moved, asked twice, gone on with, or given up; on virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from agora.errors import (
    AdapterError,
    AgoraError,
    BackendTimeout,
    BadReply,
    InvalidRequest,
    LoopDetected,
    OutOfReach,
    Overloaded,
    Rejected,
    Unavailable,
    Unsupported,
)
from agora.network.mobility import Played, Player
from agora.network.multipath import MultipathBackend
from agora.network.path import Link, Path, Technology
from agora.network.topology import Topology
from agora.network.traces import Trace
from agora.network.ways import Way
from agora.protocols import Backend, Capabilities, Chunk, GenerateRequest, Load, Message, ScoreRequest
from experts.fake import FakeBackend, question_of
from experts.script import Hang, Reply

pytestmark = pytest.mark.looptime

TEXT = "one two three four five six"


def path(name: str, **values: Any) -> Path:
    values = {"technology": Technology.WIFI, **values}
    return Path(name=name, links=(Link(name=name, source="here", target="cloud", **values),), target="cloud")


def over(*backends: Backend, **options: Any) -> MultipathBackend:
    ways = [Way(path=path(b.name), backend=b) for b in backends]
    return MultipathBackend(ways, name="cloud", **{"rng": random.Random(1), **options})


def ask(text: str = TEXT, **options: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message(role="user", content=text),), **options)


async def told(backend: MultipathBackend, request: GenerateRequest) -> tuple[str, Chunk]:
    chunks = [c async for c in backend.stream(request)]
    return "".join(c.text for c in chunks), chunks[-1]


def breakers(backend: MultipathBackend) -> dict[str, str]:
    return {s.name: s.breaker for s in backend.states()}


class LoopClock:
    def now(self) -> float:
        return now()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def now() -> float:
    return asyncio.get_running_loop().time()


async def learned(backend: MultipathBackend, *backends: FakeBackend) -> None:
    """Has each path answer often enough for its times to be known: many at once are spread over all."""
    for _ in range(20):
        await asyncio.gather(*(backend.generate(ask()) for _ in range(8)))
    assert all(len(b.requests) >= 20 for b in backends)
    await asyncio.sleep(1)
    for b in backends:
        b.calls.clear()


# -- Moving


@pytest.mark.parametrize(
    "fault",
    [Unavailable("gone"), BadReply("garbage"), Overloaded("full"), RuntimeError("a bug"), LoopDetected("round")],
)
async def test_what_may_pass_is_tried_on_another_path_once(fault: Exception) -> None:
    a, b = FakeBackend(fault, name="a"), FakeBackend(name="b")
    backend = over(a, b)
    for _ in range(6):
        answer = await backend.generate(ask())
        assert (answer.text, answer.path) == (TEXT, "b")
        assert answer.usage.calls <= 2
    assert len(a.requests) <= 6
    closed = isinstance(fault, Overloaded | LoopDetected)
    assert breakers(backend)["a"] == ("closed" if closed else "open"), (
        "being full, or in the way, is no fault of a path"
    )


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(Rejected("no", status=400), Rejected), (Rejected("filtered"), Rejected), (Unsupported("no"), Unsupported)],
)
async def test_what_fails_everywhere_is_told_at_once(fault: Exception, kind: type[Exception]) -> None:
    a, b = FakeBackend(fault, name="a"), FakeBackend(fault, name="b")
    backend = over(a, b)
    with pytest.raises(kind):
        await backend.generate(ask())
    assert len(a.requests) + len(b.requests) == 1
    assert set(breakers(backend).values()) == {"closed"}


@pytest.mark.parametrize("fault", [Rejected("no key", status=401), AdapterError("not loaded here")])
async def test_what_is_only_wrong_there_is_tried_elsewhere(fault: Exception) -> None:
    a, b = FakeBackend(fault, name="a"), FakeBackend(name="b")
    backend = over(a, b)
    for _ in range(5):
        assert (await backend.generate(ask())).path == "b"
    b.down = fault
    with pytest.raises(type(fault)):
        await backend.generate(ask())


async def test_all_paths_down_is_one_clear_error_in_bounded_time_and_no_storm() -> None:
    backends = [FakeBackend(Unavailable(f"no carrier on {n}"), name=n) for n in "abc"]
    backend = over(*backends)
    for _ in range(50):
        began = now()
        with pytest.raises(Unavailable) as failed:
            await backend.generate(ask())
        assert now() - began <= 1.1
        assert all(f"{n}: no carrier on {n}" in str(failed.value) for n in "abc")
    # Three tries each until the breakers opened; from then on single tokens, less and less often.
    assert all(len(b.requests) == 3 for b in backends)
    assert all(len(b.calls) < 10 for b in backends)
    assert all(s.why.startswith("no carrier") for s in backend.states())


async def test_all_full_says_when_to_come_back() -> None:
    backend = over(
        FakeBackend(Overloaded("full", retry_after_s=9), name="a"),
        FakeBackend(Overloaded("full", retry_after_s=4), name="b"),
    )
    with pytest.raises(Overloaded, match="every path is full") as full:
        await backend.generate(ask())
    assert full.value.retry_after_s == 4


async def test_a_path_that_comes_back_is_used_after_one_token_and_not_before() -> None:
    a, b = FakeBackend(name="a"), FakeBackend(Unavailable("never"), name="b")
    backend = over(a, b)
    a.down = Unavailable("no carrier")
    for _ in range(3):
        with pytest.raises(Unavailable):
            await backend.generate(ask())
    a.down = None
    await asyncio.sleep(40)
    before = len(a.calls)
    answers = await asyncio.gather(*(backend.generate(ask()) for _ in range(20)))
    assert {x.path for x in answers} == {"a"}
    kinds = [c.kind for c in a.calls[before:]]
    assert kinds[0] == "health"
    assert kinds.count("health") == 1


async def test_one_that_flaps_every_second_costs_few_requests() -> None:
    a, b = FakeBackend(name="a"), FakeBackend(name="b", latency=0.05)
    backend = over(a, b)
    failures = 0
    for n in range(600):
        a.down = Unavailable("no carrier") if n // 10 % 2 else None
        answer = await backend.generate(ask())
        failures += any("no carrier" in note for note in answer.notes)
        await asyncio.sleep(0.1)
    assert failures < 25, "thirty turns of three failures each would be ninety"
    assert len([c for c in a.calls if c.kind == "health"]) < 40


async def test_scores_move_too() -> None:
    a, b = FakeBackend(Unavailable("gone"), name="a"), FakeBackend(name="b", scores={" yes": -1.0})
    a.down = Unavailable("gone")
    backend = over(a, b)
    request = ScoreRequest(prompt="Is it?", continuations=(" yes",))
    assert (await backend.score(request)).scores[0].logprob == -1.0
    b.down = Hang()
    with pytest.raises(BackendTimeout):
        await backend.score(ScoreRequest(prompt="Is it?", continuations=(" yes",), timeout_s=2))


# -- Time


async def test_one_that_accepts_and_never_answers_is_left_within_the_deadline() -> None:
    a, b = FakeBackend(Hang(), name="a"), FakeBackend(Hang(), name="b", latency=0.1)
    backend = over(a, b)
    b._replies = TEXT
    for _ in range(12):
        began = now()
        answer = await backend.generate(ask(timeout_s=4))
        assert answer.path == "b"
        assert now() - began < 4
    assert 1 <= len(a.requests) <= 4, "it is hardly asked any more"
    assert all(c.outcome == "cancelled" or c.kind == "health" for c in a.calls), "what hangs is let go of"
    assert backend.load == Load()


async def test_without_a_deadline_it_is_left_too_once_times_are_known() -> None:
    a, b = FakeBackend(name="a", latency=0.1), FakeBackend(name="b", latency=0.1)
    backend = over(a, b, hedge=False)
    await learned(backend, a, b)
    a.down = Hang()
    longest = 0.0
    for _ in range(8):
        began = now()
        assert (await backend.generate(ask())).path == "b"
        longest = max(longest, now() - began)
    assert longest < 5


async def test_all_hang_and_the_time_is_up() -> None:
    backend = over(FakeBackend(Hang(), name="a"), FakeBackend(Hang(), name="b"))
    for _ in range(5):
        began = now()
        with pytest.raises((BackendTimeout, Unavailable)) as late:
            await backend.generate(ask(timeout_s=3))
        assert now() - began <= 3.01
        assert "a" in str(late.value)
    assert backend.load == Load()


async def test_deadlines_are_passed_on_with_what_is_left() -> None:
    a, b = FakeBackend(Unavailable("gone"), name="a"), FakeBackend(name="b", latency=1)
    a._replies = [Unavailable("late", hint="x")] * 9
    a._latency = 2.0
    backend = over(a, b)
    answers = [await backend.generate(ask(timeout_s=10)) for _ in range(2)]
    assert {x.path for x in answers} == {"b"}
    moved = [r.timeout_s for r in b.requests]
    assert all(t is not None and t <= 10 for t in moved)
    assert min(t for t in moved if t is not None) == pytest.approx(8, abs=0.1)


class Trickle(FakeBackend):
    """A byte now and then, and never an answer."""

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        yield Chunk(text="o")
        while True:
            await asyncio.sleep(1000)
            yield Chunk(text="n")


async def test_a_path_that_goes_on_byte_by_byte_is_left_for_one_that_answers() -> None:
    slow, quick = Trickle(name="slow"), FakeBackend(name="quick")
    quick.down = Unavailable("not yet")
    backend = over(slow, quick)
    text = ""
    async for chunk in backend.stream(ask(timeout_s=100)):
        quick.down = None
        text += chunk.text
    assert text == TEXT
    assert now() < 100


async def test_a_clock_that_leaps_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: random.uniform(-1e9, 1e9))
    a, b = FakeBackend(name="a", latency=0.1), FakeBackend(name="b", latency=0.1)
    backend = over(a, b)
    for n in range(30):
        if n % 10 == 9:
            await asyncio.sleep(1e6)  # the machine slept
        assert (await backend.generate(ask(timeout_s=5))).text == TEXT
    assert set(breakers(backend).values()) == {"closed"}


# -- Second copies


async def test_a_late_first_token_is_asked_for_on_another_path_and_the_loser_let_go() -> None:
    a, b = FakeBackend(name="a", latency=0.1), FakeBackend(name="b", latency=0.1)
    backend = over(a, b, hedge_share=1.0)
    await learned(backend, a, b)
    slow = a if (await backend.generate(ask())).path == "a" else b
    for x in (a, b):
        x.calls.clear()
    slow._latency = 5.0
    began = now()
    answer = await backend.generate(ask())
    assert now() - began < 0.5
    assert answer.text == TEXT
    assert answer.path != slow.name
    assert answer.usage.calls == 2, "both copies are counted"
    assert any("two paths" in note for note in answer.notes)
    assert [c.outcome for c in slow.calls] == ["cancelled"]
    assert backend.load == Load()


async def test_nothing_is_asked_twice_before_it_is_known_what_is_late() -> None:
    a, b = FakeBackend(name="a", latency=lambda _: 3.0), FakeBackend(name="b", latency=lambda _: 3.0)
    backend = over(a, b, hedge_share=1.0)
    for _ in range(5):
        await backend.generate(ask())
    assert backend.hedged == (0, 5)


async def test_extra_requests_stay_below_their_share() -> None:
    rng = random.Random(3)

    def latency(_: object) -> float:
        return 5.0 if rng.random() < 0.3 else 0.1

    backends = [FakeBackend(name=n, latency=latency) for n in "abc"]
    backend = over(*backends, hedge_share=0.05)
    for _ in range(20):
        await asyncio.gather(*(backend.generate(ask()) for _ in range(20)))
    extra, asked = backend.hedged
    assert asked == 400
    assert 0 < extra <= 20
    assert sum(len(b.requests) for b in backends) <= 420 + sum(s.opened for s in backend.states()) * 20


async def test_when_everything_is_slow_nothing_is_asked_twice() -> None:
    slow = False

    def latency(_: object) -> float:
        return 6.0 if slow else 0.1

    backends = [FakeBackend(name=n, latency=latency) for n in "ab"]
    backend = over(*backends, hedge_share=1.0)
    for _ in range(10):
        await asyncio.gather(*(backend.generate(ask()) for _ in range(10)))
    extra = backend.hedged[0]
    slow = True
    answers = await asyncio.gather(*(backend.generate(ask()) for _ in range(40)))
    assert all(a.text == TEXT for a in answers)
    assert backend.hedged[0] - extra <= 2
    assert set(breakers(backend).values()) == {"closed"}


async def test_hedging_can_be_switched_off() -> None:
    a, b = FakeBackend(name="a", latency=0.1), FakeBackend(name="b", latency=0.1)
    backend = over(a, b, hedge=False)
    await learned(backend, a, b)
    a._latency = b._latency = 1.0
    await backend.generate(ask())
    assert backend.hedged[0] == 0


# -- Streams


async def test_a_stream_that_breaks_before_its_first_token_moves_unseen() -> None:
    a, b = FakeBackend([Reply(TEXT, cut_after=0)] * 9, name="a"), FakeBackend(name="b")
    backend = over(a, b)
    for _ in range(3):
        assert (await told(backend, ask()))[0] == TEXT


@pytest.mark.parametrize("at", range(1, 7))
async def test_a_greedy_stream_that_breaks_goes_on_where_it_was(at: int) -> None:
    a, b = FakeBackend([Reply(TEXT, cut_after=at)] * 9, name="a"), FakeBackend(name="b")
    backend = over(a, b)
    texts = [await told(backend, ask()) for _ in range(4)]
    assert {t for t, _ in texts} == {TEXT}
    resumed = [last for _, last in texts if last.usage is not None and last.usage.calls == 2]
    assert resumed
    for last in resumed:
        assert last.path == "b"
        assert last.usage is not None
        assert last.usage.completion_tokens == at + 6, "what was generated twice is counted twice"
        assert any("broke off" in note for note in last.notes)


async def test_one_that_can_go_on_is_given_what_was_said() -> None:
    def go_on(request: GenerateRequest) -> str:
        if not request.goes_on:
            return TEXT
        said = request.messages[-1].content
        assert TEXT.startswith(said)
        return TEXT[len(said) :]

    able = Capabilities(continues=True)
    a = FakeBackend([Reply(TEXT, cut_after=3)] * 9, name="a", capabilities=able)
    b = FakeBackend(go_on, name="b", capabilities=able)
    backend = over(a, b)
    for _ in range(3):
        # Drawn, not greedy: it could not be repeated.
        assert (await told(backend, ask(temperature=1.0, max_tokens=6)))[0] == TEXT
    assert [r.max_tokens for r in b.requests if r.goes_on] == [3] * len([r for r in b.requests if r.goes_on])
    assert any(r.goes_on for r in b.requests)


async def test_a_stream_cut_at_its_last_token_ends_by_its_length() -> None:
    able = Capabilities(continues=True)
    a = FakeBackend([Reply(TEXT, cut_after=6)] * 9, name="a", capabilities=able)
    b = FakeBackend(Unavailable("gone"), name="b", capabilities=able)
    b.down = None
    backend = over(a, FakeBackend(TEXT, name="b", capabilities=able))
    text, last = await told(backend, ask(max_tokens=6))
    assert text == TEXT
    assert last.finish_reason in ("length", "stop")


async def test_a_path_that_leads_too_far_up_for_a_request_is_left_for_another_and_keeps_its_good_name() -> None:
    far, near = FakeBackend(OutOfReach("not there"), name="a"), FakeBackend(TEXT, name="b")
    backend = over(far, near)
    for _ in range(8):
        assert (await told(backend, ask()))[0] == TEXT
    assert far.requests
    assert {s.breaker for s in backend.states()} == {"closed"}
    with pytest.raises(OutOfReach, match="not there"):
        await over(far).generate(ask())


async def test_an_answer_that_differs_ends_the_stream_with_an_error() -> None:
    a, b = FakeBackend([Reply(TEXT, cut_after=3)] * 9, name="a"), FakeBackend("one two other words", name="b")
    a.down, b.down = None, Unavailable("not yet")
    backend = over(a, b)
    text = ""
    with pytest.raises(BadReply, match="differs"):
        async for chunk in backend.stream(ask()):
            b.down = None
            text += chunk.text
    assert text == "one two three"
    assert backend.load == Load()


async def test_a_sampled_stream_that_breaks_is_an_error_and_not_a_second_sample() -> None:
    a, b = FakeBackend([Reply(TEXT, cut_after=3)] * 9, name="a"), FakeBackend(name="b")
    b.down = Unavailable("not yet")
    backend = over(a, b)
    text = ""
    with pytest.raises(Unavailable, match="broke off after 13 characters, and no other path can go on with it"):
        async for chunk in backend.stream(ask(temperature=1.0)):
            b.down = None
            text += chunk.text
    assert text == "one two three"
    assert not [c for c in b.calls if c.outcome == "done" and c.kind == "stream"]


async def test_a_whole_answer_that_breaks_is_asked_for_again_even_if_it_differs() -> None:
    a, b = FakeBackend([Reply(TEXT, cut_after=3)] * 9, name="a"), FakeBackend("other words", name="b")
    b.down = Unavailable("not yet")

    class Early(FakeBackend):
        async def stream(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
            async for chunk in super().stream(request):
                b.down = None
                yield chunk

    a = Early([Reply(TEXT, cut_after=3)] * 9, name="a")
    answer = await over(a, b).generate(ask(temperature=1.0))
    assert answer.text == "other words"
    assert answer.usage.calls == 2


async def test_closing_a_stream_frees_every_path() -> None:
    a, b = FakeBackend(name="a", seconds_per_token=1), FakeBackend(name="b", seconds_per_token=1)
    backend = over(a, b)
    chunks = backend.stream(ask())
    await anext(chunks)
    await chunks.aclose()
    assert backend.load == Load()
    assert [c.outcome for c in (*a.calls, *b.calls)] == ["cancelled"]


async def test_cancelling_leaves_nothing_behind() -> None:
    a, b = FakeBackend(Hang(), name="a"), FakeBackend(Hang(), name="b")
    backend = over(a, b)
    asking = [asyncio.ensure_future(backend.generate(ask())) for _ in range(10)]
    await asyncio.sleep(1)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    assert backend.load == Load()
    assert all(s.running == 0 for s in backend.states())


# -- Links


async def test_a_link_without_bandwidth_is_not_taken_and_said() -> None:
    topology = Topology(path("a").links + path("b").links)
    a, b = FakeBackend(name="a"), FakeBackend(name="b")
    backend = over(a, b, topology=topology)
    topology.change("a", up_mbps=0.0)
    for _ in range(3):
        answer = await backend.generate(ask())
        assert answer.path == "b"
        assert "path a could not be used: link a has no bandwidth" in answer.notes
    topology.remove("b")
    with pytest.raises(Unavailable, match="a: link a has no bandwidth; b: one of its links is gone"):
        await backend.generate(ask())
    topology.change("a", up_mbps=None)
    assert (await backend.generate(ask())).path == "a"


async def test_nothing_is_known_of_the_links_and_prices_and_it_works() -> None:
    backend = MultipathBackend(
        [Way(path=Path(name=n, links=(), target=n), backend=FakeBackend(name=n)) for n in "ab"], name="x"
    )
    assert (await backend.generate(ask())).text == TEXT


async def test_links_change_while_requests_run_and_a_roadside_unit_dies_with_work_in_flight() -> None:
    links = [path("v2v").links[0], path("nr").links[0], path("lte").links[0]]
    topology = Topology(links)
    rsu = FakeBackend(name="v2v", latency=0.2, seconds_per_token=0.2)
    others = [FakeBackend(name=n, latency=0.5, seconds_per_token=0.2) for n in ("nr", "lte")]
    backend = over(rsu, *others, topology=topology)
    traces = {
        "nr": Played(up=Trace([0, 2, 4], [50.0, 0.0, 50.0], end_s=1000.0)),
        "lte": Played(down=Trace([0, 4], [20.0, 0.1], end_s=1000.0)),
    }
    drive = asyncio.ensure_future(Player(topology, traces, LoopClock()).play(10.0))

    async def dies() -> None:
        await asyncio.sleep(3.0)
        assert rsu.load.total > 0, "it holds work"
        rsu.down = Unavailable("no power")
        await rsu.aclose()
        topology.remove("v2v")

    async def request(n: int) -> str:
        await asyncio.sleep(n * 0.05)
        if n % 2:
            return (await told(backend, ask(timeout_s=30)))[0]
        return (await backend.generate(ask(timeout_s=30))).text

    texts = await asyncio.gather(*(request(n) for n in range(120)), dies())
    await drive
    assert texts[:-1] == [TEXT] * 120, "none lost, none doubled"


# -- What it is


async def test_what_every_path_claims_is_claimed_and_loads_add_up() -> None:
    a = FakeBackend(name="a", capabilities=Capabilities(logprobs=True, json_schema=True, max_context=900), latency=1)
    b = FakeBackend(name="b", capabilities=Capabilities(logprobs=True, max_context=500), latency=1)
    backend = over(a, b)
    assert backend.capabilities == Capabilities(logprobs=True, max_context=500)
    with pytest.raises(Unsupported, match="json_schema, which not every path to it claims"):
        await backend.generate(ask(json_schema={}))
    running = [asyncio.ensure_future(x.generate(ask())) for x in (a, a, b)]
    await asyncio.sleep(0.1)
    assert backend.load == Load(running=3)
    await asyncio.gather(*running)


async def test_it_is_well_if_one_path_is() -> None:
    a, b = FakeBackend(name="a"), FakeBackend(name="b")
    backend = over(a, b)
    a.down = Hang()
    assert (await backend.health()).ok
    a.down, b.down = Unavailable("no carrier"), Unavailable("no power")
    health = await backend.health()
    assert not health.ok
    assert "no carrier" in health.detail
    assert "no power" in health.detail


async def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no path"):
        MultipathBackend([], name="x")
    with pytest.raises(InvalidRequest, match="two paths to x are called 'a'"):
        MultipathBackend([Way(path=path("a"), backend=FakeBackend())] * 2, name="x")
    with pytest.raises(InvalidRequest, match="share"):
        over(FakeBackend(name="a"), hedge_share=2.0)


async def test_after_closing_it_is_unavailable() -> None:
    backend = over(FakeBackend(name="a"), FakeBackend(name="b"))
    await backend.aclose()
    await backend.aclose()
    with pytest.raises(AgoraError, match="closed"):
        await backend.generate(ask())


def test_questions_are_what_the_fake_repeats() -> None:
    assert question_of(ask()) == TEXT
