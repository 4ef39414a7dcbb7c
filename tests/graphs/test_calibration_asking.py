"""Experts are asked as they are in use, one question at a time, and what fails is told."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from agora.config import load_config
from agora.errors import BackendTimeout, ConfigError, InvalidRequest, Rejected, Unavailable
from agora.protocols import Backend, Completion, GenerateRequest, Health
from agora.square import Expert
from agora.types import ExpertCard, Tier
from experts.fake import FakeBackend
from experts.openai import OpenAIBackend
from graphs.calibrating import version_of
from graphs.calibration_asking import ATTEMPTS, GIVE_UP_AFTER, SILENT_AFTER, Order, ask_all, ladder, machines_of
from graphs.calibration_journal import Graded
from graphs.calibration_questions import Labelled
from graphs.departure import Condenser, Departure, Redactor


def expert(name: str, backend: Backend, *, tier: Tier = Tier.END, price: float = 1.0, **more: object) -> Expert:
    card = ExpertCard(name=name, description="an expert", tier=tier, price_per_mtok=price)
    return Expert(card=card, backend=backend, **more)  # type: ignore[arg-type]


def questions(n: int, first: int = 0) -> list[Labelled]:
    """Three kinds in turn; numbered without order, so that later ones look like earlier ones."""
    kinds = ("easy", "fair", "hard")
    made = [f"{kinds[i % 3]} {1000 + i * 7919 % 8999}: 2 + 2?" for i in range(first, first + n)]
    return [Labelled(question=text, answer="4", grader="number") for text in made]


async def ask(experts: Sequence[Expert], asked: Sequence[Labelled], **more: object) -> dict[str, dict[str, Graded]]:
    told: dict[str, dict[str, Graded]] = {e.name: {} for e in experts}
    order = Order(questions=asked, experts={e.name: (e, version_of(e)) for e in experts}, **more)  # type: ignore[arg-type]
    await ask_all(order, (), lambda name, outcome: told[name].__setitem__(outcome.question, outcome))
    return told


async def test_every_expert_is_asked_every_question_and_graded() -> None:
    small = expert("small", FakeBackend({"easy": "#### 4"}, otherwise="#### 5", name="a"))
    big = expert("big", FakeBackend(lambda request: "#### 4", name="b"), price=50)
    asked = questions(30)
    told = await ask([small, big], asked)
    assert [told["small"][q.key].right for q in asked] == [q.question.startswith("easy") for q in asked]
    assert all(told["big"][q.key].right for q in asked)
    one = told["big"][asked[0].key]
    assert one.answer == "4"
    assert one.cost > 40 * told["small"][asked[0].key].cost > 0
    assert {"mean_logprob", "chars"} <= set(one.signals)
    assert all(math.isfinite(v) for v in one.signals.values())


async def test_signals_are_asked_for_where_wanted_and_their_cost_counts() -> None:
    backend = FakeBackend(lambda request: "#### 4", name="a")
    asked = questions(3)
    plain = await ask([expert("e", backend)], asked)
    more = await ask([expert("e", backend)], asked, signals=("self_consistency",), samples=3)
    for q in asked:
        assert more["e"][q.key].signals["self_consistency"] == 1.0
        assert more["e"][q.key].cost > plain["e"][q.key].cost


@pytest.mark.looptime
async def test_a_failure_that_passes_is_asked_again_and_one_that_stays_is_told() -> None:
    flaky = expert("flaky", FakeBackend([Unavailable("down"), "#### 4", "#### 4"], name="f"))
    stubborn = expert("stubborn", FakeBackend([Rejected("no"), "#### 4", "#### 4"], name="s"))
    told = await ask([flaky, stubborn], questions(2), max_parallel=1)
    assert [o.right for o in told["flaky"].values()] == [True, True]
    assert sorted(bool(o.error) for o in told["stubborn"].values()) == [False, True]
    assert any("no" in o.error for o in told["stubborn"].values())


@pytest.mark.looptime
async def test_an_expert_that_is_not_there_is_given_up_and_holds_up_nobody() -> None:
    gone = FakeBackend(name="gone", failures=lambda call: Unavailable("nobody there"))
    here = FakeBackend(lambda request: "#### 4", name="here")
    asked = questions(100)
    told = await ask([expert("gone", gone), expert("here", here)], asked)
    assert all(o.right for o in told["here"].values())
    assert all(o.right is None for o in told["gone"].values())
    assert len(told["gone"]) == 100
    assert sum(o.error.startswith("not asked: 10 failures before it") for o in told["gone"].values()) == 90
    assert len(gone.requests) == GIVE_UP_AFTER * ATTEMPTS


@pytest.mark.looptime
@pytest.mark.parametrize("at_once", [1, 3, 16])
async def test_one_that_never_answers_costs_its_time_once(at_once: int) -> None:
    late = Silent()
    began = asyncio.get_running_loop().time()
    told = await ask([expert("late", late), expert("too", late)], questions(50), at_once=at_once)
    assert asyncio.get_running_loop().time() - began == pytest.approx(Silent.patience_s)
    assert all(o.error for found in told.values() for o in found.values())
    assert len(told["late"]) == len(told["too"]) == 50
    assert len(late.requests) == at_once
    reasons = [o.error for o in told["late"].values()]
    assert reasons[-1] == "not asked: nothing on its machine answers: silent: no reply within 100 s"


class Silent(FakeBackend):
    """Lets the whole time pass, whatever it is asked."""

    patience_s = 100.0

    def __init__(self, *, alive: bool = False) -> None:
        super().__init__(name="silent")
        self._alive = alive

    async def generate(self, request: GenerateRequest) -> Completion:
        with self._recorded("generate", request):
            await asyncio.sleep(self.patience_s)
            raise BackendTimeout("no reply within 100 s", backend="silent")

    async def health(self) -> Health:
        if not self._alive:
            await asyncio.sleep(math.inf)
        return Health(ok=True)


@pytest.mark.looptime
async def test_one_that_lives_is_not_given_up_for_one_question_that_it_does_not_come_to_an_end_with() -> None:
    class Odd(Silent):
        async def generate(self, request: GenerateRequest) -> Completion:
            if len(self.requests) > 1:
                return await FakeBackend.generate(self, request)
            return await super().generate(request)

    told = await ask([expert("odd", Odd(alive=True))], questions(20))
    assert [o.right is None for o in told["odd"].values()] == [True, True, *[False] * 18]
    never = Silent(alive=True)
    told = await ask([expert("never", never)], questions(20))
    assert len(never.requests) == SILENT_AFTER
    assert all(o.right is None for o in told["never"].values())


async def test_a_server_that_accepts_and_says_nothing_costs_its_time_once() -> None:
    held: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    backend = OpenAIBackend(f"http://127.0.0.1:{port}", "m", name="mute", total_timeout_s=0.2)
    clock = asyncio.get_running_loop().time
    try:
        began = clock()
        told = await ask([expert("a", backend), expert("b", backend)], questions(40))
        took = clock() - began
    finally:
        await backend.aclose()
        server.close()
        for writer in held:
            writer.close()
        await server.wait_closed()
    # Twice the time would be 0.4 s.
    assert 0.2 <= took < 0.38
    assert all(o.right is None for found in told.values() for o in found.values())


class Watched(FakeBackend):
    """Takes a second of its time for each answer, and counts how many it works on at once, with others like it."""

    def __init__(self, name: str, running: dict[str, int]) -> None:
        super().__init__(lambda request: "#### 4", name=name)
        self.running = running

    async def generate(self, request: GenerateRequest) -> Completion:
        self.running["now"] = self.running.get("now", 0) + 1
        self.running["most"] = max(self.running.get("most", 0), self.running["now"])
        # As an engine that is shared: of n at once each takes n times as long.
        await asyncio.sleep(self.running["now"])
        self.running["now"] -= 1
        return await super().generate(request)


@pytest.mark.looptime
async def test_times_are_those_of_one_question_alone_unless_more_are_wanted_at_once() -> None:
    running: dict[str, int] = {}
    shared = Watched("here", running)
    experts = [expert("a", shared), expert("b", shared)]
    told = await ask(experts, questions(8))
    assert running["most"] == 1
    assert all(o.seconds == pytest.approx(1.0) and o.at_once == 1 for found in told.values() for o in found.values())
    told = await ask(experts, questions(8), at_once=4)
    assert running["most"] == 4
    assert max(o.seconds for o in told["a"].values()) > 1.5
    assert {o.at_once for o in told["a"].values()} == {4}


@pytest.mark.looptime
async def test_those_who_share_a_machine_take_turns_and_others_do_not_wait_for_them() -> None:
    running: dict[str, int] = {}
    experts = [expert(n, Watched(n, running)) for n in "ab"]
    await ask(experts, questions(5), machines={"a": "here", "b": "here"})
    assert running["most"] == 1
    await ask(experts, questions(5))
    assert running["most"] == 2


def test_engines_in_this_process_are_one_machine_and_so_is_a_neighbour(tmp_path: Path) -> None:
    file = tmp_path / "agora.toml"
    file.write_text(
        'models.m.source = "smollm2-135m"\n'
        '[nodes.one]\nkind = "local"\nmodel = "m"\n[nodes.two]\nkind = "llamacpp"\nsource = "x.gguf"\n'
        '[nodes.far]\nkind = "openai"\nurl = "http://127.0.0.1:1/v1"\nmodel = "gpt-x"\n'
        '[experts.a]\nnode = "one"\ndescription = "a"\n'
    )

    class Relaying(FakeBackend):
        relays = True

    far = FakeBackend()
    made = machines_of(
        [
            expert("a", FakeBackend(), node="one"),
            expert("b", FakeBackend(), node="two"),
            expert("c", far, node="far"),
            expert("d", far, node="far"),
            expert("e", FakeBackend(), node="far2"),
            expert("n.f", Relaying(), node="n"),
            expert("n.g", Relaying(), node="n"),
        ],
        load_config(file),
    )
    assert made["a"] == made["b"] and made["c"] == made["d"] and made["n.f"] == made["n.g"]
    assert len(set(made.values())) == 4


@pytest.mark.looptime
async def test_what_is_asked_is_what_leaves_in_use_and_its_time_and_cost_count() -> None:
    def says(request: GenerateRequest) -> str:
        return f"{request.messages[-1].content} #### 4"

    small, big = FakeBackend(says, name="s"), FakeBackend(says, name="b", latency=1.0)
    asked = [Labelled(question="I am ann@example.org. 2 + 2?", answer="ann@example.org", grader="contains")]
    told = await ask(
        [expert("small", small), expert("big", big, tier=Tier.CLOUD)],
        asked,
        departure=Departure(redactor=Redactor(["email"])),
        signals=("verbalised",),
    )
    assert "ann@example.org" in str(small.requests[0])
    # Nothing that leaves shows it, what is asked about the answer included; and what comes back is read with it.
    assert len(big.requests) == 2 and "ann@example.org" not in str(big.requests)
    assert "<EMAIL_1>" in str(big.requests[0])
    assert all(found[asked[0].key].right for found in told.values())
    assert told["big"][asked[0].key].seconds == pytest.approx(2.0)


@pytest.mark.looptime
async def test_what_condensing_costs_and_takes_belongs_to_the_one_it_is_done_for() -> None:
    helper = expert("helper", FakeBackend(lambda request: "Two and two.", name="h", latency=3.0), price=7.0)
    big = FakeBackend(lambda request: "#### 4", name="b", latency=1.0)
    long = "This is how it was on that day. " * 40
    asked = [Labelled(question=f"{long}\n\nWhat is 2 + 2?", answer="4", grader="number")]
    told = await ask(
        [expert("big", big, tier=Tier.CLOUD, price=5.0)],
        asked,
        departure=Departure(shorteners=[Condenser(64, expert=helper)]),
    )
    one = told["big"][asked[0].key]
    assert one.right and one.seconds == pytest.approx(4.0)
    assert len(str(big.requests[0])) < len(long)
    own = big.calls[-1]
    assert own.request is not None
    assert one.cost > 5.0 * one.tokens / 1e6 > 0
    # Another price of its own leaves what the helper took as it was.
    assert one.priced(6.0).cost - one.cost == pytest.approx(1.0 * one.tokens / 1e6)


async def test_a_label_keeps_a_question_from_those_beyond_it() -> None:
    small, big = FakeBackend(lambda request: "#### 4", name="s"), FakeBackend(lambda request: "#### 4", name="b")
    asked = [dataclasses.replace(q, reach=Tier.END if i % 2 else Tier.CLOUD) for i, q in enumerate(questions(10))]
    told = await ask([expert("small", small), expert("big", big, tier=Tier.CLOUD)], asked)
    assert len(told["small"]) == 10
    assert set(told["big"]) == {q.key for q in asked if q.reach is Tier.CLOUD}
    assert len(big.requests) == 5


async def test_another_number_of_samples_is_asked_again() -> None:
    backend = FakeBackend(lambda request: "#### 4", name="a")
    one, asked = expert("e", backend), questions(3)
    told = await ask([one], asked, signals=("self_consistency",), samples=3)
    done = {o.key for o in told["e"].values()}
    order = Order(questions=asked, experts={"e": (one, version_of(one))}, signals=("self_consistency",), samples=3)
    before = len(backend.requests)
    await ask_all(order, done, lambda name, outcome: None)
    assert len(backend.requests) == before
    await ask_all(dataclasses.replace(order, samples=4), done, lambda name, outcome: None)
    assert len(backend.requests) == before + 3 * 5


async def test_never_more_in_flight_than_allowed() -> None:
    running = most = 0

    async def slow(request: object) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return "#### 4"

    experts = [expert(f"e{i}", FakeBackend(slow, name=f"b{i}")) for i in range(3)]
    await ask(experts, questions(10), max_parallel=5, at_once=8)
    assert most == 5
    for name in ("at_once", "max_parallel"):
        with pytest.raises(InvalidRequest, match=f"{name} is 0"):
            await ask(experts, questions(10), **{name: 0})


async def test_a_journal_that_cannot_be_written_ends_it_with_its_own_error() -> None:
    def full(name: str, outcome: Graded) -> None:
        raise ConfigError("no space")

    small = expert("small", FakeBackend(name="a"))
    with pytest.raises(ConfigError, match="no space"):
        await ask_all(Order(questions=questions(20), experts={"small": (small, version_of(small))}), (), full)


def test_the_ladder_is_by_tier_and_price_unless_named() -> None:
    made = [
        expert("cloud", FakeBackend(), tier=Tier.CLOUD, price=5),
        expert("dear", FakeBackend(), tier=Tier.EDGE, price=9),
        expert("edge", FakeBackend(), tier=Tier.EDGE, price=1),
        expert("end", FakeBackend(), price=100),
    ]
    here = {e.name: e for e in made}
    assert ladder(here, None) == ("end", "edge", "dear", "cloud")
    assert ladder(here, ["cloud", "end", "cloud"]) == ("cloud", "end")
    with pytest.raises(InvalidRequest, match="no expert 'x' is here; here: cloud, dear"):
        ladder(here, ["x"])
    with pytest.raises(InvalidRequest, match="nobody"):
        ladder({}, None)
