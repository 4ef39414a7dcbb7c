"""What only the embedding router does: which texts it embeds, when, and how they make a similarity."""

import asyncio
import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from agora.errors import NoExpert
from agora.routing import EmbeddingRouter
from agora.routing.embedding import DESCRIPTION_WEIGHT, END_CHARS, LONG_CHARS, ends_of
from agora.square import Expert, Square
from agora.types import ExpertCard, Subtask
from experts.fake import FakeBackend

AXES = {"east": (1.0, 0.0), "north": (0.0, 1.0)}


class Compass:
    """Unit vectors in the plane; `wait` holds every call until it is set, and no call is done at once."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.wait = asyncio.Event()
        self.wait.set()

    async def embed(self, texts: Sequence[str]) -> Any:
        self.calls.append(list(texts))
        await asyncio.sleep(0)
        await self.wait.wait()
        sums = [np.sum([v for w, v in AXES.items() if w in t] or [(-1.0, -1.0)], axis=0) for t in texts]
        return np.array([s / np.linalg.norm(s) for s in sums], dtype=np.float32)

    def times(self, text: str) -> int:
        return sum(call.count(text) for call in self.calls)


def expert(name: str, description: str, *examples: str) -> Expert:
    return Expert(card=ExpertCard(name=name, description=description, examples=examples), backend=FakeBackend())


def ask(question: str) -> Subtask:
    return Subtask(id="q", question=question)


async def similarity(square: Square, question: str) -> dict[str, float]:
    ranking = await EmbeddingRouter(Compass()).rank(ask(question), question, square)
    return {c.expert: c.similarity for c in ranking.candidates}


async def test_similarity_is_the_weighted_cosine_of_description_and_examples() -> None:
    square = Square([expert("a", "east", "north", "north north"), expert("b", "east"), expert("c", "north", "east")])
    found = await similarity(square, "east")
    assert found == pytest.approx({"a": DESCRIPTION_WEIGHT, "b": 1.0, "c": 1 - DESCRIPTION_WEIGHT}, abs=1e-4)


async def test_many_examples_count_no_more_than_one() -> None:
    square = Square([expert("few", "north", "east"), expert("many", "north", *(f"east {n}" for n in range(50)))])
    found = await similarity(square, "east")
    assert found["few"] == pytest.approx(found["many"], abs=1e-4)


async def test_a_long_question_is_judged_by_its_better_end() -> None:
    square = Square([expert("e", "east"), expert("n", "north")])
    filler = "lorem ipsum " * 200
    for question in (f"{filler} go east", f"go east {filler}"):
        found = await similarity(square, question)
        assert found["e"] == pytest.approx(1.0, abs=1e-4) and found["n"] < 0.1
    assert ends_of("x" * LONG_CHARS) == ["x" * LONG_CHARS]
    assert [len(end) for end in ends_of("x" * 100_000)] == [END_CHARS, END_CHARS]


async def test_cards_are_embedded_once_however_many_ask_at_once() -> None:
    embedder, square = Compass(), Square([expert("e", "east", "go east"), expert("n", "north")])
    router = EmbeddingRouter(embedder)
    embedder.wait.clear()
    ranks = [asyncio.create_task(router.rank(ask(f"q{n}"), f"q{n}", square)) for n in range(20)]
    await asyncio.sleep(0)
    embedder.wait.set()
    await asyncio.gather(*ranks)
    await router.rank(ask("later"), "later", square)
    assert [embedder.times(t) for t in ("east", "go east", "north")] == [1, 1, 1]


async def test_of_those_who_join_only_their_own_texts_are_embedded() -> None:
    embedder, square = Compass(), Square([expert("e", "east")])
    router = EmbeddingRouter(embedder)
    await router.rank(ask("q"), "q", square)
    square.join(expert("n", "north"))
    ranking = await router.rank(ask("go north"), "go north", square)
    assert ranking.candidates[0].expert == "n"
    assert embedder.times("east") == embedder.times("north") == 1


async def test_who_changed_its_card_is_seen_anew() -> None:
    embedder, square = Compass(), Square([expert("x", "east"), expert("n", "north east")])
    router = EmbeddingRouter(embedder)
    await router.rank(ask("go north"), "go north", square)
    square.leave("x")
    square.join(expert("x", "north"))
    assert (await router.rank(ask("go north"), "go north", square)).candidates[0].expert == "x"


async def test_whoever_comes_and_goes_while_texts_are_embedded_is_ranked_as_it_is_then() -> None:
    embedder, square = Compass(), Square([expert("e", "east"), expert("gone", "east")])
    router = EmbeddingRouter(embedder)
    embedder.wait.clear()
    ranking = asyncio.create_task(router.rank(ask("north"), "north", square))
    await asyncio.sleep(0)
    square.leave("gone")
    square.join(expert("n", "north"))
    embedder.wait.set()
    assert [c.expert for c in (await ranking).candidates] == ["n", "e"]


async def test_when_everyone_leaves_meanwhile_nobody_can_take_it() -> None:
    embedder, square = Compass(), Square([expert("e", "east")])
    embedder.wait.clear()
    ranking = asyncio.create_task(EmbeddingRouter(embedder).rank(ask("north"), "north", square))
    await asyncio.sleep(0)
    square.leave("e")
    embedder.wait.set()
    with pytest.raises(NoExpert, match="the square is empty"):
        await ranking


async def test_one_who_gives_up_waiting_does_not_take_the_others_along() -> None:
    embedder, square = Compass(), Square([expert("e", "east")])
    router = EmbeddingRouter(embedder)
    first, second = (asyncio.create_task(router.rank(ask("q"), "q", square)) for _ in range(2))
    while ["east"] not in embedder.calls:
        await asyncio.sleep(0)
    embedder.wait.clear()
    first.cancel()  # while it embeds the cards for both
    with pytest.raises(asyncio.CancelledError):
        await first
    embedder.wait.set()
    assert (await second).candidates[0].expert == "e"


async def test_a_square_that_is_gone_is_forgotten() -> None:
    router = EmbeddingRouter(Compass())
    for _ in range(5):
        await router.rank(ask("q"), "q", Square([expert("e", "east")]))
    gc.collect()
    assert len(router._indices) == 0


def test_a_router_outlives_the_loop_it_was_first_used_in() -> None:
    embedder, square = Compass(), Square([expert("e", "east")])
    router = EmbeddingRouter(embedder)

    async def many() -> None:
        await asyncio.gather(*(router.rank(ask("q"), "q", square) for _ in range(5)))

    asyncio.run(many())
    square.join(expert("n", "north"))
    asyncio.run(many())
    assert embedder.times("north") == 1
