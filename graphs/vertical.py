"""Vertical collaboration: every subtask is answered at the lowest tier whose answer can be trusted.

The graph is that of `graphs.horizontal`, with the same input, output, events and checkpoints; only how a subtask is
solved differs: it climbs from tier to tier (`graphs.climb`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.pregel import Pregel

from agora.errors import InvalidRequest
from agora.protocols import Embedder
from agora.routing.cascade.policy import Policy
from agora.routing.keywords import KeywordRouter
from agora.routing.router import Router
from agora.square import Square
from agora.types import Budget
from graphs.climb import Climb
from graphs.crew import MAX_ATTEMPTS
from graphs.departure import Departure
from graphs.entry import MAX_PARALLEL, checked_limits, compiled
from graphs.experience import Experience
from graphs.guidance import Guide, Known, LoadTrust
from graphs.how import How
from graphs.ladder import ACCEPT
from graphs.once import Once
from graphs.plan import Planner
from graphs.rules import RulePlanner
from graphs.signals.gathering import DEFAULT_SAMPLES, checked_signals
from graphs.stream_budget import StreamBudget
from graphs.synthesise import SectionsSynthesiser, Synthesiser


def vertical(
    square: Square,
    *,
    experts: Sequence[str] | None = None,
    policy: Policy | None = None,
    trust: Known | LoadTrust | None = None,
    trade_off: float | None = None,
    max_risk: float | None = None,
    confidence: float = 0.95,
    accept: float = ACCEPT,
    signals: Sequence[str] = (),
    samples: int = DEFAULT_SAMPLES,
    stream: StreamBudget | None = None,
    stream_cost: float | None = None,
    stream_seconds: float | None = None,
    planner: Planner | None = None,
    router: Router | None = None,
    synthesiser: Synthesiser | None = None,
    embedder: Embedder | None = None,
    departure: Departure | None = None,
    once: Once | None = None,
    budget: Budget | None = None,
    max_parallel: int = MAX_PARALLEL,
    max_attempts: int = MAX_ATTEMPTS,
    checkpointer: BaseCheckpointSaver[Any] | None = None,
) -> Pregel[Any, Any, Any, Any]:
    """Builds the graph: plan, climb with every subtask as soon as its inputs are there, make one answer.

    Who is asked next, or whose answer is taken, says the first of these that there is: `policy`; the policy in `trust`;
    a plain cascade up the ladder that takes the first answer with a confidence of at least `accept`. Nobody but the
    last who may be asked is waited for until the deadline: see `graphs.patience`.

    Args:
        square: Who can be asked.
        experts: The ladder, the cheapest first; all by tier, then price, if None. Those that are not here are passed
            over.
        policy: Decides whom to ask next. Names of its models that are not here are not asked.
        trust: Calibrators and policy that `agora calibrate` left: themselves, or a function that looks for those of
            the experts that are here, called again when someone joins or leaves; it may block.
        trade_off: Money that an answer's being right is worth, unless a question brings its own; None for what the
            policy was chosen for.
        max_risk: Most accuracy that may be lost against always asking the top tier. Unless a policy is certified for
            that, the top tier alone is asked.
        confidence: Probability with which `max_risk` must hold.
        accept: Confidence at which the plain cascade takes an answer.
        signals: What is asked of every answer beyond what comes with it: any of `graphs.signals.SIGNALS`.
        samples: Answers sampled for self-consistency.
        stream: Budget of all questions together, where several graphs share it.
        stream_cost: Most money for all questions of this graph together.
        stream_seconds: Most seconds of answering for all questions of this graph together.
        planner: Makes the task graph; by rules if None.
        router: Says who of those alike in tier and price is asked first; by keywords if None.
        synthesiser: Makes one answer of the parts; puts them one under the other if None.
        embedder: Turns questions into vectors, for policies that look at them.
        departure: What is done to a text before it leaves this machine's tier.
        once: Makes identical calls of one asker once, and may keep answers.
        budget: What a run may spend, unless its input says otherwise.
        max_parallel: Subtasks of one run asked at the same time.
        max_attempts: Experts that may fail for one subtask before those left are not asked any more.
        checkpointer: Where every answer is kept, so that a killed run can be resumed without paying anybody twice.

    Returns:
        A compiled LangGraph graph. Input `graphs.how.Ask`, output `graphs.entry.Answered`;
        `stream_mode="custom"` yields the typed events of `agora.events`.

    Raises:
        InvalidRequest: If an argument is out of range. When run: if the question cannot be asked.
        ConfigError: If what `agora calibrate` left is damaged.
        AgoraError: When run: if planning fails. Failing subtasks do not raise; the result says what is missing.
    """
    checked_limits(max_parallel=max_parallel, max_attempts=max_attempts, samples=samples)
    if not 0 <= accept <= 1:
        raise InvalidRequest(f"accept is {accept}; it must be in [0, 1]")
    for name, value in (("max_risk", max_risk), ("confidence", confidence)):
        if value is not None and not 0 < value < 1:
            raise InvalidRequest(f"{name} is {value}; it must be above 0 and below 1")
    if trade_off is not None and not 0 < trade_off < float("inf"):
        raise InvalidRequest(f"trade_off is {trade_off}; it must be a positive number")
    if experts is not None and (not experts or len(set(experts)) != len(experts)):
        raise InvalidRequest(f"experts is {list(experts)!r}; it must be names, each once, or absent for all")
    if stream is not None and (stream_cost is not None or stream_seconds is not None):
        raise InvalidRequest("give either a stream or limits for one of this graph's own, not both")
    experience = Experience() if stream is None else stream.experience
    guide = Guide(
        square,
        experts=experts,
        policy=policy,
        trust=trust,
        trade_off=trade_off,
        max_risk=max_risk,
        confidence=confidence,
    )
    guide.look()
    crew = Climb(
        square=square,
        router=router or KeywordRouter(),
        max_attempts=max_attempts,
        departure=departure,
        once=once,
        guide=guide,
        experts=None if experts is None else tuple(experts),
        accept=accept,
        signals=checked_signals(signals),
        samples=samples,
        stream=stream or StreamBudget(cost=stream_cost, seconds=stream_seconds, experience=experience),
        experience=experience,
        embedder=embedder,
    )
    how = How(
        crew=crew,
        planner=planner or RulePlanner(),
        synthesiser=synthesiser or SectionsSynthesiser(),
        budget=budget or Budget(),
        max_parallel=max_parallel,
        departure=departure,
    )
    return compiled(how, name="vertical", checkpointer=checkpointer)
