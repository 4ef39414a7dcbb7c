"""How short any schedule could be at best: no policy, whatever it knows, ends earlier."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import linprog

from agora.errors import AgoraError
from agora.scheduling.problem import Problem

Work = Callable[[str, str], float]
"""Units of work of a task on a machine."""


def critical_path(problem: Problem, work: Work | None = None) -> float:
    """Seconds of the longest way through the tasks, each where that way is shortest, alone there, results moved.

    L(i, m) = seconds of i alone on m + max over outputs j of min over machines k of (transfer(m, k) + L(j, k)). Sharing
    a machine only slows a task, and waiting adds to it, so no schedule is shorter than max over i of min over m L(i,
    m).

    Args:
        problem: What is to be done.
        work: What the tasks turn out to be; as expected if None.
    """
    work = work or problem.work
    longest: dict[tuple[str, str], float] = {}
    for task in reversed(problem.order):
        outputs = problem.outputs[task].items()
        for m in problem.able[task]:
            after = max(
                (min(problem.transfer_s(m, k, size) + longest[o, k] for k in problem.able[o]) for o, size in outputs),
                default=0.0,
            )
            longest[task, m] = work(task, m) * problem.by_name[m].speed.seconds(1) + after
    return max(min(longest[task, m] for m in problem.able[task]) for task in problem.order)


def total_work(problem: Problem, work: Work | None = None) -> float:
    """Seconds that all work takes if it is spread as well as can be, in pieces of any size, at machines' best loads.

    The least M with x ≥ 0, Σ_m x(i, m) = 1 for each task i and Σ_i work(i, m)·x(i, m) ≤ M·most(m) for each machine m,
    where most(m) is the most units per second at any load: a linear program. A schedule gives such an x with its
    makespan for M: its machine m does work at no more than most(m).

    Args:
        problem: What is to be done.
        work: What the tasks turn out to be; as expected if None.

    Raises:
        AgoraError: If the program cannot be solved.
    """
    work = work or problem.work
    pairs = [(i, m) for i in problem.order for m in problem.able[i]]
    rows = {task: n for n, task in enumerate(problem.order)}
    columns = {m.name: n for n, m in enumerate(problem.machines)}
    once = np.zeros((len(rows), len(pairs) + 1))
    room = np.zeros((len(columns), len(pairs) + 1))
    for n, (task, name) in enumerate(pairs):
        machine = problem.by_name[name]
        once[rows[task], n] = 1.0
        room[columns[name], n] = work(task, name) / machine.speed.most(machine.slots)
    room[:, -1] = -1.0
    least = np.zeros(len(pairs) + 1)
    least[-1] = 1.0
    # Seconds of one's own, so that the solver's tolerances mean the same for milliseconds and days.
    scale = float(room[:, :-1].max()) or 1.0
    room[:, :-1] /= scale
    found = linprog(least, A_ub=room, b_ub=np.zeros(len(columns)), A_eq=once, b_eq=np.ones(len(rows)), method="highs")
    if not found.success:
        raise AgoraError(f"the bound by total work cannot be computed: {found.message}")
    return float(found.fun) * scale


def lower_bound(problem: Problem, work: Work | None = None) -> float:
    """The larger of both bounds, in seconds."""
    return max(critical_path(problem, work), total_work(problem, work))
