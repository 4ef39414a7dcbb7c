import asyncio
from typing import Any

import pytest

from agora.errors import InvalidRequest, Unavailable
from agora.protocols import Capabilities
from agora.square import Expert, Square
from agora.types import ExpertCard
from experts.fake import FakeBackend, Hang, Reply


def expert(name: str, backend: FakeBackend, **more: Any) -> Expert:
    return Expert(
        card=ExpertCard(name=name, description="d", price_per_mtok=1e6, max_tokens=20), backend=backend, **more
    )


async def test_an_expert_speaks_with_its_own_voice() -> None:
    backend = FakeBackend("  yes and no ")
    answer = await expert("e", backend, system_prompt="Be brief.", temperature=0.7).ask("Is it?")
    request: Any = backend.requests[0]
    assert [(m.role, m.content) for m in request.messages] == [("system", "Be brief."), ("user", "Is it?")]
    assert request.temperature == 0.7 and request.max_tokens == 20
    assert answer.text == "yes and no" and answer.expert == "e"
    assert answer.usage.calls == 1 and answer.usage.cost == answer.usage.tokens > 0
    assert answer.mean_logprob is not None


async def test_a_backend_without_chat_gets_a_prompt() -> None:
    backend = FakeBackend("ok", capabilities=Capabilities(chat=False, completion=True))
    answer = await expert("e", backend, system_prompt="Be brief.").ask("Is it?", max_tokens=5)
    request: Any = backend.requests[0]
    assert request.prompt is not None and "Be brief." in request.prompt and "Is it?" in request.prompt
    assert request.max_tokens == 5
    assert answer.mean_logprob is None


async def test_the_card_limits_what_a_caller_may_want() -> None:
    backend = FakeBackend("ok")
    await expert("e", backend).ask("q", max_tokens=10_000)
    request: Any = backend.requests[0]
    assert request.max_tokens == 20


async def test_joining_and_leaving() -> None:
    square = Square([expert("a", FakeBackend())])
    before = square.version
    square.join(expert("b", FakeBackend()))
    assert [e.name for e in square] == ["a", "b"] and len(square) == 2 and square.version > before
    with pytest.raises(InvalidRequest, match="already here"):
        square.join(expert("b", FakeBackend()))
    assert square.leave("a").name == "a"
    assert square.get("a") is None
    with pytest.raises(InvalidRequest, match="here: b"):
        square.leave("a")


@pytest.mark.looptime
async def test_health_asks_each_backend_once_and_waits_for_none_too_long() -> None:
    shared, dead, stuck = FakeBackend(), FakeBackend(Unavailable("down")), FakeBackend(Hang())
    square = Square([expert("a", shared), expert("b", shared), expert("c", dead), expert("d", stuck)])
    health = await square.health(timeout_s=5)
    assert health["a"].ok and health["b"].ok
    assert not health["c"].ok and "down" in health["c"].detail
    assert not health["d"].ok and "5 s" in health["d"].detail
    assert sum(c.kind == "health" for c in shared.calls) == 1


async def test_closing_closes_every_backend() -> None:
    backend = FakeBackend(Reply("late", latency=60))
    square = Square([expert("a", backend), expert("b", backend)])
    asking = asyncio.create_task(square.experts[0].ask("q"))
    await asyncio.sleep(0)
    await square.aclose()
    with pytest.raises(Unavailable):
        await asking
    with pytest.raises(Unavailable):
        await square.experts[0].ask("q")


def test_an_expert_may_describe_itself_anew_and_keeps_its_place() -> None:
    cards = [ExpertCard(name=n, description="d") for n in ("a", "b")]
    square = Square([Expert(card=c, backend=FakeBackend()) for c in cards])
    before, version = square.experts, square.version
    square.recard(ExpertCard(name="a", description="better"))
    assert [e.card.description for e in square] == ["better", "d"]
    assert square.experts[0].backend is before[0].backend
    assert square.version > version
    with pytest.raises(InvalidRequest, match="no expert named 'c' is here; here: a, b"):
        square.recard(ExpertCard(name="c", description="d"))
