"""How long one expert is waited for, so that whoever accepts and never answers leaves time for the others."""

from __future__ import annotations

from typing import Final

from graphs.experience import Experience

USUAL_TIMES: Final = 4.0
"""How many times as long as its answers usually take an expert is waited for, even if that is more than its share. The
time of an answer goes with its length, and few answers are more than four times as long as the mean."""

LEAST_S: Final = 0.25
"""Seconds below which a share would be no chance: a short answer over a network takes about as long."""


def seconds_for(expert: str, left: float, sharing: int, experience: Experience) -> float:
    """Seconds that an expert is waited for, at most `left`.

    Whoever is the last who may be asked has all of it. Any other has an equal share, or as long as its answers usually
    take and some more; while nothing is known of its answers, the share is all there is to go by.

    Args:
        expert: Its name.
        left: Seconds to the deadline.
        sharing: Those who may still be asked, itself included.
        experience: What asking them takes.
    """
    if sharing <= 1:
        return left
    usual = experience.usual_seconds(expert) or 0.0
    return min(left, max(left / sharing, USUAL_TIMES * usual, LEAST_S))
