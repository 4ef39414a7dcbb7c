"""What a policy is: it sees a question and the answers so far, and says whom to ask next or whose answer to take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is known before anybody is asked.

    Attributes:
        text: The question.
        embedding: Its unit vector, shape (dim,), where there is an embedding model.
        cost_left: Most money that may still be spent on it; None for any amount.
        seconds_left: Seconds to its deadline; None for no deadline.
    """

    text: str
    embedding: NDArray[np.float32] | None = None
    cost_left: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One model's answer, as far as a policy looks at it.

    Attributes:
        model: Its position among the policy's models.
        answer: The final answer in a form in which equal answers are equal texts; None if none can be read.
        signals: What tells how far it can be trusted, by name (`agora.routing.signals`); absent where not told. Never
            NaN or infinite.
        cost: Money it cost.
        seconds: Time it took.
    """

    model: int
    answer: str | None
    signals: Mapping[str, float] = field(default_factory=dict)
    cost: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Ask this model next.

    Attributes:
        model: Its position.
        quality: Probability in [0, 1] that its answer will be right.
        why: In words a person can check.
    """

    model: int
    quality: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """Take the answer of this model, which has been seen.

    Attributes:
        model: Its position.
        quality: Probability in [0, 1] that it is right.
        why: In words a person can check.
    """

    model: int
    quality: float
    why: str


Decision = Ask | Take


@runtime_checkable
class Policy(Protocol):
    """Decides, one step at a time; pure and quick (it runs on the event loop)."""

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models it was fitted for, the cheapest first."""

    def decide(self, query: Query, seen: Sequence[Seen], *, allowed: Collection[int]) -> Decision:
        """Says what to do next.

        Args:
            query: The question.
            seen: The answers so far, in the order they came.
            allowed: Positions of the models that may be asked now: not asked before, here, within reach and budget.

        Returns:
            `Ask` for one of `allowed`, or `Take` for one of `seen`; never `Take` before anything was seen unless
            nothing is allowed.

        Raises:
            NoExpert: If nothing is allowed and nothing was seen.
        """
