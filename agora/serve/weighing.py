"""Whether a graph goes by what a right answer is said to be worth."""

from __future__ import annotations

from agora.serve.errors import ApiError
from graphs.build import Graph
from graphs.direct import weighs


def check_weighs(graph: Graph, name: str) -> None:
    """Checks that a graph weighs answers against money.

    Raises:
        ApiError: 400, if it does not.
    """
    if not weighs(graph):
        raise ApiError(
            400,
            f"{name!r} does not weigh answers against money: a trade_off has no meaning there",
            code="unsupported",
            param="trade_off",
            hint="leave it out, or ask a vertical graph",
        )
