"""What any router promises: who can take a subtask, the order, pins, and explanations."""

import itertools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import InvalidRequest, ModelError, NoExpert
from agora.protocols import Capabilities, Load
from agora.routing import ROUTERS, EmbeddingRouter, FallbackRouter, KeywordRouter, Ranking, Router, Weights
from agora.routing.order import by_match
from agora.square import Expert, Square
from agora.types import ExpertCard, Modality, Subtask
from experts.fake import FakeBackend


class Busy(FakeBackend):
    """Says it has that many requests."""

    def __init__(self, requests: int = 0, **more: Any) -> None:
        super().__init__(**more)
        self.requests_in_work = requests

    @property
    def load(self) -> Load:
        return Load(running=self.requests_in_work)


class Words:
    """Embeds by counting words: exact, and no model."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def embed(self, texts: Sequence[str]) -> Any:
        self.seen += texts
        return np.stack([self._one(t) for t in texts])

    def _one(self, text: str) -> Any:
        axes = ["money", "body", "radio"]
        counts = np.array([text.lower().count(a) for a in axes] + [0] * 1000, dtype=np.float32)
        # what is not about any of them lies in a direction of its own
        counts[3 + zlib.crc32(text.encode()) % 1000] = 0.1
        return counts / np.linalg.norm(counts)


def expert(name: str, about: str, *, load: int = 0, capabilities: Capabilities | None = None, **card: Any) -> Expert:
    more = {"capabilities": capabilities} if capabilities else {}
    return Expert(
        card=ExpertCard(name=name, description=about, **{"keywords": (about,), **card}), backend=Busy(load, **more)
    )


def three() -> Square:
    return Square([expert("bank", "money"), expert("clinic", "body"), expert("mast", "radio")])


def ask(question: str = "money?", **more: Any) -> Subtask:
    return Subtask(id="s1", question=question, **more)


async def rank(router: Router, square: Square, question: str = "money?", **more: Any) -> Ranking:
    return await router.rank(ask(question, **more), question, square)


def names(ranking: Ranking) -> list[str]:
    return [c.expert for c in ranking.candidates]


@pytest.fixture(params=["embedding", "keywords"])
def router(request: pytest.FixtureRequest) -> Router:
    return ROUTERS[request.param](Words())


async def test_the_expert_of_the_field_comes_first_and_says_why(router: Router) -> None:
    for question, best in [("How does money work", "bank"), ("my body aches", "clinic"), ("a radio", "mast")]:
        ranking = await rank(router, three(), question)
        assert names(ranking)[0] == best and len(ranking.candidates) == 3
        assert "best" in ranking.why(best) and "idle, free" in ranking.why(best)
        assert f"best: {best}" in ranking.why(names(ranking)[1])


async def test_the_figures_in_the_explanation_are_those_of_the_candidates() -> None:
    square = Square([expert("bank", "money", load=3, price_per_mtok=0.5), expert("clinic", "body money")])
    ranking = await rank(EmbeddingRouter(Words()), square)
    by = {c.expert: c for c in ranking.candidates}
    assert ranking.why("bank") == (
        f"best match {by['bank'].similarity:.2f} (next: clinic {by['clinic'].similarity:.2f}), "
        "3 in work, 0.5 per million tokens"
    )
    assert by["bank"].score == pytest.approx(by["bank"].similarity - 0.02 * 2 - 0.01 / 3)


async def test_of_equals_the_idle_one_is_asked_then_the_cheaper_one_then_the_first() -> None:
    def replicas(*about: tuple[int, float]) -> Square:
        return Square([expert(f"e{n}", "money", load=k, price_per_mtok=p) for n, (k, p) in enumerate(about)])

    router = EmbeddingRouter(Words())
    assert names(await rank(router, replicas((1, 0.0), (0, 60.0)))) == ["e1", "e0"]
    assert names(await rank(router, replicas((2, 5.0), (2, 0.2)))) == ["e1", "e0"]
    assert names(await rank(router, replicas((2, 1.0), (2, 1.0), (2, 1.0)))) == ["e0", "e1", "e2"]


async def test_a_clear_match_is_waited_for() -> None:
    square = Square([expert("clinic", "body"), expert("bank", "money", load=30)])
    ranking = await rank(EmbeddingRouter(Words()), square)
    assert names(ranking) == ["bank", "clinic"]
    assert names(await rank(EmbeddingRouter(Words(), weights=Weights(load_penalty=1.0)), square)) == ["clinic", "bank"]


async def test_a_passed_over_best_match_is_named_with_its_load() -> None:
    square = Square([expert("bank", "money", load=7), expert("bank2", "money money money radio")])
    ranking = await rank(EmbeddingRouter(Words(), weights=Weights(load_penalty=0.2)), square)
    assert names(ranking)[0] == "bank2"
    assert "best: bank" in ranking.why("bank2") and "7 in work" in ranking.why("bank2")


async def test_a_pin_comes_first_and_nothing_is_embedded() -> None:
    words = Words()
    square = Square([expert("bank", "money", load=2), expert("clinic", "body"), expert("mast", "radio", load=1)])
    ranking = await rank(EmbeddingRouter(words), square, "my body", expert="bank")
    assert names(ranking) == ["bank", "clinic", "mast"] and words.seen == []
    assert ranking.why("bank") == "named by the plan, 2 in work, free"
    assert ranking.why("mast") == "next in line after bank, 1 in work, free"


async def test_a_pin_that_is_not_here_is_told_and_the_best_match_stands_in(router: Router) -> None:
    ranking = await rank(router, three(), "a radio", expert="lawyer")
    assert names(ranking)[0] == "mast"
    assert dict(ranking.excluded) == {"lawyer": "named by the plan, but not here"}
    assert ranking.why("lawyer") == "named by the plan, but not here"


async def test_who_cannot_take_the_modality_is_left_out(router: Router) -> None:
    square = three()
    square.join(expert("eye", "images", modalities=(Modality.TEXT, Modality.IMAGE)))
    ranking = await rank(router, square, "money?", modality=Modality.IMAGE, expert="bank")
    assert names(ranking) == ["eye"] and dict(ranking.excluded)["bank"] == "takes text, not image"
    assert "only one" in ranking.why("eye")


@pytest.mark.parametrize("where", ["card", "backend"])
async def test_who_cannot_read_it_all_is_left_out(router: Router, where: str) -> None:
    small = (
        expert("small", "money", context_tokens=500)
        if where == "card"
        else expert("small", "money", capabilities=Capabilities(max_context=500))
    )
    square = Square([small, expert("large", "money", context_tokens=100_000), expert("unknown", "money")])
    assert set(names(await rank(router, square, "money " * 100))) == {"small", "large", "unknown"}
    ranking = await rank(router, square, "money " * 1000)
    assert set(names(ranking)) == {"large", "unknown"}
    assert "500" in dict(ranking.excluded)["small"]
    # short question, but an answer that would not fit beside it
    assert "small" not in names(await rank(router, square, "money " * 300, max_tokens=250))


async def test_nobody_here_and_nobody_able_are_told_apart(router: Router) -> None:
    with pytest.raises(NoExpert, match=r"'s1'.*the square is empty"):
        await rank(router, Square())
    with pytest.raises(NoExpert, match="bank: takes text, not audio; clinic: takes text, not audio"):
        await rank(router, three(), modality=Modality.AUDIO)


async def test_without_a_close_match_the_generalist_goes_first(router: Router) -> None:
    square = three()
    square.join(expert("anyone", "Answers general questions.", keywords=(), load=5))
    ranking = await rank(router, square, "Who painted it")
    assert names(ranking)[0] == "anyone" and not ranking.close
    assert "no close" in ranking.why("anyone") and "a general expert, 5 in work" in ranking.why("anyone")
    assert "general" not in ranking.why("bank")
    assert names(await rank(router, square, "money"))[0] == "bank"


async def test_without_a_close_match_and_a_generalist_it_says_so(router: Router) -> None:
    ranking = await rank(router, three(), "Who painted it")
    assert ranking.why(names(ranking)[0]).startswith("no close ")


async def test_the_same_question_gets_the_same_ranking(router: Router) -> None:
    square = three()
    assert await rank(router, square, "radio money") == await rank(router, square, "radio money")


async def test_a_square_that_changes_is_seen(router: Router) -> None:
    square = three()
    await rank(router, square)
    square.leave("bank")
    assert "bank" not in names(await rank(router, square))
    square.join(expert("bank", "radio"))
    assert set(names(await rank(router, square, "radio"))[:2]) == {"bank", "mast"}


@pytest.mark.parametrize("question", ["?", "…", "12 + 7", "x" * 100_000, "money " * 16_000, "😀 日本語 ﷽"])
async def test_any_question_is_ranked(router: Router, question: str) -> None:
    assert len((await rank(router, three(), question)).candidates) == 3


def test_weights_out_of_range_are_refused() -> None:
    for bad in ({"load_penalty": -1}, {"price_penalty": math.nan}, {"price_scale": 0}):
        with pytest.raises(InvalidRequest, match=next(iter(bad))):
            Weights(**bad)


@given(
    similarities=st.lists(st.floats(-1, 1), min_size=1, max_size=8),
    loads=st.lists(st.integers(0, 10_000), min_size=8, max_size=8),
    prices=st.lists(st.floats(0, 1e6), min_size=8, max_size=8),
)
def test_everyone_able_is_ranked_once_best_score_first(
    similarities: list[float], loads: list[int], prices: list[float]
) -> None:
    experts = [expert(f"e{n}", "d", load=loads[n], price_per_mtok=prices[n]) for n, _ in enumerate(similarities)]
    ranking = by_match(
        experts,
        {e.name: s for e, s in zip(experts, similarities, strict=True)},
        excluded=(),
        close_match=0.1,
        weights=Weights(),
    )
    assert sorted(names(ranking)) == sorted(e.name for e in experts)
    scores = [c.score for c in ranking.candidates]
    assert all(a >= b - 1e-5 for a, b in itertools.pairwise(scores))
    for c in ranking.candidates:
        assert c.similarity - 0.02 * math.log2(1 + c.load) - 0.01 <= c.score + 1e-9 <= c.similarity + 1e-8
        assert ranking.why(c.expert)


class Broken:
    async def embed(self, texts: Sequence[str]) -> Any:
        raise ModelError("model 'minilm-l6' is not on this machine", hint="agora models pull minilm-l6")


async def test_without_a_working_embedding_model_words_decide_and_every_explanation_says_so() -> None:
    for router in (ROUTERS["embedding"](Broken()), FallbackRouter(EmbeddingRouter(Broken()), KeywordRouter())):
        ranking = await rank(router, three(), "a radio")
        assert names(ranking)[0] == "mast"
        assert "fell back to keyword match" in ranking.why("mast") and "agora models pull" in ranking.why("bank")
        with pytest.raises(NoExpert):
            await rank(router, Square())
    ranking = await rank(ROUTERS["embedding"](None), three(), "a radio")
    assert names(ranking)[0] == "mast" and "no embedding model is there" in ranking.why("mast")


@pytest.mark.parametrize(
    "vectors", [np.ones(3, np.float32), np.ones((7, 3), np.float32), np.array([[np.nan, 1.0]], np.float32)]
)
async def test_an_embedder_that_returns_rubbish_is_named(vectors: Any) -> None:
    class Rubbish:
        async def embed(self, texts: Sequence[str]) -> Any:
            return vectors

    with pytest.raises(ModelError, match="the embedder returned"):
        await rank(EmbeddingRouter(Rubbish()), three())
