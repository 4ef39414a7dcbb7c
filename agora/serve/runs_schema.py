"""What `/v1/runs` takes and gives, as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from agora.serve.wire import Body, BudgetBody, Label, TradeOff
from agora.types import MAX_QUESTION_CHARS
from graphs.records import RunStatus

MAX_METADATA: Final = 16
"""Most entries of a run's metadata; as in OpenAI's API."""

MAX_METADATA_CHARS: Final = 512
"""Most characters of a value in it; as in OpenAI's API."""

_Key = Annotated[str, StringConstraints(min_length=1, max_length=64)]
_Value = Annotated[str, StringConstraints(max_length=MAX_METADATA_CHARS)]
_Question = Annotated[str, StringConstraints(min_length=1, max_length=MAX_QUESTION_CHARS)]


class RunRequest(Body):
    """A question to be answered by a run: `question`, or `input`, which is another word for it.

    `reach` says how far up from this machine it may go, with every part of it; `trade_off` what money a right answer is
    worth, for a graph that weighs the one against the other.
    """

    question: _Question | None = None
    input: _Question | None = None
    graph: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    budget: BudgetBody | None = None
    reach: Label | None = None
    trade_off: TradeOff | None = None
    metadata: Annotated[dict[_Key, _Value], Field(max_length=MAX_METADATA)] | None = None
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")] | None = None

    @model_validator(mode="after")
    def _one_question(self) -> RunRequest:
        if (self.question is None) == (self.input is None):
            raise ValueError("question is needed, or input instead, and not both")
        return self

    @property
    def asked(self) -> str:
        """The question, under whichever name it came."""
        return self.question or self.input or ""


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RunView(_Reply):
    """A run as it stands.

    `queued`: it is accepted and waits for its turn. `result` is not told in lists. Times are seconds since the epoch.
    """

    id: str
    object: Literal["run"] = "run"
    status: RunStatus
    queued: bool
    question: str
    graph: str
    created_at: float
    finished_at: float | None
    budget: BudgetBody | None
    reach: Label
    trade_off: float | None
    metadata: dict[str, str]
    result: dict[str, Any] | None = None
    error: str | None


class RunList(_Reply):
    """Runs, the newest first. `before` with the last one's id asks for more."""

    object: Literal["list"] = "list"
    data: list[RunView]
    has_more: bool


class EventView(_Reply):
    """An event of a run: its number, its type, and what it tells."""

    seq: int
    type: str
    data: dict[str, Any]


class EventList(_Reply):
    """Events of a run in order. `after` with the last one's number asks for more."""

    object: Literal["list"] = "list"
    data: list[EventView]
    has_more: bool
