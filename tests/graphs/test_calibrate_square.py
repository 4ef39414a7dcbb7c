"""An open square is calibrated by one call, and a graph that runs beside it takes what was learned into use."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from agora.config import Config, load_config
from agora.errors import ConfigError, InvalidRequest, OutOfReach
from agora.protocols import GenerateRequest
from agora.routing.trust import CannotCalibrate
from agora.square import Expert, Square
from agora.types import AdapterRef, Answer, ExpertCard, RunResult, Tier
from experts.fake import FakeBackend
from graphs import calibrate as calibration
from graphs import calibration_fit, guidance
from graphs.build import build_graph
from graphs.calibrate import Progress, calibrate, who
from graphs.calibrating import load_trust, policy_folder, save_kept
from graphs.calibration_folder import CALIBRATORS, current
from graphs.calibration_journal import Journal
from graphs.calibration_questions import Labelled
from graphs.run import run


def says(request: GenerateRequest) -> str:
    """Right on what is easy, and says how it came to that."""
    return "2 + 2 makes #### 4" if "easy" in str(request.messages) else "I think it is 0"


def nearly_always_right(request: GenerateRequest) -> str:
    found = re.search(r"\d{4}", str(request.messages))
    return f"#### {4 if found is None or int(found[0]) % 5 else 1}"


def made() -> Square:
    small = ExpertCard(name="small", description="small", price_per_mtok=1.0)
    big = ExpertCard(name="big", description="big", tier=Tier.CLOUD, price_per_mtok=100.0)
    return Square(
        [
            Expert(card=small, backend=FakeBackend(says, name="s")),
            Expert(card=big, backend=FakeBackend(nearly_always_right, name="b")),
        ]
    )


def questions(n: int) -> list[Labelled]:
    texts = [f"{('easy', 'hard')[i % 2]} {1000 + i * 7919 % 8999}: 2 + 2?" for i in range(n)]
    return [Labelled(question=t, answer="4", grader="number") for t in texts]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "agora.toml").write_text(
        '[graph]\nname = "vertical"\nplanner = "none"\nrouter = "keywords"\n[vertical]\npolicy = "policy"\n'
    )
    return load_config(tmp_path / "agora.toml")


def sent(square: Square, name: str) -> int:
    expert = square.get(name)
    assert expert is not None and isinstance(expert.backend, FakeBackend)
    return len(expert.backend.requests)


async def test_one_call_asks_learns_and_writes(config: Config) -> None:
    square, told = made(), list[Progress]()
    result = await calibrate(square, questions(80), config=config, tell=told.append)
    assert [(e.version.expert, e.n, e.accuracy) for e in result.experts] == [("small", 80, 0.5), ("big", 80, 0.825)]
    assert result.policy is not None and result.policy.models == ("small", "big")
    trust = load_trust(policy_folder(config), list(square), config=config)
    assert trust.notes == () and trust.policy() is not None
    for name in ("small", "big"):
        mine = [p for p in told if p.expert == name]
        assert [p.done for p in mine] == list(range(81)) and {p.total for p in mine} == {80}
        assert [p.outcome is None for p in mine[:2]] == [True, False]
    assert told[-1].expert is None


async def test_it_goes_on_where_it_was_and_anew_only_where_that_is_wanted(config: Config) -> None:
    square, told = made(), list[Progress]()
    await calibrate(square, questions(40), config=config, experts=["small"])
    assert sent(square, "small") == 40
    await calibrate(square, questions(60), config=config, experts=["small"], tell=told.append)
    assert sent(square, "small") == 60 and told[0].done == 40
    await calibrate(square, questions(60), config=config, experts=["small"], fresh=True)
    assert (sent(square, "small"), sent(square, "big")) == (120, 0)


async def test_without_a_configuration_whoever_is_given_is_asked(tmp_path: Path) -> None:
    experts = list(made())
    result = await calibrate(experts, questions(40), folder=tmp_path / "learned")
    assert [e.version.expert for e in result.experts] == ["small", "big"]
    assert load_trust(tmp_path / "learned", experts).models == ("small", "big")
    named = await calibrate(experts, questions(40), folder=tmp_path / "other", experts=["big"])
    assert [e.version.expert for e in named.experts] == ["big"]


async def test_what_cannot_be_is_told_before_anybody_is_asked(config: Config) -> None:
    square = made()
    with pytest.raises(CannotCalibrate, match="29 questions; at least 30"):
        await calibrate(square, questions(29), config=config)
    with pytest.raises(InvalidRequest, match="no expert 'x' is here"):
        await calibrate(square, questions(40), config=config, experts=["x"])
    with pytest.raises(OutOfReach, match=r"big cannot be calibrated: .* no further than edge"):
        await calibrate(square, questions(40), config=config, experts=["small", "big"], reach=Tier.EDGE)
    with (
        Journal(policy_folder(config) / "journal.jsonl"),
        pytest.raises(ConfigError, match="another calibration"),
    ):
        await calibrate(square, questions(40), config=config)
    assert (sent(square, "small"), sent(square, "big")) == (0, 0)


async def test_questions_that_may_not_go_far_leave_out_who_is_beyond(config: Config) -> None:
    square = made()
    result = await calibrate(square, questions(40), config=config, reach=Tier.END)
    assert [e.version.expert for e in result.experts] == ["small"] and sent(square, "big") == 0
    # One question may be bound further than all of them.
    asked = [dataclasses.replace(q, reach=Tier.END if i < 4 else Tier.CLOUD) for i, q in enumerate(questions(60))]
    result = await calibrate(square, asked, config=config)
    assert sent(square, "big") == 56 and [e.n for e in result.experts] == [60, 56]
    assert result.policy is not None and result.policy.rows == 56


async def test_neighbours_experts_are_asked_only_where_they_are_named(tmp_path: Path) -> None:
    class Relaying(FakeBackend):
        relays = True

    square = made()
    far = ExpertCard(name="n.far", description="far", tier=Tier.EDGE)
    square.join(Expert(card=far, backend=Relaying(), node="n"))
    assert who(square, Config()) == ("small", "big")
    assert who(square, Config(), ["n.far", "small"]) == ("n.far", "small")
    file = tmp_path / "agora.toml"
    file.write_text(
        '[nodes.s]\nkind = "fake"\n[experts.small]\nnode = "s"\ndescription = "small"\n'
        '[vertical]\nexperts = ["small", "n.far"]\n[neighbours.n]\nurl = "http://127.0.0.1:1"\n'
    )
    assert who(square, load_config(file)) == ("small", "n.far")


async def test_what_it_is_cancelled_in_is_ended_before_the_journal_is_given_back(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, real = threading.Event(), threading.Event(), calibration_fit.fit_all

    def slow(*args: object, **more: object) -> object:
        begun.set()
        go_on.wait(10)
        return real(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(calibration, "fit_all", slow)
    work = asyncio.create_task(calibrate(made(), questions(40), config=config, experts=["small"]))
    await asyncio.to_thread(begun.wait, 10)
    work.cancel()
    await asyncio.sleep(0.01)
    with pytest.raises(ConfigError, match="another calibration"), Journal(policy_folder(config) / "journal.jsonl"):
        pass
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert len(list((current(policy_folder(config)) / CALIBRATORS).glob("small~*.json"))) == 1
    with Journal(policy_folder(config) / "journal.jsonl") as journal:
        assert len(journal.known) == 40


class Vectors:
    """Every question is its own direction."""

    dim = 4

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.eye(4, dtype=np.float32)[[len(t) % 4 for t in texts]]

    async def aclose(self) -> None:
        pass


async def test_questions_are_embedded_for_those_who_answer_with_embeddings(config: Config) -> None:
    square = made()
    await calibrate(square, questions(60), config=config, embedder=Vectors())
    assert load_trust(policy_folder(config), list(square), config=config, embeds=False).blind
    assert not load_trust(policy_folder(config), list(square), config=config, embeds=True).blind


# -- Beside a graph that runs


async def answered(graph: object, question: str) -> RunResult:
    return await run(graph, question)  # type: ignore[arg-type]


UNKNOWN = "nothing is calibrated"


async def test_a_running_graph_takes_what_is_learned_into_use_at_its_next_question(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guidance, "LOOK_S", 0.0)
    square = made()
    graph = build_graph(config, square)
    before = await answered(graph, "easy 1: 2 + 2?")
    assert any(UNKNOWN in n for n in before.notes)
    await calibrate(square, questions(200), config=config)
    after = await answered(graph, "easy 1: 2 + 2?")
    assert after.notes == ()
    outcome = next(iter(after.attempts.values()))[-1].outcome
    # The small one is known to be right on these, and how it says so.
    assert isinstance(outcome, Answer) and outcome.expert == "small"
    assert outcome.confidence is not None and outcome.confidence > 0.8


async def test_what_is_being_written_is_not_read(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guidance, "LOOK_S", 0.0)
    square = made()
    await calibrate(square, questions(100), config=config)
    graph = build_graph(config, square)
    assert (await answered(graph, "easy 1: 2 + 2?")).notes == ()
    seen = []
    real = save_kept

    def watched(folder: Path, kept: object) -> None:
        real(folder, kept)  # type: ignore[arg-type]
        seen.append(load_trust(policy_folder(config), list(square), config=config, embeds=False).models)

    monkeypatch.setattr(calibration_fit, "save_kept", watched)
    work = asyncio.create_task(calibrate(square, questions(120), config=config))
    while not work.done():
        assert (await answered(graph, "easy 1: 2 + 2?")).notes == ()
    await work
    assert seen == [("small", "big")]


@pytest.mark.looptime
async def test_it_looks_no_more_often_than_every_few_seconds(config: Config) -> None:
    class Counted:
        looks = reads = 0

        def __call__(self, experts: object) -> object:
            self.reads += 1
            return load_trust(policy_folder(config), list(square), config=config)

        def stamp(self) -> int:
            self.looks += 1
            return self.looks // 3

    square, trust = made(), Counted()
    guide = guidance.Guide(square, trust=trust)  # type: ignore[arg-type]
    guide.look()
    for _ in range(50):
        await guide.now()
    assert (trust.looks, trust.reads) == (2, 1)
    await asyncio.sleep(guidance.LOOK_S)
    await guide.now()
    # What changed is read once.
    assert (trust.looks, trust.reads) == (3, 2)
    await guide.now()
    assert (trust.looks, trust.reads) == (3, 2)


async def test_an_alias_that_moves_is_noticed_at_once(config: Config) -> None:
    class Serving(FakeBackend):
        adapters = (AdapterRef.parse("sst2@v1"),)

    backend = Serving(says, name="s", adapters=["sst2"])
    card = ExpertCard(name="small", description="small", price_per_mtok=1.0)
    square = Square([Expert(card=card, backend=backend, adapter=AdapterRef.parse("sst2"))])
    big = made().get("big")
    assert big is not None
    square.join(big)
    await calibrate(square, questions(60), config=config)
    graph = build_graph(config, square)
    assert (await answered(graph, "easy 1: 2 + 2?")).notes == ()
    backend.adapters = (*backend.adapters, AdapterRef.parse("sst2@v2"))  # type: ignore[assignment]
    notes = " ".join((await answered(graph, "easy 1: 2 + 2?")).notes)
    assert "sst2@v1" in notes and "sst2@v2" in notes and "no longer counts" in notes


async def test_a_guarantee_covers_what_is_redacted_where_it_was_learned_so(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guidance, "LOOK_S", 0.0)
    table = config.vertical.model_copy(update={"redact": ("email",), "max_risk": 0.1})
    redacts = config.model_copy(update={"vertical": table})
    square = made()
    graph = build_graph(redacts, square)
    await calibrate(square, questions(300), config=redacts)
    notes = (await answered(graph, "easy 1: 2 + 2?")).notes
    assert any("certified" in n for n in notes)
    assert not any("does not cover" in n for n in notes)
    # One that was learned with whole questions does not count for what is redacted.
    plain = config.model_copy(update={"vertical": config.vertical.model_copy(update={"max_risk": 0.1})})
    await calibrate(square, questions(300), config=plain)
    assert any("no longer counts" in n for n in (await answered(graph, "easy 1: 2 + 2?")).notes)
