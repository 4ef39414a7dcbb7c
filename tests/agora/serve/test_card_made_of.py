"""What an expert is made of is told from node to node, so that nobody trusts it for what it was before."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from agora.config import Config, NeighbourConfig
from agora.serve.neighbours import Neighbours
from agora.serve.node_card import NodeCard, read_card
from agora.square import Expert, Square
from agora.types import AdapterRef, ExpertCard
from experts.fake import FakeBackend
from graphs.calibrating import version_of
from graphs.calibration_version import fingerprint

REFRESH_S = 5.0


class Serving(FakeBackend):
    """A backend that tells which adapters it has."""

    adapters: tuple[AdapterRef, ...] = (AdapterRef.parse("sst2@v1"),)


class Beside:
    """Looks at the card of a node in this process."""

    def __init__(self, node: Neighbours) -> None:
        self._node = node

    async def look(self, *, known: str | None = None) -> NodeCard:
        return read_card(orjson.dumps(self._node.card(known=known)))

    async def aclose(self) -> None:
        pass


@asynccontextmanager
async def three_in_a_row() -> AsyncIterator[tuple[Square, Square, Square]]:
    """The last one has the expert; the one between tells it on to the first one."""
    card = ExpertCard(name="films", description="Knows films.")
    own = Expert(card=card, backend=Serving(name="m"), adapter=AdapterRef.parse("sst2"), node="here")
    squares = [Square(), Square(), Square([own])]
    nodes: list[Neighbours] = []
    for n, square in reversed(list(enumerate(squares))):
        after = nodes[-1] if nodes else None
        node = Neighbours(
            square,
            {} if after is None else {"next": NeighbourConfig(url="http://next.invalid:1", refresh_s=REFRESH_S)},
            node_id=f"{n}" * 16,
            node_name=f"node{n}",
            max_hops=3,
            environment={},
            rng=random.Random(n),
            lookouts=lambda url, *, name, api_key, node, after=after: Beside(after),
        )
        await node.start()
        nodes.append(node)
    # The one between is seen by the first one only after it has looked itself.
    await asyncio.sleep(2 * REFRESH_S)
    try:
        yield squares[0], squares[1], squares[2]
    finally:
        for node in reversed(nodes):
            await node.aclose()


def only(square: Square) -> Expert:
    [expert] = square
    return expert


@pytest.mark.looptime
async def test_an_adapter_that_changes_over_there_makes_another_version_here() -> None:
    async with three_in_a_row() as (first, between, last):
        assert only(first).name == "next.next.films"
        before = version_of(only(first)), version_of(only(between))
        told = fingerprint(only(last))
        assert told and fingerprint(only(first)) == fingerprint(only(between)) == told
        joined = first.version
        await asyncio.sleep(4 * REFRESH_S)
        assert first.version == joined and version_of(only(first)) == before[0]
        backend = only(last).backend
        assert isinstance(backend, Serving)
        backend.adapters = (*backend.adapters, AdapterRef.parse("sst2@v2"))
        await asyncio.sleep(3 * REFRESH_S)
        assert fingerprint(only(first)) == fingerprint(only(last)) != told
        # Whoever keeps what was learned sees by the square that it has to look again.
        assert first.version > joined
        assert version_of(only(first)) != before[0] and version_of(only(between)) != before[1]


@pytest.mark.looptime
async def test_the_same_expert_started_anew_is_the_same_version() -> None:
    versions = []
    for _ in range(2):
        async with three_in_a_row() as (first, _between, _last):
            versions.append(version_of(only(first)))
    assert versions[0] == versions[1]


@pytest.mark.looptime
async def test_a_prompt_that_changes_shows() -> None:
    async with three_in_a_row() as (first, _, last):
        before = fingerprint(only(first))
        own = last.leave("films")
        last.join(dataclasses.replace(own, system_prompt="You know nothing."))
        await asyncio.sleep(3 * REFRESH_S)
        assert fingerprint(only(first)) != before


async def test_a_node_tells_of_its_experts_what_its_configuration_says_of_them() -> None:
    expert = Expert(card=ExpertCard(name="films", description="Knows films."), backend=FakeBackend(), node="here")

    def told(source: str) -> Any:
        config = Config.model_validate(
            {
                "models": {"m": {"source": source}},
                "nodes": {"here": {"kind": "local", "model": "m"}},
                "experts": {"films": {"node": "here", "description": "Knows films."}},
            }
        )
        node = Neighbours(
            Square([expert]),
            {},
            node_id="a" * 16,
            node_name="here",
            max_hops=3,
            made_of=lambda e: fingerprint(e, config),
        )
        [entry] = read_card(orjson.dumps(node.card())).experts or ()
        return entry.made_of

    assert told("smollm2-135m") == told("smollm2-135m") != told("qwen2.5-coder-1.5b")


def test_an_older_node_that_tells_nothing_can_be_read_and_a_strange_one_is_left_out() -> None:
    square = Square([Expert(card=ExpertCard(name="films", description="Knows films."), backend=FakeBackend())])
    node = Neighbours(square, {}, node_id="a" * 16, node_name="here", max_hops=3)
    card = orjson.loads(orjson.dumps(node.card()))
    del card["experts"][0]["made_of"]
    [entry] = read_card(orjson.dumps(card)).experts or ()
    assert entry.made_of == ""
    card["experts"][0]["made_of"] = "../x"
    read = read_card(orjson.dumps(card))
    assert read.experts == () and "made_of" in read.refused[0]
