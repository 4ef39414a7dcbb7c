"""Recorded answers are the model's own, survive a kill, and are never those of another request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agora.errors import Unavailable
from agora.protocols import Backend, Capabilities, GenerateRequest, Message
from agora.types import AdapterRef
from benchmarks.tiers_parts.recording import ALTERNATIVES, RecordedBackend
from experts.fake import FakeBackend, Reply

CLAIMS = Capabilities(logprobs=True, adapters=True, seed=True)


def asking(text: str, **more: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message(role="user", content=text),), logprobs=0, **more)


def recorded(file: Path, model: FakeBackend | None, **more: Any) -> RecordedBackend:
    async def opened() -> Backend:
        assert model is not None, "a question came that should have been known"
        return model

    opener: Callable[[], Awaitable[Backend]] = opened
    return RecordedBackend(opener, file, name="r", identity=more.pop("identity", "m"), capabilities=CLAIMS, **more)


async def test_what_was_answered_once_is_answered_without_the_model(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.jsonl"
    model = FakeBackend({"sea": Reply("deep and blue", logprobs=(-0.1, -0.2, -0.3))})
    first = recorded(file, model)
    said = await first.generate(asking("the sea?"))
    again = recorded(file, None)
    assert await again.generate(asking("the sea?")) == said
    assert [t.logprob for t in said.logprobs] == [-0.1, -0.2, -0.3]
    assert not again.opened
    (then,), (now,) = first.taken, again.taken
    assert (then.recorded, now.recorded) == (False, True)
    assert then.seconds == now.seconds > 0
    assert then.tokens == now.tokens == said.usage.tokens


async def test_only_as_many_alternatives_are_told_as_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    await recorded(file, FakeBackend("yes")).generate(asking("?"))
    kept = recorded(file, None)
    counts = []
    for n in (0, 2, ALTERNATIVES):
        completion = await kept.generate(replace(asking("?"), logprobs=n))
        counts.append(len(completion.logprobs[0].top))
    assert counts == [0, 2, ALTERNATIVES]
    assert (await kept.generate(replace(asking("?"), logprobs=None))).logprobs == ()
    assert not kept.knows(replace(asking("?"), logprobs=ALTERNATIVES + 1))


@pytest.mark.parametrize(
    "other",
    [
        asking("the lake?"),
        asking("the sea?", max_tokens=7),
        asking("the sea?", stop=("x",)),
        asking("the sea?", adapter=AdapterRef.parse("a@v1")),
        GenerateRequest(prompt="the sea?", logprobs=0),
        replace(
            asking("the sea?"), messages=(Message(role="system", content="Be brief."), *asking("the sea?").messages)
        ),
    ],
    ids=["question", "length", "stop", "adapter", "prompt", "system"],
)
async def test_another_request_is_another_question(tmp_path: Path, other: GenerateRequest) -> None:
    file = tmp_path / "a.jsonl"
    await recorded(file, FakeBackend("blue")).generate(asking("the sea?"))
    kept = recorded(file, None)
    assert kept.knows(asking("the sea?"))
    assert kept.knows(replace(asking("the sea?"), timeout_s=3.0))
    assert not kept.knows(other)
    assert not recorded(file, None, identity="other model").knows(asking("the sea?"))


async def test_a_line_cut_off_by_a_kill_loses_that_answer_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    backend = recorded(file, FakeBackend())
    for text in ("one", "two"):
        await backend.generate(asking(text))
    file.write_bytes(file.read_bytes()[:-20])
    kept = recorded(file, FakeBackend())
    assert kept.knows(asking("one"))
    assert not kept.knows(asking("two"))
    await kept.generate(asking("two"))
    assert recorded(file, None).knows(asking("two"))


async def test_samples_are_asked_for_anew(tmp_path: Path) -> None:
    model = FakeBackend(["a", "b"])
    backend = recorded(tmp_path / "a.jsonl", model)
    said = [(await backend.generate(asking("?", temperature=0.7))).text for _ in range(2)]
    assert said == ["a", "b"]


async def test_fresh_asks_again_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    await recorded(file, FakeBackend("old")).generate(asking("?"))
    fresh = recorded(file, FakeBackend(["new"]), fresh=True)
    assert (await fresh.generate(asking("?"))).text == "new"
    assert (await fresh.generate(asking("?"))).text == "new", "within a run it is asked once"
    assert (await recorded(file, None).generate(asking("?"))).text == "new"


async def test_a_failure_is_not_an_answer(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    backend = recorded(file, FakeBackend([Unavailable("down"), "up"]))
    with pytest.raises(Unavailable):
        await backend.generate(asking("?"))
    assert not backend.knows(asking("?"))
    assert (await backend.generate(asking("?"))).text == "up"


async def test_a_stream_is_the_same_answer(tmp_path: Path) -> None:
    backend = recorded(tmp_path / "a.jsonl", FakeBackend("to be or"))
    chunks = [c async for c in backend.stream(asking("?"))]
    assert "".join(c.text for c in chunks) == "to be or"
    assert chunks[-1].finish_reason == "stop"
