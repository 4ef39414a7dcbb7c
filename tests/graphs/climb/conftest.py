"""What tests of climbing have in common."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from agora.routing import KeywordRouter
from agora.routing.cascade.policy import Decision, Query, Seen
from agora.square import Expert, Square
from agora.types import Answer, Attempt, Budget, ExpertCard, Subtask, Tier
from experts.fake import FakeBackend, Reply
from graphs.calibrating import Chosen
from graphs.climb import Climb
from graphs.guidance import Guide, Known, LoadTrust
from graphs.solver import Job
from graphs.spend import Spend

TIERS = {"small": Tier.END, "medium": Tier.EDGE, "large": Tier.CLOUD}
PRICES = {"small": 0.0, "medium": 1.0, "large": 10.0}


def reply(text: str, probability: float) -> Reply:
    """A reply whose words have that probability each."""
    return Reply(text, logprobs=(math.log(probability),) * 20)


def expert(name: str, script: Any, *, node: str | None = None, tier: Tier | None = None, **card: Any) -> Expert:
    card = {"tier": tier or TIERS[name], "price_per_mtok": PRICES.get(name, 0.0), **card}
    return Expert(
        card=ExpertCard(name=name, description=f"{name} knows", **card),
        backend=script if isinstance(script, FakeBackend) else FakeBackend(script, name=name),
        node=node or name,
    )


def three(small: Any = None, medium: Any = None, large: Any = None) -> Square:
    return Square(
        [
            # Not in the order of the ladder: that is found by tier and price.
            expert("large", large or reply("forty-two", 0.95)),
            expert("small", small or reply("41", 0.5)),
            expert("medium", medium or reply("42?", 0.6)),
        ]
    )


class Told:
    """Calibrators and a policy that are given."""

    def __init__(
        self,
        confidences: Mapping[str, Callable[[Mapping[str, float]], float | None]] | None = None,
        chosen: Chosen | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self._confidences = confidences or {}
        self._chosen = chosen
        self.notes = notes

    def confidence(self, expert: str, signals: Mapping[str, float]) -> float | None:
        known = self._confidences.get(expert)
        return None if known is None else known(signals)

    def policy(
        self, *, trade_off: float | None = None, max_risk: float | None = None, confidence: float = 0.95
    ) -> Chosen | None:
        return self._chosen


class Scripted:
    """A policy that says what its function says, and remembers what it was shown."""

    def __init__(self, models: Sequence[str], decide: Callable[[Sequence[Seen], set[int]], Decision]) -> None:
        self.models = tuple(models)
        self._decide = decide
        self.shown: list[tuple[Query, tuple[Seen, ...], set[int]]] = []

    def decide(self, query: Query, seen: Sequence[Seen], *, allowed: Collection[int]) -> Decision:
        self.shown.append((query, tuple(seen), set(allowed)))
        return self._decide(seen, set(allowed))


async def climb(
    square: Square,
    question: str = "what?",
    *,
    budget: Budget | None = None,
    subtask: Subtask | None = None,
    experts: tuple[str, ...] | None = None,
    policy: Any = None,
    trust: Known | LoadTrust | None = None,
    max_risk: float | None = None,
    spend: Spend | None = None,
    crew: Climb | None = None,
    **options: Any,
) -> tuple[Attempt, ...]:
    budget = budget or Budget()
    crew = crew or climber(square, experts=experts, policy=policy, trust=trust, max_risk=max_risk, **options)
    loop = asyncio.get_running_loop()
    told: list[tuple[int, str | None, bool]] = []
    started: list[tuple[int, str]] = []
    attempts = await crew.solve(
        Job(
            subtask=subtask or Subtask(id="t1", question=question),
            question=question,
            spend=spend or Spend(budget),
            deadline=None if budget.deadline_s is None else loop.time() + budget.deadline_s,
            on_start=lambda n, expert, why: started.append((n, expert)),
            on_end=lambda n, attempt, last: told.append((n, attempt.expert, last)),
        )
    )
    # Every attempt is told once, in order, and only the last one as the last.
    assert told == [(n, a.expert, n == len(attempts)) for n, a in enumerate(attempts, 1)]
    assert all(told[n - 1][1] == name for n, name in started)
    return attempts


def climber(
    square: Square,
    *,
    experts: tuple[str, ...] | None = None,
    policy: Any = None,
    trust: Known | LoadTrust | None = None,
    max_risk: float | None = None,
    **options: Any,
) -> Climb:
    guide = Guide(square, experts=experts, policy=policy, trust=trust, max_risk=max_risk)
    return Climb(square=square, router=KeywordRouter(), guide=guide, experts=experts, **options)


def names(attempts: Sequence[Attempt]) -> list[str | None]:
    return [a.expert for a in attempts]


def answer(attempts: Sequence[Attempt]) -> Answer:
    outcome = attempts[-1].outcome
    assert isinstance(outcome, Answer), outcome
    return outcome


class Words:
    """Vectors of words, or a failure."""

    def __init__(self, fails: bool = False) -> None:
        self._fails = fails

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if self._fails:
            raise RuntimeError("no model")
        return np.full((len(texts), 3), 1 / math.sqrt(3), dtype=np.float32)


def certified(decide: Callable[[Query, Sequence[Seen], set[int]], Decision], *models: str) -> Told:
    class Fit:
        def __init__(self) -> None:
            self.models = models

        def decide(self, query: Query, seen: Sequence[Seen], *, allowed: Collection[int]) -> Decision:
            return decide(query, seen, set(allowed))

    return Told(chosen=Chosen(policy=Fit(), kind="cascade", why="fits", certified=True))


class Tiers:
    """Three tiers, `small`, `medium` and `large`, what climbs over them, and what tells how far they can be trusted."""

    reply = staticmethod(reply)
    expert = staticmethod(expert)
    three = staticmethod(three)
    climb = staticmethod(climb)
    climber = staticmethod(climber)
    names = staticmethod(names)
    answer = staticmethod(answer)
    certified = staticmethod(certified)
    Told = Told
    Scripted = Scripted
    Words = Words


@pytest.fixture
def tiers() -> type[Tiers]:
    """What tests of climbing have in common."""
    return Tiers
