"""What can go wrong, said so that the reader knows what to do next.

Every error of agora derives from `AgoraError`. Its text says what was wrong, the value seen and what is allowed;
`hint` says what to do next. `code` is a stable machine-readable word, and `transient` tells whether the same
request may well succeed later, or elsewhere.
"""

from __future__ import annotations

from typing import ClassVar


class AgoraError(Exception):
    """Base of every error agora raises on purpose.

    Args:
        message: What was wrong, with the value seen and what is allowed.
        hint: What to do next, one sentence.
    """

    code: str = "error"
    transient: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidRequest(AgoraError):
    """The caller's own input cannot be served as it stands."""

    code = "invalid_request"


class InvalidPlan(AgoraError):
    """A task graph breaks a rule: duplicate id, unknown input, cycle, or too many subtasks."""

    code = "invalid_plan"


class ConfigError(AgoraError):
    """A configuration file is wrong. The message names file, key, value and what is allowed."""

    code = "config"


class NoExpert(AgoraError):
    """Nobody in the square can take this subtask."""

    code = "no_expert"


class OutOfReach(NoExpert):
    """A text may not go as far up as whoever would have to see it: its label forbids that."""

    code = "out_of_reach"


class BudgetExceeded(AgoraError):
    """The run's budget of money or tokens is used up."""

    code = "budget"


class DeadlineExceeded(AgoraError):
    """The run's deadline passed before the work was done."""

    code = "deadline"
    transient = True


class LoopDetected(AgoraError):
    """A request came back to a node that it had already passed, or would be sent to one."""

    code = "loop_detected"


class TooManyHops(LoopDetected):
    """A request would have to pass more machines than it may."""

    code = "too_many_hops"


class BackendError(AgoraError):
    """Something went wrong between agora and a model.

    Args:
        message: What was wrong.
        backend: The name of the backend.
        hint: What to do next.
    """

    code = "backend"

    def __init__(self, message: str, *, backend: str = "", hint: str | None = None) -> None:
        super().__init__(f"{backend}: {message}" if backend else message, hint=hint)
        self.backend = backend


class Unavailable(BackendError):
    """The backend cannot be reached or is failing; another one, or another time, may do."""

    code = "unavailable"
    transient = True


class BackendTimeout(BackendError):
    """The backend took longer than it was given (connect, first token or total)."""

    code = "timeout"
    transient = True


class Overloaded(BackendError):
    """The backend's queue is full or its rate limit reached.

    Args:
        message: What was wrong.
        backend: The name of the backend.
        retry_after_s: Seconds after which the server asks to be tried again, if it said so.
        hint: What to do next.
    """

    code = "overloaded"
    transient = True

    def __init__(
        self,
        message: str,
        *,
        backend: str = "",
        retry_after_s: float | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, backend=backend, hint=hint)
        self.retry_after_s = retry_after_s


class BadReply(BackendError):
    """The backend answered with something that is no answer: garbage, a cut stream, a wrong content type."""

    code = "bad_reply"
    transient = True


class Rejected(BackendError):
    """The backend refused this very request (HTTP 4xx); asking again will not help.

    Args:
        message: What was wrong, in the server's own words where it gave some.
        backend: The name of the backend.
        status: HTTP status, if there was one.
        body: The server's own error body, cut to a bounded length.
        hint: What to do next.
    """

    code = "rejected"

    def __init__(
        self,
        message: str,
        *,
        backend: str = "",
        status: int | None = None,
        body: str = "",
        hint: str | None = None,
    ) -> None:
        super().__init__(message, backend=backend, hint=hint)
        self.status = status
        self.body = body


class Unsupported(BackendError):
    """The backend does not claim the capability that this request needs."""

    code = "unsupported"


class AdapterError(BackendError):
    """An adapter is missing, damaged, unsafe, or was made for another base model."""

    code = "adapter"


class ModelError(AgoraError):
    """Model weights cannot be found, fetched, checked or loaded."""

    code = "model"


class StoreError(AgoraError):
    """The run store (checkpoints on disk) cannot be read or written."""

    code = "store"


class RunNotFound(StoreError):
    """No run of that id is in the store."""

    code = "run_not_found"
