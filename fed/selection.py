"""Who is asked next: everybody idle once, in random order, before anybody twice.

A model's idle clients are in two pools: those not chosen yet in this turn, and those chosen already. The first is drawn
from at random; once it is empty, the pools change places. Each is a persistent map from 0 … n−1 to names, so drawing,
adding and taking out cost O(log n), and 10,000 idle clients cost no more than ten.
"""

from __future__ import annotations

from typing import Any

from immutables import Map

Pool = Map[int, str]
Pools = tuple[Pool, Pool]


def put(pools: Pools, which: int, name: str) -> tuple[Pools, int]:
    """Adds a client to a pool.

    Returns:
        The pools, and its place.
    """
    place = len(pools[which])
    return _changed(pools, which, pools[which].set(place, name)), place


def take(pools: Pools, which: int, place: int) -> tuple[Pools, str | None]:
    """Takes the client at that place out of a pool; the last one takes its place.

    Returns:
        The pools, and who has that place now, if anybody.
    """
    pool = pools[which]
    last = len(pool) - 1
    moved = pool[last]
    pool = pool.delete(last)
    if place == last:
        return _changed(pools, which, pool), None
    return _changed(pools, which, pool.set(place, moved)), moved


def pools_to_json(pools: Pools) -> list[list[str]]:
    """As JSON: names in the order of their places."""
    return [[pool[i] for i in range(len(pool))] for pool in pools]


def pools_from_json(body: list[Any]) -> Pools:
    """Reads what `pools_to_json` wrote."""
    first, second = body
    return Map(list(enumerate(first))), Map(list(enumerate(second)))


def _changed(pools: Pools, which: int, pool: Pool) -> Pools:
    return (pools[0], pool) if which else (pool, pools[1])
