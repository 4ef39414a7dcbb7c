from __future__ import annotations

import asyncio
import doctest
from contextlib import aclosing

import pytest

import experts.fake
from agora.errors import (
    AdapterError,
    BackendError,
    BackendTimeout,
    BadReply,
    InvalidRequest,
    Overloaded,
    Rejected,
    Unavailable,
    Unsupported,
)
from agora.protocols import Backend, Capabilities, GenerateRequest, Load, Message, ScoreRequest
from agora.types import AdapterRef, Usage
from experts.fake import FakeBackend, Hang, Reply, tokens_of


def ask(text: str = "hello there", **options: object) -> GenerateRequest:
    return GenerateRequest(messages=(Message(role="user", content=text),), **options)  # type: ignore[arg-type]


async def text_of(backend: FakeBackend, text: str = "hello there", **options: object) -> str:
    return (await backend.generate(ask(text, **options))).text


async def test_documentation_examples_run() -> None:
    # In a thread of its own: the examples call asyncio.run.
    assert (await asyncio.to_thread(doctest.testmod, experts.fake)).failed == 0


def test_is_a_backend() -> None:
    assert isinstance(FakeBackend(), Backend)


@pytest.mark.parametrize("text", ["to be or not", "  lead", "trail ", "a\n\n b", "", "日本語 ok 🦜"])
def test_tokens_join_to_the_text(text: str) -> None:
    assert "".join(tokens_of(text)) == text


async def test_echoes_what_the_user_said_last() -> None:
    request = GenerateRequest(
        messages=(
            Message(role="system", content="be brief"),
            Message(role="user", content="one"),
            Message(role="assistant", content="two"),
            Message(role="user", content="three four"),
        )
    )
    done = await FakeBackend().generate(request)
    assert done.text == "three four"
    assert done.finish_reason == "stop"
    assert done.usage == Usage(prompt_tokens=6, completion_tokens=2, calls=1)
    assert done.model == "fake"


async def test_mapping_prefers_the_exact_question_then_the_first_contained_key() -> None:
    backend = FakeBackend({"capital": "contained", "capital of Italy": "exact"}, otherwise="unknown")
    assert await text_of(backend, "capital of Italy") == "exact"
    assert await text_of(backend, "the capital of Italy?") == "contained"
    assert await text_of(backend, "weather") == "unknown"


async def test_list_answers_call_by_call_and_then_says_it_is_used_up() -> None:
    backend = FakeBackend(["one", Unavailable("down"), lambda r: "three", Reply("four")])
    assert await text_of(backend) == "one"
    with pytest.raises(Unavailable, match="down"):
        await text_of(backend)
    assert await text_of(backend) == "three"
    assert await text_of(backend) == "four"
    with pytest.raises(BackendError, match="4 replies and was asked for number 5"):
        await text_of(backend)


async def test_functions_may_be_async_and_may_return_faults() -> None:
    async def reply(request: GenerateRequest) -> str | Unavailable:
        await asyncio.sleep(0)
        return Unavailable("no") if request.max_tokens == 7 else f"{request.max_tokens} tokens"

    backend = FakeBackend(reply)
    assert await text_of(backend, max_tokens=3) == "3 tokens"
    with pytest.raises(Unavailable):
        await text_of(backend, max_tokens=7)


async def test_max_tokens_and_stop_cut_the_reply() -> None:
    backend = FakeBackend("one two three four")
    cut = await backend.generate(ask(max_tokens=2))
    assert (cut.text, cut.finish_reason, cut.usage.completion_tokens) == ("one two", "length", 2)
    stopped = await backend.generate(ask(stop=("three", "wo")))
    assert (stopped.text, stopped.finish_reason) == ("one t", "stop")
    assert (await backend.generate(ask(max_tokens=4))).finish_reason == "stop"
    beyond = await backend.generate(ask(max_tokens=2, stop=("three",)))
    assert (beyond.text, beyond.finish_reason) == ("one two", "length")


async def test_logprobs_are_scripted_or_the_default() -> None:
    backend = FakeBackend(Reply("a b c", logprobs=(-0.1, -0.2)))
    done = await backend.generate(ask(logprobs=2))
    assert [t.logprob for t in done.logprobs] == [-0.1, -0.2, -0.5]
    assert done.logprobs[1].top == ((" b", -0.2), (" b~1", -1.2))
    assert done.mean_logprob == pytest.approx(-0.8 / 3)
    assert (await backend.generate(ask())).logprobs == ()


async def test_scores_are_scripted_by_continuation_or_by_function() -> None:
    request = ScoreRequest(prompt="Review: fine\nSentiment:", continuations=(" good", " bad", " quite good"))
    by_text = await FakeBackend(scores={" good": -0.25, " bad": -3.0}).score(request)
    assert [s.logprob for s in by_text.scores] == [-0.25, -3.0, -1.0]
    assert [s.tokens for s in by_text.scores] == [1, 1, 2]
    assert by_text.best.text == " good"
    by_function = await FakeBackend(scores=lambda r: [-float(len(c)) for c in r.continuations]).score(request)
    assert by_function.best.text == " bad"
    with pytest.raises(Unavailable):
        await FakeBackend(scores=lambda r: Unavailable("no")).score(request)
    with pytest.raises(InvalidRequest, match="1 scores for 3"):
        await FakeBackend(scores=lambda r: [-1.0]).score(request)


@pytest.mark.looptime
async def test_time_is_scripted_on_the_loops_clock(looptime: float) -> None:
    backend = FakeBackend("a b c d", latency=2.0, seconds_per_token=0.5)
    done = await backend.generate(ask())
    assert looptime == 3.5
    assert (done.first_token_s, done.seconds) == (2.0, 3.5)
    times = [(c.text, float(looptime)) async for c in backend.stream(ask())]
    assert times == [("a", 5.5), (" b", 6.0), (" c", 6.5), (" d", 7.0), ("", 7.0)]


@pytest.mark.looptime
async def test_latency_by_call_and_by_request(looptime: float) -> None:
    by_call = FakeBackend(latency=[1.0, 2.0])
    for expected in (1.0, 3.0, 5.0):
        await text_of(by_call)
        assert looptime == expected
    by_request = FakeBackend(latency=lambda r: 10.0 if r.prompt else 20.0)
    await text_of(by_request)
    assert looptime == 25.0


@pytest.mark.looptime
async def test_hang_ends_by_timeout(looptime: float) -> None:
    backend = FakeBackend(Hang())
    with pytest.raises(BackendTimeout):
        await backend.generate(ask(timeout_s=4.0))
    assert looptime == 4.0
    assert backend.load == Load()


@pytest.mark.looptime
async def test_timeout_bounds_the_queue_a_slow_function_and_a_slow_stream(looptime: float) -> None:
    backend = FakeBackend(latency=100.0, max_running=1)
    first = asyncio.create_task(backend.generate(ask()))
    await asyncio.sleep(1)
    with pytest.raises(BackendTimeout):
        await backend.generate(ask(timeout_s=2.0))
    assert looptime == 3.0
    assert backend.load == Load(running=1)
    first.cancel()

    async def slow(request: GenerateRequest) -> str:
        await asyncio.sleep(50)
        return "late"

    with pytest.raises(BackendTimeout):
        await FakeBackend(slow).generate(ask(timeout_s=5.0))
    assert looptime == 8.0
    seen = []
    with pytest.raises(BackendTimeout):
        async for chunk in FakeBackend("a b c d e", seconds_per_token=1.0).stream(ask(timeout_s=2.5)):
            seen.append(chunk.text)
    assert seen == ["a", " b", " c"]


async def test_stream_cut_after_n_chunks() -> None:
    backend = FakeBackend(Reply("a b c d", cut_after=2))
    seen = []
    with pytest.raises(BadReply, match="broke off"):
        async for chunk in backend.stream(ask()):
            seen.append(chunk.text)
    assert seen == ["a", " b"]
    with pytest.raises(BadReply):
        await backend.generate(ask())


async def test_failures_by_index_and_by_predicate_lie_over_the_replies() -> None:
    backend = FakeBackend("fine", failures={1: Overloaded("busy", retry_after_s=3), 2: Unavailable})
    assert await text_of(backend) == "fine"
    with pytest.raises(Overloaded) as busy:
        await text_of(backend)
    assert busy.value.retry_after_s == 3
    with pytest.raises(Unavailable, match="fake: scripted failure"):
        await backend.score(ScoreRequest(prompt="a", continuations=("b",)))
    assert await text_of(backend) == "fine"

    backend = FakeBackend("fine", failures=lambda call: BadReply("odd") if call.kind == "stream" else None)
    assert await text_of(backend) == "fine"
    with pytest.raises(BadReply):
        async for _ in backend.stream(ask()):
            pass


async def test_down_can_be_switched_while_running() -> None:
    backend = FakeBackend()
    assert (await backend.health()).ok
    backend.down = Unavailable("power cut")
    health = await backend.health()
    assert not health.ok
    assert "power cut" in health.detail
    with pytest.raises(Unavailable):
        await text_of(backend)
    backend.down = None
    assert await text_of(backend) == "hello there"


async def test_health_uses_up_no_reply() -> None:
    backend = FakeBackend(["first"])
    assert (await backend.health()).ok
    assert await text_of(backend) == "first"
    assert not (await FakeBackend(Unavailable("gone")).health()).ok


@pytest.mark.looptime
async def test_limit_queue_and_overload() -> None:
    backend = FakeBackend(latency=1.0, max_running=2, max_waiting=1)
    running = [asyncio.create_task(backend.generate(ask(str(n)))) for n in range(3)]
    await asyncio.sleep(0.5)
    assert backend.load == Load(running=2, waiting=1)
    with pytest.raises(Overloaded):
        await backend.generate(ask())
    await asyncio.gather(*running)
    assert [(c.started_s, c.ended_s) for c in backend.calls[:3]] == [(0, 1), (0, 1), (1, 2)]
    assert backend.load == Load()


@pytest.mark.looptime
async def test_cancelled_waiter_gives_up_its_place() -> None:
    backend = FakeBackend(latency=1.0, max_running=1)
    first, second, third = (asyncio.create_task(backend.generate(ask(str(n)))) for n in range(3))
    await asyncio.sleep(0.5)
    second.cancel()
    await asyncio.gather(first, second, third, return_exceptions=True)
    assert [c.outcome for c in backend.calls] == ["done", "cancelled", "done"]
    assert backend.calls[2].started_s == 1.0
    assert backend.load == Load()


@pytest.mark.looptime
async def test_slot_handed_to_a_cancelled_waiter_is_passed_on() -> None:
    backend = FakeBackend(latency=1.0, max_running=1)
    tasks = [asyncio.create_task(backend.generate(ask(str(n)))) for n in range(3)]
    # The first one ends at 1.0 and hands its slot to the second, which is cancelled in that very turn.
    tasks[0].add_done_callback(lambda _: tasks[1].cancel())
    await asyncio.gather(*tasks, return_exceptions=True)
    assert tasks[1].cancelled()
    assert tasks[2].result().text == "2"
    assert backend.load == Load()


@pytest.mark.looptime
async def test_cancellation_and_closing_a_stream_are_recorded(looptime: float) -> None:
    backend = FakeBackend("a b c", latency=5.0)
    task = asyncio.create_task(backend.generate(ask()))
    await asyncio.sleep(2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with aclosing(backend.stream(ask())) as chunks:
        assert (await anext(chunks)).text == "a"
    assert [(c.kind, c.outcome, c.asked_s, c.ended_s) for c in backend.calls] == [
        ("generate", "cancelled", 0, 2),
        ("stream", "cancelled", 2, 7),
    ]
    assert backend.calls[1].text == "a"
    assert backend.load == Load()


async def test_adapters() -> None:
    backend = FakeBackend(lambda r: f"by {r.adapter}", adapters=["med@v3", "law"])
    assert backend.capabilities.adapters
    done = await backend.generate(ask(adapter=AdapterRef.parse("med@v3")))
    assert (done.text, done.model) == ("by med@v3", "med@v3")
    assert await text_of(backend, adapter=AdapterRef.parse("med")) == "by med"
    assert await text_of(backend, adapter=AdapterRef.parse("law")) == "by law"
    with pytest.raises(AdapterError, match="'med@v4'; it has: law, med@v3"):
        await text_of(backend, adapter=AdapterRef.parse("med@v4"))


async def test_what_is_not_claimed_is_refused() -> None:
    backend = FakeBackend(capabilities=Capabilities(chat=True))
    with pytest.raises(Unsupported, match="completion"):
        await backend.generate(GenerateRequest(prompt="x"))
    with pytest.raises(Unsupported, match="score"):
        await backend.score(ScoreRequest(messages=ask().messages, continuations=("a",)))
    for options in ({"logprobs": 0}, {"json_schema": {}}, {"adapter": AdapterRef(name="a")}):
        with pytest.raises(Unsupported, match=next(iter(options))):
            await backend.generate(ask(**options))
    with pytest.raises(Unsupported, match="chat"):
        await FakeBackend(capabilities=Capabilities(chat=False, completion=True)).generate(ask())


async def test_context_is_bounded_if_claimed() -> None:
    backend = FakeBackend(capabilities=Capabilities(max_context=10))
    assert await text_of(backend, "one two", max_tokens=8) == "one two"
    with pytest.raises(Rejected, match="needs 11 tokens; the context holds 10"):
        await text_of(backend, "one two three", max_tokens=8)


@pytest.mark.looptime
async def test_aclose_fails_what_runs_and_waits_and_what_comes() -> None:
    backend = FakeBackend(latency=10.0, max_running=1)
    tasks = [asyncio.create_task(backend.generate(ask())) for _ in range(2)]
    await asyncio.sleep(1)
    await backend.aclose()
    await backend.aclose()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, Unavailable)
    with pytest.raises(Unavailable, match="closed"):
        await backend.generate(ask())
    assert not (await backend.health()).ok
    assert backend.load == Load()


@pytest.mark.parametrize(
    "options",
    [
        {"latency": -1.0},
        {"latency": []},
        {"seconds_per_token": float("nan")},
        {"max_running": 0},
        {"max_waiting": -1},
    ],
)
def test_impossible_scripts_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        FakeBackend(**options)  # type: ignore[arg-type]
