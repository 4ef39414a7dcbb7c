"""Replicas that come and go by how much there is to do: no request is lost, none outlives the set."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agora.config import parse_config
from agora.errors import AdapterError, BackendTimeout, ConfigError, ModelError, Overloaded, Unavailable, Unsupported
from agora.protocols import Backend, GenerateRequest, Message, ScoreRequest
from agora.scheduling.scaling import Targets
from agora.types import AdapterRef
from experts.adapters import CONFIG_FILE, WEIGHTS_FILE
from experts.build import open_square
from experts.conformance import BackendConformance
from experts.fake import FakeBackend, Hang, Reply
from experts.openai import OpenAIBackend
from experts.replicas import Care, ReplicaSet
from experts.replicas_crew import Replica, ReplicaCrew
from experts.replicas_signal import FirstTokens, Watch
from experts.vllm_metrics import Seconds

MED = AdapterRef.parse("med@v1")

CARE = Care(every_s=1.0, drain_s=100.0, health_s=5.0, give_up_s=20.0, backoff_s=4.0, backoff_cap_s=16.0)
TARGETS = Targets(least=1, most=3, queue=4.0, up_after_s=2.0, down_after_s=20.0, cooldown_s=5.0, step_up=1)


def ask(text: str = "hello", **more: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message(role="user", content=text),), **more)


class Fake(FakeBackend):
    """A replica that takes adapters, and notes that it was closed."""

    def __init__(self, *args: Any, refuses: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.loaded: dict[AdapterRef, str] = {}
        self.refuses = refuses
        self.closed = 0

    async def load_adapter(self, ref: AdapterRef, folder: Path) -> str:
        if self.down is not None:
            assert isinstance(self.down, Exception)
            raise self.down
        if self.refuses:
            raise AdapterError("it does not fit", backend=self.name)
        self.loaded[ref] = (folder / WEIGHTS_FILE).read_text()
        return self.name

    async def unload_adapter(self, ref: AdapterRef) -> None:
        if ref not in self.loaded:
            raise AdapterError("it is not there", backend=self.name)
        del self.loaded[ref]

    async def aclose(self) -> None:
        self.closed += 1
        await super().aclose()


def write_adapter(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text("{}")
    (folder / WEIGHTS_FILE).write_text("w1")


class Farm:
    """Opens replicas, and knows all there ever were."""

    def __init__(self, make: Callable[[int], Fake] | None = None, *, opening_s: float = 0.0) -> None:
        self.make = make or (lambda n: Fake(name=f"r{n}", latency=1.0))
        self.opening_s = opening_s
        self.failing: ModelError | None = None
        self.opened: list[Fake] = []
        self.tries: list[float] = []
        self.cancelled = 0

    async def open(self, number: int) -> Backend:
        self.tries.append(asyncio.get_running_loop().time())
        try:
            await asyncio.sleep(self.opening_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failing is not None:
            raise self.failing
        self.opened.append(self.make(number))
        return self.opened[-1]


@asynccontextmanager
async def started(farm: Farm, targets: Targets = TARGETS, care: Care = CARE) -> AsyncIterator[ReplicaSet]:
    replicas = await ReplicaSet.start(farm.open, targets, name="gpu", care=care)
    try:
        yield replicas
    finally:
        await replicas.aclose()
    assert all(r.closed == 1 for r in farm.opened), "a replica outlived the set, or was ended twice"


class TestConformance(BackendConformance):
    @pytest.fixture
    async def backend(self) -> AsyncIterator[Backend]:
        farm = Farm(lambda n: Fake(name=f"r{n}", seconds_per_token=0.001))
        async with started(farm, Targets(least=2, most=2)) as replicas:
            yield replicas


@pytest.mark.looptime
async def test_the_load_makes_it_grow_and_its_end_makes_it_shrink_and_nothing_is_lost() -> None:
    farm = Farm(opening_s=3.0)
    async with started(farm) as replicas:
        answered = 0
        most = 0

        async def user() -> None:
            nonlocal answered, most
            for _ in range(40):
                assert (await replicas.generate(ask())).text == "hello"
                answered += 1
                most = max(most, len(replicas.replicas))

        await asyncio.gather(*(user() for _ in range(12)))
        assert answered == 12 * 40
        assert most == 3
        assert (replicas.signal.wanted, replicas.signal.requests) == (3, 0)
        await asyncio.sleep(60.0)
        signal = replicas.signal
        assert (signal.wanted, signal.up, signal.starting, signal.draining) == (1, 1, 0, 0)
        assert sum(r.closed for r in farm.opened) == 2
    assert len(farm.opened) == 3


@pytest.mark.looptime
async def test_a_steady_load_starts_and_stops_nothing() -> None:
    farm = Farm()
    async with started(
        farm, Targets(least=1, most=3, queue=4.0, up_after_s=1.0, down_after_s=5.0, cooldown_s=1.0)
    ) as r:

        async def user() -> None:
            for _ in range(120):
                await r.generate(ask())

        await asyncio.gather(*(user() for _ in range(8)))
    assert len(farm.opened) == 2


QUICK = Targets(least=1, most=2, queue=4.0, up_after_s=0.0, down_after_s=5.0, cooldown_s=1.0)


def as_long_as_asked(number: int) -> Fake:
    """Takes as many seconds as the request may have tokens."""
    return Fake(name=f"r{number}", latency=lambda request: float(getattr(request, "max_tokens", 1)))


async def drained(replicas: ReplicaSet, farm: Farm) -> list[asyncio.Task[Any]]:
    """Two replicas came up, each has one request of 100 s, and of these the second is no longer wanted."""
    work = [asyncio.create_task(replicas.generate(ask(max_tokens=10))) for _ in range(8)]
    await asyncio.sleep(2.5)
    assert replicas.signal.up == 2
    work.append(asyncio.create_task(replicas.generate(ask(max_tokens=100))))
    await asyncio.sleep(8.0)
    work.append(asyncio.create_task(replicas.generate(ask(max_tokens=100))))
    await asyncio.sleep(10.0)
    assert [r.load.total for r in farm.opened] == [1, 1]
    signal = replicas.signal
    assert (signal.wanted, signal.up, signal.draining) == (1, 1, 1)
    return work


@pytest.mark.looptime
async def test_a_draining_replica_answers_what_it_has_and_gets_no_more() -> None:
    farm = Farm(as_long_as_asked)
    async with started(farm, QUICK) as replicas:
        work = await drained(replicas, farm)
        second = farm.opened[1]
        before = len(second.requests)
        await asyncio.gather(*(replicas.generate(ask(max_tokens=1)) for _ in range(2)))
        assert len(second.requests) == before
        assert second.closed == 0
        assert [done.text for done in await asyncio.gather(*work)] == ["hello"] * 10
        await asyncio.sleep(2.0)
        assert second.closed == 1
        assert replicas.signal.draining == 0


@pytest.mark.looptime
async def test_one_that_is_starting_and_no_longer_wanted_may_end_in_its_own_time() -> None:
    ended: list[int] = []

    async def slow(number: int) -> Backend:
        if not number:
            return Fake(name="r0", latency=1.0)
        try:
            await asyncio.sleep(1e6)
        finally:
            # Ending a server takes longer than several looks.
            await asyncio.sleep(10.0)
            ended.append(number)
        raise AssertionError("unreachable")

    async def unready(replica: Replica) -> None:
        return None

    crew = ReplicaCrew(slow, CARE, name="gpu", prepare=unready)
    await crew.begin(1)
    crew.keep(2)
    await asyncio.sleep(1.0)
    assert crew.starting == 1
    for _ in range(5):
        crew.keep(1)
        await asyncio.sleep(1.0)
    assert crew.starting == 0 and not ended
    crew.keep(2)
    assert crew.starting == 1, "the one that ends itself does not count"
    await asyncio.sleep(6.0)
    assert ended == [1]
    await crew.aclose()
    assert ended == [1, 2] and not crew.all


@pytest.mark.looptime
async def test_what_is_wanted_again_comes_back_from_draining() -> None:
    farm = Farm(as_long_as_asked)
    async with started(farm, QUICK) as replicas:
        work = await drained(replicas, farm)
        work += [asyncio.create_task(replicas.generate(ask(max_tokens=5))) for _ in range(8)]
        await asyncio.sleep(2.0)
        assert (replicas.signal.up, replicas.signal.draining) == (2, 0)
        assert farm.opened[1].closed == 0
        await asyncio.gather(*work)
    assert len(farm.opened) == 2, "nothing new had to be started"


@pytest.mark.looptime
async def test_a_drain_has_an_end() -> None:
    """A request that hangs does not keep a server for ever; it goes to another replica."""

    def make(number: int) -> Fake:
        if number == 0:
            return as_long_as_asked(0)
        return Fake(lambda r: Hang() if r.max_tokens == 100 else "hello", name="r1")

    farm = Farm(make)
    async with started(farm, QUICK, Care(every_s=1.0, drain_s=30.0)) as replicas:
        work = await drained(replicas, farm)
        assert [done.text for done in await asyncio.gather(*work)] == ["hello"] * 10
        assert farm.opened[1].closed == 1
    assert len(farm.opened) == 2


@pytest.mark.looptime
async def test_a_replica_that_dies_costs_no_request_and_is_replaced() -> None:
    farm = Farm(lambda n: Fake(name=f"r{n}", latency=1.0))
    async with started(farm, Targets(least=2, most=2)) as replicas:

        async def user() -> None:
            for _ in range(40):
                assert (await replicas.generate(ask())).text == "hello"

        users = [asyncio.create_task(user()) for _ in range(6)]
        await asyncio.sleep(5.5)
        dead = farm.opened[0]
        await FakeBackend.aclose(dead)  # What runs there fails at once, and so does all that comes.
        dead.down = Unavailable("killed", backend=dead.name)
        await asyncio.gather(*users)
        assert len(farm.opened) == 3
        assert dead.closed == 1
        assert replicas.signal.up == 2
        assert (await replicas.health()).ok


@pytest.mark.looptime
async def test_a_replica_that_comes_back_is_used_again() -> None:
    farm = Farm()
    async with started(farm, Targets(least=2, most=2)) as replicas:
        first = farm.opened[0]
        first.down = Unavailable("restarting", backend=first.name)
        await asyncio.gather(*(replicas.generate(ask()) for _ in range(4)))
        assert not farm.opened[1].closed
        await asyncio.sleep(3.0)
        seen = len(first.requests)
        await replicas.generate(ask())
        assert len(first.requests) == seen, "it is not tried while another one is there"
        first.down = None
        await asyncio.sleep(3.0)
        await asyncio.gather(*(replicas.generate(ask()) for _ in range(4)))
        assert len(first.requests) == seen + 2
    assert len(farm.opened) == 2


@pytest.mark.looptime
async def test_starts_that_fail_are_tried_again_with_patience_and_nothing_stops_meanwhile() -> None:
    farm = Farm()
    async with started(farm) as replicas:
        farm.failing = ModelError("out of memory")

        async def user() -> None:
            for _ in range(60):
                await replicas.generate(ask())

        await asyncio.gather(*(user() for _ in range(8)))
        waits = [b - a for a, b in zip(farm.tries[1:], farm.tries[2:], strict=False)]
        assert 3 <= len(waits) <= 8
        assert waits[0] >= 4.0 and waits[1] >= 8.0 and all(w >= 16.0 for w in waits[2:])
        assert replicas.signal.up == 1
        farm.failing = None
        await asyncio.gather(*(user() for _ in range(8)))
        assert (replicas.signal.up or 0) >= 2


async def test_if_none_can_be_started_that_is_said_and_nothing_is_left() -> None:
    farm = Farm()
    farm.failing = ModelError("no such model")
    with pytest.raises(ModelError, match="no such model"):
        await ReplicaSet.start(farm.open, Targets(least=2, most=3), care=CARE)
    assert not farm.opened


@pytest.mark.looptime
async def test_closed_while_one_is_starting_nothing_is_left() -> None:
    farm = Farm()
    async with started(farm) as replicas:
        farm.opening_s = 1e6
        work = [asyncio.create_task(replicas.generate(ask())) for _ in range(12)]
        await asyncio.gather(*work)
        work = [asyncio.create_task(replicas.generate(ask(timeout_s=100.0))) for _ in range(12)]
        farm.opened[0]._latency = 50.0
        await asyncio.sleep(10.0)
        await asyncio.gather(*(replicas.generate(ask()) for _ in range(12)))
        assert (replicas.signal.starting or 0) >= 1
        await asyncio.gather(*work)
    assert farm.cancelled >= 1
    with pytest.raises(Unavailable, match="closed"):
        await replicas.generate(ask())
    assert not (await replicas.health()).ok


async def test_what_is_full_passes_the_request_on_and_if_all_are_that_is_said() -> None:
    farm = Farm(lambda n: Fake(name=f"r{n}", latency=0.05, max_running=1, max_waiting=0))
    async with started(farm, Targets(least=2, most=2)) as replicas:
        results = await asyncio.gather(*(replicas.generate(ask()) for _ in range(3)), return_exceptions=True)
        assert sorted(type(r).__name__ for r in results) == ["Completion", "Completion", "Overloaded"]
        assert isinstance(results[2], Overloaded)


async def test_a_stream_moves_before_its_first_piece_and_breaks_after_it() -> None:
    def make(number: int) -> Fake:
        if number == 0:
            return Fake([Unavailable("dead"), Reply("a b c", cut_after=1)], name="r0")
        return Fake("whole answer", name="r1")

    farm = Farm(make)
    async with started(farm, Targets(least=2, most=2)) as replicas:
        async with aclosing(replicas.stream(ask())) as chunks:
            assert "".join([c.text async for c in chunks]) == "whole answer"
        assert [len(r.requests) for r in farm.opened] == [1, 1]
        scores = await replicas.score(ScoreRequest(prompt="a", continuations=("b",)))
        assert len(scores.scores) == 1
        assert replicas.signal.ttft_s is not None


@pytest.mark.looptime
async def test_the_time_of_a_request_counts_over_all_replicas() -> None:
    farm = Farm(lambda n: Fake([Unavailable("dead")] * 9, name=f"r{n}", latency=6.0))
    async with started(farm, Targets(least=2, most=2)) as replicas:
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises((BackendTimeout, Unavailable)):
            await replicas.generate(ask(timeout_s=10.0))
        assert loop.time() - began <= 10.1


@pytest.mark.looptime
async def test_every_replica_has_every_adapter_those_too_that_come_later(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    farm = Farm()
    async with started(farm) as replicas:
        assert await replicas.load_adapter(MED, tmp_path) == "r0"
        (tmp_path / WEIGHTS_FILE).unlink()

        async def user() -> None:
            for _ in range(20):
                await replicas.generate(ask())

        await asyncio.gather(*(user() for _ in range(8)))
        assert len(farm.opened) >= 2
        assert all(r.loaded == {MED: "w1"} for r in farm.opened)
        await replicas.unload_adapter(MED)
        assert not any(r.loaded for r in farm.opened)
        assert replicas.adapters == ()


@pytest.mark.looptime
async def test_an_adapter_that_one_replica_refuses_is_on_none(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    farm = Farm(lambda n: Fake(name=f"r{n}", refuses=n == 1))
    async with started(farm, Targets(least=2, most=2)) as replicas:
        with pytest.raises(AdapterError, match="it does not fit"):
            await replicas.load_adapter(MED, tmp_path)
        assert not any(r.loaded for r in farm.opened)
        assert replicas.adapters == ()
        with pytest.raises(AdapterError, match="cannot be read"):
            await replicas.load_adapter(MED, tmp_path / "nowhere")


@pytest.mark.looptime
async def test_a_replica_that_was_down_gets_the_adapter_when_it_is_back(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    farm = Farm()
    async with started(farm, Targets(least=2, most=2)) as replicas:
        first = farm.opened[0]
        first.down = Unavailable("restarting", backend=first.name)
        await replicas.load_adapter(MED, tmp_path)
        assert not first.loaded
        first.down = None
        await asyncio.sleep(5.0)
        assert first.loaded == {MED: "w1"}


async def test_replicas_that_take_no_adapters_say_so(tmp_path: Path) -> None:
    async def plain(number: int) -> Backend:
        return FakeBackend()

    write_adapter(tmp_path)
    replicas = await ReplicaSet.start(plain, Targets())
    with pytest.raises(Unsupported, match="take no adapters"):
        await replicas.load_adapter(MED, tmp_path)
    await replicas.aclose()


class Server(OpenAIBackend):
    """Replies to bodies with its name, as often as it is told to; then it cannot be reached."""

    def __init__(self, name: str, replies: int, *, breaks: bool = False) -> None:
        super().__init__("http://127.0.0.1:1/v1", "model", name=name)
        self.replies = replies
        self.breaks = breaks

    async def forward(self, path: Any, payload: bytes, read: Any, **more: Any) -> Any:
        if not self.replies:
            raise Unavailable("gone", backend=self.name)
        self.replies -= 1
        told = await read(self.name)
        if self.breaks:
            raise Unavailable("broke off", backend=self.name)
        return told


async def test_bodies_are_passed_on_to_another_server_only_before_a_reply() -> None:
    servers = [Server("s0", 1), Server("s1", 2)]

    async def give(number: int) -> Backend:
        return servers[number]

    async def read(reply: Any) -> str:
        return f"read {reply}"

    replicas = await ReplicaSet.start(give, Targets(least=2, most=2))
    assert replicas.server in servers
    told = [await replicas.forward("chat/completions", b"{}", read) for _ in range(3)]
    assert sorted(told) == ["read s0", "read s1", "read s1"]
    with pytest.raises(Unavailable, match="gone"):
        await replicas.forward("chat/completions", b"{}", read)
    servers[0].replies = servers[1].replies = 5
    servers[0].breaks = servers[1].breaks = True
    with pytest.raises(Unavailable, match="broke off"):
        await replicas.forward("chat/completions", b"{}", read)
    assert servers[0].replies + servers[1].replies == 9, "what had begun to be told was begun anew"
    await replicas.aclose()
    plain = await ReplicaSet.start(Farm().open, Targets())
    assert plain.server is None
    with pytest.raises(Unsupported, match="OpenAI"):
        await plain.forward("chat/completions", b"{}", read)
    await plain.aclose()


TOML = """
[nodes.gpu]
kind = "vllm"
model = "{model}"
port = 9000
replicas = 2
max_replicas = 3
target_queue = 7.5
target_ttft_s = 2.0

[experts.one]
node = "gpu"
description = "Everything."
"""


async def test_a_node_of_the_configuration_is_a_set_of_replicas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []

    async def start(model: Path, **said: Any) -> Fake:
        started.append(said)
        return Fake(name=said["name"])

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    monkeypatch.setattr("experts.vllm.VLLMBackend.start", start)
    monkeypatch.setattr("experts.models.ModelStore.resolve", lambda self, source, **more: Path(source))
    config = parse_config(TOML.format(model=tmp_path / "m"), file=tmp_path / "agora.toml")
    square = await open_square(config)
    try:
        expert = square.get("one")
        assert expert is not None
        assert isinstance(expert.backend, ReplicaSet)
        assert sorted((s["name"], s["port"]) for s in started) == [("gpu/0", 9000), ("gpu/1", 9001)]
        assert expert.backend.signal.up == 2
    finally:
        await square.aclose()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("replicas = 4", "max_replicas is 3, fewer than replicas, which is 4"),
        ("port = 65534", "go past 65535"),
        ("replicas = 0", "replicas"),
        ("target_queue = 0", "target_queue"),
    ],
)
def test_what_cannot_be_configured_is_told(key: str, said: str, tmp_path: Path) -> None:
    name = key.split()[0]
    lines = [key if line.startswith(f"{name} =") else line for line in TOML.format(model="m").splitlines()]
    with pytest.raises(ConfigError, match=said):
        parse_config("\n".join(lines), file=tmp_path / "agora.toml")


def test_recent_times_to_the_first_token() -> None:
    times = FirstTokens()
    assert times.recent(0.0) is None
    for n in range(10):
        times.saw(float(n), n / 10)
    assert times.recent(10.0) == 0.8
    assert times.recent(68.5) == 0.9, "all but the last are older than a minute"
    assert times.recent(100.0) is None


def test_watched_from_outside_the_time_to_the_first_token_is_that_of_late() -> None:
    targets = Targets(most=4, queue=100.0, ttft_s=1.0, up_after_s=0.0, cooldown_s=0.0)
    watch = Watch(targets)

    def told(quick: int, slow: int) -> Seconds:
        bounds = ((0.5, float(quick)), (4.0, float(quick + slow)), (float("inf"), float(quick + slow)))
        return Seconds(count=quick + slow, total=0.1 * quick + 3.0 * slow, bounds=bounds)

    first = watch.look(0.0, 10, told(1000, 0))
    assert first.wanted == 1
    assert first.ttft_s is not None and first.ttft_s < 0.5
    late = watch.look(10.0, 10, told(1000, 50))
    assert late.ttft_s is not None and late.ttft_s > 3.0, (
        "a thousand quick ones of long ago do not hide fifty slow ones"
    )
    assert late.wanted == 3
    assert watch.look(100.0, 10, told(1000, 50)).ttft_s is None
    again = watch.look(110.0, 10, told(5, 0))
    assert again.ttft_s is not None and again.ttft_s < 0.5, "the server was started again"
