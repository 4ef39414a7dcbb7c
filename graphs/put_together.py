"""Making one answer of a run's parts, within its budget and its deadline, whatever goes wrong with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial

from agora.errors import AgoraError, DeadlineExceeded, OutOfReach
from agora.routing.takers import beyond
from agora.square import Expert
from agora.types import Answer, Outcome, TaskGraph, Tier
from graphs.call import left_until
from graphs.departure import Departure
from graphs.outside import synthesise_outside
from graphs.spend import Spend
from graphs.synthesise import Synthesiser, combine, synthesis_prompt

log = logging.getLogger(__name__)


async def put_together(
    synthesiser: Synthesiser,
    question: str,
    graph: TaskGraph,
    outcomes: Mapping[str, Outcome],
    *,
    departure: Departure | None,
    spend: Spend,
    deadline: float | None,
) -> Answer:
    """One answer of the parts; the parts as they are, with a note that says why, where it cannot be had.

    Args:
        synthesiser: Makes it.
        question: The whole question.
        graph: The subtasks.
        outcomes: What came of each.
        departure: What is done to a text before it leaves this machine's tier.
        spend: The run's spending.
        deadline: Event-loop time at which to stop, or None.
    """
    ask = partial(synthesise_outside, synthesiser, question, graph, outcomes, departure=departure, spend=spend)
    left = left_until(deadline)
    try:
        if left is not None and left <= 0 and synthesiser.asks is not None:
            raise DeadlineExceeded("the run's deadline passed before they could be put together")
        async with asyncio.timeout(None if left is None else max(0.0, left)):
            if synthesiser.asks is None:
                return await ask()
            expert = synthesiser.asks
            _check_reach(expert, graph.reach)
            chars = len(synthesis_prompt(question, graph, outcomes)) + len(expert.system_prompt or "")
            async with spend.grant(expert.card, chars, None) as most:
                # Whoever has the name by now: nothing is waited for between this look and the asking.
                _check_reach(synthesiser.asks, graph.reach)
                return await ask(max_tokens=most, timeout_s=left_until(deadline))
    except TimeoutError:
        why = "the run's deadline passed while they were put together"
    except AgoraError as e:
        why = e.message
    except Exception as e:
        log.exception("synthesiser %s failed", synthesiser.name)
        why = f"{synthesiser.name} failed: {type(e).__name__}: {e}"
    note = f"the parts are given as they are: {why}"
    return Answer(text=combine(question, graph, outcomes), expert="sections", notes=(note,))


def _check_reach(expert: Expert | None, reach: Tier) -> None:
    if expert is not None and (reason := beyond(expert.card, reach)) is not None:
        raise OutOfReach(f"{expert.name} may not see them: {reason}")
