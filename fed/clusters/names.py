"""Names of clusters that stay the same while members come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from scipy.optimize import linear_sum_assignment

PREFIX: Final = "cluster-"
"""Names are this and a number, which is never given twice in a run."""


def match(groups: Sequence[Sequence[str]], before: Mapping[str, str], fresh: int) -> tuple[list[str], int]:
    """Names for groups: those of the clusters that most of their members come from.

    The total overlap is the largest there can be (Kuhn 1955, the Hungarian method). A group that shares no member with
    the cluster it would be matched with gets a new name.

    Args:
        groups: Members of each; nobody is in two.
        before: Cluster by client; clients not named had none.
        fresh: Number of the next new name.

    Returns:
        A name for each group, and the number of the next new name.
    """
    old = sorted(set(before.values()))
    overlap = np.zeros((len(groups), len(old)))
    for row, members in enumerate(groups):
        for client in members:
            if client in before:
                overlap[row, old.index(before[client])] += 1
    names: dict[int, str] = {}
    for row, column in zip(*linear_sum_assignment(overlap, maximize=True), strict=True):
        if overlap[row, column]:
            names[int(row)] = old[column]
    for row in range(len(groups)):
        if row not in names:
            names[row] = f"{PREFIX}{fresh}"
            fresh += 1
    return [names[row] for row in range(len(groups))], fresh
