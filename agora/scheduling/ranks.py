"""How far each task is from the end, and when it must end for the whole to end in time.

Generic over what a task is: all that counts is who needs whom, and how long things take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from agora.errors import InvalidRequest

Seconds = Callable[[str], float]
Between = Callable[[str, str], float]


def upward_ranks(
    order: Sequence[str],
    outputs: Mapping[str, Sequence[str] | Mapping[str, float]],
    seconds: Seconds,
    between: Between | None = None,
) -> dict[str, float]:
    """Seconds from the start of each task to the end of everything, by the longest way.

    rank(i) = w̄(i) + max over successors j of (c̄(i, j) + rank(j)): equation 8 of Topcuoglu, Hariri and Wu,
    "Performance-effective and low-complexity task scheduling for heterogeneous computing", 2002.

    Args:
        order: Tasks, each after all that it needs.
        outputs: The tasks that need each one.
        seconds: Expected seconds of a task.
        between: Expected seconds to move a result from a task to another; none if None.
    """
    ranks: dict[str, float] = {}
    for task in reversed(order):
        after = max((ranks[o] + (between(task, o) if between else 0.0) for o in outputs[task]), default=0.0)
        ranks[task] = seconds(task) + after
    return ranks


def latest_ends(
    order: Sequence[str],
    outputs: Mapping[str, Sequence[str] | Mapping[str, float]],
    seconds: Seconds,
    *,
    deadline_s: float,
    between: Between | None = None,
) -> dict[str, float]:
    """The latest end of each task for a deadline: the time there is, split along the paths in proportion to the ranks.

    A task must leave its successors the share of the time that the longest way behind it is of the longest of all:
    end(i) = D · (1 − (rank(i) − w̄(i)) / max rank). So a task that nobody waits for may take all the time, slack and
    shortage are shared out in proportion along the critical path, and a task beside it is never cut off while those on
    it are still expected to run. Along every path the latest ends never decrease.

    Args:
        order: Tasks, each after all that it needs.
        outputs: The tasks that need each one.
        seconds: Expected seconds of a task.
        deadline_s: D, seconds from the start to the end of everything.
        between: Expected seconds to move a result from a task to another; none if None.

    Returns:
        Seconds from the start, by task.

    Raises:
        InvalidRequest: If the deadline is not positive.
    """
    if not deadline_s > 0:
        raise InvalidRequest(f"deadline_s is {deadline_s}; it must be above 0 seconds")
    ranks = upward_ranks(order, outputs, seconds, between)
    longest = max(ranks.values(), default=0.0)
    if longest <= 0.0:
        return dict.fromkeys(order, deadline_s)
    return {i: deadline_s * min(max(1.0 - (ranks[i] - seconds(i)) / longest, 0.0), 1.0) for i in order}
