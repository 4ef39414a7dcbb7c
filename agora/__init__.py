"""agora: expert language models on end, edge and cloud that reason together and learn together.

This package exports the vocabulary. What uses it stands above: `experts` (what answers), `graphs` (reasoning together).
"""

from agora.errors import AgoraError
from agora.events import AttemptEnded, AttemptStarted, Event, Planned, RunFailed, RunFinished, RunState, apply
from agora.square import Expert, Square
from agora.types import (
    AdapterRef,
    Answer,
    Attempt,
    Budget,
    ExpertCard,
    Failure,
    Modality,
    Outcome,
    RunResult,
    Subtask,
    TaskGraph,
    Tier,
    Usage,
)

__all__ = [
    "AdapterRef",
    "AgoraError",
    "Answer",
    "Attempt",
    "AttemptEnded",
    "AttemptStarted",
    "Budget",
    "Event",
    "Expert",
    "ExpertCard",
    "Failure",
    "Modality",
    "Outcome",
    "Planned",
    "RunFailed",
    "RunFinished",
    "RunResult",
    "RunState",
    "Square",
    "Subtask",
    "TaskGraph",
    "Tier",
    "Usage",
    "apply",
]
