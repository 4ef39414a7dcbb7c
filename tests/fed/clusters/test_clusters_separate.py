"""How many clusters there are, and their names."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import silhouette_samples

from fed.clusters.names import match
from fed.clusters.profile import k_means
from fed.clusters.separate import gather, numbered, separate, silhouettes
from fed.clusters.similarity import distances


def blobs(sizes: list[int], seed: int, spread: float = 1.0, dimensions: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(sizes), dimensions))
    truth = np.repeat(np.arange(len(sizes)), sizes)
    points = centres[truth] + spread * rng.normal(size=(len(truth), dimensions))
    return points @ points.T, truth


@pytest.mark.parametrize("sizes", [[6, 6], [4, 9, 5], [5, 5, 5, 5, 5]])
def test_groups_that_are_there_are_found_with_their_number(sizes: list[int]) -> None:
    for seed in range(4):
        products, truth = blobs(sizes, seed, spread=0.6)
        found = separate(products, least=2, seed=seed)
        assert found.labels.tolist() == truth.tolist()
        assert found.silhouette > 0.3


@pytest.mark.parametrize("shape", ["round", "long", "common", "lengths"])
def test_one_cluster_is_not_taken_for_several(shape: str) -> None:
    wrong = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        points = rng.normal(size=(24, 40))
        if shape == "long":
            points /= np.sqrt(np.arange(1, 41))
        if shape == "common":
            points += 5.0
        if shape == "lengths":
            # All want the same; some take more steps.
            points = rng.uniform(0.5, 4.0, size=(24, 1)) * (points + 4.0)
        wrong += separate(points @ points.T, least=2, seed=seed).count > 1
    # At a level of 0.05, three or more of twelve would be seen once in fifty times.
    assert wrong <= 2


def test_a_number_that_is_given_is_kept_and_strays_do_not_take_a_cluster() -> None:
    products, truth = blobs([5, 5, 1], seed=3, spread=0.5)
    found = separate(products, clusters=2, least=2)
    assert found.count == 2 and found.labels[:10].tolist() == truth[:10].tolist()
    assert separate(products, clusters=11).count == 11
    assert separate(products, clusters=1).count == 1


def test_too_few_clients_are_one_cluster() -> None:
    for n in (0, 1, 2, 3):
        assert separate(np.eye(n), least=2).labels.tolist() == [0] * n


@settings(max_examples=40, deadline=None)
@given(labels=st.lists(st.integers(0, 3), min_size=4, max_size=15), seed=st.integers(0, 99))
def test_silhouettes_are_those_of_scikit_learn(labels: list[int], seed: int) -> None:
    which = numbered(np.array(labels))
    points = np.random.default_rng(seed).normal(size=(len(labels), 3))
    apart = distances(points @ points.T)
    if 2 <= len(set(labels)) < len(labels):
        np.testing.assert_allclose(silhouettes(apart, which), silhouette_samples(apart, which, metric="precomputed"))


def test_small_clusters_are_gathered_into_the_nearest() -> None:
    where = np.array([0.0, 0.1, 0.2, 5.0, 5.1, 4.0])
    apart = np.abs(where[:, None] - where[None, :])
    assert gather(apart, np.array([0, 0, 0, 1, 1, 2]), 2).tolist() == [0, 0, 0, 1, 1, 1]
    assert gather(apart, np.arange(6), 2).tolist() == [0] * 6


groupings = st.lists(st.integers(0, 4), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(before=groupings, after=groupings)
def test_names_keep_the_largest_overlap_there_can_be_and_are_never_given_twice(
    before: list[int], after: list[int]
) -> None:
    had = {f"c{n}": f"cluster-{g + 1}" for n, g in enumerate(before)}
    groups = [[f"c{n}" for n, g in enumerate(after) if g == k] for k in sorted(set(after))]
    names, fresh = match(groups, had, 6)
    assert len(set(names)) == len(groups) and fresh >= 6
    kept = sum(had.get(c) == name for name, members in zip(names, groups, strict=True) for c in members)
    old = sorted(set(had.values())) + [""] * len(groups)
    best = (
        max(
            sum(had.get(c) == name for name, members in zip(chosen, groups, strict=True) for c in members)
            for chosen in set(permutations(old, len(groups)))
        )
        if len(groups) <= 3
        else kept
    )
    assert kept == best
    assert all(name in had.values() or int(name.removeprefix("cluster-")) >= 6 for name in names)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.integers(0, 30), min_size=1, max_size=8), k=st.integers(1, 4))
def test_k_means_in_one_dimension_is_the_best_there_is(values: list[int], k: int) -> None:
    numbers = np.array(values, float)
    k = min(k, len(set(values)))
    labels = k_means(numbers, k)
    cost = sum(((numbers[labels == c] - numbers[labels == c].mean()) ** 2).sum() for c in set(labels.tolist()))
    ordered = np.sort(numbers)

    def least(start: int, left: int) -> float:
        if left == 1:
            rest = ordered[start:]
            return float(((rest - rest.mean()) ** 2).sum())
        ends = range(start + 1, len(ordered) - left + 2)
        return min(float(((ordered[start:e] - ordered[start:e].mean()) ** 2).sum()) + least(e, left - 1) for e in ends)

    assert cost == pytest.approx(least(0, k), abs=1e-9)
    for x in set(values):
        assert len(set(labels[numbers == x].tolist())) == 1
