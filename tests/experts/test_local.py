from __future__ import annotations

import asyncio
import gc
import json
import shutil
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from agora.errors import (
    AdapterError,
    BackendTimeout,
    InvalidRequest,
    ModelError,
    Overloaded,
    Unavailable,
    Unsupported,
)
from agora.network.choice import Chooser
from agora.network.multipath import MultipathBackend, loop_time
from agora.network.path import Link, Technology
from agora.network.path import Path as Path_
from agora.network.ways import Way
from agora.protocols import Backend, Chunk, GenerateRequest, Load, Message, ScoreRequest
from agora.types import AdapterRef
from experts.conformance import BackendConformance
from experts.engine.batch import Batch
from experts.engine.jobs import GenerateJob, Mailbox, Outbox, Piece
from experts.local import LocalBackend
from experts.models import ModelStore

RED1, RED2, BLUE = (AdapterRef.parse(name) for name in ("red@v1", "red@v2", "blue@v1"))


class TestConformance(BackendConformance):
    @pytest.fixture
    async def backend(self, tiny_model: Path, tiny_adapters: dict[str, Path]) -> AsyncIterator[Backend]:
        async with await LocalBackend.open(tiny_model, threads=1) as backend:
            await backend.load_adapter(RED1, tiny_adapters["red@v1"])
            yield backend

    @pytest.fixture
    def adapter(self) -> AdapterRef:
        return RED1


class TestConformanceWithOneRow(TestConformance):
    """The same with everything queued behind one row."""

    @pytest.fixture
    async def backend(self, tiny_model: Path, tiny_adapters: dict[str, Path]) -> AsyncIterator[Backend]:
        async with await LocalBackend.open(tiny_model, threads=1, max_batch=1) as backend:
            await backend.load_adapter(RED1, tiny_adapters["red@v1"])
            yield backend


Opener = Callable[..., Any]


@pytest.fixture
async def opened(tiny_model: Path) -> AsyncIterator[Opener]:
    """opened(**options): a backend on the tiny model, closed after the test."""
    backends: list[LocalBackend] = []

    async def open_one(folder: Path = tiny_model, **options: Any) -> LocalBackend:
        backends.append(await LocalBackend.open(folder, **{"threads": 1, **options}))
        return backends[-1]

    yield open_one
    for backend in backends:
        await backend.aclose()


def ask(text: str = "once upon a time", **options: Any) -> GenerateRequest:
    return GenerateRequest(prompt=text, **{"max_tokens": 8, **options})


@contextmanager
def held(backend: LocalBackend) -> Iterator[threading.Event]:
    """Steps of the model wait until the event is set, at the latest at the end of the block."""
    runner = batch_of(backend)._runner
    original, gate = runner.forward, threading.Event()

    def forward(*args: Any) -> Any:
        assert gate.wait(20)
        return original(*args)

    runner.forward = forward  # type: ignore[method-assign]
    try:
        yield gate
    finally:
        gate.set()
        runner.forward = original  # type: ignore[method-assign]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.002)


def batch_of(backend: LocalBackend) -> Batch:
    return backend._worker.call(lambda batch: batch).result(20)


def engine_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("agora-")]


# -- Answers


async def test_answers_as_the_model_itself(opened: Opener, reference: Any, tiny_adapters: dict[str, Path]) -> None:
    backend = await opened()
    for name, folder in tiny_adapters.items():
        await backend.load_adapter(AdapterRef.parse(name), folder)
    questions = ["once upon", "the quick brown fox jumps over the lazy dog and", "why", "count from one to twenty"]
    adapters = [None, *tiny_adapters]
    requests = [
        ask(text, adapter=AdapterRef.parse(name) if name else None, max_tokens=12)
        for name in adapters
        for text in questions
    ]
    answers = await asyncio.gather(*(backend.generate(r) for r in requests))
    for request, answer in zip(requests, answers, strict=True):
        ids = reference.ids(request.prompt)
        made = reference.greedy(ids, 12, str(request.adapter) if request.adapter else None)
        # Decoded after the prompt, as a reader would see it.
        expected = reference.tokenizer.decode(ids + made, skip_special_tokens=True)[len(request.prompt) :]
        assert answer.text == expected
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.usage.completion_tokens == 12
        assert answer.usage.calls == 1
    assert len({a.text for a in answers[:: len(questions)]}) == len(adapters), "an adapter had no effect"


async def test_a_chat_is_answered_after_its_template(opened: Opener, reference: Any) -> None:
    backend = await opened()
    answer = await backend.generate(GenerateRequest(messages=(Message(role="user", content="why?"),), max_tokens=6))
    prompt = "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    ids = reference.ids(prompt)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.text == reference.tokenizer.decode(reference.greedy(ids, 6))


async def test_a_template_that_refuses_is_the_callers_error(opened: Opener) -> None:
    backend = await opened()
    with pytest.raises(InvalidRequest, match="chat template refuses"):
        await backend.generate(GenerateRequest(messages=(Message(role="user", content="refuse me"),)))
    assert backend.load == Load()


async def test_without_a_template_there_is_no_chat(opened: Opener, tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    backend = await opened(folder)
    assert not backend.capabilities.chat
    with pytest.raises(Unsupported, match="chat"):
        await backend.generate(GenerateRequest(messages=(Message(role="user", content="hi"),)))
    assert (await backend.generate(ask())).text


async def test_tells_what_answered_and_when(opened: Opener, tiny_adapters: dict[str, Path]) -> None:
    backend = await opened()
    await backend.load_adapter(RED1, tiny_adapters["red@v1"])
    plain, adapted = await asyncio.gather(backend.generate(ask()), backend.generate(ask(adapter=RED1)))
    assert plain.model == "tiny"
    assert adapted.model == "tiny+red@v1"
    assert 0 < plain.first_token_s < plain.seconds


async def test_an_end_token_ends_the_answer(opened: Opener, tiny_model: Path, tmp_path: Path, reference: Any) -> None:
    """It is counted, it has a log-probability, and it has no text."""
    ids = reference.ids("once upon a time")
    made = reference.greedy(ids, 12)
    last = next(n for n in range(4, 12) if made[n] not in made[:n])
    folder = shutil.copytree(tiny_model, tmp_path / "ending")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": made[last]}))
    backend = await opened(folder)
    answer = await backend.generate(ask(max_tokens=40, logprobs=0))
    assert answer.finish_reason == "stop"
    assert answer.usage.completion_tokens == len(answer.logprobs) == last + 1
    whole = reference.tokenizer.decode(ids + made[:last])
    assert answer.text == whole[len("once upon a time") :]


async def test_a_stop_string_across_tokens(opened: Opener) -> None:
    backend = await opened()
    whole = await backend.generate(ask(max_tokens=30, logprobs=0))
    names = [t.token for t in whole.logprobs]
    # From the middle of one token to the middle of the one after the next.
    at = next(n for n in range(5, 25) if all(len(t) > 1 and "�" not in t for t in names[n : n + 2]))
    stop = names[at][1:] + names[at + 1][:-1]
    expected = whole.text[: whole.text.index(stop)]
    chunks = [c async for c in backend.stream(ask(max_tokens=30, stop=(stop,)))]
    assert "".join(c.text for c in chunks) == expected
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens < 30


async def test_text_that_only_looked_like_a_stop_string_is_told(opened: Opener) -> None:
    backend = await opened()
    whole = await backend.generate(ask(max_tokens=20))
    ending = whole.text[-3:] + "\x01"
    assert (await backend.generate(ask(max_tokens=20, stop=(ending,)))).text == whole.text


async def test_log_probabilities_are_the_models(opened: Opener, reference: Any) -> None:
    backend = await opened()
    cool, hot = await asyncio.gather(
        backend.generate(ask(logprobs=4)), backend.generate(ask(logprobs=4, temperature=1.7, seed=3))
    )
    ids = reference.ids("once upon a time")
    for answer in (cool, hot):
        rows = reference.logprobs(ids)[-1]
        first = answer.logprobs[0]
        assert [lp for _, lp in first.top] == pytest.approx(rows.topk(4).values.tolist(), abs=1e-3)
    assert "".join(t.token for t in cool.logprobs) == cool.text
    made = reference.greedy(ids, 8)
    rows = reference.logprobs(ids + made)[len(ids) - 1 :]
    expected = [float(row[token]) for row, token in zip(rows, made, strict=False)]
    assert [t.logprob for t in cool.logprobs] == pytest.approx(expected, abs=1e-3)
    assert cool.mean_logprob == pytest.approx(sum(expected) / 8, abs=1e-3)


async def test_scores_are_the_models(opened: Opener, reference: Any, tiny_adapters: dict[str, Path]) -> None:
    """Alone and among generations, with an adapter and without, against whole texts scored one by one."""
    backend = await opened()
    await backend.load_adapter(BLUE, tiny_adapters["blue@v1"])
    text, tails = "why is the sky", (" blue", " dark at night?", " the", " the robot by the sea 🦜")
    ids = reference.ids(text)
    for name in (None, "blue@v1"):
        request = ScoreRequest(prompt=text, continuations=tails, adapter=AdapterRef.parse(name) if name else None)
        scores, *_ = await asyncio.gather(backend.score(request), *(backend.generate(ask()) for _ in range(3)))
        for tail, score in zip(tails, scores.scores, strict=True):
            whole = reference.ids(text + tail)
            assert whole[: len(ids)] == ids
            assert score.tokens == len(whole) - len(ids)
            assert score.logprob == pytest.approx(reference.score(ids, whole[len(ids) :], name), abs=2e-3)
        assert scores.usage.prompt_tokens == len(ids) + sum(s.tokens for s in scores.scores)
        assert scores.usage.completion_tokens == 0


# -- Limits


async def test_a_prompt_beyond_the_context_says_how_long_it_is(opened: Opener, reference: Any) -> None:
    backend = await opened(max_context=50)
    assert backend.capabilities.max_context == 50
    text = "once upon a time " * 20
    tokens = len(reference.ids(text))
    with pytest.raises(InvalidRequest, match=rf"has {tokens} tokens; .* 50 in all, so at most 49 are allowed"):
        await backend.generate(ask(text))
    with pytest.raises(InvalidRequest, match=f"has {tokens} tokens"):
        await anext(backend.stream(ask(text)))
    with pytest.raises(InvalidRequest, match=f"has {tokens} tokens"):
        await backend.score(ScoreRequest(prompt=text, continuations=(" a",)))
    assert backend.load == Load()


async def test_the_answer_ends_where_the_context_does(opened: Opener) -> None:
    backend = await opened(max_context=50)
    answer = await backend.generate(ask(max_tokens=10_000))
    assert answer.finish_reason == "length"
    assert answer.usage.tokens == 50


async def test_a_full_queue_is_told_at_once(opened: Opener) -> None:
    backend = await opened(max_batch=1, max_queue=2)
    with held(backend):
        tasks = [asyncio.create_task(backend.generate(ask())) for _ in range(3)]
        await until(lambda: backend.load == Load(running=1, waiting=2))
        with pytest.raises(Overloaded, match="1 requests are running and 2 waiting; at most 1 and 2") as full:
            await backend.generate(ask())
        assert full.value.transient
        assert full.value.retry_after_s is not None and full.value.retry_after_s > 0
        with pytest.raises(Overloaded):
            await backend.score(ScoreRequest(prompt="a", continuations=(" b",)))
        with pytest.raises(Overloaded):
            await anext(backend.stream(ask()))
        tasks[2].cancel()
        await asyncio.gather(tasks[2], return_exceptions=True)
        tasks.append(asyncio.create_task(backend.generate(ask("why"))))
        await until(lambda: backend.load.waiting == 2)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(a).__name__ for a in answers] == ["Completion", "Completion", "CancelledError", "Completion"]
    assert backend.load == Load()


async def test_time_in_the_queue_counts(opened: Opener) -> None:
    backend = await opened(max_batch=1)
    with held(backend):
        first = asyncio.create_task(backend.generate(ask()))
        await until(lambda: backend.load.running == 1)
        with pytest.raises(BackendTimeout, match=r"no answer within 0\.05 s, waiting for a free row included"):
            await backend.generate(ask(timeout_s=0.05))
        with pytest.raises(BackendTimeout):
            await backend.score(ScoreRequest(prompt="a", continuations=(" b",), timeout_s=0.05))
        assert backend.load == Load(running=1)
    assert (await first).text


async def test_a_stream_out_of_time_frees_its_row(opened: Opener) -> None:
    backend = await opened()
    chunks = backend.stream(ask(max_tokens=400, timeout_s=5))
    async with aclosing(chunks):
        await anext(chunks)
        with held(backend):
            work = next(iter(backend._open))
            work._deadline = asyncio.get_running_loop().time() + 0.03
            with pytest.raises(BackendTimeout):
                async for _ in chunks:
                    pass
    batch = batch_of(backend)
    await until(lambda: not batch.busy or not batch._rows)
    assert (await backend.generate(ask())).text


async def test_a_cancelled_request_frees_its_row_by_the_next_step(opened: Opener) -> None:
    backend = await opened(max_batch=1)
    with held(backend) as gate:
        first = asyncio.create_task(backend.generate(ask(max_tokens=400)))
        second = asyncio.create_task(backend.generate(ask(max_tokens=1)))
        await until(lambda: backend.load == Load(running=1, waiting=1))
        first.cancel()
        gate.set()
        await second
    assert first.cancelled()
    assert backend.load == Load()


async def test_out_of_range(tiny_model: Path) -> None:
    for options, said in (
        ({"max_batch": 0}, "max_batch is 0; it must be ≥ 1"),
        ({"max_queue": -1}, "max_queue is -1; it must be ≥ 0"),
        ({"threads": 0}, "threads is 0"),
        ({"max_context": 1}, "max_context is 1; it must be ≥ 2"),
        ({"dtype": "int4"}, "dtype is 'int4'; allowed"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            await LocalBackend.open(tiny_model, **options)  # type: ignore[arg-type]
    assert not engine_threads()


# -- The thread


async def test_the_model_never_runs_on_the_event_loops_thread(opened: Opener) -> None:
    backend = await opened()
    runner = batch_of(backend)._runner
    original, seen = runner.forward, set()

    def forward(*args: Any) -> Any:
        seen.add(threading.current_thread().name)
        return original(*args)

    runner.forward = forward
    await asyncio.gather(
        backend.generate(ask()), backend.score(ScoreRequest(prompt="a", continuations=(" b",))), backend.health()
    )
    assert seen == {"agora-local"}


async def test_the_event_loop_stays_free_while_the_model_decodes(opened: Opener) -> None:
    """It wakes a sleeper many times during one long step; a blocking call would wake it once."""
    backend = await opened()
    with held(backend) as gate:
        task = asyncio.create_task(backend.generate(ask()))
        woken = 0
        for _ in range(20):
            await asyncio.sleep(0.001)
            woken += 1
        assert not task.done()
        gate.set()
        await task
    assert woken == 20


async def test_a_failing_model_fails_its_requests_and_goes_on(opened: Opener, caplog: pytest.LogCaptureFixture) -> None:
    backend = await opened()
    runner = batch_of(backend)._runner
    original = runner.forward

    def fail(*_: Any) -> Any:
        raise MemoryError("cannot allocate")

    runner.forward = fail
    results = await asyncio.gather(*(backend.generate(ask()) for _ in range(3)), return_exceptions=True)
    health = await backend.health()
    runner.forward = original
    assert all(isinstance(r, Unavailable) and "MemoryError: cannot allocate" in r.message for r in results)
    assert not health.ok
    assert "MemoryError" in health.detail
    assert (await backend.generate(ask())).text
    assert (await backend.health()).ok
    assert backend.load == Load()


async def test_even_a_broken_engine_lets_nobody_wait_for_ever(opened: Opener, caplog: pytest.LogCaptureFixture) -> None:
    backend = await opened(max_batch=1)
    batch = batch_of(backend)
    original = batch._admit

    def fail() -> None:
        raise RuntimeError("a bug")

    batch._admit = fail  # type: ignore[method-assign]
    results = await asyncio.gather(*(backend.generate(ask()) for _ in range(3)), return_exceptions=True)
    batch._admit = original  # type: ignore[method-assign]
    assert all(isinstance(r, Unavailable) and "RuntimeError: a bug" in r.message for r in results)
    assert (await backend.generate(ask())).text


async def test_health_does_not_wait_in_the_queue(opened: Opener) -> None:
    backend = await opened(max_batch=1, max_queue=1)
    tasks = [asyncio.create_task(backend.generate(ask(max_tokens=400))) for _ in range(2)]
    await until(lambda: backend.load.running == 1)
    with pytest.raises(Overloaded):
        await backend.generate(ask())
    assert (await backend.health()).ok
    assert not any(t.done() for t in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_closing_ends_all_work_and_all_threads(opened: Opener) -> None:
    backend = await opened(max_batch=1, name="one")
    assert engine_threads()
    stream = backend.stream(ask(max_tokens=400))
    await anext(stream)
    tasks = [asyncio.create_task(backend.generate(ask(max_tokens=400))) for _ in range(3)]
    tasks.append(asyncio.create_task(backend.score(ScoreRequest(prompt="a", continuations=(" b",)))))
    await until(lambda: backend.load == Load(running=1, waiting=4))
    await asyncio.gather(backend.aclose(), backend.aclose())
    assert not engine_threads()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, Unavailable)
        assert "one: the backend is closed" in result.message
    with pytest.raises(Unavailable):
        async for _ in stream:
            pass
    await backend.aclose()
    with pytest.raises(Unavailable):
        await backend.load_adapter(RED1, "anywhere")
    assert not (await backend.health()).ok
    assert backend.load == Load()


async def test_a_closed_backend_holds_no_model(opened: Opener) -> None:
    """Even if somebody still holds the backend."""
    backend = await opened()
    await backend.generate(ask())
    model = weakref.ref(batch_of(backend)._runner._model)
    await backend.aclose()
    gc.collect()
    assert model() is None


async def test_a_request_still_being_read_when_the_backend_closes(opened: Opener) -> None:
    backend = await opened()
    codec = backend._facts.codec
    entered, gate = threading.Event(), threading.Event()
    original = codec.encode

    def slow(*args: Any, **options: Any) -> Any:
        entered.set()
        assert gate.wait(20)
        return original(*args, **options)

    codec.encode = slow
    task = asyncio.create_task(backend.generate(ask()))
    await until(entered.is_set)
    closing = asyncio.create_task(backend.aclose())
    await asyncio.sleep(0.01)
    gate.set()
    await closing
    with pytest.raises(Unavailable):
        await task


async def test_a_model_that_cannot_be_loaded_leaves_no_thread(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        await LocalBackend.open(tmp_path / "nowhere")
    await until(lambda: not engine_threads())


async def test_opening_that_is_given_up_leaves_no_thread(tiny_model: Path) -> None:
    task = asyncio.create_task(LocalBackend.open(tiny_model, threads=1))
    await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not engine_threads())


async def test_a_forgotten_backend_lets_go_of_its_thread(tiny_model: Path) -> None:
    backend = await LocalBackend.open(tiny_model, threads=1)
    await backend.generate(ask())
    del backend

    def gone() -> bool:
        gc.collect()
        return not engine_threads()

    await until(gone)
    assert not engine_threads()


def test_one_event_loop_after_another(tiny_model: Path) -> None:
    backend = asyncio.run(LocalBackend.open(tiny_model, threads=1))
    first = asyncio.run(backend.generate(ask()))
    assert asyncio.run(backend.generate(ask())).text == first.text
    asyncio.run(backend.aclose())


def test_events_for_a_closed_loop_are_dropped() -> None:
    async def mailbox() -> Mailbox:
        return Mailbox()

    outbox = Outbox()
    job = GenerateJob(name="x", mailbox=asyncio.run(mailbox()), prompt=[1], limit=1)
    outbox.post(job, Piece(text="a"))
    outbox.flush()
    assert not outbox._mail


# -- Adapters


async def test_an_unknown_adapter_is_told_with_the_known_ones(opened: Opener, tiny_adapters: dict[str, Path]) -> None:
    backend = await opened()
    with pytest.raises(AdapterError, match="adapter green is not loaded; loaded: none"):
        await backend.generate(ask(adapter=AdapterRef(name="green")))
    await backend.load_adapter(RED1, tiny_adapters["red@v1"])
    await backend.load_adapter(BLUE, tiny_adapters["blue@v1"])
    for ref in ("red@v2", "green", "green@v1"):
        with pytest.raises(AdapterError, match=f"adapter {ref} is not loaded; loaded: blue@v1, red@v1"):
            await backend.generate(ask(adapter=AdapterRef.parse(ref)))
    with pytest.raises(AdapterError):
        await backend.unload_adapter(RED2)


async def test_a_bare_name_is_the_newest_version(opened: Opener, tiny_adapters: dict[str, Path]) -> None:
    backend = await opened()
    await backend.load_adapter(RED2, tiny_adapters["red@v2"])
    await backend.load_adapter(RED1, tiny_adapters["red@v1"])
    newest = await backend.generate(ask(adapter=AdapterRef(name="red")))
    assert newest.text == (await backend.generate(ask(adapter=RED2))).text
    assert newest.model == "tiny+red@v2"
    await backend.unload_adapter(RED2)
    oldest = await backend.generate(ask(adapter=AdapterRef(name="red")))
    assert oldest.text == (await backend.generate(ask(adapter=RED1))).text != newest.text


async def test_loaded_adapters_are_immutable(opened: Opener, tiny_adapters: dict[str, Path]) -> None:
    backend = await opened()
    info = await backend.load_adapter(RED1, tiny_adapters["red@v1"])
    assert await backend.load_adapter(RED1, tiny_adapters["red@v1"]) == info
    with pytest.raises(AdapterError, match="adapter red@v1 is loaded already, with other weights"):
        await backend.load_adapter(RED1, tiny_adapters["red@v2"])
    assert dict(backend.adapters) == {RED1: info}


async def test_a_version_that_comes_back_has_its_new_weights(
    opened: Opener, tiny_adapters: dict[str, Path], reference: Any
) -> None:
    """Unloaded and loaded again with others, nothing of the old ones is left."""
    backend = await opened()
    await backend.load_adapter(RED1, tiny_adapters["red@v1"])
    first = await backend.generate(ask(adapter=RED1))
    await backend.unload_adapter(RED1)
    await backend.load_adapter(RED1, tiny_adapters["red@v2"])
    second = await backend.generate(ask(adapter=RED1))
    made = reference.greedy(reference.ids("once upon a time"), 8, "red@v2")
    assert second.text == reference.tokenizer.decode(reference.ids("once upon a time") + made)[16:] != first.text


async def test_loading_while_requests_run_changes_none_of_them(opened: Opener, tiny_adapters: dict[str, Path]) -> None:
    backend = await opened()
    await backend.load_adapter(RED1, tiny_adapters["red@v1"])
    requests = [ask(max_tokens=60), ask(max_tokens=60, adapter=RED1), ask("why is the sky", max_tokens=60)]
    alone = [(await backend.generate(r)).text for r in requests]
    streams = [asyncio.create_task(backend.generate(r)) for r in requests]
    await until(lambda: backend.load.running == 3)
    await backend.load_adapter(BLUE, tiny_adapters["blue@v1"])
    await backend.load_adapter(RED2, tiny_adapters["red@v2"])
    await backend.unload_adapter(BLUE)
    assert [(await s).text for s in streams] == alone


async def test_unloading_waits_for_those_who_use_it(opened: Opener, tiny_adapters: dict[str, Path]) -> None:
    backend = await opened(max_batch=1)
    await backend.load_adapter(RED1, tiny_adapters["red@v1"])
    expected = (await backend.generate(ask(adapter=RED1))).text
    with held(backend):
        users = [asyncio.create_task(backend.generate(ask(adapter=RED1))) for _ in range(2)]
        await until(lambda: backend.load == Load(running=1, waiting=1))
        unloading = asyncio.create_task(backend.unload_adapter(RED1))
        await asyncio.sleep(0.01)
        assert not unloading.done()
        assert not backend.adapters
        with pytest.raises(AdapterError):
            await backend.generate(ask(adapter=RED1))
    assert [(await u).text for u in users] == [expected] * 2
    await unloading


async def test_unloading_that_is_given_up_keeps_the_adapter(opened: Opener, tiny_adapters: dict[str, Path]) -> None:
    backend = await opened()
    await backend.load_adapter(RED1, tiny_adapters["red@v1"])
    with held(backend):
        user = asyncio.create_task(backend.generate(ask(adapter=RED1)))
        await until(lambda: backend.load.running == 1)
        unloading = asyncio.create_task(backend.unload_adapter(RED1))
        await asyncio.sleep(0.01)
        unloading.cancel()
        await asyncio.gather(unloading, return_exceptions=True)
    await user
    assert (await backend.generate(ask(adapter=RED1))).text


async def test_a_bad_adapter_leaves_everything_as_it_was(
    opened: Opener, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    backend = await opened()
    before = (await backend.generate(ask())).text
    folder = shutil.copytree(tiny_adapters["red@v1"], tmp_path / "bad")
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(AdapterError, match="can run code"):
        await backend.load_adapter(RED1, folder)
    assert not backend.adapters
    assert (await backend.generate(ask())).text == before


# -- A real model


# -- Going on with what another one began


class Breaking:
    """A backend whose streams break after so many chunks; one that goes on for others is asked well."""

    def __init__(self, backend: LocalBackend, after: int) -> None:
        self._backend = backend
        self._after = after
        self.name = "breaking"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        async with aclosing(self._backend.stream(request)) as chunks:  # type: ignore[type-var]
            n = 0
            async for chunk in chunks:
                if n == self._after:
                    raise Unavailable("its link is gone", backend=self.name)
                n += bool(chunk.text)
                yield chunk

    async def aclose(self) -> None:
        """The backend is the test's."""


class Seen(Breaking):
    """Keeps what it was asked."""

    def __init__(self, backend: LocalBackend) -> None:
        super().__init__(backend, after=10**9)
        self.name = "seen"
        self.asked: list[GenerateRequest] = []

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        self.asked.append(request)
        async with aclosing(self._backend.stream(request)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk


def over(first: Any, second: Any) -> MultipathBackend:
    """First the one, then the other."""
    ways = [
        Way(path=Path_(name=n, links=(link(n, mbps),), target=n), backend=b)
        for n, b, mbps in (("first", first, 1000.0), ("second", second, 1.0))
    ]
    return MultipathBackend(ways, name="both", chooser=Chooser(loop_time, explore=False), hedge=False)


def link(name: str, mbps: float) -> Link:
    return Link(
        name=name, source="here", target=name, technology=Technology.WIFI, up_mbps=mbps, down_mbps=mbps, rtt_s=1 / mbps
    )


async def test_a_drawn_answer_of_another_path_is_gone_on_with_here(opened: Opener) -> None:
    backend: LocalBackend = await opened()
    seen = Seen(backend)
    request = GenerateRequest(
        messages=(Message(role="user", content="count, please"),), max_tokens=12, temperature=1.0, logprobs=0
    )
    both = over(Breaking(backend, after=4), seen)
    chunks = [chunk async for chunk in both.stream(request)]
    (rest,) = seen.asked
    said = "".join(t.token for c in chunks for t in c.logprobs)
    assert rest.goes_on
    assert rest.messages[:-1] == request.messages
    assert "".join(c.text for c in chunks).startswith(rest.messages[-1].content)
    assert rest.messages[-1].content
    assert chunks[-1].path == "second"
    assert sum(len(c.logprobs) for c in chunks) == 12, said
    # What it reads is the question, and what was said where the answer begins.
    codec = backend._facts.codec
    read = len(codec.encode(rest.messages, None, goes_on=True))
    assert (await backend.generate(rest)).usage.prompt_tokens == read
    await both.aclose()


@pytest.mark.model
@pytest.mark.parametrize("after", [1, 5, 12])
async def test_a_real_model_goes_on_with_its_own_words(after: int) -> None:
    folder = ModelStore().resolve("smollm2-135m", pull=True)
    request = GenerateRequest(messages=(Message(role="user", content="Name three colours of fruit."),), max_tokens=24)
    async with await LocalBackend.open(folder) as backend:
        whole = (await backend.generate(request)).text
        both = over(Breaking(backend, after=after), Seen(backend))
        assert "".join([chunk.text async for chunk in both.stream(request)]) == whole


@pytest.mark.model
async def test_a_real_model_says_what_transformers_says() -> None:
    folder = ModelStore().resolve("smollm2-135m", pull=True)
    async with await LocalBackend.open(folder) as backend:
        requests = [
            GenerateRequest(prompt="The capital of France is", max_tokens=3),
            GenerateRequest(messages=(Message(role="user", content="Hi!"),), max_tokens=24),
            GenerateRequest(prompt="Once upon a time there was a small robot who", max_tokens=24),
        ]
        alone = [await backend.generate(r) for r in requests]
        assert alone[0].text.startswith(" Paris")
        assert alone[1].finish_reason == "stop"
        together = await asyncio.gather(*(backend.generate(r) for r in requests * 3))
        assert [a.text for a in together] == [a.text for a in alone] * 3
        scores = await backend.score(
            ScoreRequest(prompt="The capital of France is", continuations=(" Paris", " London", " a fish"))
        )
        assert scores.best.text == " Paris"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(requests[2].prompt, return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert alone[2].text == tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :])
