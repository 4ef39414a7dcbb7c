"""No client decides alone: its share of the weight has a cap."""

from __future__ import annotations

from collections.abc import Sequence


def capped(window: Sequence[tuple[str, float]], client: str, cap: float) -> float:
    """By what a client's weights are multiplied so that nobody in the window has more than that share.

    Let r_i be what client i's updates in the window weigh together. All are cut to a level t, e_i = min(r_i, t), where
    t = cap · Σ e_j: it is found by taking the largest r away until the next one is below the level. With n clients a
    share under 1/n is impossible, so the cap is at least 1/n, and one client alone is never scaled. It depends on the
    unscaled weights only, so it cannot drift.

    Args:
        window: Client and unscaled weight of the last updates, this one's included.
        client: Whose factor.
        cap: Most share, above 0.

    Returns:
        A factor from (0, 1].
    """
    sums: dict[str, float] = {}
    for name, weight in window:
        sums[name] = sums.get(name, 0.0) + weight
    cap = max(cap, 1.0 / len(sums))
    own = sums[client]
    if cap >= 1.0 or own <= 0.0:
        return 1.0
    largest_first = sorted(sums.values(), reverse=True)
    left = sum(largest_first)
    for cut, weight in enumerate(largest_first):
        if cut * cap >= 1.0 - _ROUNDING:
            # Everybody larger shares all the weight there is.
            break
        level = cap * left / (1.0 - cut * cap)
        if weight <= level:
            return min(1.0, level / own)
        left -= weight
    return min(1.0, largest_first[-1] / own)


_ROUNDING = 1e-9
"""Of a product of a share and a count."""
