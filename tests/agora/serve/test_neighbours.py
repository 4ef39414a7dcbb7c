"""Who is in the square as neighbours come, go, lie and fail: in virtual time, with cards instead of a network."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from agora.config import NeighbourConfig
from agora.errors import BackendTimeout, ConfigError, Unavailable
from agora.protocols import Load
from agora.serve.neighbour import BACKOFF_CAP_S, JOINS_AT_ONCE, JOINS_PER_MINUTE
from agora.serve.neighbours import GAP_S, HOLD_S, Neighbours
from agora.serve.node_card import MAX_EXPERTS, NodeCard, WrongCard, read_card
from agora.square import Expert, Square
from agora.types import ExpertCard, Tier
from experts.fake import FakeBackend
from experts.neighbour import NeighbourBackend

A, B, C, D = ("a" * 16, "b" * 16, "c" * 16, "d" * 16)
REFRESH_S = 5.0

Card = dict[str, Any]


def entry(name: str = "finance", path: tuple[str, ...] = (B,), **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "description": f"Knows {name}.",
        "examples": ["What is it worth?"],
        "keywords": ["money"],
        "tier": "edge",
        "modalities": ["text"],
        "price_per_mtok": 0.5,
        "max_tokens": 100,
        "context_tokens": None,
        "temperature": 0.7,
        "capabilities": {"chat": True, "max_context": 2048},
        "engine": "e0",
        "path": list(path),
        "origin": path[-1],
        "origin_name": "node",
        "name_there": name.rpartition(".")[2],
        "hops": len(path) - 1,
        **more,
    }


def card(node: str = B, *experts: dict[str, Any], revision: str = "r-1", **loads: tuple[int, int]) -> Card:
    return {
        "node": {"id": node, "name": "node", "version": "1"},
        "revision": revision,
        "loads": {e: {"running": r, "waiting": w} for e, (r, w) in (loads or {"e0": (0, 0)}).items()},
        "experts": list(experts or (entry(path=(node,)),)),
    }


class Scripted:
    """Shows whatever `shows` holds at the time: a card, or an error."""

    def __init__(self, shows: Card | Exception | Callable[[], Any]) -> None:
        self.shows: Any = shows
        self.at: list[float] = []
        self.known: list[str | None] = []
        self.closed = False

    async def look(self, *, known: str | None = None) -> NodeCard:
        self.at.append(asyncio.get_running_loop().time())
        self.known.append(known)
        shown = self.shows() if callable(self.shows) else self.shows
        if isinstance(shown, Exception):
            if isinstance(shown, BackendTimeout):
                await asyncio.sleep(5)
            raise shown
        if known is not None and known == shown["revision"]:
            shown = {**shown, "experts": None}
        return read_card(orjson.dumps(shown))

    async def aclose(self) -> None:
        self.closed = True


@asynccontextmanager
async def around(
    scripts: Mapping[str, Scripted], *, max_hops: int = 3, own: tuple[str, ...] = (), **config: Any
) -> AsyncIterator[tuple[Square, Neighbours]]:
    square = Square([Expert(card=ExpertCard(name=n, description="Ours."), backend=FakeBackend()) for n in own])
    configs = {n: NeighbourConfig(url=f"http://{n}.invalid:1", refresh_s=REFRESH_S, **config) for n in scripts}
    neighbours = Neighbours(
        square,
        configs,
        node_id=A,
        node_name="here",
        max_hops=max_hops,
        environment={},
        rng=random.Random(1),
        lookouts=lambda url, *, name, api_key, node: scripts[name],
    )
    await neighbours.start()
    try:
        yield square, neighbours
    finally:
        await neighbours.aclose()
        await square.aclose()


def names(square: Square) -> set[str]:
    return {e.name for e in square}


# --- coming and going


@pytest.mark.looptime
async def test_a_neighbours_experts_join_under_its_name() -> None:
    async with around({"b": Scripted(card())}, own=("law",)) as (square, neighbours):
        assert names(square) == {"law", "b.finance"}
        expert = square.get("b.finance")
        assert expert is not None
        assert expert.card == ExpertCard(
            name="b.finance",
            description="Knows finance.",
            examples=("What is it worth?",),
            keywords=("money",),
            tier=Tier.EDGE,
            price_per_mtok=0.5,
            max_tokens=100,
        )
        assert (expert.node, expert.temperature) == ("b", 0.7)
        assert expert.backend.capabilities.max_context == 2048
        (state,) = neighbours.state()
        assert (state.name, state.node, state.up, state.error) == ("b", B, True, None)
        assert state.experts == ("b.finance",)
    assert names(square) == {"law"}


@pytest.mark.looptime
async def test_only_the_experts_that_the_configuration_names_are_asked() -> None:
    shown = card(B, entry("finance"), entry("law"))
    async with around({"b": Scripted(shown)}, experts=("law",)) as (square, _):
        assert names(square) == {"b.law"}


@pytest.mark.looptime
async def test_one_missed_look_is_forgiven_and_two_are_not() -> None:
    b = Scripted(card())
    async with around({"b": b}) as (square, neighbours):
        shows = iter([Unavailable("lost"), card()])
        b.shows = lambda: next(shows)
        await asyncio.sleep(REFRESH_S * 1.2 + 1)
        assert names(square) == {"b.finance"}
        assert len(b.at) == 3
        assert b.at[2] - b.at[1] < 1  # looked again soon, to be sure
        b.shows = Unavailable("down")
        await asyncio.sleep(REFRESH_S * 1.2 + 1)
        assert names(square) == set()
        (state,) = neighbours.state()
        assert not state.up
        assert state.error == "down"


@pytest.mark.looptime
async def test_a_neighbour_that_is_down_is_looked_at_ever_less_often_and_comes_back() -> None:
    b = Scripted(Unavailable("down"))
    async with around({"b": b}) as (square, _):
        await asyncio.sleep(600)
        gaps = [later - earlier for earlier, later in zip(b.at, b.at[1:], strict=False)]
        assert gaps[0] < 1
        assert gaps[1] < gaps[2] < gaps[3]
        assert max(gaps) <= BACKOFF_CAP_S * 1.11
        assert len(b.at) < 600 / BACKOFF_CAP_S * 1.2 + 6
        b.shows = card()
        await asyncio.sleep(BACKOFF_CAP_S * 1.2)
        assert names(square) == {"b.finance"}


@pytest.mark.looptime
async def test_a_neighbour_that_is_down_is_looked_at_when_it_asks_for_our_card() -> None:
    b, c = Scripted(Unavailable("down")), Scripted(card(C, entry(path=(C,))))
    async with around({"b": b, "c": c}) as (square, neighbours):
        await asyncio.sleep(300)
        b.shows = card(D, entry(path=(D,)))
        looks = len(b.at)
        neighbours.heard_of(C)  # it is up, and no news
        await asyncio.sleep(0.01)
        assert len(b.at) == looks
        for _ in range(100):
            neighbours.heard_of(D)
        await asyncio.sleep(GAP_S)
        assert len(b.at) == looks + 1
        assert names(square) == {"b.finance", "c.finance"}


@pytest.mark.looptime
async def test_a_failed_request_and_a_failed_look_are_enough() -> None:
    b = Scripted(card())
    async with around({"b": b}) as (square, _):
        await asyncio.sleep(1)
        b.shows = Unavailable("killed")
        await _ask_in_vain(square)
        await asyncio.sleep(0.01)
        assert names(square) == set()


@pytest.mark.looptime
async def test_an_expert_that_fails_does_not_take_its_node_with_it() -> None:
    b = Scripted(card())
    async with around({"b": b}) as (square, _):
        await asyncio.sleep(1)
        for _ in range(20):
            await _ask_in_vain(square)
        assert names(square) == {"b.finance"}
        assert len(b.at) <= 2 + asyncio.get_running_loop().time() / GAP_S  # however many fail


async def _ask_in_vain(square: Square) -> None:
    """Tells of trouble as a request does that finds nobody at `b.invalid`."""
    expert = square.get("b.finance")
    assert expert is not None
    assert isinstance(expert.backend, NeighbourBackend)
    expert.backend._line.on_trouble()
    await asyncio.sleep(0)


@pytest.mark.looptime
async def test_work_on_a_node_that_hangs_is_ended_and_on_one_that_drains_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[str] = []
    idle = asyncio.Event()

    async def aclose(self: NeighbourBackend) -> None:
        closed.append(self.name)

    async def wait_idle(self: NeighbourBackend) -> None:
        await idle.wait()

    monkeypatch.setattr(NeighbourBackend, "aclose", aclose)
    monkeypatch.setattr(NeighbourBackend, "idle", wait_idle)
    b, c = Scripted(card()), Scripted(card(C, entry(path=(C,))))
    async with around({"b": b, "c": c}) as (square, _):
        b.shows, c.shows = BackendTimeout("no reply"), Unavailable("connection refused")
        await asyncio.sleep(60)
        assert names(square) == set()
        assert closed == ["b.finance"]
        idle.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert closed == ["b.finance", "c.finance"]


@pytest.mark.looptime
async def test_an_expert_that_changes_its_card_joins_anew_and_the_others_stay() -> None:
    b = Scripted(card(B, entry("finance"), entry("law")))
    async with around({"b": b}) as (square, _):
        law = square.get("b.law")
        b.shows = card(B, entry("finance", description="Knows more."), entry("law"), revision="r-2")
        await asyncio.sleep(REFRESH_S * 1.2)
        assert square.get("b.law") is law
        changed = square.get("b.finance")
        assert changed is not None
        assert changed.card.description == "Knows more."
        b.shows = card(B, entry("law"), revision="r-3")
        await asyncio.sleep(REFRESH_S * 1.2)
        assert names(square) == {"b.law"}


@pytest.mark.looptime
async def test_a_known_revision_is_not_told_again_but_its_load_is() -> None:
    b = Scripted(card(B, entry(), e0=(3, 1)))
    async with around({"b": b}) as (square, _):
        expert = square.get("b.finance")
        assert expert is not None
        assert expert.backend.load == Load(running=3, waiting=1)
        version = square.version
        b.shows = card(B, entry(), e0=(7, 0))
        await asyncio.sleep(REFRESH_S * 1.2)
        assert b.known == [None, "r-1"]
        assert expert.backend.load == Load(running=7)
        assert square.version == version  # nobody came or went: nothing is embedded anew


# --- ways


@pytest.mark.looptime
async def test_of_several_ways_to_an_expert_the_shortest_is_used_and_the_next_one_when_it_goes() -> None:
    b = Scripted(card(B, entry("finance"), entry("c.law", (B, C))))
    c = Scripted(card(C, entry("law", (C,)), entry("b.finance", (C, B))))
    async with around({"b": b, "c": c}) as (square, _):
        assert names(square) == {"b.finance", "c.law"}
        c.shows = Unavailable("down")
        await asyncio.sleep(REFRESH_S * 1.2 + 1)
        assert names(square) == {"b.finance"}  # b has not had the time to see that c is gone, if it is
        await asyncio.sleep(HOLD_S + REFRESH_S)
        assert names(square) == {"b.finance", "b.c.law"}
        through = square.get("b.c.law")
        assert through is not None
        assert through.node == "b.node"  # not the same machine as b itself
        c.shows = card(C, entry("law", (C,)))
        await asyncio.sleep(BACKOFF_CAP_S * 1.2)
        assert names(square) == {"b.finance", "c.law"}


@pytest.mark.looptime
async def test_our_own_experts_told_back_to_us_and_ones_too_far_away_stay_out() -> None:
    shown = card(B, entry("finance"), entry("us.law", (B, A)), entry("c.d.far", (B, C, D)), entry("c.near", (B, C)))
    async with around({"b": Scripted(shown)}, max_hops=2) as (square, _):
        assert names(square) == {"b.finance", "b.c.near"}


@pytest.mark.looptime
async def test_a_name_that_would_be_too_long_or_is_taken_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    shown = card(B, entry("finance"), entry("x" * 63))
    async with around({"b": Scripted(shown)}, own=("b.finance",)) as (square, _):
        assert names(square) == {"b.finance"}
        assert square.get("b.finance").node == "local"  # type: ignore[union-attr]
        await asyncio.sleep(100)
    said = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 2
    assert any("longer than 64" in s for s in said)
    assert any("taken" in s for s in said)


@pytest.mark.looptime
async def test_what_is_learnt_is_told_on_with_the_way_and_within_the_limit() -> None:
    b = Scripted(card(B, entry("finance"), entry("c.law", (B, C))))
    async with around({"b": b}, max_hops=2, own=("ours",)) as (square, neighbours):
        assert names(square) == {"ours", "b.finance", "b.c.law"}
        told = read_card(orjson.dumps(neighbours.card()))
        assert told.node.id == A
        assert told.experts is not None
        ways = {e.name: (e.path, e.name_there) for e in told.experts}
        assert ways == {"ours": ((A,), "ours"), "b.finance": ((A, B), "finance")}
        assert read_card(orjson.dumps(neighbours.card(known=told.revision))).experts is None
        assert read_card(orjson.dumps(neighbours.card(known="other"))).experts is not None


# --- lies


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../etc/passwd"},
        {"name": ""},
        {"name": "x" * 65},
        {"price_per_mtok": -1},
        {"price_per_mtok": "free"},
        {"price_per_mtok": None},
        {"max_tokens": 0},
        {"temperature": 9},
        {"max_tokens": 10**18},
        {"description": ""},
        {"description": "x" * 5_000},
        {"description": "\x1b\x07"},
        {"examples": ["x" * 100_000]},
        {"examples": ["x"] * 10_000},
        {"examples": "x"},
        {"keywords": [1]},
        {"tier": "moon"},
        {"modalities": []},
        {"capabilities": {"chat": "yes"}},
        {"engine": "e" * 100},
        {"path": []},
        {"path": [C]},
        {"path": [B, C, B], "hops": 2},
        {"path": [B, "nobody"]},
        {"hops": 3},
        {"origin": D},
        {"name_there": "law"},
    ],
)
@pytest.mark.looptime
async def test_an_entry_that_lies_is_left_out_with_one_reason(
    wrong: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    b = Scripted(card(B, entry("law"), entry("finance") | wrong))
    async with around({"b": b}) as (square, _):
        assert names(square) == {"b.law"}
        for n in range(5):
            await asyncio.sleep(REFRESH_S * 1.2)
            b.shows["revision"] = f"r-{n + 2}"
    said = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1
    assert "experts[1]" in said[0]
    assert len(said[0]) < 400


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"[" * 100_000,
        b'{"node": {}}',
        b"\xff\xfe",
        orjson.dumps(card()).replace(b"0.5", b"NaN"),
        orjson.dumps({**card(), "node": {"id": "me", "name": "node"}}),
        orjson.dumps({**card(), "loads": {"e0": {"running": -1, "waiting": 0}}}),
        orjson.dumps({**card(), "loads": {f"e{n}": {"running": 0, "waiting": 0} for n in range(MAX_EXPERTS + 1)}}),
        orjson.dumps({**card(), "experts": [entry(f"e{n}") for n in range(MAX_EXPERTS + 1)]}),
        orjson.dumps({**card(), "revision": "x" * 1000}),
    ],
)
def test_what_is_no_card_is_refused_in_a_bounded_error(data: bytes) -> None:
    with pytest.raises(WrongCard) as refused:
        read_card(data)
    assert len(str(refused.value)) < 400


def test_control_characters_never_reach_a_terminal() -> None:
    read = read_card(orjson.dumps(card(B, entry(description="Knows\x1b[2J money.\nAnd more."))))
    assert read.experts is not None
    assert read.experts[0].description == "Knows [2J money. And more."


@pytest.mark.looptime
async def test_a_neighbour_that_is_this_very_node_is_refused_clearly(caplog: pytest.LogCaptureFixture) -> None:
    async with around({"b": Scripted(card(A, entry(path=(A,))))}) as (square, neighbours):
        assert names(square) == set()
        assert "this very node" in str(neighbours.state()[0].error)
        await asyncio.sleep(200)
    assert sum("this very node" in r.message for r in caplog.records) == 1


@pytest.mark.looptime
async def test_who_claims_to_be_another_neighbour_is_refused_and_the_first_one_stays() -> None:
    b, c = Scripted(card(B)), Scripted(Unavailable("not yet"))
    async with around({"b": b, "c": c}) as (square, neighbours):
        c.shows = card(B, entry("evil"))
        await asyncio.sleep(60)
        assert names(square) == {"b.finance"}
        assert "neighbour b already" in str(neighbours.state()[1].error)


@pytest.mark.looptime
async def test_a_card_that_turns_wrong_vouches_for_nobody_at_once() -> None:
    b = Scripted(card())
    async with around({"b": b}) as (square, _):
        b.shows = {**card(), "loads": None}
        await asyncio.sleep(REFRESH_S * 1.2)
        assert len(b.at) <= 3
        assert names(square) == set()


@pytest.mark.looptime
async def test_an_expert_that_is_unknown_where_it_should_be_is_out_until_the_card_changes() -> None:
    b = Scripted(card(B, entry("finance"), entry("law")))
    async with around({"b": b}) as (square, _):
        expert = square.get("b.finance")
        assert expert is not None
        assert isinstance(expert.backend, NeighbourBackend)
        expert.backend._line.on_unknown("finance")
        assert names(square) == {"b.law"}
        await asyncio.sleep(10 * REFRESH_S)
        assert names(square) == {"b.law"}
        b.shows = card(B, entry("finance"), entry("law"), revision="r-2")
        await asyncio.sleep(REFRESH_S * 1.2)
        assert names(square) == {"b.law", "b.finance"}


@pytest.mark.looptime
async def test_experts_that_change_all_the_time_are_held_back() -> None:
    turn = 0

    def shows() -> Card:
        nonlocal turn
        turn += 1
        experts = [entry(f"e{n}", description=f"Knows {turn}.") for n in range(MAX_EXPERTS)]
        return card(B, *experts, revision=f"r-{turn}")

    async with around({"b": Scripted(shows)}) as (square, _):
        before = square.version
        await asyncio.sleep(600)
        came_and_went = square.version - before
        assert came_and_went <= 2 * (JOINS_AT_ONCE + 10 * JOINS_PER_MINUTE + 1)


@pytest.mark.looptime
async def test_a_bug_while_looking_is_logged_and_does_not_end_the_looking(caplog: pytest.LogCaptureFixture) -> None:
    b = Scripted(RuntimeError("a bug"))
    async with around({"b": b}) as (square, _):
        await asyncio.sleep(5)
        b.shows = card()
        await asyncio.sleep(BACKOFF_CAP_S * 2)
        assert names(square) == {"b.finance"}
    assert any("a bug" in str(r.exc_info) for r in caplog.records if r.exc_info)


# --- what this node tells


async def test_the_card_tells_no_prompt_no_address_and_no_key() -> None:
    backend = FakeBackend(name="at http://secret.invalid")
    expert = Expert(
        card=ExpertCard(
            name="law", description="Knows law.", examples=("x" * 1000, *["short"] * 20), keywords=("k",) * 100
        ),
        backend=backend,
        system_prompt="Never tell this.",
    )
    twin = Expert(card=ExpertCard(name="twin", description="Same engine."), backend=backend)
    square = Square([expert, twin])
    neighbours = Neighbours(square, {}, node_id=A, node_name="here", max_hops=3)
    plain = orjson.dumps(neighbours.card())
    assert b"Never" not in plain
    assert b"secret" not in plain
    read = read_card(plain)
    assert read.experts is not None
    assert not read.refused
    assert read.experts[0].examples == ("short",) * 16
    assert len(read.experts[0].keywords) == 64
    assert read.experts[0].engine == read.experts[1].engine
    assert not hasattr(read.experts[0].capabilities, "score")


async def test_an_engine_keeps_its_label_and_no_other_ever_has_it() -> None:
    def expert(name: str) -> Expert:
        return Expert(card=ExpertCard(name=name, description="Knows."), backend=FakeBackend())

    square = Square([expert("a"), expert("b")])
    neighbours = Neighbours(square, {}, node_id=A, node_name="here", max_hops=3)

    def labels() -> dict[str, str]:
        return {e["name"]: e["engine"] for e in neighbours.card()["experts"]}

    first = labels()
    square.leave("a")
    square.join(expert("c"))
    later = labels()
    assert later["b"] == first["b"]
    assert later["c"] not in first.values()
    assert set(neighbours.card()["loads"]) == set(later.values())


async def test_a_huge_square_still_fits_on_a_card_that_others_read() -> None:
    wordy = tuple(f"{n} " + "wörd " * 90 for n in range(64))
    square = Square(
        [
            Expert(
                card=ExpertCard(name=f"e{n}", description="Wordy. " * 500, examples=wordy, keywords=wordy),
                backend=FakeBackend(),
            )
            for n in range(400)
        ]
    )
    told = orjson.dumps(Neighbours(square, {}, node_id=A, node_name="here", max_hops=3).card())
    assert len(told) < 2**20
    read = read_card(told)
    assert read.experts is not None
    assert not read.refused
    assert len(read.experts) > 100


def test_all_missing_keys_are_told_at_once() -> None:
    configs = {n: NeighbourConfig(url="http://b:1", api_key_env=f"KEY_OF_{n}") for n in ("b", "c")}
    with pytest.raises(ConfigError, match=r"KEY_OF_b.*KEY_OF_c"):
        Neighbours(Square(), configs, node_id=A, node_name="here", max_hops=3, environment={"KEY_OF_c": ""})


@pytest.mark.looptime
async def test_a_neighbour_that_does_not_answer_delays_the_start_by_a_second_at_most() -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with around({"b": Scripted(BackendTimeout("nothing")), "c": Scripted(card(C, entry(path=(C,))))}) as (
        square,
        _,
    ):
        assert loop.time() - started <= 1.01
        assert names(square) == {"c.finance"}
