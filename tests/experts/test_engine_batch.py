"""The running batch, driven step by step without its thread: what each request gets, whatever is beside it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agora.errors import AdapterError, AgoraError, BadReply, Unavailable
from experts.adapters import read_adapter
from experts.engine.batch import Batch
from experts.engine.cache import Lane
from experts.engine.jobs import Event, GenerateJob, Job, Marks, Outbox, Piece, ScoreJob
from experts.engine.loading import LoadedModel, load
from experts.engine.pace import Pace

ADAPTERS = (None, "red@v1", "red@v2", "blue@v1")
CLOSE = 2e-4
"""Largest difference between two float32 computations of one log-probability of the tiny model."""


class Inbox(Outbox):
    """Keeps every event, by request."""

    def __init__(self) -> None:
        super().__init__()
        self.events: dict[Job, list[Event]] = defaultdict(list)

    def post(self, job: Job, event: Event) -> None:
        if not job.cancelled:
            self.events[job].append(event)

    def flush(self) -> None:
        pass


class Told:
    """A tokenizer that notes which tokens were generated: their numbers are their text."""

    chat = False

    def decode(self, tokens: Any) -> str:
        return "".join(f"<{t}>" for t in tokens)

    def name(self, token: int) -> str:
        return f"<{token}>"


@pytest.fixture(scope="module")
def loaded(tiny_model: Path, tiny_adapters: dict[str, Path]) -> Iterator[LoadedModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = load(tiny_model, dtype="float32", device="cpu")
    facts = dataclasses.replace(whole.facts, codec=Told())  # type: ignore[arg-type]
    yield dataclasses.replace(whole, facts=facts)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def adapted(loaded: LoadedModel, tiny_adapters: dict[str, Path]) -> dict[str | None, str | None]:
    """All adapters are on the model; the engine's name of each."""
    names: dict[str | None, str | None] = {None: None}
    for n, (ref, folder) in enumerate(tiny_adapters.items()):
        names[ref] = f"a{n}"
        loaded.runner.adapters.add(f"a{n}", read_adapter(folder, loaded.facts.layers))
    return names


def batch_of(loaded: LoadedModel, adapters: Any = (), **options: Any) -> tuple[Batch, Inbox]:
    inbox = Inbox()
    options = {"max_rows": 8, "max_bytes": 2**40, **options}
    batch = Batch(loaded, outbox=inbox, **options)
    batch._adapters = {a for a in adapters if a}
    return batch, inbox


def generation(prompt: list[int], limit: int, **options: Any) -> GenerateJob:
    return GenerateJob(name="test", mailbox=None, prompt=prompt, limit=limit, **options)  # type: ignore[arg-type]


def scoring(prompt: list[int], continuations: list[list[int]], **options: Any) -> ScoreJob:
    return ScoreJob(name="test", mailbox=None, prompt=prompt, continuations=continuations, **options)  # type: ignore[arg-type]


def run_out(batch: Batch, most: int = 2000) -> int:
    steps = 0
    while batch.busy:
        batch.step()
        steps += 1
        assert steps < most, "the batch does not come to an end"
    return steps


def tokens_of(events: list[Event]) -> list[int]:
    text = "".join(e.text for e in events if isinstance(e, Piece))
    return [int(t) for t in text.removeprefix("<").removesuffix(">").split("><")] if text else []


tokens = st.lists(st.integers(3, 399), min_size=1, max_size=40)
requests = st.fixed_dictionaries(
    {
        "prompt": tokens,
        "limit": st.integers(1, 10),
        "adapter": st.sampled_from(ADAPTERS),
        "at": st.integers(0, 8),
        "cancelled_at": st.none() | st.integers(0, 12),
        "continuations": st.none()
        | st.lists(st.lists(st.integers(3, 399), min_size=1, max_size=6), min_size=1, max_size=4),
    }
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    asked=st.lists(requests, min_size=1, max_size=7),
    max_rows=st.integers(1, 6),
    prefill=st.integers(1, 48),
    lane=st.sampled_from((2, 8, 64)),
)
def test_any_mix_gives_every_request_its_own_answer(
    loaded: LoadedModel,
    adapted: dict[str | None, str | None],
    reference: Any,
    asked: list[dict[str, Any]],
    max_rows: int,
    prefill: int,
    lane: int,
) -> None:
    """Whatever the prompts, lengths, adapters, arrivals, departures, chunks and lanes: each request is answered as a
    plain model without cache, batch and padding answers it."""
    batch, inbox = batch_of(loaded, adapted.values(), max_rows=max_rows, prefill_tokens=prefill, lane_tokens=lane)
    jobs: list[tuple[dict[str, Any], Job]] = []
    for a in asked:
        adapter = adapted[a["adapter"]]
        if a["continuations"] is None:
            jobs.append((a, generation(a["prompt"], a["limit"], adapter=adapter, logprobs=2)))
        else:
            jobs.append((a, scoring(a["prompt"], a["continuations"], adapter=adapter)))
    for step in range(14):
        for a, job in jobs:
            if a["at"] == step:
                batch.enqueue(job)
            if a["cancelled_at"] == step and not inbox.events[job]:
                job.cancelled = True
        batch.step()
    run_out(batch)
    for a, job in jobs:
        if job.cancelled:
            assert not inbox.events[job]
            continue
        (event,) = inbox.events[job]
        if isinstance(job, ScoreJob):
            assert isinstance(event, Marks), event
            expected = [reference.score(a["prompt"], c, a["adapter"]) for c in a["continuations"]]
            assert event.logprobs == pytest.approx(expected, abs=CLOSE * 10)
            continue
        assert isinstance(event, Piece), event
        made = tokens_of([event])
        assert event.finish_reason == "length"
        assert len(made) == a["limit"] == event.tokens == len(event.logprobs)
        rows = reference.logprobs(a["prompt"] + made, a["adapter"])[len(a["prompt"]) - 1 :]
        for row, token, told in zip(rows, made, event.logprobs, strict=False):
            assert float(row.max() - row[token]) < CLOSE, "not the likeliest token"
            assert told.logprob == pytest.approx(float(row[token]), abs=CLOSE)
            assert [lp for _, lp in told.top] == pytest.approx(row.topk(2).values.tolist(), abs=CLOSE)
    assert not batch._rows
    assert all(not lane.places for lane in batch._cache._lanes.values())


def test_the_same_seed_draws_the_same_alone_and_among_others(loaded: LoadedModel) -> None:
    def sample(seed: int, top_p: float) -> GenerateJob:
        return generation([5, 6, 7], 20, temperature=1.5, top_p=top_p, seed=seed)

    for top_p in (1.0, 0.9, 0.3):
        batch, inbox = batch_of(loaded)
        alone = sample(7, top_p)
        batch.enqueue(alone)
        run_out(batch)
        batch, among = batch_of(loaded, prefill_tokens=4)
        others = [generation([9] * n, 15, temperature=0.8, seed=n) for n in (3, 30, 11)]
        again = sample(7, top_p)
        for job in (others[0], others[1], again, others[2]):
            batch.enqueue(job)
            batch.step()
        run_out(batch)
        assert tokens_of(among.events[again]) == tokens_of(inbox.events[alone])
        batch.enqueue(other := sample(8, top_p))
        run_out(batch)
        assert tokens_of(among.events[other]) != tokens_of(among.events[again])


def test_without_a_seed_samples_differ(loaded: LoadedModel) -> None:
    batch, inbox = batch_of(loaded)
    jobs = [generation([5, 6, 7], 20, temperature=1.5) for _ in range(3)]
    for job in jobs:
        batch.enqueue(job)
    run_out(batch)
    assert len({tuple(tokens_of(inbox.events[job])) for job in jobs}) == 3


def test_requests_join_and_leave_between_steps(loaded: LoadedModel) -> None:
    """A late request starts while an early one is running, and ends before it."""
    batch, inbox = batch_of(loaded)
    long, short = generation([5] * 10, 40), generation([6] * 10, 3)
    batch.enqueue(long)
    for _ in range(5):
        batch.step()
    batch.enqueue(short)
    for _ in range(3):
        batch.step()
    assert inbox.events[short]
    assert not inbox.events[long]


def test_a_cancelled_row_is_free_by_the_next_step(loaded: LoadedModel) -> None:
    batch, inbox = batch_of(loaded, max_rows=1)
    first, second = generation([5] * 10, 400), generation([6] * 10, 1)
    batch.enqueue(first)
    batch.enqueue(second)
    batch.step()
    assert not second.started
    first.cancelled = True
    batch.step()
    assert second.started
    assert inbox.events[second]


def test_first_come_first_served(loaded: LoadedModel) -> None:
    """Short requests that come later do not overtake, and nobody starves."""
    batch, inbox = batch_of(loaded, max_rows=2)
    jobs = [generation([5] * 20, 12), generation([6] * 3, 2), generation([7] * 50, 9), generation([8], 1)]
    jobs += [scoring([9] * 5, [[4], [5, 6]]), generation([4] * 2, 3)]
    for job in jobs:
        batch.enqueue(job)
    started: list[Job] = []
    while batch.busy:
        batch.step()
        started += [job for job in jobs if job.started and job not in started]
    assert started == jobs
    assert all(inbox.events[job] for job in jobs)


def test_a_long_prompt_does_not_stall_the_others(loaded: LoadedModel) -> None:
    """While it is read in chunks, those that decode get a token each step, and a short prompt is read meanwhile."""
    batch, inbox = batch_of(loaded, prefill_tokens=16)
    running = generation([5, 6], 50, streaming=True)
    batch.enqueue(running)
    batch.step()
    long, short = generation([7] * 400, 1), generation([8] * 6, 1)
    batch.enqueue(long)
    batch.enqueue(short)
    for n in range(2, 10):
        batch.step()
        assert len(inbox.events[running]) == n
    assert inbox.events[short]
    assert not inbox.events[long]
    seen: list[int] = []
    original = batch._runner.forward
    batch._runner.forward = lambda tokens, *more: seen.append(len(tokens)) or original(tokens, *more)  # type: ignore
    try:
        run_out(batch)
    finally:
        del batch._runner.forward
    assert max(seen) <= 16 + 1
    assert inbox.events[long]


def test_more_readers_than_tokens_to_read_are_served_as_they_came(loaded: LoadedModel) -> None:
    batch, inbox = batch_of(loaded, prefill_tokens=2, max_rows=6)
    jobs = [generation([5 + n] * (30 - 4 * n), 2) for n in range(6)]
    for job in jobs:
        batch.enqueue(job)
    done: list[Job] = []
    while batch.busy:
        batch.step()
        done += [job for job in jobs if inbox.events[job] and job not in done]
    assert all(len(tokens_of(inbox.events[job])) == 2 for job in jobs)
    assert set(done[:2]) == set(jobs[:2]), "later, shorter prompts starved the first"


def test_a_failing_step_ends_its_requests_and_no_others(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch, inbox = batch_of(loaded, max_rows=2)
    jobs = [generation([5] * 4, 6), generation([6] * 4, 6), generation([7] * 4, 6)]
    for job in jobs:
        batch.enqueue(job)
    batch.step()
    original = batch._runner.forward

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory: tried to allocate 9 GB\nand a stack")

    monkeypatch.setattr(batch._runner, "forward", fail)
    batch.step()
    monkeypatch.setattr(batch._runner, "forward", original)
    run_out(batch)
    for job in jobs[:2]:
        error = inbox.events[job][-1]
        assert isinstance(error, Unavailable)
        assert "RuntimeError: out of memory: tried to allocate 9 GB" in error.message
        assert "stack" not in error.message
        assert error.transient
    assert len(tokens_of(inbox.events[jobs[2]])) == 6
    assert "step of 2 rows failed" in caplog.text


def test_a_request_without_room_ends_alone(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory that runs out while one row grows is that row's failure only."""
    batch, inbox = batch_of(loaded, lane_tokens=16)
    grows, stays = generation([5] * 12, 30), generation([6] * 4, 12)
    batch.enqueue(grows)
    batch.enqueue(stays)
    batch.step()
    original = Lane._grow

    def grow(lane: Lane, slots: int) -> None:
        if lane.capacity > 16:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        original(lane, slots)

    monkeypatch.setattr(Lane, "_grow", grow)
    run_out(batch)
    error = inbox.events[grows][-1]
    assert isinstance(error, Unavailable)
    assert "can't allocate memory" in error.message
    assert len(tokens_of(inbox.events[stays])) == 12
    monkeypatch.undo()
    batch.enqueue(again := generation([5] * 12, 30))
    run_out(batch)
    assert len(tokens_of(inbox.events[again])) == 30


def test_a_row_whose_results_cannot_be_told_fails_alone(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch, inbox = batch_of(loaded)
    bad, good = generation([5] * 4, 10, stop=("x",)), generation([6] * 4, 10)
    batch.enqueue(bad)
    batch.enqueue(good)
    batch.step()
    row = next(r for r in batch._rows if r.job is bad)

    def fail(_: str) -> Any:
        raise ValueError("no such text")

    monkeypatch.setattr(row._stops, "push", fail)  # type: ignore[union-attr]
    run_out(batch)
    error = inbox.events[bad][-1]
    assert isinstance(error, Unavailable)
    assert "ValueError: no such text" in error.message
    assert len(tokens_of(inbox.events[good])) == 10


@pytest.mark.parametrize("bad_at", [0, 1, 2])
def test_a_row_whose_output_is_no_number_fails_alone(loaded: LoadedModel, bad_at: int) -> None:
    """Neither those beside it, nor one that moves into its memory, nor the next that gets it, is touched: what lies
    past a row's end is masked, but 0 · NaN is NaN."""
    batch, inbox = batch_of(loaded, lane_tokens=64)
    long, short, bad = generation([5] * 40, 20), generation([7] * 5, 20), generation([6] * 30, 30)
    for job in (*[long, short][:bad_at], bad, *[long, short][bad_at:]):
        batch.enqueue(job)
    while any(row.place.length < len(row.job.prompt) for row in batch._rows) or not batch._rows:
        batch.step()
    place = next(row.place for row in batch._rows if row.job is bad)
    for layer in (*place.lane.keys, *place.lane.values):
        layer[place.slot, : place.length] = float("nan")
    batch.step()
    assert isinstance(inbox.events[bad][-1], BadReply)
    batch.enqueue(late := generation([6] * 4, 10))
    run_out(batch)
    check, clean = batch_of(loaded)
    for job in (long, short, late):
        check.enqueue(again := generation(job.prompt, job.limit))
        run_out(check)
        assert tokens_of(inbox.events[job]) == tokens_of(clean.events[again])


def test_an_adapter_comes_and_goes_without_changing_those_that_run(
    loaded: LoadedModel, tiny_adapters: dict[str, Path], reference: Any
) -> None:
    batch, inbox = batch_of(loaded)
    plain = generation([5] * 9, 12)
    batch.enqueue(plain)
    batch.step()
    batch.step()
    batch.add_adapter("late", read_adapter(tiny_adapters["blue@v1"], loaded.facts.layers))
    batch.step()
    adapted = generation([5] * 9, 4, adapter="late")
    batch.enqueue(adapted)
    while not inbox.events[adapted]:
        batch.step()
    batch.remove_adapter("late")
    run_out(batch)
    assert tokens_of(inbox.events[plain]) == reference.greedy([5] * 9, 12)
    assert tokens_of(inbox.events[adapted]) == reference.greedy([5] * 9, 4, "blue@v1")
    batch.enqueue(gone := generation([5] * 9, 4, adapter="late"))
    run_out(batch)
    assert isinstance(inbox.events[gone][-1], AdapterError)


def test_removing_an_adapter_ends_what_still_uses_it(loaded: LoadedModel, tiny_adapters: dict[str, Path]) -> None:
    batch, inbox = batch_of(loaded)
    batch.add_adapter("brief", read_adapter(tiny_adapters["red@v1"], loaded.facts.layers))
    batch.enqueue(user := generation([5] * 9, 40, adapter="brief"))
    batch.enqueue(plain := generation([5] * 9, 10))
    batch.step()
    batch.remove_adapter("brief")
    run_out(batch)
    assert isinstance(inbox.events[user][-1], AdapterError)
    assert len(tokens_of(inbox.events[plain])) == 10


def test_memory_is_a_limit_too(loaded: LoadedModel) -> None:
    """A request waits until its share of memory is free; one that is alone always runs."""
    per_token = loaded.runner.shape.bytes_per_token
    batch, inbox = batch_of(loaded, max_bytes=100 * per_token, lane_tokens=16)
    big, small, huge = generation([5] * 30, 30), generation([6] * 4, 4), generation([7] * 150, 5)
    for job in (big, small, huge):
        batch.enqueue(job)
    batch.step()
    assert [j.started for j in (big, small, huge)] == [True, True, False]
    run_out(batch)
    assert len(tokens_of(inbox.events[huge])) == 5


def test_many_continuations_are_scored_in_turns(
    loaded: LoadedModel, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experts.engine.rows.TREE_TOKENS", 6)
    prompt = [11, 12, 13, 14]
    tails = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [5, 6, 8], [20, 21], [8, 8]]
    batch, inbox = batch_of(loaded, prefill_tokens=5)
    batch.enqueue(job := scoring(prompt, tails))
    run_out(batch)
    (marks,) = inbox.events[job]
    assert isinstance(marks, Marks)
    assert marks.logprobs == pytest.approx([reference.score(prompt, t) for t in tails], abs=CLOSE * 10)


def test_abort_ends_everything(loaded: LoadedModel) -> None:
    batch, inbox = batch_of(loaded, max_rows=1)
    jobs = [generation([5], 50), generation([6], 50)]
    for job in jobs:
        batch.enqueue(job)
    batch.step()
    batch.abort(lambda job: Unavailable("over", backend=job.name))
    assert not batch.busy
    for job in jobs:
        assert isinstance(inbox.events[job][-1], AgoraError)


def test_an_urgent_request_goes_before_all_others(loaded: LoadedModel) -> None:
    batch, inbox = batch_of(loaded, max_rows=1)
    batch.enqueue(generation([5], 50))
    batch.enqueue(generation([5], 50))
    batch.step()
    batch.enqueue(probe := generation([6], 1, urgent=True))
    batch.step()
    assert inbox.events[probe]


def test_the_pace_is_known_once_requests_have_waited(loaded: LoadedModel) -> None:
    now, pace = [0.0], Pace()
    batch, _ = batch_of(loaded, max_rows=1, clock=lambda: now[0], pace=pace)
    for _ in range(5):
        batch.enqueue(generation([5], 1))
    assert pace.seconds is None
    while batch.busy:
        now[0] += 2.0
        batch.step()
    assert pace.seconds == pytest.approx(2.0)
