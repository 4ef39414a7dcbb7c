"""What experts do together: plan a question, solve its subtasks, and make one answer of theirs."""

from graphs.horizontal import horizontal
from graphs.run import resume, run, stream
from graphs.store import RunRecord, RunStatus, RunStore

__all__ = ["RunRecord", "RunStatus", "RunStore", "horizontal", "resume", "run", "stream"]
