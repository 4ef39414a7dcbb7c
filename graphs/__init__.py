"""What experts do together: plan a question, solve its subtasks, and make one answer of theirs."""

from graphs.horizontal import horizontal
from graphs.multi_access import multi_access
from graphs.run import resume, run, stream
from graphs.store import RunRecord, RunStatus, RunStore
from graphs.vertical import vertical

__all__ = ["RunRecord", "RunStatus", "RunStore", "horizontal", "multi_access", "resume", "run", "stream", "vertical"]
