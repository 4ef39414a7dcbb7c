"""What goes into a graph, and what all its runs share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypedDict

from agora.errors import InvalidRequest
from agora.types import Budget
from graphs.departure import Departure
from graphs.places import Fifo, Scheduler
from graphs.plan import Planner
from graphs.solver import Solver, Weighing
from graphs.synthesise import Synthesiser

MAX_TRADE_OFF: Final = 1e9
"""Most money that one right answer may be said to be worth: what a budget may be at most."""

MAX_ASKER_CHARS: Final = 256
"""Characters of an asker's name: those of an API key have at most 64."""


class Ask(TypedDict, total=False):
    """What goes into the graph. All but `question` may be left out; keys of a larger state are ignored.

    What was said before the question is told to whoever is asked for a part of it; only the question is planned over.
    `reach` says how far up question and what was said before may go, and with them every part of it: `local`, `edge` or
    `cloud` (see `agora.types.reach`). `asker` says whose question it is: answers are shared, in flight or from a cache,
    among the questions of one asker only, and among all that name none. `trade_off` is the money that a right answer is
    worth this time, for graphs that weigh the one against the other.
    """

    question: str
    said_before: str
    budget: dict[str, Any]
    reach: str
    asker: str
    trade_off: float


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """What all runs of one graph share.

    Attributes:
        crew: Who can be asked, and how they are chosen.
        planner: Makes the task graph.
        synthesiser: Makes one answer of the parts.
        budget: What a run may spend, unless its input says otherwise.
        max_parallel: Subtasks asked at the same time.
        scheduler: Which of the subtasks that wait for that are asked first.
        departure: What is done to a text before it leaves this machine's tier, whoever asks.
    """

    crew: Solver
    planner: Planner
    synthesiser: Synthesiser
    budget: Budget
    max_parallel: int
    scheduler: Scheduler = field(default_factory=Fifo)
    departure: Departure | None = None


def checked_trade_off(value: Any) -> float:
    """The value, if it can be a trade-off.

    Raises:
        InvalidRequest: If it is no positive number, or too large.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= MAX_TRADE_OFF or not math.isfinite(value):
        raise InvalidRequest(f"trade_off is {value!r}; it must be a number above 0, at most {MAX_TRADE_OFF:g}")
    return float(value)


def weighed(how: How, state: Ask) -> How:
    """How a run goes whose question says what a right answer is worth; `how` itself if it does not.

    Raises:
        InvalidRequest: If it is out of range, or the graph weighs nothing.
    """
    wanted = state.get("trade_off")
    if wanted is None:
        return how
    worth = checked_trade_off(wanted)
    if not isinstance(how.crew, Weighing):
        raise InvalidRequest(
            f"trade_off is {worth:g}, and this graph does not weigh answers against money",
            hint="ask a vertical graph, or leave it out",
        )
    return replace(how, crew=how.crew.weighing(worth))


def asker_of(state: Ask) -> str | None:
    """Whose question it is; None if that is not said.

    Raises:
        InvalidRequest: If it is no name.
    """
    asker = state.get("asker")
    if asker is None or (isinstance(asker, str) and 0 < len(asker) <= MAX_ASKER_CHARS):
        return asker
    raise InvalidRequest(f"asker must be a text of 1 to {MAX_ASKER_CHARS} characters, or absent")


def budget_of(state: Ask) -> Budget | None:
    """What a run may spend by its input; None if that says nothing.

    Raises:
        InvalidRequest: If it is no budget.
    """
    plain: Any = state.get("budget")
    if plain is None or isinstance(plain, Budget):
        return plain
    try:
        return Budget(**plain)
    except (TypeError, OverflowError):
        raise InvalidRequest(f"budget {plain!r} must be an object with any of deadline_s, cost, tokens") from None
