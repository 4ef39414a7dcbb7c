"""The vocabulary: what a query becomes, who answers it, and what comes back."""

from agora.types.experts import AdapterRef, ExpertCard
from agora.types.outcomes import (
    Answer,
    Attempt,
    Failure,
    Outcome,
    RunResult,
    Usage,
    attempt_from_dict,
    attempt_to_dict,
    outcome_from_dict,
    outcome_to_dict,
)
from agora.types.reach import LABELS, highest, label_of, lowest, reach_of
from agora.types.tasks import MAX_SUBTASKS, Budget, Subtask, TaskGraph
from agora.types.words import ID, MAX_QUESTION_CHARS, Modality, Tier, checked_question, to_plain

__all__ = [
    "ID",
    "LABELS",
    "MAX_QUESTION_CHARS",
    "MAX_SUBTASKS",
    "AdapterRef",
    "Answer",
    "Attempt",
    "Budget",
    "ExpertCard",
    "Failure",
    "Modality",
    "Outcome",
    "RunResult",
    "Subtask",
    "TaskGraph",
    "Tier",
    "Usage",
    "attempt_from_dict",
    "attempt_to_dict",
    "checked_question",
    "highest",
    "label_of",
    "lowest",
    "outcome_from_dict",
    "outcome_to_dict",
    "reach_of",
    "to_plain",
]
